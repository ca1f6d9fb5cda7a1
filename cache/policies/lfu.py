"""Least frequently used, with ageing: a use counts half as much after `half_life` more blocks were published.

Without ageing what was popular once would stay for ever. Every use is worth 2**(moment / half_life), so all counts
fade alike and the order of two blocks changes only when one is used: no count is ever touched to age it. Sums of such
numbers are kept as logarithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue


class Lfu:
    """Orders leaves by their faded number of uses, being published among them; of equals the least recent goes."""

    def __init__(self, half_life: int) -> None:
        self._half_life = half_life
        self._leaves = LeafQueue()
        self._count: dict[int, float] = {}  # by block id: log2 of the uses' worth
        self._num_inserted = 0

    def on_insert(self, block: Block) -> None:
        self._num_inserted += 1
        self._count[block.block_id] = self._num_inserted / self._half_life

    def on_hit(self, block: Block) -> None:
        count = self._count[block.block_id]
        moment = self._num_inserted / self._half_life
        self._count[block.block_id] = moment + log2(1.0 + 2.0 ** (count - moment)) if count < moment + 60 else count
        if not block.num_children:
            self._leaves.discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        self._leaves.add(block, (self._count[block.block_id], block.released_at))

    def on_evict(self, block: Block) -> None:
        self._leaves.discard(block)
        del self._count[block.block_id]

    def victim(self) -> Block | None:
        return self._leaves.first()

    def leaves(self) -> Iterator[Block]:
        return iter(self._leaves)
