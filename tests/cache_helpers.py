"""Chains of prompts, and what a sequence does to the cache from its beginning to its last block."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import derive_namespace, derive_root

SECRET = b"deployment"
ROOT = derive_root(SECRET, "model", "float32")
PUBLIC_SPACE = derive_namespace(SECRET, "public")


def make_chain(tokens: Sequence[int], owner: str = "a", *, size: int = 4, num_public: int = 0) -> Chain:
    """Return the chain of a prompt; `num_public` of its blocks are in the public zone."""
    chain = Chain(
        owner=owner,
        root=ROOT,
        public_namespace=PUBLIC_SPACE,
        namespace=derive_namespace(SECRET, "tenant", owner),
        num_public_blocks=num_public,
        block_size=size,
    )
    chain.extend(list(tokens))
    return chain


def compute(cache: PrefixCache, chain: Chain, table: BlockTable | None = None) -> BlockTable:
    """Match, allocate the rest, and publish all full blocks, in a new table or in `table`."""
    table = table or BlockTable()
    num_found = cache.match(chain, table, len(chain))
    assert cache.allocate(chain, table, len(chain) - num_found) is not None
    cache.insert(chain, table, len(chain))
    return table
