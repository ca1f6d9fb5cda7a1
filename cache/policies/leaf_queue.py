"""Leaves in the order in which they should go, and what policies have in common whose order is a number per leaf."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from kvasir.cache.run import Run

_MIN_HEAP = 64

Key = tuple[float, ...]
"""What a policy orders by, then what tells equal ones apart."""


class LeafQueue:
    """A heap of leaves, lowest key first, of equals the one added first; taking one out of the middle is O(1), the rest
    O(log n) amortised."""

    def __init__(self) -> None:
        self._entries: dict[Run, tuple[Key, int, Run]] = {}
        self._heap: list[tuple[Key, int, Run]] = []  # the same entries, and some that are void
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

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


class LeafOrder:
    """A policy that gives every leaf a `key` when it becomes one; the leaf of the lowest goes."""

    def __init__(self) -> None:
        self._leaves = LeafQueue()

    def key(self, run: Run) -> Key:
        """Return the key of `run`, a leaf from now on."""
        raise NotImplementedError

    def on_insert(self, run: Run, num_blocks: int) -> None:
        pass

    def on_split(self, head: Run, tail: Run) -> None:
        pass

    def on_hit(self, run: Run) -> None:
        if not run.num_children:
            self._leaves.discard(run)

    def on_release(self, run: Run) -> None:
        if not run.num_children:
            self.on_leaf(run)

    def on_leaf(self, run: Run) -> None:
        self._leaves.add(run, self.key(run))

    def on_evict(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            self._leaves.discard(run)

    def victim(self) -> Run | None:
        return self._leaves.first()

    def leaves(self) -> Iterator[Run]:
        return iter(self._leaves)
