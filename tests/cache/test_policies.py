"""Eviction policies: what they have in common under random use, and the victim that tells each from its neighbours."""

from __future__ import annotations

import random

import pytest

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.ownership import Quota
from kvasir.cache.policies import DEFAULT_POLICY, POLICIES, adaptive, make
from kvasir.cache.policies.adaptive import Adaptive
from kvasir.cache.policies.gdsf import Gdsf
from kvasir.cache.policies.hazard import NUM_ZONES, HazardModel, Row
from kvasir.cache.policies.sieve import Sieve
from kvasir.cache.policies.ttl import Ttl
from kvasir.cache.policies.visits import Visit
from kvasir.cache.policy import Hint, Retention, Use
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.prefix import derive_namespace, derive_root
from kvasir.worker.options import parse_options
from kvasir.worker.startup import build

SIZE = 1
ROOT = derive_root(b"deployment", "model", "float32")
PUBLIC_SPACE = derive_namespace(b"deployment", "public")


def make_cache(policy: str, num_blocks: int, block_size: int = SIZE) -> PrefixCache:
    return PrefixCache(num_blocks, block_size, make(policy, num_blocks, block_size))


def make_chain(tokens: list[int], owner: str = "a", num_public: int = 0) -> Chain:
    chain = Chain(
        owner=owner,
        root=ROOT,
        public_namespace=PUBLIC_SPACE,
        namespace=derive_namespace(b"deployment", "tenant", owner),
        num_public_blocks=num_public,
        block_size=SIZE,
    )
    chain.extend(tokens)
    return chain


def use(
    cache: PrefixCache,
    *tokens: int,
    owner: str = "a",
    hint: Hint | None = None,
    retention: tuple[Retention, ...] = (),
) -> None:
    """Do what a request with the prompt `tokens` does, one block each."""
    chain, table = make_chain(list(tokens), owner), BlockTable(use=Use(0, hint=hint, retention=retention))
    num_found = cache.match(chain, table, len(chain))
    assert cache.allocate(chain, table, len(chain) - num_found) is not None
    cache.insert(chain, table, len(chain))
    cache.free(table)


def is_resident(cache: PrefixCache, *tokens: int, owner: str = "a") -> bool:
    return cache.probe(make_chain(list(tokens), owner), len(tokens))[0] == len(tokens)


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
                chain = make_chain([rng.randrange(3)], owner)
                cache.pin("pinned", chain)
            case _:
                tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
                chain = make_chain(tokens, owner, rng.choice([0, 0, 2]))
                retention = Retention(0, rng.choice([None, 2]), rng.randrange(101), rng.choice([None, 5.0]))
                table = BlockTable(use=Use(retention=(retention,) if rng.random() < 0.3 else ()))
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
    with pytest.raises(ValueError, match=r"no eviction policy 'clock'; choose one of lru, fifo"):
        make("clock", 8, 16)
    command = ["--model", "m", "--gateway", "ipc://g"]
    assert parse_options(command).eviction_policy == DEFAULT_POLICY
    assert parse_options([*command, "--eviction-policy", "gdsf"]).eviction_policy == "gdsf"
    with pytest.raises(ConfigurationError, match=r"--eviction-policy.*'clock'.*lru"):
        parse_options([*command, "--eviction-policy", "clock"])


# ---- what tells them apart


def test_lru_takes_what_was_used_longest_ago_and_fifo_what_came_first() -> None:
    gone = {}
    for policy in ("lru", "fifo"):
        cache = make_cache(policy, 8)
        for token in (1, 2, 3, 1):
            use(cache, token)
        gone[policy] = victims(cache, 1, 2, 3)
    assert gone == {"lru": [2], "fifo": [1]}


def test_lfu_keeps_what_was_used_often_though_others_are_more_recent() -> None:
    gone = {}
    for policy in ("lru", "lfu"):
        cache = make_cache(policy, 8)
        for token in (1, 1, 1, 2, 2, 3, 4):
            use(cache, token)
        gone[policy] = victims(cache, 1, 2, 3, 4, count=3)
    assert gone == {"lru": [1, 2, 3], "lfu": [3, 4, 2]}


