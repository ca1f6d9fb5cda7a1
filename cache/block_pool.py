"""The blocks of one worker's KV memory: counted, handed out and taken back.

A block is a number (`block_id`, its place in `kv_store`). The pool knows which blocks are free, and the last
owner of each; `cache.prefix_cache` knows what the others hold and which tables use them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from kvasir.cache.run import BLOCK_IDS
from kvasir.protocol.errors import KvasirError

PUBLIC = "public"
"""Owner of the blocks of published prefixes; tenants' blocks are owned by the tenant's name."""


class IntegrityError(KvasirError):
    """The bookkeeping contradicts itself: a bug. What is computed from here on cannot be trusted."""

    code = "integrity_error"


class BlockPool:
    """`num_blocks` blocks, handed out and taken back many at a time. `owners`: by block id the last owner, or None.

    The free list is a stack: what was freed last is warm in the processor's cache and goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.owners: list[str | None] = [None] * num_blocks
        self._free = array(BLOCK_IDS, range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, owner: str, num_blocks: int) -> tuple[list[int], list[int]]:
        """Return the ids of `num_blocks` free blocks, which are `owner`'s now, and those of them that must be zeroed
        because they were another owner's.

        Raises:
            IndexError: fewer are free; ask `num_free` first.
        """
        first = self.num_free - num_blocks
        if first < 0:
            raise IndexError(f"{num_blocks} blocks wanted, {self.num_free} are free")
        block_ids = self._free[first:].tolist()
        block_ids.reverse()
        del self._free[first:]
        owners = self.owners
        if set(map(owners.__getitem__, block_ids)) == {owner}:
            return block_ids, []
        to_zero = [block_id for block_id in block_ids if owners[block_id] not in (owner, None)]
        for block_id in block_ids:
            owners[block_id] = owner
        return block_ids, to_zero

    def free(self, block_ids: array[int] | list[int]) -> None:
        """Take back blocks that no table uses; the first ones are handed out first. Contents stay until zeroed."""
        self._free.extend(block_ids[::-1])

    def check_integrity(self, used_ids: Iterable[int]) -> None:
        """Check that every block is either free or among `used_ids`, and once.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        num_uses = [0] * self.num_blocks
        for block_id in used_ids:
            num_uses[block_id] += 1
            if num_uses[block_id] > 1:
                raise IntegrityError(f"block {block_id} is used for two things at once")
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError(f"{len(self._free) - len(free)} blocks are in the free list twice")
        for block_id, is_used in enumerate(num_uses):
            if is_used and block_id in free:
                raise IntegrityError(f"block {block_id} is free but in use")
            if not is_used and block_id not in free:
                raise IntegrityError(f"block {block_id} is lost: neither free nor in use")
            if is_used and self.owners[block_id] is None:
                raise IntegrityError(f"block {block_id} is in use but has no owner")
