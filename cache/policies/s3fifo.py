"""S3-FIFO (Yang et al., SOSP 2023): most blocks are used once, so new ones have to prove themselves in a small queue.

A new block enters `small`, a tenth of the blocks; used twice there it moves to `main`, else it goes and leaves its hash
in `ghost`. Whose hash is there when it comes back enters `main` at once. `main` gives every use, up to three, another
round. Only leaves can be looked at when room is needed: the oldest leaf of a queue stands for its head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue

SMALL_SHARE = 0.1
_MAX_USES = 3


@dataclass(slots=True)
class _Entry:
    """`number`: when the block entered its queue."""

    number: int
    in_main: bool
    num_uses: int = 0


class S3Fifo:
    """The two queues of one order, sized by how many blocks it has. `ghost` remembers as many hashes as it has blocks,
    at least until the next one comes."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by block id
        self._small = LeafQueue()
        self._main = LeafQueue()
        self._num_small = 0
        self._num_entered = 0
        self._ghost: dict[bytes, None] = {}  # oldest first
        self._victim: Block | None = None

    def on_insert(self, block: Block) -> None:
        assert block.hash is not None
        self._num_entered += 1
        in_main = block.hash in self._ghost
        if in_main:
            del self._ghost[block.hash]
        else:
            self._num_small += 1
        self._entries[block.block_id] = _Entry(self._num_entered, in_main)

    def on_hit(self, block: Block) -> None:
        entry = self._entries[block.block_id]
        entry.num_uses = min(entry.num_uses + 1, _MAX_USES)
        if not block.num_children:
            (self._main if entry.in_main else self._small).discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        entry = self._entries[block.block_id]
        (self._main if entry.in_main else self._small).add(block, (entry.number, entry.number))

    def on_evict(self, block: Block) -> None:
        entry = self._entries.pop(block.block_id)
        (self._main if entry.in_main else self._small).discard(block)
        self._num_small -= not entry.in_main
        if block is self._victim and not entry.in_main:
            assert block.hash is not None
            self._ghost[block.hash] = None
            while len(self._ghost) > len(self._entries) + 1:
                del self._ghost[next(iter(self._ghost))]
        self._victim = None

    def victim(self) -> Block | None:
        while True:
            use_small = self._num_small >= SMALL_SHARE * len(self._entries)
            first, second = (self._small, self._main) if use_small else (self._main, self._small)
            queue = first if first else second
            block = self._victim = queue.first()
            if block is None:
                return None
            entry = self._entries[block.block_id]
            if entry.num_uses <= (0 if entry.in_main else 1):
                return block
            queue.discard(block)
            self._num_small -= not entry.in_main
            entry.num_uses = entry.num_uses - 1 if entry.in_main else 0
            entry.in_main = True
            self._num_entered += 1
            entry.number = self._num_entered
            self.on_leaf(block)

    def leaves(self) -> Iterator[Block]:
        return chain(self._small, self._main)