def test_the_counts_of_lfu_age() -> None:
    cache = make_cache("lfu", 4)
    for token in (1, 1, 1, 1):
        use(cache, token)
    for token in range(100, 110):
        use(cache, token)
    assert is_resident(cache, 1)  # four uses, a little faded, against one
    for token in range(200, 230):
        use(cache, token)
    assert not is_resident(cache, 1)


def test_the_counts_of_lfu_do_not_overflow() -> None:
    cache = make_cache("lfu", 2)
    use(cache, 0)
    for token in range(1, 9000):  # 2**(9000 / half-life) is far beyond a float
        use(cache, token)
        use(cache, 0)
    assert is_resident(cache, 0)


def test_gdsf_keeps_the_deep_block_that_lfu_and_lru_let_go() -> None:
    gone = {}
    for policy in ("lru", "lfu", "gdsf"):
        cache = make_cache(policy, 16)
        use(cache, *range(10, 18))  # a chain of eight blocks, then a block of depth 0, used once each
        use(cache, 1)
        assert cache.evict(1) == 1
        gone[policy] = "deep" if not is_resident(cache, *range(10, 18)) else "shallow"
    assert gone == {"lru": "deep", "lfu": "deep", "gdsf": "shallow"}


def test_gdsf_lets_go_in_time_of_what_was_popular_once() -> None:
    cache = make_cache("gdsf", 4)
    for token in (1, 1, 1):
        use(cache, token)
    for token in range(100, 105):
        use(cache, token)
    assert is_resident(cache, 1)
    for token in range(200, 220):
        use(cache, token)
    assert not is_resident(cache, 1)  # the floor has risen above it


def test_sieve_spares_what_was_used_since_the_hand_came_by_and_does_not_move_it() -> None:
    gone = {}
    for policy in ("fifo", "lru", "sieve"):
        cache = make_cache(policy, 8)
        for token in (1, 2, 3, 4, 3, 1):
            use(cache, token)
        gone[policy] = victims(cache, 1, 2, 3, 4, count=4)
    # The hand: 1 is marked, 2 goes; on to 3, marked, 4 goes; round again, 1 and 3 are marked no more.
    assert gone == {"fifo": [1, 2, 3, 4], "lru": [2, 4, 3, 1], "sieve": [2, 4, 1, 3]}


def test_the_hand_of_sieve_goes_on_from_where_it_stood() -> None:
    cache = make_cache("sieve", 8)
    for token in (1, 2, 3, 4, 1):
        use(cache, token)
    assert victims(cache, 1, 2, 3, 4) == [2]  # the mark of 1 is gone now, yet the hand is past it
    assert victims(cache, 1, 3, 4) == [3]


def test_s3fifo_lets_new_blocks_go_before_those_that_were_used_twice() -> None:
    cache = make_cache("s3fifo", 10)
    for token in (1, 2, 1, 2, 1, 2):  # two uses after the first: they earn the main queue
        use(cache, token)
    use(cache, 3)
    use(cache, 4)
    use(cache, 3)  # only one: not enough
    assert victims(cache, 1, 2, 3, 4, count=2) == [3, 4]


def test_s3fifo_knows_a_block_again_that_it_let_go() -> None:
    cache = make_cache("s3fifo", 4)
    for token in (1, 2, 3, 4):
        use(cache, token)
    assert victims(cache, 1, 2, 3, 4) == [1]
    use(cache, 1)  # its ghost is remembered: into the main queue at once, without a second use
    assert victims(cache, 1, 2, 3, 4, count=3) == [2, 3, 4]
    assert is_resident(cache, 1)


@pytest.mark.parametrize("policy", ["s3fifo", "sieve"])
def test_uses_of_a_prefix_do_not_count_for_what_followed_it(policy: str) -> None:
    cache = make_cache(policy, 12)
    use(cache, 1, 2, 3)
    for _ in range(2):
        use(cache, 1)
    use(cache, 9)
    assert cache.evict(2) == 2
    assert is_resident(cache, 1) and is_resident(cache, 9) and not is_resident(cache, 1, 2)
    assert victims(cache, 1, 9) == [9]


