"""Priorities with a time to live: blocks that a request asked to retain go after the others, as long as it asked.

The shape of TensorRT-LLM's retention hints: a priority from 0 to 100 (35 where nothing was said) for some seconds. The
lowest priority goes first, of equals the least recently used. Without hints this is leaf-first LRU.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.run import Run

if TYPE_CHECKING:
    from kvasir.cache.block_table import BlockTable, Chain

DEFAULT_PRIORITY = 35
_MIN_HEAP = 64


class Retentions:
    """What requests asked for, from the moment they free it: makes a cache's orders and observes for them.

    The last request that asks for a block decides; one that asks for nothing changes nothing. A run's note: the
    priority and until when.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> Ttl:
        return Ttl(self)

    def on_advance(self, now: float) -> None:
        self.now = now

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        pass

    def cuts(self, table: BlockTable) -> Iterator[int]:
        for retention in table.use.retention if table.use is not None else ():
            yield retention.start
            if retention.end is not None:
                yield retention.end

    def on_free(self, table: BlockTable) -> None:
        for retention in table.use.retention if table.use is not None else ():
            until = inf if retention.duration_s is None else self.now + retention.duration_s
            for run in table.runs():
                if run.start >= retention.start and (retention.end is None or run.end <= retention.end):
                    run.note = (retention.priority, until)

    def of(self, run: Run) -> tuple[int, float] | None:
        """Return the priority asked for `run` and until when; None: none, or its time is over."""
        if run.note is None or run.note[1] <= self.now:
            return None
        asked: tuple[int, float] = run.note
        return asked


class Ttl(LeafOrder):
    """Orders leaves by priority, then recency."""

    def __init__(self, retentions: Retentions) -> None:
        super().__init__()
        self._retentions = retentions
        self._expiring: list[tuple[float, int, Run]] = []  # heap of (until, released_at, leaf), and void ones

    def key(self, run: Run) -> Key:
        retained = self._retentions.of(run)
        return retained[0] if retained else DEFAULT_PRIORITY, run.released_at

    def on_leaf(self, run: Run) -> None:
        super().on_leaf(run)
        retained = self._retentions.of(run)
        if retained and retained[1] < inf:
            heappush(self._expiring, (retained[1], run.released_at, run))
            if len(self._expiring) > 2 * len(self._leaves) + _MIN_HEAP:
                live = ((leaf, self._retentions.of(leaf)) for leaf in self._leaves)
                self._expiring = [(of[1], leaf.released_at, leaf) for leaf, of in live if of]
                heapify(self._expiring)

    def victim(self) -> Run | None:
        while self._expiring and self._expiring[0][0] <= self._retentions.now:
            _, _, run = heappop(self._expiring)
            if self._leaves.discard(run):
                self.on_leaf(run)
        return super().victim()
