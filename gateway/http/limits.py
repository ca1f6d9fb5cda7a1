"""Bounds of what clients can make the HTTP server hold, what they have come to, and the room that all bodies share."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvasir.gateway.http.parser import MessageLimits, Refusal


@dataclass(frozen=True, slots=True)
class HttpLimits(MessageLimits):
    """Bounds of what strangers can make the server hold, and for how long (seconds).

    `max_connections`: beyond it a new one takes the place of the longest idle one; of the one that has been sending a
    request for longest, for `crowd_s` at least, if none is idle; or is turned away.
    `max_total_body_bytes`: of all bodies that are held at one time.
    """

    max_connections: int = 1024
    max_total_body_bytes: int = 256 << 20
    crowd_s: float = 1.0
    headers_s: float = 5.0
    body_s: float = 30.0
    idle_s: float = 75.0
    write_s: float = 15.0  # a client that takes nothing for so long is cut
    linger_s: float = 1.0  # how long a refused client may go on sending before it is cut


@dataclass(slots=True)
class HttpStatistics:
    """Counters since the start; `num_open` is a gauge. `num_cut`: for being too slow."""

    num_open: int = 0
    num_accepted: int = 0
    num_turned_away: int = 0
    num_requests: int = 0
    num_malformed: int = 0
    num_cut: int = 0
    by_status: dict[int, int] = field(default_factory=dict)


class BodyRoom:
    """Room for `max_bytes` of bodies. One owner may hold three times as much as is left free, so that there is always
    some for others (Choudhury and Hahne, 1998)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self.by_owner: dict[str, int] = {}

    def refusal(self, owner: str) -> Refusal | None:
        """Return why no more of `owner`'s can be read now."""
        free = self._max_bytes - self.num_bytes
        if free < 0:
            return Refusal(503, "too many large requests are being read; try again in a moment")
        if owner and self.by_owner.get(owner, 0) > 3 * free:
            return Refusal(429, "too many of your large requests are being read; try again in a moment")
        return None


class Held:
    """The part of the room that one connection has taken, for an owner if one is known."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.num_bytes = 0
        self.owner = ""

    def resize(self, num_bytes: int) -> None:
        if num_bytes == self.num_bytes:
            return
        more, self.num_bytes = num_bytes - self.num_bytes, num_bytes
        self._room.num_bytes += more
        if self.owner:
            by_owner = self._room.by_owner
            by_owner[self.owner] = by_owner.get(self.owner, 0) + more
            if not by_owner[self.owner]:
                del by_owner[self.owner]

    def charge(self, owner: str) -> None:
        """From now on `owner` is charged with it."""
        num_bytes = self.num_bytes
        self.resize(0)
        self.owner = owner
        self.resize(num_bytes)