@pytest.mark.parametrize("policy", ["ttl", "adaptive"])
def test_what_is_retained_goes_by_priority_until_the_time_is_over(policy: str) -> None:
    cache = make_cache(policy, 8)
    use(cache, 1, retention=(Retention(priority=90, duration_s=10.0),))
    use(cache, 2)
    use(cache, 3, retention=(Retention(priority=10),))
    use(cache, 4)
    assert victims(cache, 1, 2, 3, 4, count=2) == [3, 2]
    cache.advance(9.0)
    use(cache, 5)
    assert victims(cache, 1, 4, 5) == [4]
    cache.advance(11.0)
    use(cache, 6)
    assert victims(cache, 1, 5, 6) == [1]


def test_adaptive_keeps_what_an_earlier_turn_asked_to_retain_until_the_time_is_over() -> None:
    cache = make_cache("adaptive", 8)
    use(cache, 1, 2, retention=(Retention(priority=90, duration_s=10.0),))
    cache.advance(1.0)
    use(cache, 1, 2, 3, hint="one_shot")  # the conversation goes on and asks for nothing more
    cache.advance(9.9)
    use(cache, 5)
    use(cache, 6)
    assert victims(cache, 5, 6) == [5] and is_resident(cache, 1, 2, 3)
    cache.advance(10.1)
    assert cache.evict(1) == 1
    assert is_resident(cache, 6) and not is_resident(cache, 1, 2, 3)


def test_ttl_keeps_only_the_blocks_in_the_range_and_forgets_them_with_their_contents() -> None:
    cache = make_cache("ttl", 8)
    use(cache, 1, 2, 3, retention=(Retention(0, 2, 80),))
    use(cache, 9)
    assert cache.evict(1) == 1
    assert is_resident(cache, 1, 2) and not is_resident(cache, 1, 2, 3)
    assert victims(cache, 9) == [9]
    assert cache.evict(2) == 2
    for token in (11, 12, 13):  # the same blocks of the pool, other contents
        use(cache, token)
    assert victims(cache, 11, 12, 13) == [11]


def test_adaptive_keeps_those_who_come_back_and_learns_who_they_are() -> None:
    gone = {}
    for policy in ("lru", "adaptive"):
        cache = make_cache(policy, 64)
        now = 0.0
        for i in range(100):  # the conversations of one tenant go on after a minute, those of the other never do
            for turn in (1, 2):
                now += 20.0
                cache.advance(now)
                use(cache, *(100 + i, 1, 2)[: turn + 1], owner="returns")
            use(cache, 1000 + i, owner="leaves")
        cache.evict(64)
        use(cache, 1, owner="returns")
        cache.advance(now + 10.0)
        use(cache, 2, owner="leaves")
        assert cache.evict(1) == 1
        gone[policy] = "returns" if is_resident(cache, 2, owner="leaves") else "leaves"
    assert gone == {"lru": "returns", "adaptive": "leaves"}


def test_adaptive_keeps_what_is_due_before_what_was_used_just_now() -> None:
    gone = {}
    for policy in ("lru", "adaptive"):
        cache = make_cache(policy, 64)
        rng = random.Random(5)
        for i in range(300):  # everybody comes back after 12 to 15 seconds, and only then
            for turn in range(3):
                cache.advance(60.0 * i + turn * rng.uniform(12.0, 15.0))
                use(cache, *(10 * i, 10 * i + 1, 10 * i + 2)[: turn + 1])
        cache.evict(64)
        cache.advance(30_000.0)
        use(cache, 5_001)
        cache.advance(30_009.0)
        use(cache, 5_002)
        cache.advance(30_010.0)
        use(cache, 5_003)
        gone[policy] = victims(cache, 5_001, 5_002, 5_003)
    assert gone == {"lru": [5_001], "adaptive": [5_003]}


def test_adaptive_believes_a_hint_before_it_has_learned_anything() -> None:
    cache = make_cache("adaptive", 8)
    for token, hint in ((1, "open"), (2, None), (3, "one_shot"), (4, "closing"), (5, None)):
        cache.advance(float(token))
        use(cache, token, hint=hint)
    assert set(victims(cache, 1, 2, 3, 4, 5, count=2)) == {3, 4}
    assert victims(cache, 1, 2, 5, count=2) == [2, 5]


