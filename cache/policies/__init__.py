"""Eviction policies behind the one interface of `cache.policy`, by name."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.cache.policies.lru import Lru
from kvasir.cache.policies.two_heaps import TwoHeaps
from kvasir.cache.policy import PolicyFactory

POLICIES: dict[str, Callable[[int], PolicyFactory]] = {"lru": lambda num_blocks: Lru, "two_heaps": TwoHeaps}
"""From the number of blocks of a cache to what makes its orders."""

DEFAULT_POLICY = "two_heaps"
