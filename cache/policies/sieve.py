"""SIEVE (Zhang et al., NSDI 2024): a hand goes round from the oldest block to the newest and takes what was not used
since it came by last.

Blocks keep the place they were published at. The hand sees leaves only: it passes the others without touching their
mark. Known to suffer from that on deep trees; here for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue


class Sieve:
    """The leaves that the hand will still come to in this round, and those that it has passed."""

    def __init__(self) -> None:
        self._ahead = LeafQueue()
        self._behind = LeafQueue()
        self._hand = 0  # number of the block it stands at
        self._number: dict[int, int] = {}  # by block id: when it was published
        self._visited: set[int] = set()
        self._num_inserted = 0

    def on_insert(self, block: Block) -> None:
        self._num_inserted += 1
        self._number[block.block_id] = self._num_inserted

    def on_hit(self, block: Block) -> None:
        self._visited.add(block.block_id)
        if not block.num_children:
            self._discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        number = self._number[block.block_id]
        (self._ahead if number >= self._hand else self._behind).add(block, (number, number))

    def on_evict(self, block: Block) -> None:
        self._discard(block)
        self._visited.discard(block.block_id)
        del self._number[block.block_id]

    def victim(self) -> Block | None:
        while True:
            block = self._ahead.first()
            if block is None:
                if not self._behind:
                    return None
                self._ahead, self._behind = self._behind, self._ahead
                self._hand = 0
                continue
            number = self._number[block.block_id]
            self._hand = number
            if block.block_id not in self._visited:
                return block
            self._visited.remove(block.block_id)
            self._ahead.discard(block)
            self._behind.add(block, (number, number))

    def leaves(self) -> Iterator[Block]:
        return chain(self._ahead, self._behind)

    def _discard(self, block: Block) -> None:
        if not self._ahead.discard(block):
            self._behind.discard(block)