def test_adaptive_lets_the_last_block_go_first_when_conversations_go_on_without_it() -> None:
    gone = []
    for is_kept in (False, True):
        cache = make_cache("adaptive", 64)
        for i in range(50):
            cache.advance(20.0 * i)
            use(cache, 100 + i, 1, 2, 3)
            cache.advance(20.0 * i + 5.0)
            use(cache, 100 + i, 1, 2, *([3, 4] if is_kept else [9]))
        cache.evict(64)
        use(cache, 1, 2, 3)
        cache.advance(1_001.0)
        use(cache, 5, 6, 7)
        assert cache.evict(2) == 2
        gone.append(is_resident(cache, 1, 2) != is_resident(cache, 5, 6))
    assert gone == [False, True]  # one block of each, or two of the older


def test_adaptive_knows_blocks_that_were_only_held_as_what_they_were() -> None:
    policy = Adaptive(8, SIZE)
    cache = PrefixCache(8, SIZE, policy)
    use(cache, 1, 2, 3)
    table = BlockTable()
    before = cache.match(make_chain([1, 2, 3]), table, 3, again=True) and [run.note for run in table.runs()]
    cache.advance(5.0)
    cache.free(table)
    held = BlockTable()
    cache.match(make_chain([1, 2, 3]), held, 3, again=True)
    assert [run.note for run in held.runs()] == before
    cache.free(held)
    assert cache.evict(3) == 3


def test_adaptive_takes_a_preempted_request_for_one_visit_with_one_answer() -> None:
    cache, chain, table = make_cache("adaptive", 8), make_chain([1, 2, 3]), BlockTable(use=Use())
    cache.match(chain, table, 3)
    assert cache.allocate(chain, table, 3) is not None
    cache.insert(chain, table, 3)
    cache.advance(1.0)
    cache.free(table)  # preempted: the answer is not complete
    cache.advance(2.0)
    assert cache.match(chain, table, 3, again=True) == 3
    assert table.use is not None
    table.use.num_answer_tokens = 9
    cache.advance(3.0)
    cache.free(table)
    cache.advance(100.0)
    use(cache, 5)
    held = BlockTable()
    cache.match(chain, held, 3, again=True)
    visit = held.last.note if held.last is not None else None
    assert isinstance(visit, Visit)
    assert (visit.answered_at, visit.session.turn) == (3.0, 1)
    assert visit.session.mean_answer == pytest.approx(10.0)
    cache.free(held)


def test_adaptive_learns_a_bounded_amount_when_time_advances_and_nothing_while_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[int] = []
    learn = HazardModel.learn

    def count(model: HazardModel, row: Row, zone: int, end_s: float, reused: bool) -> None:
        learned.append(zone)
        learn(model, row, zone, end_s, reused)

    monkeypatch.setattr(HazardModel, "learn", count)
    monkeypatch.setattr(adaptive, "_MAX_AT_ONCE", 50)
    monkeypatch.setattr(adaptive, "_MAX_DUE", 100)
    cache = make_cache("adaptive", 256)
    for token in range(200):
        use(cache, token)
    assert not learned
    now, most = 10_000.0, 0
    for _ in range(2_000):  # a long rest, then step by step
        before = len(learned)
        cache.advance(now)
        most = max(most, len(learned) - before)
        now += 0.01
    assert 0 < most <= 50
    assert sorted(learned) == sorted(100 * list(range(NUM_ZONES)))  # of the first hundred, in every zone; no others
    assert cache.evict(200) == 200
    cache.check_integrity([])


def test_a_worker_evicts_by_the_policy_it_was_given() -> None:
    command = ["--model", "oracle:", "--gateway", "ipc://unused", "--kv-memory", "1M"]
    for name, kind in (("sieve", Sieve), ("gdsf", Gdsf), ("ttl", Ttl)):
        engine, _ = build(parse_options([*command, "--eviction-policy", name]))
        chain, table = make_chain([]), BlockTable()
        chain.block_size = engine.cache.block_size
        chain.extend(list(range(chain.block_size)))
        assert engine.cache.allocate(chain, table, 1) is not None
        engine.cache.insert(chain, table, 1)
        assert table.last is not None
        assert type(table.last.order.policy) is kind
