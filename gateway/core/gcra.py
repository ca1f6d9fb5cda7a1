"""A rate limit as one number: the generic cell rate algorithm (ITU-T I.371), which is a leaky bucket without a timer.

The number is the time at which the bucket is full again. Whoever takes n of `per_min` moves it n/`per_min` minutes
on, from now or from where it is, and may do so while it stays within one minute from now. Whole nanoseconds of a
monotonic clock, rounded so that nothing is granted twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvasir.gateway.core.api import Submit
from kvasir.gateway.core.promises import EARLY_S, Expected, Promises

MINUTE_NS = 60_000_000_000


@dataclass(slots=True)
class Meter:
    """One bucket. `full_at`: when all of it may be taken again. `next_at`: the same, if what is asked for is taken."""

    full_at: int = 0
    next_at: int = 0
    promised: Promises = field(default_factory=Promises)
    expected: Expected = field(default_factory=Expected)

    def after(self, num: int, per_min: int, now: int) -> int:
        """Return when all of it could be taken again if `num` were taken now: more than a minute from now, they are not
        there."""
        full_at = self.full_at
        return (full_at if full_at > now else now) - (-num * MINUTE_NS // per_min)

    def wait_ns(self, num: int, per_min: int, now: int) -> int:
        """Return for how long `num` cannot be taken yet, 0 if it can. `num` is at most `per_min`."""
        return max(0, self.after(num, per_min, now) - now - MINUTE_NS)

    def kept_ns(self, submit: Submit, num: int, per_min: int, now: int) -> int:
        """Return how much later `num` can be taken by a newcomer, because others were told to come for theirs by now,
        each taken for as large; 0 for one of those."""
        if not self.expected.tickets.num:  # nearly always
            return 0
        now_s = now / 1e9
        return self.expected.num_kept(submit, now_s + EARLY_S, now_s) * cost_ns(num, per_min)

    def promise_s(self, submit: Submit, num: int, per_min: int, now: int) -> float:
        """Return in how many seconds `submit`, which was refused `num`, is to come back, after those refused before."""
        now_s, cost_s = now / 1e9, cost_ns(num, per_min) / 1e9
        wait_s = self.promised.wait_s(now_s, self.wait_ns(num, per_min, now) / 1e9 or cost_s, cost_s)
        self.expected.give(submit, now_s + wait_s)
        return wait_s

    def take(self, num: int, per_min: int, now: int) -> None:
        """Take `num`, which is there to be taken."""
        self.full_at = self.after(num, per_min, now)

    def put_back(self, num: int, of: int, per_min: int) -> None:
        """Put back `num` of the `of` that were taken at once and not used."""
        self.full_at += -of * MINUTE_NS // per_min - (num - of) * MINUTE_NS // per_min

    def available(self, per_min: int, now: int) -> int:
        """Return how many can be taken now."""
        return max(0, (MINUTE_NS - max(0, self.full_at - now)) * per_min // MINUTE_NS)


def cost_ns(num: int, per_min: int) -> int:
    """Return how long it takes until `num` have come back, rounded up."""
    return -(-num * MINUTE_NS // per_min)
