"""A priority queue of leaves, for policies that give every leaf a key."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from kvasir.cache.run import Run

_MIN_HEAP = 64

Key = tuple[float, ...]


class LeafQueue:
    """A heap of leaves, lowest key first, of equals the one added first; taking one out of the middle is O(1), the rest
    O(log n) amortised."""

    def __init__(self) -> None:
        self._entries: dict[Run, tuple[Key, int, Run]] = {}
        self._heap: list[tuple[Key, int, Run]] = []  # the same entries, and some that are void
        self._num_added = 0

    def __iter__(self) -> Iterator[Run]:
        return iter(self._entries)

    def add(self, run: Run, key: Key) -> None:
        """Add `run`, which is not in the queue."""
        if len(self._heap) > 2 * len(self._entries) + _MIN_HEAP:
            self._heap = list(self._entries.values())
            heapify(self._heap)
        self._num_added += 1
        entry = self._entries[run] = (key, self._num_added, run)
        heappush(self._heap, entry)

    def discard(self, run: Run) -> bool:
        """Take `run` out if it is in; return whether it was."""
        return self._entries.pop(run, None) is not None

    def first(self) -> Run | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry[2]
            heappop(heap)
        return None
