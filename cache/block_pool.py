"""The blocks of one worker's KV memory: made once, counted, handed out and taken back.

A block is a number (`block_id`, its place in `kv_store`) and the bookkeeping around it. The pool knows which blocks
are free and how often the others are referenced; what a block's contents mean is `cache.prefix_cache`'s business,
which keeps its notes in the same object, so that a hit touches one run of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import KvasirError

if TYPE_CHECKING:
    from cache.ownership import Order

PUBLIC = "public"
"""Owner of the blocks of published prefixes; tenants' blocks are owned by the tenant's name."""


class IntegrityError(KvasirError):
    """The bookkeeping contradicts itself: a bug. What is computed from here on cannot be trusted."""

    code = "integrity_error"


@dataclass(slots=True, eq=False)
class Block:
    """One block. `hash` is set while it is published; the fields after it are then its identity and never change.

    `owner` is who had it last and outlives `free`: the next owner, if another, must have it zeroed. `order` is the
    eviction order that it belongs to while it is not free. `released_at` counts releases of all blocks: what was
    released earlier has the smaller number. `num_shields`: resident children that belong to another order or are
    shielded themselves. `older` and `newer` are links for the eviction policy's own list.
    """

    block_id: int
    ref_count: int = 0
    owner: str | None = None
    hash: bytes | None = None
    parent_hash: bytes = b""
    namespace: bytes = b""
    tokens: bytes = b""
    parent: Block | None = None
    num_children: int = 0
    num_shields: int = 0
    released_at: int = 0
    order: Order | None = None
    older: Block | None = None
    newer: Block | None = None


class BlockPool:
    """`num_blocks` blocks; allocating and freeing one is O(1).

    The free list is a stack: what was freed last is warm in the processor's cache and goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._free = self.blocks[::-1]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, owner: str) -> tuple[Block, bool]:
        """Return a free block, referenced once, and whether it must be zeroed because it was another owner's.

        Raises:
            IndexError: none is free; ask `num_free` first.
        """
        block = self._free.pop()
        block.ref_count = 1
        previous, block.owner = block.owner, owner
        return block, previous is not None and previous != owner

    def free(self, block: Block) -> None:
        """Take back an unpublished block without references. It keeps `owner`, and its contents until zeroed."""
        self._free.append(block)

    def check_integrity(self, references: Iterable[int]) -> None:
        """Check free + used == total and every ref count against `references`, the block ids of all holders.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        expected = [0] * len(self.blocks)
        for block_id in references:
            expected[block_id] += 1
        free = {block.block_id for block in self._free}
        if len(free) != len(self._free):
            raise IntegrityError(f"{len(self._free) - len(free)} blocks are in the free list twice")
        for block in self.blocks:
            if block.ref_count != expected[block.block_id]:
                raise IntegrityError(
                    f"block {block.block_id} has ref count {block.ref_count} but {expected[block.block_id]} references"
                )
            if block.block_id in free and (block.ref_count or block.hash is not None):
                raise IntegrityError(f"block {block.block_id} is free but referenced or published")
            if block.block_id not in free and not block.ref_count and block.hash is None:
                raise IntegrityError(f"block {block.block_id} is lost: not free, not referenced, not published")
