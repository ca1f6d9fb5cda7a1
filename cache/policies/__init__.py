"""Eviction policies behind the one interface of `cache.policy`; `make` knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.cache.policies.adaptive import Adaptive
from kvasir.cache.policies.fifo import Fifo
from kvasir.cache.policies.gdsf import Gdsf
from kvasir.cache.policies.lfu import Lfu
from kvasir.cache.policies.lru import Lru
from kvasir.cache.policies.s3fifo import S3Fifo
from kvasir.cache.policies.sieve import Sieve
from kvasir.cache.policies.ttl import Retentions
from kvasir.cache.policy import PolicyFactory

_HALF_LIFE_TURNS = 2  # LFU: a use counts half after so many times the pool's blocks were published

POLICIES: dict[str, Callable[[int, int], PolicyFactory]] = {
    "lru": lambda num_blocks, block_size: Lru,
    "fifo": lambda num_blocks, block_size: Fifo,
    "lfu": lambda num_blocks, block_size: lambda: Lfu(_HALF_LIFE_TURNS * num_blocks),
    "s3fifo": lambda num_blocks, block_size: S3Fifo,
    "sieve": lambda num_blocks, block_size: Sieve,
    "gdsf": lambda num_blocks, block_size: lambda: Gdsf(block_size),
    "ttl": lambda num_blocks, block_size: Retentions(),
    "adaptive": Adaptive,
}
"""From the pool's number of blocks and their size in tokens to what makes the orders of one cache."""

DEFAULT_POLICY = "adaptive"


def make(name: str, num_blocks: int, block_size: int) -> PolicyFactory:
    """Return what makes the orders of a cache of `num_blocks` blocks of `block_size` tokens under the policy `name`.

    Raises:
        ValueError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no eviction policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](num_blocks, block_size)
