"""Eviction policies: what they have in common under random use, and the victim that tells each from its neighbours."""

from __future__ import annotations

import random

import pytest

from kvasir.cache.block_table import BlockTable
from kvasir.cache.policies import DEFAULT_POLICY, POLICIES
from kvasir.cache.policies.lru import Lru
from kvasir.cache.policies.two_heaps import TwoHeaps, TwoHeapsOrder, Visit
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.messages import Quota
from kvasir.protocol.sampling import CacheHint, RetentionHint
from kvasir.worker.options import parse_options
from kvasir.worker.startup import build
from tests.cache_helpers import compute, make_chain

SIZE = 1


def make_cache(policy: str, num_blocks: int, block_size: int = SIZE) -> PrefixCache:
    return PrefixCache(num_blocks, block_size, POLICIES[policy](num_blocks))


def use(
    cache: PrefixCache,
    *tokens: int,
    owner: str = "a",
    hint: CacheHint | None = None,
    retention: tuple[RetentionHint, ...] = (),
) -> None:
    """Do what a request with the prompt `tokens` does, one block each."""
    cache.free(compute(cache, make_chain(tokens, owner, size=SIZE), BlockTable(hint=hint, retention=retention)))


def is_resident(cache: PrefixCache, *tokens: int, owner: str = "a") -> bool:
    return cache.probe(make_chain(tokens, owner, size=SIZE), len(tokens))[0] == len(tokens)


def victims(cache: PrefixCache, *firsts: int, count: int = 1) -> list[int]:
    """Evict `count` blocks and return which of the one-block prompts `firsts` went with each."""
    gone: list[int] = []
    for _ in range(count):
        assert cache.evict(1) == 1
        gone += [token for token in firsts if token not in gone and not is_resident(cache, token)]
    return gone


