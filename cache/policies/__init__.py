"""Eviction policies behind the one interface of `cache.policy`; `make` knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.cache.policies.lru import Lru
from kvasir.cache.policies.two_heaps import TwoHeaps
from kvasir.cache.policy import PolicyFactory

POLICIES: dict[str, Callable[[int], PolicyFactory]] = {"lru": lambda num_blocks: Lru, "two_heaps": TwoHeaps}
"""From the number of blocks of a cache to what makes its orders."""

DEFAULT_POLICY = "two_heaps"


def make(name: str, num_blocks: int) -> PolicyFactory:
    """Return what makes the orders of a cache of `num_blocks` blocks under the policy `name`.

    Raises:
        ValueError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no eviction policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](num_blocks)
