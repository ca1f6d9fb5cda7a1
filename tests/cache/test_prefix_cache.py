"""The prefix cache: what is found, shared, kept private, evicted and reported."""

import pytest

from kvasir.cache.block_pool import PUBLIC, IntegrityError
from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import derive_namespace, hash_prompt, split_hashes
from kvasir.protocol.tokens import pack_tokens
from tests.cache_helpers import PUBLIC_SPACE, ROOT, SECRET, compute, make_chain

SIZE = 4


def make_bare_chain(
    tokens: list[int], hashes: bytes, owner: str = "a", *, num_public: int = 0, root: bytes = ROOT
) -> Chain:
    return Chain(
        owner=owner,
        root=root,
        public_namespace=PUBLIC_SPACE,
        namespace=derive_namespace(SECRET, "tenant", owner),
        num_public_blocks=num_public,
        block_size=SIZE,
        packed_tokens=pack_tokens(tokens),
        packed_hashes=hashes,
    )


def num_hits(cache: PrefixCache, chain: Chain) -> int:
    table = BlockTable()
    found = cache.match(chain, table, len(chain))
    cache.free(table)
    return found


def take_hashes(cache: PrefixCache) -> tuple[list[bytes], list[bytes]]:
    """Return the hashes stored and removed since the last call."""
    stored, removed = cache.take_events()
    return [digest for piece in stored for digest in split_hashes(piece.hashes)], split_hashes(removed)


def tokens_of(num_blocks: int, salt: int = 0) -> list[int]:
    return [salt * 1000 + i for i in range(num_blocks * SIZE)]


def test_a_second_sequence_shares_the_blocks_of_the_first() -> None:
    cache = PrefixCache(8, SIZE)
    first, second = make_chain(tokens_of(4)), make_chain(tokens_of(2) + tokens_of(1, salt=1))
    table = compute(cache, first)
    other = compute(cache, second)
    assert other.block_ids[:2] == table.block_ids[:2]
    assert other.block_ids[2] not in table.block_ids
    cache.check_integrity([table, other])


def test_match_is_capped_in_whole_blocks() -> None:
    cache = PrefixCache(8, SIZE)
    chain = make_chain(tokens_of(4))
    cache.free(compute(cache, chain))
    table = BlockTable()
    assert cache.match(chain, table, 3) == 3
    assert len(table.block_ids) == 3


def test_one_tenants_private_blocks_are_never_matched_by_another() -> None:
    cache = PrefixCache(16, SIZE)
    cache.free(compute(cache, make_chain(tokens_of(3), "a")))
    assert num_hits(cache, make_chain(tokens_of(3), "a")) == 3
    assert num_hits(cache, make_chain(tokens_of(3), "b")) == 0


def test_the_public_zone_is_shared_and_what_follows_it_is_not() -> None:
    cache = PrefixCache(16, SIZE)
    a = make_chain(tokens_of(4), "a", num_public=2)
    table = compute(cache, a)
    assert [cache.pool.owners[i] for i in table.block_ids] == [PUBLIC, PUBLIC, "a", "a"]
    assert num_hits(cache, make_chain(tokens_of(4), "b", num_public=2)) == 2
    assert num_hits(cache, make_chain(tokens_of(4), "b", num_public=1)) == 1


@pytest.mark.parametrize("difference", ["tokens", "namespace", "root", "parent"])
def test_an_equal_digest_with_another_identity_is_a_miss(difference: str) -> None:
    cache = PrefixCache(16, SIZE)
    victim = make_chain(tokens_of(3), "a")
    table = compute(cache, victim)
    forged = b"".join(victim.hashes)
    num_found = num_published = 0
    match difference:
        case "tokens":
            attacker = make_bare_chain(tokens_of(1) + tokens_of(2, salt=7), forged)
            num_found = num_published = 1
        case "namespace":
            attacker = make_bare_chain(tokens_of(3), forged, "b")
        case (
            "root"
        ):  # from here on the digests are looked for elsewhere in the tree: his blocks stand beside the victim's
            attacker = make_bare_chain(tokens_of(3), forged, root=bytes(16))
            num_published = 3
        case _:  # the victim's second block offered as the child of another first one
            first = make_chain(tokens_of(1, salt=7))
            cache.free(compute(cache, first))
            attacker = make_bare_chain(tokens_of(1, salt=7) + tokens_of(2)[SIZE:], first.hashes[0] + victim.hashes[1])
            num_found, num_published = 1, 2
    assert num_hits(cache, attacker) == num_found
    num_collisions = 0 if num_published > num_found else 1
    assert cache.statistics().num_collisions == num_collisions
    # Nor may the attacker's own block take the victim's place, or any block of his be hung below it.
    other = compute(cache, attacker)
    assert (other.num_published, other.publishable) == (num_published, not num_collisions)
    assert set(other.block_ids[1:]).isdisjoint(table.block_ids)
    cache.check_integrity([table, other])
    cache.free(table)
    cache.free(other)
    cache.check_integrity([])
    assert num_hits(cache, victim) == 3
    assert num_hits(cache, attacker) == num_published
    assert num_hits(cache, victim) == 3


