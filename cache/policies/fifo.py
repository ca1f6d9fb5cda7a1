"""First in, first out: the leaf that was published first goes, however often it was used since.

With leaf-first eviction that is nearly LRU, since a conversation's youngest leaf is also its last used one.
"""

from __future__ import annotations

from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.run import Run


class Fifo(LeafOrder):
    """Orders leaves by when they were published in this order. A run's note: how many blocks were before it."""

    def __init__(self) -> None:
        super().__init__()
        self._num_inserted = 0

    def on_insert(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            run.note = self._num_inserted
        self._num_inserted += num_blocks

    def key(self, run: Run) -> Key:
        return run.note, run.start