# ---- what all have in common


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_no_block_outlives_its_parent_and_the_books_agree_after_every_step(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache(policy, 24)
    live: list[BlockTable] = []
    num_hits = 0
    for step in range(400):
        cache.advance(step * 0.5)
        owner = rng.choice("abc")
        match rng.randrange(10):
            case 0:
                cache.evict(rng.randrange(4), rng.choice([None, owner]))
            case 1:
                quotas = {"a": Quota(3, 9), "b": Quota(0, 7)}
                cache.set_quotas({name: quotas[name] for name in quotas if rng.random() < 0.5})
            case 2 | 3 | 4 if live:
                cache.free(live.pop(rng.randrange(len(live))))
            case 5:
                chain = make_chain([rng.randrange(3)], owner, size=SIZE)
                cache.pin("pinned", chain)
            case _:
                tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
                chain = make_chain(tokens, owner, size=SIZE, num_public=rng.choice([0, 0, 2]))
                retention = RetentionHint(0, rng.choice([None, 2]), rng.randrange(101), rng.choice([None, 5.0]))
                table = BlockTable(retention=(retention,) if rng.random() < 0.3 else ())
                num_found = cache.match(chain, table, len(chain))
                num_hits += num_found
                if cache.allocate(chain, table, len(chain) - num_found) is None:
                    cache.free(table)
                else:
                    cache.insert(chain, table, len(chain))
                    live.append(table)
        cache.check_integrity(live)
    for table in live:
        cache.free(table)
    cache.unpin("pinned")
    cache.set_quotas({})
    cache.check_integrity([])
    assert num_hits and cache.statistics().num_evicted
    cache.evict(24)
    assert cache.pool.num_free == 24  # whatever is idle can go


@pytest.mark.parametrize("policy", POLICIES)
def test_asking_for_the_victim_changes_nothing(policy: str) -> None:
    cache, asked = make_cache(policy, 16), make_cache(policy, 16)
    rng = random.Random(3)
    for _ in range(200):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        use(cache, *tokens)
        use(asked, *tokens)
        asked.check_integrity([])  # asks
        asked.check_integrity([])
    assert set(cache.resident_hashes()) == set(asked.resident_hashes())
    assert cache.statistics() == asked.statistics()


def test_an_unknown_policy_is_refused_by_name() -> None:
    command = ["--model", "m", "--gateway", "ipc://g"]
    with pytest.raises(ConfigurationError, match=r"invalid choice: 'clock'.*lru.*two_heaps"):
        parse_options([*command, "--eviction-policy", "clock"])
    assert parse_options(command).eviction_policy == DEFAULT_POLICY
    assert parse_options([*command, "--eviction-policy", "lru"]).eviction_policy == "lru"


# ---- what tells them apart


def test_two_heaps_lets_go_of_the_longest_rest_where_lru_takes_the_oldest() -> None:
    gone = {}
    for policy in POLICIES:
        cache = make_cache(policy, 8)
        use(cache, 1)
        cache.advance(10.0)
        use(cache, 1, 2)  # goes on after 10 s
        cache.advance(15.0)
        use(cache, 5)
        cache.advance(17.0)
        use(cache, 5, 6)  # goes on after 2 s
        cache.advance(18.0)
        use(cache, 7)  # never seen before: 30 s
        cache.advance(19.0)
        assert cache.evict(3) == 3
        gone[policy] = [first for first in ((1, 2), (5, 6), (7,)) if not is_resident(cache, *first)]
    assert gone == {
        "lru": [(1, 2), (5, 6)],
        "two_heaps": [(1, 2), (7,)],
    }  # lru takes 1 as well, two_heaps one block each


@pytest.mark.parametrize(("now", "kept"), [(29.9, "oldest"), (30.1, "longest")])
def test_two_heaps_is_lru_once_the_oldest_is_idle_for_longer_than_30_seconds(now: float, kept: str) -> None:
    cache = make_cache("two_heaps", 8)
    use(cache, 1)
    use(cache, 1, 2)  # goes on at once
    cache.advance(1.0)
    use(cache, 3)  # never seen before: 30 s
    cache.advance(now)
    assert cache.evict(1) == 1
    assert is_resident(cache, 1, 2) == (kept == "oldest")
    assert is_resident(cache, 3) == (kept == "longest")


def test_two_heaps_averages_the_rests_of_a_conversation_that_was_evicted_meanwhile() -> None:
    policy = TwoHeaps(16)
    cache = PrefixCache(16, SIZE, policy)
    now = 0.0
    for turn, rest_s in enumerate((0.0, 4.0, 16.0), 1):
        now += rest_s
        cache.advance(now)
        use(cache, *range(turn))
        cache.evict(16)
    use(cache, 0, 1, 2, 3)
    held = BlockTable()
    cache.match(make_chain([0, 1, 2, 3], size=SIZE), held, 4, again=True)
    visit: Visit = held.last.note
    expected = (4.0**0.6 * 16.0**0.4) ** 0.6 * 0.25**0.4  # the last rest was 0 s: counted as a quarter of a second
    assert visit.mean_rest_s == pytest.approx(expected)


def test_two_heaps_takes_what_a_conversation_went_on_without() -> None:
    cache = make_cache("two_heaps", 8)
    use(cache, 1)
    use(cache, 4, 5)
    cache.advance(1.0)
    use(cache, 4, 6)  # the same but for its last block
    assert cache.evict(1) == 1
    assert not is_resident(cache, 4, 5) and is_resident(cache, 4, 6) and is_resident(cache, 1)


def test_two_heaps_does_not_take_a_shared_beginning_for_a_conversation() -> None:
    cache = make_cache("two_heaps", 16)
    use(cache, 9)
    for token in (3, 4, 5):  # short questions below one system prompt
        cache.advance(float(token))
        use(cache, 1, 2, token)
    assert cache.evict(2) == 2
    # The first is taken for continued, once: its end is where the beginning became known. The others are not.
    assert is_resident(cache, 1, 2, 4) and is_resident(cache, 1, 2, 5) and not is_resident(cache, 9)


def test_two_heaps_believes_a_hint_that_nothing_follows() -> None:
    cache = make_cache("two_heaps", 8)
    for token, hint in ((1, "open"), (2, None), (3, "one_shot"), (4, "closing"), (5, None)):
        cache.advance(float(token))
        use(cache, token, hint=hint)
    cache.advance(100.0)
    assert victims(cache, 1, 2, 3, 4, 5, count=3) == [3, 4, 1]


def test_what_is_retained_goes_by_priority_until_the_time_is_over() -> None:
    cache = make_cache("two_heaps", 8)
    cache.set_quotas({"a": Quota(cap=8)})
    use(cache, 1, retention=(RetentionHint(priority=90, duration_s=10.0),))
    use(cache, 2)
    use(cache, 3, retention=(RetentionHint(priority=10),))
    use(cache, 4)
    assert victims(cache, 1, 2, 3, 4, count=2) == [3, 2]
    cache.advance(9.0)
    use(cache, 5)
    assert victims(cache, 1, 4, 5) == [4]
    cache.advance(11.0)
    use(cache, 6)
    assert victims(cache, 1, 5, 6) == [1]


def test_what_an_earlier_turn_asked_to_retain_outlasts_the_next_turns_hint() -> None:
    cache = make_cache("two_heaps", 8)
    cache.set_quotas({"a": Quota(cap=8)})
    use(cache, 1, 2, retention=(RetentionHint(priority=90, duration_s=10.0),))
    cache.advance(1.0)
    use(cache, 1, 2, 3, hint="one_shot")
    cache.advance(9.9)
    use(cache, 5)
    assert cache.evict(1) == 1
    assert victims(cache, 5) == [5] and is_resident(cache, 1, 2)
    use(cache, 6)
    cache.advance(10.1)
    assert cache.evict(1) == 1
    assert is_resident(cache, 6) and not is_resident(cache, 1, 2)


def test_only_the_blocks_in_the_range_are_retained_and_only_of_an_owner_with_a_quota() -> None:
    cache = make_cache("two_heaps", 8)
    cache.set_quotas({"a": Quota(cap=8)})
    for owner in "ab":
        use(cache, 1, 2, 3, owner=owner, retention=(RetentionHint(0, 2, 80),))
        use(cache, 9, owner=owner)
        assert cache.evict(1, owner) == 1
        assert is_resident(cache, 1, 2, owner=owner) and not is_resident(cache, 1, 2, 3, owner=owner)
        assert cache.evict(1, owner) == 1
        assert is_resident(cache, 1, 2, owner=owner) == (owner == "a")
        assert is_resident(cache, 9, owner=owner) == (owner == "b")
        cache.clear(owner)


def test_blocks_that_were_only_held_keep_their_visit() -> None:
    cache = make_cache("two_heaps", 8)
    use(cache, 1, 2, 3, hint="closing")
    table = BlockTable()
    cache.match(make_chain([1, 2, 3], size=SIZE), table, 3, again=True)
    use(cache, 4)
    cache.free(table)
    assert cache.evict(3) == 3
    assert is_resident(cache, 4)


def test_evicted_blocks_are_remembered_up_to_a_bound() -> None:
    policy = TwoHeaps(2)
    cache = PrefixCache(2, SIZE, policy)
    for token in range(50):
        use(cache, token)
    assert len(policy._ends) == 8


def test_a_worker_evicts_by_the_policy_it_was_given() -> None:
    command = ["--model", "oracle:", "--gateway", "ipc://unused", "--kv-memory", "1M"]
    for name, kind in (("lru", Lru), ("two_heaps", TwoHeapsOrder)):
        engine, _ = build(parse_options([*command, "--eviction-policy", name]))
        assert type(engine.cache._owners.commons.policy) is kind


def test_two_heaps_does_not_count_a_request_that_has_not_ended_as_left() -> None:
    cache = make_cache("two_heaps", 8)
    chain, running = make_chain([1, 2], size=SIZE), BlockTable()
    cache.match(chain, running, 2)
    assert cache.allocate(chain, running, 2) is not None
    cache.insert(chain, running, 2)
    use(cache, 1, 2, 3)  # meanwhile: another choice of the same prompt
    cache.free(running)
    assert isinstance(running.visit, Visit)
    assert not running.visit.is_final and running.visit.mean_rest_s is None
