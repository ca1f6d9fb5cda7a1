"""Whether the index of one worker's cache is right: what it said of each prompt, beside what the worker found.

Most differences have a reason: blocks are evicted while a request waits. What has none is drift: events were lost or
wrong. When drift is more than a share of what was asked for, the index is to be replaced by a snapshot.
"""

from __future__ import annotations

from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.protocol.prefix import HASH_BYTES

MAX_DRIFT = 0.01  # of the prompt tokens since the last snapshot
MIN_DRIFT_BLOCKS = 4
MIN_INTERVAL_S = 10.0


class Audit:
    """Adds up drift since the last snapshot. `unit_blocks`: the engine finds prefixes in whole runs of so many blocks,
    and a difference of less than two such runs says nothing about the index."""

    def __init__(self, block_size: int, unit_blocks: int, now: float) -> None:
        self._block_size = block_size
        self._slack = 0 if unit_blocks == 1 else 2 * unit_blocks
        self._begun_at = now
        self._num_prompt_tokens = 0
        self._num_drift_tokens = 0

    def check(
        self, index: PrefixIndex, prefix_hashes: bytes, resident: int, found: int, sent_at: float, num_tokens: int
    ) -> int:
        """Return how many tokens of a prompt of `num_tokens` are drift.

        The index had said, when it was sent at `sent_at`, that `resident` of its blocks are resident; `found` the
        worker has found.
        """
        self._num_prompt_tokens += num_tokens
        num_blocks = 0
        if resident > found + self._slack:
            evicted_at = index.evicted_at(prefix_hashes[found * HASH_BYTES : (found + 1) * HASH_BYTES])
            if evicted_at is None or evicted_at < sent_at:
                num_blocks = resident - found
        elif found > resident + self._slack and not index.is_resident(
            prefix_hashes[(found - 1) * HASH_BYTES : found * HASH_BYTES]
        ):
            num_blocks = found - resident  # the worker holds them now, and does not tell twice
        num_drift = num_blocks * self._block_size
        self._num_drift_tokens += num_drift
        return num_drift

    def is_due(self, now: float) -> bool:
        """Return whether drift is beyond the bound, and the last snapshot not just asked for."""
        least = max(MIN_DRIFT_BLOCKS * self._block_size, MAX_DRIFT * self._num_prompt_tokens)
        return self._num_drift_tokens >= least and now - self._begun_at >= MIN_INTERVAL_S

    def begin(self, now: float) -> None:
        """Start anew with a snapshot."""
        self._begun_at = now
        self._num_prompt_tokens = self._num_drift_tokens = 0
