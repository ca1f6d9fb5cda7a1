"""Which block goes when room is needed: the interface of eviction policies, and leaf-first LRU.

A policy instance keeps one *order* of published blocks: the common one, or that of a tenant with a floor or a cap. The
cache makes them with a factory, so that what several of them learn can live in the factory's closure.

The cache keeps one promise that every policy may build on: whoever references a published block references all its
ancestors too, and frees them after it. So an idle block has only idle descendants. They may be in another order, and
that order may keep them: `block.num_children` says whether a block may go, and `on_leaf` when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Protocol

from cache.block_pool import Block

_MIN_HEAP = 64


class Policy(Protocol):
    """Notified by the cache of everything that happens to the blocks of its order. All calls are O(log n) or better.

    A block is *idle* while nobody references it; only idle blocks without resident children (leaves) may go.
    """

    def on_insert(self, block: Block) -> None:
        """`block` was published; it is referenced by who published it. Or it came from another order: then it may be
        idle, and `on_release` follows."""

    def on_hit(self, block: Block) -> None:
        """`block` got one more reference, already counted: `ref_count` 1 means that it was idle until now."""

    def on_release(self, block: Block) -> None:
        """`block` lost its last reference and is idle from now on; a leaf if `num_children` is 0."""

    def on_leaf(self, block: Block) -> None:
        """`block`, idle for some time already, lost its last resident child: from now on it may go."""

    def on_evict(self, block: Block) -> None:
        """`block` leaves this order: forget it. Any leaf, not only the last `victim`, or on its way to another order
        any block at all."""

    def victim(self) -> Block | None:
        """Return the leaf that should go next, None if there is none. Changes nothing that anybody sees."""

    def leaves(self) -> Iterator[Block]:
        """Yield all leaves, in any order (for integrity checks)."""


PolicyFactory = Callable[[], Policy]


class Lru:
    """Leaf-first least recently used: the leaf that was released longest ago.

    A heap of leaves by `released_at`. Whole chains are released and found again at a time, but only their last block
    is a leaf, so hits and releases cost next to nothing and an eviction O(log number of leaves).
    """

    def __init__(self) -> None:
        self._leaves: dict[int, Block] = {}  # by released_at
        self._heap: list[int] = []  # the same numbers, and some that are no leaf's any more

    def on_insert(self, block: Block) -> None:
        pass

    def on_hit(self, block: Block) -> None:
        if not block.num_children:
            self._leaves.pop(block.released_at, None)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        if len(self._heap) > 2 * len(self._leaves) + _MIN_HEAP:
            self._heap = list(self._leaves)
            heapify(self._heap)
        self._leaves[block.released_at] = block
        heappush(self._heap, block.released_at)

    def on_evict(self, block: Block) -> None:
        self._leaves.pop(block.released_at, None)

    def victim(self) -> Block | None:
        while self._heap:
            block = self._leaves.get(self._heap[0])
            if block is not None:
                return block
            heappop(self._heap)
        return None

    def leaves(self) -> Iterator[Block]:
        yield from self._leaves.values()
