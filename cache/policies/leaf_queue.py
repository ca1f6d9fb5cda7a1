"""Leaves in the order in which they should go, for policies whose order is a number per block."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from cache.block_pool import Block

_MIN_HEAP = 64

Key = tuple[float, int]
"""What a policy orders by, then what tells equal ones apart; no two leaves of a queue have the same."""


class LeafQueue:
    """A heap of leaves, lowest key first; taking one out of the middle is O(1), the rest O(log n) amortised."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Key, Block]] = {}  # by block id
        self._heap: list[tuple[Key, Block]] = []  # the same entries, and some that are void

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Block]:
        return (block for _, block in self._entries.values())

    def add(self, block: Block, key: Key) -> None:
        """Add `block`, which is not in the queue."""
        if len(self._heap) > 2 * len(self._entries) + _MIN_HEAP:
            self._heap = list(self._entries.values())
            heapify(self._heap)
        entry = self._entries[block.block_id] = (key, block)
        heappush(self._heap, entry)

    def discard(self, block: Block) -> bool:
        """Take `block` out if it is in; return whether it was."""
        return self._entries.pop(block.block_id, None) is not None

    def first(self) -> Block | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[1].block_id) is entry:
                return entry[1]
            heappop(heap)
        return None
