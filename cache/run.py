"""Runs: consecutive published blocks of a prefix cache that have always been used together.

Runs are the nodes of a radix tree. A request that uses only the first part of a run cuts it in two. So what several
requests share is made of whole runs, and what is known about a block's use is known about its run.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import inf
from typing import Any

from kvasir.protocol.prefix import HASH_BYTES

DEFAULT_PRIORITY = 35
"""Of blocks that no request asked to retain."""

BLOCK_IDS = "i"
"""Type code of arrays of block ids."""

Key = tuple["Run | bytes", bytes]
"""What finds a run: its parent, or its chain's root hash if it has none, and the hash of its first block."""


@dataclass(slots=True, eq=False, repr=False)
class Run:
    """Consecutive blocks of one chain. They have one namespace, one owner and the same references.

    `hashes` and `tokens` are packed. `parent` is the run that ends where this one begins, None at the beginning of a
    chain; `start` is the depth of the first block. `ref_count` tables reference all of it, and with it its ancestors.
    `released_at` numbers the blocks in the order of their release: it is the number of the last block, and those before
    it have the next ones.
    `num_children` runs build on it. `num_blocking` of them are in another eviction order, or blocked by descendants
    themselves: this run may have to stay for them. While `is_open`, only the sequence that publishes it has used it,
    and it may grow. A request asked to retain it with `priority` (0 to 100) until the time `retained_until`. `note` is
    the eviction policy's own. Both parts of a cut run keep priority and note. A run that was evicted is empty.
    """

    parent: Run | None
    root: bytes
    start: int
    namespace: bytes
    owner: str
    block_ids: array[int]
    hashes: bytes
    tokens: bytes
    ref_count: int = 1
    num_children: int = 0
    num_blocking: int = 0
    released_at: int = 0
    is_open: bool = True
    priority: int = DEFAULT_PRIORITY
    retained_until: float = inf
    note: Any = None

    def __len__(self) -> int:
        return len(self.block_ids)

    @property
    def end(self) -> int:
        return self.start + len(self.block_ids)

    @property
    def key(self) -> Key:
        return self.root if self.parent is None else self.parent, self.hash_of(0)

    def hash_of(self, index: int) -> bytes:
        return self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]

    @property
    def parent_hash(self) -> bytes | None:
        return None if self.parent is None else self.parent.hash_of(len(self.parent) - 1)

    def forget_retention(self) -> None:
        self.priority, self.retained_until = DEFAULT_PRIORITY, inf

    def grow(self, block_ids: array[int], hashes: bytes, tokens: bytes) -> None:
        """Append blocks."""
        self.block_ids += block_ids
        self.hashes += hashes
        self.tokens += tokens

    def cut(self, num_blocks: int) -> Run:
        """Make the first `num_blocks` blocks, some but not all, this run's parent, and return that."""
        block_ids, hashes, tokens = self._tail(num_blocks)
        head = Run(
            parent=self.parent,
            root=self.root,
            start=self.start,
            namespace=self.namespace,
            owner=self.owner,
            block_ids=self.block_ids[:num_blocks],
            hashes=self.hashes[: -len(hashes)],
            tokens=self.tokens[: -len(tokens)],
            ref_count=self.ref_count,
            num_children=1,
            num_blocking=int(self.num_blocking > 0),
            released_at=self.released_at + len(block_ids),
            is_open=False,
            priority=self.priority,
            retained_until=self.retained_until,
            note=self.note,
        )
        self.parent = head
        self.start += num_blocks
        self.block_ids, self.hashes, self.tokens = block_ids, hashes, tokens
        return head

    def trim(self, num_blocks: int) -> tuple[array[int], bytes]:
        """Drop the last `num_blocks` blocks, at least one; return their ids and packed hashes."""
        block_ids, hashes, tokens = self._tail(len(self) - num_blocks)
        del self.block_ids[-num_blocks:]
        self.hashes = self.hashes[: -len(hashes)]
        self.tokens = self.tokens[: -len(tokens)]
        self.released_at += num_blocks
        return block_ids, hashes

    def _tail(self, first: int) -> tuple[array[int], bytes, bytes]:
        """Return ids, hashes and tokens of the blocks from `first` on."""
        size = len(self.tokens) // len(self)
        return self.block_ids[first:], self.hashes[first * HASH_BYTES :], self.tokens[first * size :]
