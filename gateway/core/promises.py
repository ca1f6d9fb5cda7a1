"""When who was refused is to come back: each at a time of its own, so that there is room for every one of them.

If all were told when the next one can be served, all would come back then, and all but one be refused again. A promise
keeps no room free: whoever comes first has it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
