"""Greedy dual size frequency (Cherkasova 1998): what is used rarely and cheap to compute again goes.

A block's priority is L + uses * cost / size, set anew at every use; L is the priority of the last block that went, so
what has not been used for long is overtaken by what comes. All blocks are of size 1. The cost is the time to compute
the block again when everything before it is resident: the same for all blocks but for attention, which grows with
depth.
"""

from __future__ import annotations

from collections.abc import Iterator

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue

ATTENTION_SHARE_TOKENS = 32_768
"""Context at which attention costs as much as the rest of a transformer of 8 billion parameters (2 * parameters
floating-point operations per token against 4 * layers * width * context)."""


class Depths:
    """How deep each block of a pool is: makes a cache's orders, which share it, since a parent may be in another."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._depth = [0] * num_blocks
        self._step = block_size / ATTENTION_SHARE_TOKENS

    def __call__(self) -> Gdsf:
        return Gdsf(self)

    def note(self, block: Block) -> None:
        parent = block.parent
        self._depth[block.block_id] = self._depth[parent.block_id] + 1 if parent is not None else 0

    def cost(self, block: Block) -> float:
        """Return the time to compute `block` again, in times of the first block."""
        return 1.0 + self._step * self._depth[block.block_id]


class Gdsf:
    """Orders leaves by priority; of equals the least recent goes."""

    def __init__(self, depths: Depths) -> None:
        self._depths = depths
        self._leaves = LeafQueue()
        self._num_uses: dict[int, int] = {}  # by block id
        self._priority: dict[int, float] = {}
        self._floor = 0.0  # L
        self._victim: Block | None = None

    def on_insert(self, block: Block) -> None:
        self._depths.note(block)
        self._num_uses[block.block_id] = 0
        self._use(block)

    def on_hit(self, block: Block) -> None:
        self._use(block)
        if not block.num_children:
            self._leaves.discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        self._leaves.add(block, (self._priority[block.block_id], block.released_at))

    def on_evict(self, block: Block) -> None:
        self._leaves.discard(block)
        del self._num_uses[block.block_id]
        priority = self._priority.pop(block.block_id)
        if block is self._victim:
            self._floor = max(self._floor, priority)
            self._victim = None

    def victim(self) -> Block | None:
        self._victim = self._leaves.first()
        return self._victim

    def leaves(self) -> Iterator[Block]:
        return iter(self._leaves)

    def _use(self, block: Block) -> None:
        num_uses = self._num_uses[block.block_id] + 1
        self._num_uses[block.block_id] = num_uses
        self._priority[block.block_id] = self._floor + num_uses * self._depths.cost(block)
