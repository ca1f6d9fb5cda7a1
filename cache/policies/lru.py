"""Leaf-first least recently used: the leaf that was released longest ago goes.

Whole chains are released and found again at a time, but only the last run of each is a leaf, so hits and releases cost
next to nothing.
"""

from __future__ import annotations

from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.run import Run


class Lru(LeafOrder):
    """Orders leaves by when they were released."""

    def key(self, run: Run) -> Key:
        return run.released_at, 0
