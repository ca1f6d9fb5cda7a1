"""Why recent requests went where they went: one routing decision per attempt, with the terms of every candidate."""

from __future__ import annotations

from collections import OrderedDict

from kvasir.gateway.routing.router import Decision


class Receipts:
    """Keeps those of the last `max_requests` requests."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._decisions: OrderedDict[bytes, list[Decision]] = OrderedDict()  # by request, the oldest first

    def add(self, req_id: bytes, decision: Decision) -> None:
        """Note where an attempt was sent."""
        decisions = self._decisions.get(req_id)
        if decisions is not None:
            decisions.append(decision)
            return
        self._decisions[req_id] = [decision]
        if len(self._decisions) > self._max_requests:
            self._decisions.popitem(last=False)

    def of(self, req_id: bytes) -> list[Decision] | None:
        """Return the decisions about a recent request, None if it is not known any more."""
        return self._decisions.get(req_id)

    def find(self, request: str) -> list[Decision] | None:
        """Return the same for the newest request whose id, in hexadecimal, begins like `request` (what clients see
        before a dash is no part of it)."""
        start = request.rpartition("-")[2].lower()
        newest_first = reversed(self._decisions)
        return next((self._decisions[req_id] for req_id in newest_first if _begins(req_id, start)), None)


def _begins(req_id: bytes, start: str) -> bool:
    return bool(start) and req_id.hex().startswith(start)
