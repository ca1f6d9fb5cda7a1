"""First in, first out: the leaf that was published first goes, however often it was used since.

With leaf-first eviction that is nearly LRU, since a conversation's youngest leaf is also its last used block.
"""

from __future__ import annotations

from collections.abc import Iterator

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue


class Fifo:
    """Orders leaves by when they were published in this order."""

    def __init__(self) -> None:
        self._leaves = LeafQueue()
        self._number: dict[int, int] = {}  # by block id
        self._num_inserted = 0

    def on_insert(self, block: Block) -> None:
        self._num_inserted += 1
        self._number[block.block_id] = self._num_inserted

    def on_hit(self, block: Block) -> None:
        if not block.num_children:
            self._leaves.discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        number = self._number[block.block_id]
        self._leaves.add(block, (number, number))

    def on_evict(self, block: Block) -> None:
        self._leaves.discard(block)
        del self._number[block.block_id]

    def victim(self) -> Block | None:
        return self._leaves.first()

    def leaves(self) -> Iterator[Block]:
        return iter(self._leaves)
