"""When who was refused is to come back: each at a time of its own, so that there is room for every one of them.

If all were told when the next one can be served, all would come back then, and all but one be refused again. A promise
keeps no room free, but a queue has some for those that were told to come back (`Tickets`). Beyond a load at which the
next place is free in a minute more are told to come than can be served.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from kvasir.gateway.core.api import Submit

EARLY_S = 0.1  # clocks and links differ
MAX_WAIT_S = 60.0  # OpenAI's clients take no longer wait from a server
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

    def __init__(self, max_tickets: int = 20_000) -> None:
        self._max_tickets = max_tickets
        self._due: OrderedDict[bytes, deque[float]] = OrderedDict()  # the oldest first; of equal requests in turn
        self._num = 0

    def give(self, submit: Submit, due: float) -> None:
        """Remember that a request was told to come back at `due`."""
        self._due.setdefault(_mark(submit), deque()).append(due)
        self._num += 1
        while self._num > self._max_tickets:
            self._num -= len(self._due.popitem(last=False)[1])

    def take(self, submit: Submit, now: float) -> bool:
        """Return whether a request comes back when it was told to, or later; who has come is forgotten."""
        mark = _mark(submit)
        due = self._due.get(mark)
        if due is None or due[0] > now + EARLY_S:
            return False
        due.popleft()
        self._num -= 1
        if not due:
            del self._due[mark]
        return True


def _mark(submit: Submit) -> bytes:
    return xxh3_128_digest(submit.tenant_id.encode() + b"\0" + submit.token_ids)


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