def test_a_block_computed_twice_at_the_same_time_is_published_once() -> None:
    cache = PrefixCache(16, SIZE)
    long = make_chain(tokens_of(3))
    short = make_chain(tokens_of(2) + tokens_of(1, salt=1))
    first, second = BlockTable(), BlockTable()
    for chain, table in ((long, first), (short, second)):
        assert cache.match(chain, table, 3) == 0
        cache.allocate(chain, table, 3)
    cache.insert(long, first, 3)
    cache.insert(short, second, 2)
    assert second.duplicates == [0, 1]
    cache.check_integrity([first, second])
    cache.free(first)
    cache.evict(16)  # the first sequence is gone, yet what the second chains on must stay
    cache.insert(short, second, 3)
    cache.check_integrity([second])
    assert num_hits(cache, short) == 3
    cache.free(second)
    cache.check_integrity([])
    assert cache.pool.num_free == 13  # both private duplicates were freed, the three published blocks stay


def test_eviction_is_leaf_first_and_least_recently_used() -> None:
    cache = PrefixCache(8, SIZE)
    old, young = make_chain(tokens_of(3, salt=1)), make_chain(tokens_of(3, salt=2))
    cache.free(compute(cache, old))
    cache.free(compute(cache, young))
    for expected in ((2, 3), (1, 3), (0, 3), (0, 2)):
        assert cache.evict(1) == 1
        assert (cache.probe(old, 3)[0], cache.probe(young, 3)[0]) == expected
        cache.check_integrity([])
    num_hits(cache, make_chain(tokens_of(1, salt=2)))  # touching the head does not save the tail
    assert cache.evict(8) == 2
    assert cache.pool.num_free == 8


def test_a_hit_moves_a_chain_behind_those_used_less_recently() -> None:
    cache = PrefixCache(8, SIZE)
    first, second = make_chain(tokens_of(2, salt=1)), make_chain(tokens_of(2, salt=2))
    cache.free(compute(cache, first))
    cache.free(compute(cache, second))
    assert num_hits(cache, first) == 2
    cache.evict(2)
    assert (num_hits(cache, first), num_hits(cache, second)) == (2, 0)


def test_blocks_in_use_are_not_evicted_and_an_allocation_that_cannot_be_met_changes_nothing() -> None:
    cache = PrefixCache(6, SIZE)
    held, idle = make_chain(tokens_of(3, salt=1)), make_chain(tokens_of(3, salt=2))
    table = compute(cache, held)
    cache.free(compute(cache, idle))
    fresh, chain = BlockTable(), make_chain(tokens_of(4, salt=3))
    assert cache.num_available == 3
    assert cache.allocate(chain, fresh, 4) is None
    assert (fresh.block_ids, num_hits(cache, idle)) == ([], 3)
    assert cache.allocate(chain, fresh, 3) == []
    assert (num_hits(cache, idle), num_hits(cache, held)) == (0, 3)
    cache.check_integrity([table, fresh])


def test_blocks_that_change_owner_are_named_for_zeroing() -> None:
    cache = PrefixCache(4, SIZE)
    table = compute(cache, make_chain(tokens_of(3), "a"))
    used = set(table.block_ids)
    cache.free(table)
    other = BlockTable()
    to_zero = cache.allocate(make_chain(tokens_of(4), "b"), other, 4)
    assert set(to_zero) == used


def test_generated_tokens_extend_the_chain_as_the_gateway_hashes_them() -> None:
    tokens = tokens_of(5)
    space = derive_namespace(SECRET, "tenant", "a")
    hashes = hash_prompt(ROOT, PUBLIC_SPACE, space, pack_tokens(tokens), SIZE, SIZE)
    whole = make_bare_chain(tokens, hashes, num_public=1)
    grown = make_chain(tokens[: 2 * SIZE], num_public=1)
    for i in range(2, 5):
        grown.extend(tokens[i * SIZE : (i + 1) * SIZE])
    assert grown.hashes == whole.hashes
    assert grown.tokens == whole.tokens


def test_events_are_netted_over_a_step() -> None:
    cache = PrefixCache(4, SIZE)
    chain = make_chain(tokens_of(3))
    cache.free(compute(cache, chain))
    assert take_hashes(cache) == (chain.hashes, [])
    cache.evict(1)
    cache.free(compute(cache, chain))  # removed and stored again: nothing has changed
    assert cache.take_events() == ([], b"")
    cache.free(compute(cache, make_chain(tokens_of(4, salt=1))))  # pushes out the other three
    cache.evict(2)
    stored, removed = take_hashes(cache)
    assert len(stored) == 2
    assert set(removed) == set(chain.hashes)
    assert split_hashes(cache.resident_hashes()) == stored


def test_probe_forecasts_the_match_and_how_much_of_it_is_idle() -> None:
    cache = PrefixCache(16, SIZE)
    cache.free(compute(cache, make_chain(tokens_of(6))))
    table = compute(cache, make_chain(tokens_of(2)))
    assert cache.probe(make_chain(tokens_of(8)), 8) == (6, 4)
    assert cache.probe(make_chain(tokens_of(8)), 1) == (1, 0)
    assert cache.probe(make_chain(tokens_of(2, salt=1)), 2) == (0, 0)
    cache.free(table)


def test_hashes_that_do_not_cover_the_full_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 prefix hashes for 2 full blocks"):
        make_bare_chain(tokens_of(2), bytes(16))


def test_check_integrity_finds_an_orphan_and_a_forgotten_reference() -> None:
    cache = PrefixCache(4, SIZE)
    table = compute(cache, make_chain(tokens_of(2)))
    with pytest.raises(IntegrityError, match="references"):
        cache.check_integrity([])
    table.last.hashes = b"?" * len(table.last.hashes)
    with pytest.raises(IntegrityError, match="not its own"):
        cache.check_integrity([table])
