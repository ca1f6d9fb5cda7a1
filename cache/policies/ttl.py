"""Priorities with a time to live: blocks that a request asked to retain go after the others, as long as it asked.

The shape of TensorRT-LLM's retention hints: a priority from 0 to 100 (35 where nothing was said) for some seconds. The
lowest priority goes first, of equals the least recently used. Without hints this is leaf-first LRU.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from cache.block_pool import Block
from cache.policies.leaf_queue import LeafQueue

if TYPE_CHECKING:
    from cache.block_table import BlockTable, Chain

DEFAULT_PRIORITY = 35
_MIN_HEAP = 64


class Retentions:
    """What requests asked for, per block, from the moment they free it: makes a cache's orders and observes for them.

    The last request that asks for a block decides; one that asks for nothing changes nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        self.now = 0.0
        self._asked: list[tuple[bytes, int, float] | None] = [None] * num_blocks  # hash, priority, until when

    def __call__(self) -> Ttl:
        return Ttl(self)

    def on_match(self, chain: Chain, table: BlockTable, now: float) -> None:
        self.now = now
        table.visit = chain

    def on_free(self, table: BlockTable, now: float) -> None:
        self.now = now
        if table.use is None or not table.use.retention or table.visit is None:
            return
        hashes: list[bytes] = table.visit.hashes  # type: ignore[attr-defined]  # our own note: the chain
        for retention in table.use.retention:
            until = inf if retention.duration_s is None else now + retention.duration_s
            end = table.num_published if retention.end is None else min(retention.end, table.num_published)
            for i in range(retention.start, end):
                block_id = table.twins[i].block_id if i in table.twins else table.block_ids[i]
                self._asked[block_id] = (hashes[i], retention.priority, until)

    def of(self, block: Block) -> tuple[int, float] | None:
        """Return the priority asked for what `block` holds now, and until when; None: none, or its time is over."""
        asked = self._asked[block.block_id]
        if asked is None or asked[0] != block.hash or asked[2] <= self.now:
            return None
        return asked[1], asked[2]


class Ttl:
    """Orders leaves by priority, then recency."""

    def __init__(self, retentions: Retentions) -> None:
        self._retentions = retentions
        self._leaves = LeafQueue()
        self._expiring: list[tuple[float, int, Block]] = []  # heap of (until, released_at, leaf), and void ones

    def on_insert(self, block: Block) -> None:
        pass

    def on_hit(self, block: Block) -> None:
        if not block.num_children:
            self._leaves.discard(block)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        retained = self._retentions.of(block)
        self._leaves.add(block, (retained[0] if retained else DEFAULT_PRIORITY, block.released_at))
        if retained and retained[1] < inf:
            heappush(self._expiring, (retained[1], block.released_at, block))
            if len(self._expiring) > 2 * len(self._leaves) + _MIN_HEAP:
                live = ((leaf, self._retentions.of(leaf)) for leaf in self._leaves)
                self._expiring = [(of[1], leaf.released_at, leaf) for leaf, of in live if of]
                heapify(self._expiring)

    def on_evict(self, block: Block) -> None:
        self._leaves.discard(block)

    def victim(self) -> Block | None:
        while self._expiring and self._expiring[0][0] <= self._retentions.now:
            _, released_at, block = heappop(self._expiring)
            if block.released_at == released_at and self._leaves.discard(block):
                self.on_leaf(block)
        return self._leaves.first()

    def leaves(self) -> Iterator[Block]:
        return iter(self._leaves)
