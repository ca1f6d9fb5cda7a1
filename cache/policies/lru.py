"""Leaf-first least recently used: the leaf that was released longest ago goes. The plain baseline, blind to hints.

Whole chains are released and found again at a time, but only the last run of each is a leaf, so hits and releases cost
next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvasir.cache.policies.leaf_queue import LeafQueue
from kvasir.cache.run import Run


class Lru:
    """Orders leaves by when they were released."""

    def __init__(self) -> None:
        self._by_age = LeafQueue()

    def on_hit(self, run: Run) -> None:
        if not run.num_children:
            self._discard(run)

    def on_release(self, run: Run) -> None:
        if not run.num_children:
            self.on_leaf(run)

    def on_leaf(self, run: Run) -> None:
        self._by_age.add(run, (run.released_at,))

    def on_evict(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            self._discard(run)

    def victim(self) -> Run | None:
        return self._by_age.first()

    def leaves(self) -> Iterator[Run]:
        return iter(self._by_age)

    def _discard(self, run: Run) -> None:
        self._by_age.discard(run)
