"""Greedy dual size frequency (Cherkasova 1998): what is used rarely and cheap to compute again goes.

A block's priority is L + uses * cost / size, set anew at every use; L is the priority of the last block that went, so
what has not been used for long is overtaken by what comes. All blocks are of size 1. The cost is the time to compute
the block again when everything before it is resident: the same for all blocks but for attention, which grows with
depth. A run's priority is that of its last block.
"""

from __future__ import annotations

from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.run import Run

ATTENTION_SHARE_TOKENS = 32_768
"""Context at which attention costs as much as the rest of a transformer of 8 billion parameters (2 * parameters
floating-point operations per token against 4 * layers * width * context)."""


class Gdsf(LeafOrder):
    """Orders leaves by priority; of equals the least recent goes. A run's note: its uses, and L at the last of them."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self._step = block_size / ATTENTION_SHARE_TOKENS  # by which a block costs more than the one before
        self._floor = 0.0  # L
        self._victim: Run | None = None

    def on_insert(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            run.note = (1, self._floor)

    def on_hit(self, run: Run) -> None:
        run.note = (run.note[0] + 1, self._floor)
        super().on_hit(run)

    def on_evict(self, run: Run, num_blocks: int) -> None:
        if run is self._victim:
            self._floor = max(self._floor, self._priority(run))
        super().on_evict(run, num_blocks)

    def key(self, run: Run) -> Key:
        return self._priority(run), run.released_at

    def victim(self) -> Run | None:
        self._victim = super().victim()
        return self._victim

    def _priority(self, run: Run) -> float:
        num_uses, floor = run.note
        return float(floor + num_uses * (1.0 + self._step * (run.end - 1)))
