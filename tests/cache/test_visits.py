"""Visits are known again by few blocks, in random conversations."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.policies.visits import Ghosts, Session, Visit
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import derive_namespace, derive_root

ROOT = derive_root(b"deployment", "model", "float32")
SPACE = derive_namespace(b"deployment", "tenant", "a")


def make_chain(tokens: list[int]) -> Chain:
    chain = Chain(owner="a", root=ROOT, public_namespace=SPACE, namespace=SPACE, num_public_blocks=0, block_size=1)
    chain.extend(tokens)
    return chain


def num_common(tokens: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other, strict=False)))


def remember(ghosts: Ghosts, tokens: list[int]) -> Visit:
    """Let `ghosts` remember a visit of the blocks `tokens`, made of runs of random lengths."""
    cache, chain, table = PrefixCache(len(tokens), 1), make_chain(tokens), BlockTable()
    for depth in sorted(random.Random(len(tokens)).sample(range(1, len(tokens)), k=min(3, len(tokens) - 1))):
        part = BlockTable()
        cache.match(chain, part, depth)
        cache.allocate(chain, part, depth - part.num_published)
        cache.insert(chain, part, depth)
        cache.free(part)
    cache.match(chain, table, len(chain))
    cache.allocate(chain, table, len(chain) - table.num_published)
    cache.insert(chain, table, len(chain))
    visit = Visit(Session(0), len(chain), None, [])
    ghosts.add(visit, table)
    assert visit.tail == chain.hashes[-1]
    return visit


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 250])
def test_who_goes_on_is_known_by_all_of_it(size: int) -> None:
    ghosts = Ghosts(1000)
    remember(ghosts, [7, *range(100, 105)])  # somebody else, for whose sake a shallow block may say the wrong name
    visit = remember(ghosts, list(range(size)))
    for num_more in (0, 1, 5, 8, 100):
        chain = make_chain([*range(size), *range(1000, 1000 + num_more)])
        for num_known in {0, size // 2, size - 1}:
            assert ghosts.find(chain, num_known) == (visit, size)
        assert ghosts.find(chain, size) == (None, size)


@pytest.mark.parametrize("seed", range(10))
def test_the_deepest_block_that_is_remembered_is_found_where_it_is_near_the_end_of_a_visit(seed: int) -> None:
    rng, ghosts = random.Random(seed), Ghosts(10_000)
    seen: list[list[int]] = []
    for _ in range(60):
        base = rng.choice(seen) if seen and rng.random() < 0.7 else []
        shared = base[: rng.randrange(len(base) + 1)] if rng.random() < 0.5 else base
        tokens = [*shared, *(rng.randrange(1000, 9999) for _ in range(rng.randrange(1, 30)))]
        chain = make_chain(tokens)
        ghost, depth = ghosts.find(chain, 0)
        common = [(num_common(tokens, other), len(other)) for other in seen]
        whole = max((num for num, size in common if num == size), default=0)
        assert whole <= depth <= max((num for num, _ in common), default=0)
        assert (ghost is None) == (depth == 0)
        remember(ghosts, tokens)
        seen.append(tokens)


def test_the_oldest_are_forgotten_and_nothing_is_learned_from_them() -> None:
    ghosts = Ghosts(12)
    visits = []
    for i in range(6):
        visits.append(remember(ghosts, [100 * i + j for j in range(5)]))
        visits[-1].is_open = True
    remember(ghosts, [1, 2, 3, 4, 5])
    assert ghosts.find(make_chain([0, 1, 2, 3, 4]), 0) == (None, 0)
    assert ghosts.find(make_chain([500, 501, 502, 503, 504]), 0) == (visits[5], 5)
    assert [visit.is_open for visit in visits] == [False, False, False, True, True, True]
