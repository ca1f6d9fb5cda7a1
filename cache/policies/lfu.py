"""Least frequently used, with ageing: a use counts half as much after `half_life` more blocks were published.

Without ageing what was popular once would stay for ever. Every use is worth 2**(moment / half_life), so all counts
fade alike and the order of two runs changes only when one is used: no count is ever touched to age it. Sums of such
numbers are kept as logarithms.
"""

from __future__ import annotations

from math import log2

from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.run import Run


class Lfu(LeafOrder):
    """Orders leaves by their faded number of uses, being published among them; of equals the least recent goes.

    A run's note: log2 of its uses' worth.
    """

    def __init__(self, half_life: int) -> None:
        super().__init__()
        self._half_life = half_life
        self._num_inserted = 0

    def on_insert(self, run: Run, num_blocks: int) -> None:
        self._num_inserted += num_blocks
        if num_blocks == len(run):
            run.note = self._num_inserted / self._half_life

    def on_hit(self, run: Run) -> None:
        count, moment = run.note, self._num_inserted / self._half_life
        run.note = moment + log2(1.0 + 2.0 ** (count - moment)) if count < moment + 60 else count
        super().on_hit(run)

    def key(self, run: Run) -> Key:
        return run.note, run.released_at
