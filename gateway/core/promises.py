"""When who was refused is to come back: each at a time of its own, so that there is room for every one of them.

If all were told when the next one can be served, all would come back then, and all but one be refused again. Newcomers
do not take their places: a queue has more for those that were told to come back (`Tickets`), a limit keeps for them
what will be theirs (`Expected`). Beyond a load at which the next place is free in a minute more are told to come than
can be served.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from kvasir.gateway.core.api import Submit

EARLY_S = 0.1  # clocks and links differ
KEPT_S = 0.5  # for so long a place waits for who is to have it
MAX_WAIT_S = 60.0  # OpenAI's clients take no longer wait from a server
MAX_TICKETS = 20_000  # of one payer for one thing, or of a queue: the oldest are forgotten
MARGIN = 1.25  # rates are measured, and change
_WINDOW_S = 0.5
_NEWEST = 0.3


@dataclass(slots=True)
class Promises:
    """Those made to one payer about one thing."""

    next_at: float = 0.0

    def wait_s(self, now: float, room_in_s: float, each_s: float) -> float:
        """Return in how many seconds to come back, when there is room in `room_in_s`, then again every `each_s`."""
        at = max(self.next_at, now + room_in_s)
        if at - now > MAX_WAIT_S:
            at = now + min(room_in_s, MAX_WAIT_S)
        self.next_at = at + each_s
        return at - now


class Tickets:
    """Who was told to come back when. A request that comes again is known by its tenant and its tokens."""

    def __init__(self) -> None:
        self._due: OrderedDict[bytes, deque[float]] = OrderedDict()  # the oldest first; of equal requests in turn
        self.num = 0

    def give(self, submit: Submit, due: float) -> None:
        """Remember that a request was told to come back at `due`."""
        self._due.setdefault(_mark(submit), deque()).append(due)
        self.num += 1
        while self.num > MAX_TICKETS:
            self.num -= len(self._due.popitem(last=False)[1])

    def take(self, submit: Submit, now: float) -> float | None:
        """Return when a request was told to come back that comes then, or later, None if it was not; who has come is
        forgotten."""
        if not self.num:
            return None
        mark = _mark(submit)
        due = self._due.get(mark)
        if due is None or due[0] > now + EARLY_S:
            return None
        due_at = due.popleft()
        self.num -= 1
        if not due:
            del self._due[mark]
        return due_at


def _mark(submit: Submit) -> bytes:
    return xxh3_128_digest(submit.tenant_id.encode() + b"\0" + submit.token_ids)


class Expected:
    """Those that one payer was told to come back for one thing, and how many of them do."""

    def __init__(self) -> None:
        self.tickets = Tickets()
        self._due: list[float] = []  # ascending
        self._share_obeying = 1.0  # of those that should have come, the latest count most

    def give(self, submit: Submit, due: float) -> None:
        """Expect a request again at `due`."""
        self.tickets.give(submit, due)
        insort(self._due, due)
        del self._due[:-MAX_TICKETS]

    def take(self, submit: Submit, now: float) -> bool:
        """Return whether a request was told to come now, or before; it is not expected any more."""
        due_at = self.tickets.take(submit, now)
        if due_at is None:
            return False
        index = bisect_left(self._due, due_at)
        if self._due[index : index + 1] == [due_at]:
            del self._due[index]
            self._share_obeying += _NEWEST * (1.0 - self._share_obeying)
        return True

    def num_kept(self, submit: Submit, until: float, now: float) -> int:
        """Return how many come before `until` for whom to keep what `submit` asks for; 0 for one of those."""
        return 0 if self.take(submit, now) else self.num_before(until, now)

    def num_before(self, until: float, now: float) -> int:
        """Return how many will probably come before `until`, those counted that are late by less than `KEPT_S`: of all
        that are to a share, as have come of those before. Where nobody does as told it is none."""
        if not self._due:
            return 0
        num_missing = bisect_left(self._due, now - KEPT_S)
        del self._due[:num_missing]
        self._share_obeying *= (1.0 - _NEWEST) ** num_missing
        return round(self._share_obeying * bisect_left(self._due, until))


class Places:
    """Those of one payer that may run at once, and who was told to come for one. Stays are as long as lately."""

    def __init__(self) -> None:
        self._promises = Promises()
        self._expected = Expected()

    def is_free(self, submit: Submit, num_running: int, num_places: int, stay_s: float, now: float) -> bool:
        """Return whether there is a place for `submit`: for one that comes when it was told to any that is free, for a
        newcomer one that is not kept for those to come within half a stay."""
        num_kept = self._expected.num_kept(submit, now + stay_s / 2, now) if self._expected.tickets.num else 0
        return num_running + num_kept < num_places

    def promise_s(self, submit: Submit, num_places: int, stay_s: float, now: float) -> float:
        """Return in how many seconds `submit`, for which there is no place, is to come back."""
        wait_s = self._promises.wait_s(now, MARGIN * stay_s, MARGIN * stay_s / num_places)
        self._expected.give(submit, now + wait_s)
        return wait_s


@dataclass(slots=True)
class LeavingRate:
    """How many requests a second leave a queue, learned while there are some that wait; 0: not known yet."""

    per_s: float = 0.0
    _since: float = 0.0
    _num_left: int = 0
    _was_waiting: bool = False

    def measure(self, now: float, num_left: int, *, is_waiting: bool) -> None:
        """Take in how many have left so far. Call it some ten times/s."""
        if now - self._since < _WINDOW_S:
            return
        if is_waiting and self._was_waiting:
            per_s = (num_left - self._num_left) / (now - self._since)
            self.per_s += (per_s - self.per_s) * (_NEWEST if self.per_s else 1.0)
        self._since, self._num_left, self._was_waiting = now, num_left, is_waiting
