"""Which block goes when room is needed: the interface of eviction policies, and leaf-first LRU.

A policy sees published blocks only. The cache keeps one promise that every policy may build on: whoever references a
published block references all its ancestors too, and frees them after it. So an idle block has only idle descendants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cache.block_pool import Block


class Policy(Protocol):
    """Notified by the cache of everything that happens to published blocks. All calls are O(log n) or better.

    A block is *idle* while nobody references it; only idle blocks without resident children may go.
    """

    def on_insert(self, block: Block) -> None:
        """`block` was published; it is referenced by who published it."""

    def on_hit(self, block: Block) -> None:
        """`block` got one more reference, already counted: `ref_count` 1 means that it was idle until now."""

    def on_release(self, block: Block) -> None:
        """`block` lost its last reference and is idle from now on."""

    def on_evict(self, block: Block) -> None:
        """`block`, idle, leaves the cache: forget it."""

    def victim(self) -> Block | None:
        """Return the idle block without resident children that should go next, None if nothing is idle."""

    def idle_blocks(self) -> Iterator[Block]:
        """Yield all idle blocks, next victim first if there is such an order (for integrity checks)."""


class Lru:
    """Leaf-first least recently used, O(1): an intrusive list of all idle blocks, longest idle first.

    Blocks are released child before parent, so the head of the list never has a resident child: leaf-first costs
    nothing. The idea is vLLM's, whose block pool frees a request's blocks in reverse.
    """

    def __init__(self) -> None:
        # A ring through a sentinel, which spares every link operation its case for an end of the list.
        self._ring = Block(0)
        self._ring.older = self._ring.newer = self._ring

    def on_insert(self, block: Block) -> None:
        pass

    def on_hit(self, block: Block) -> None:
        if block.ref_count == 1:
            self._unlink(block)

    def on_release(self, block: Block) -> None:
        ring = self._ring
        newest = ring.older
        assert newest is not None
        block.older = newest
        block.newer = ring
        newest.newer = block
        ring.older = block

    def on_evict(self, block: Block) -> None:
        self._unlink(block)

    def victim(self) -> Block | None:
        oldest = self._ring.newer
        return oldest if oldest is not self._ring else None

    def idle_blocks(self) -> Iterator[Block]:
        block = self._ring.newer
        while block is not None and block is not self._ring:
            yield block
            block = block.newer

    @staticmethod
    def _unlink(block: Block) -> None:
        older, newer = block.older, block.newer
        assert older is not None and newer is not None
        older.newer = newer
        newer.older = older
        block.older = block.newer = None
