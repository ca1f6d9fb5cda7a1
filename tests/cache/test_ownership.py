"""Floors, caps, pins and accounts of the cache; what a flood does with and without a floor; and who can read what."""

from __future__ import annotations

import random

import pytest
import torch

from kvasir.cache.block_pool import PUBLIC
from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.kv_store import KvStore
from kvasir.cache.policies import POLICIES
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import KvAccount, Quota
from kvasir.protocol.prefix import derive_namespace, hash_prompt
from tests import cache_helpers
from tests.cache_helpers import PUBLIC_SPACE, ROOT, SECRET

SIZE = 4


def make_chain(num_blocks: int, owner: str, salt: int = 0, *, num_public: int = 0) -> Chain:
    """Blocks that differ with `salt` behind the public zone, which is everybody's."""
    tokens = [i if i < num_public * SIZE else salt * 1000 + i for i in range(num_blocks * SIZE)]
    return cache_helpers.make_chain(tokens, owner, num_public=num_public)


def visit(cache: PrefixCache, chain: Chain) -> int | None:
    """Serve `chain` from beginning to end; return how many blocks were found, None if it did not fit."""
    table = BlockTable()
    found = cache.match(chain, table, len(chain))
    if cache.allocate(chain, table, len(chain) - found) is None:
        cache.free(table)
        return None
    cache.insert(chain, table, len(chain))
    cache.free(table)
    return found


def account(cache: PrefixCache, owner: str) -> KvAccount:
    return next(s for s in cache.accounts() if s.tenant == owner)


def test_what_an_owner_holds_within_his_floor_stays_under_others_pressure() -> None:
    cache = PrefixCache(10, SIZE)
    cache.set_quotas({"a": Quota(floor=3)})
    visit(cache, make_chain(5, "a"))
    for salt in range(5):
        visit(cache, make_chain(4, "b", salt))
    assert account(cache, "a").num_held == 3
    assert visit(cache, make_chain(3, "a")) == 3
    assert cache.num_available == 7
    assert visit(cache, make_chain(8, "b", 9)) is None


def test_a_floor_does_not_keep_its_owner_from_his_own_blocks() -> None:
    cache = PrefixCache(6, SIZE)
    cache.set_quotas({"a": Quota(floor=6)})
    for salt in range(3):
        assert visit(cache, make_chain(6, "a", salt)) == 0
    assert account(cache, "a").num_evicted_own == 12


def test_an_owner_at_his_cap_makes_room_among_his_own_blocks_only() -> None:
    cache = PrefixCache(10, SIZE)
    cache.set_quotas({"a": Quota(cap=4)})
    visit(cache, make_chain(4, "b"))
    for salt in range(5):
        assert visit(cache, make_chain(3, "a", salt)) == 0
    assert account(cache, "a").num_held <= 4
    assert visit(cache, make_chain(4, "b")) == 4
    assert visit(cache, make_chain(5, "a", 9)) is None
    assert cache.pool.num_free >= 2


def test_blocks_in_use_count_towards_the_cap() -> None:
    cache = PrefixCache(10, SIZE)
    cache.set_quotas({"a": Quota(cap=4)})
    chain, table = make_chain(3, "a"), BlockTable()
    cache.allocate(chain, table, 3)
    assert cache.room_of("a") == 1
    assert visit(cache, make_chain(2, "a", 1)) is None
    assert visit(cache, make_chain(1, "a", 1)) == 0


def test_blocks_of_whoever_is_above_his_cap_go_before_older_ones() -> None:
    cache = PrefixCache(6, SIZE)
    visit(cache, make_chain(3, "b"))
    chain, table = make_chain(3, "a"), BlockTable()
    cache.allocate(chain, table, 3)
    cache.insert(chain, table, 3)
    cache.set_quotas({"a": Quota(cap=1)})  # in use: nothing can go yet
    cache.free(table)
    visit(cache, make_chain(1, "c"))
    assert (account(cache, "a").num_held, account(cache, "b").num_held) == (2, 3)
    visit(cache, make_chain(2, "c", 1))  # one of his, up to the cap, and then whichever is oldest
    assert (account(cache, "a").num_held, account(cache, "b").num_held) == (1, 2)


def test_a_lowered_cap_takes_effect_at_once() -> None:
    cache = PrefixCache(10, SIZE)
    visit(cache, make_chain(8, "a"))
    cache.set_quotas({"a": Quota(cap=3)})
    assert account(cache, "a").num_held == 3
    assert visit(cache, make_chain(8, "a")) is None
    cache.set_quotas({})
    assert visit(cache, make_chain(8, "a")) == 3


@pytest.mark.parametrize(
    ("quotas", "match"),
    [
        ({"a": Quota(floor=6), "b": Quota(floor=5)}, "floors of 11 blocks in all do not fit"),
        ({"a": Quota(floor=3, cap=2)}, "do not go together"),
        ({"a": Quota(cap=0)}, "do not go together"),
        ({PUBLIC: Quota(floor=1)}, "pin the prefix instead"),
    ],
)
def test_quotas_that_do_not_fit_are_refused_and_change_nothing(quotas: dict[str, Quota], match: str) -> None:
    cache = PrefixCache(10, SIZE)
    cache.set_quotas({"a": Quota(floor=2)})
    with pytest.raises(BadRequest, match=match):
        cache.set_quotas(quotas)
    visit(cache, make_chain(1, "a"))
    assert cache.quota_of("a").floor == 2


def test_a_published_block_above_a_protected_private_one_is_not_evicted() -> None:
    cache = PrefixCache(6, SIZE)
    cache.set_quotas({"a": Quota(floor=1)})
    visit(cache, make_chain(3, "a", num_public=2))
    assert cache.num_available == 3
    visit(cache, make_chain(3, "b", 1))
    assert visit(cache, make_chain(4, "b", 2)) is None
    cache.check_integrity([])
    assert visit(cache, make_chain(3, "a", num_public=2)) == 3
    cache.set_quotas({})
    assert visit(cache, make_chain(6, "b", 3)) == 0


def test_a_pinned_prefix_stays_until_it_is_unpinned_and_then_its_room_is_there_at_once() -> None:
    cache = PrefixCache(6, SIZE)
    visit(cache, make_chain(3, "a", num_public=3))
    assert cache.pin("support", make_chain(3, "operator", num_public=3)) == 3
    for salt in range(1, 4):
        visit(cache, make_chain(3, "b", salt))
    assert visit(cache, make_chain(3, "c", num_public=3)) == 3
    assert visit(cache, make_chain(4, "b", 9)) is None
    cache.unpin("support")
    assert cache.num_available == 6
    assert visit(cache, make_chain(6, "b", 9)) == 0


def test_pins_and_floors_do_not_promise_the_same_block_twice() -> None:
    cache = PrefixCache(6, SIZE)
    visit(cache, make_chain(3, "a", num_public=3))
    cache.set_quotas({"a": Quota(floor=4)})
    assert cache.pin("support", make_chain(3, "a", num_public=3)) == 0
    cache.set_quotas({"a": Quota(floor=3)})
    assert cache.pin("support", make_chain(3, "a", num_public=3)) == 3
    with pytest.raises(BadRequest, match="3 are pinned"):
        cache.set_quotas({"a": Quota(floor=4)})


def test_clearing_an_owner_takes_his_idle_blocks_and_nobody_elses() -> None:
    cache = PrefixCache(12, SIZE)
    visit(cache, make_chain(4, "a", num_public=2))
    visit(cache, make_chain(3, "b"))
    assert cache.clear("a") == 2
    assert [account(cache, owner).num_held for owner in ("a", "b", PUBLIC)] == [0, 3, 2]
    cache.check_integrity([])


def test_accounts_say_who_held_what_for_how_long_and_who_pushed_out_whom() -> None:
    cache = PrefixCache(4, SIZE)
    cache.advance(10.0)
    visit(cache, make_chain(4, "a"))
    cache.advance(12.0)
    visit(cache, make_chain(4, "a"))
    visit(cache, make_chain(3, "b"))
    cache.advance(13.5)
    a, b = account(cache, "a"), account(cache, "b")
    assert (a.num_held, a.block_s, a.num_looked_up, a.num_hits) == (1, 2 * 4 + 1.5 * 1, 8, 4)
    assert (b.num_held, b.block_s, b.num_caused, a.num_suffered, a.num_evicted_own) == (3, 4.5, 3, 3, 0)


# ---- the flood


def flooded_hit_rate(floor: int, num_flooders: int) -> float:
    """The token-weighted hit rate of one tenant with 30 conversations of 6 blocks, beside others that ask for new
    blocks only: 20 of their prompts, of 4 blocks, come between two of its."""
    rng = random.Random(7)
    cache = PrefixCache(256, SIZE)
    cache.set_quotas({"victim": Quota(floor=floor)})
    asked = found = salt = 0
    for turn in range(600):
        for _ in range(20 if num_flooders else 0):
            salt += 1
            assert visit(cache, make_chain(4, f"flood-{rng.randrange(num_flooders)}", 100 + salt)) == 0
        hits = visit(cache, make_chain(6, "victim", rng.randrange(30)))
        if turn >= 100:
            asked, found = asked + 6, found + hits
    return found / asked


def test_eight_flooding_tenants_do_not_take_the_hits_of_a_victim_with_a_floor() -> None:
    alone = flooded_hit_rate(0, 0)
    assert alone > 0.99
    assert flooded_hit_rate(180, 8) >= 0.95 * alone  # 0.998 of 0.996; the control gets 0.085
    assert flooded_hit_rate(0, 8) < 0.5 * alone, "the control: without a floor the flood was to win"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_floors_and_caps_hold_under_every_policy(policy: str) -> None:
    rng = random.Random(2)
    cache = PrefixCache(40, SIZE, POLICIES[policy](40))
    cache.set_quotas({"a": Quota(floor=12), "b": Quota(cap=9)})
    visit(cache, make_chain(6, "a", num_public=2))
    visit(cache, make_chain(8, "a", 1))
    for i in range(150):
        cache.advance(float(i))
        visit(cache, make_chain(rng.randrange(1, 8), rng.choice("bcd"), rng.randrange(2, 40), num_public=0))
        assert account(cache, "b").num_held <= 9
        if i % 10 == 0:
            cache.check_integrity([])
    assert account(cache, "a").num_held == 12
    assert visit(cache, make_chain(6, "a", num_public=2)) == 6


# ---- isolation


def test_names_that_run_into_each_other_share_nothing() -> None:
    cache = PrefixCache(64, SIZE)
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("a\0b", "c"), ("", "abc"), ("tenant", "group")]
    for kind, name in pairs:
        space = derive_namespace(SECRET, kind, name)
        chain = make_chain(2, "a")
        chain.namespace = space
        packed = chain.tokens
        hashes = hash_prompt(ROOT, PUBLIC_SPACE, space, packed, 0, SIZE)
        chain.hashes = [hashes[i : i + 16] for i in range(0, len(hashes), 16)]
        assert visit(cache, chain) == 0, f"{kind!r} and {name!r} found somebody else's block"


class Reader:
    """Sequences over a real store. Each writes its owner's canary, reads all that its table shows, and checks it."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = PrefixCache(num_blocks, SIZE)
        self.kv = KvStore(num_blocks, 1, SIZE, 1, 2, torch.float32, "cpu")
        self.num_foreign = self.num_nan = self.num_read = 0

    def open(self, chain: Chain) -> BlockTable | None:
        table = BlockTable()
        found = self.cache.match(chain, table, len(chain))
        to_zero = self.cache.allocate(chain, table, len(chain) - found)
        if to_zero is None:
            self.cache.free(table)
            return None
        if to_zero:
            self.kv.zero(to_zero)
            self.num_foreign += int(self.kv.data[to_zero].ne(0).sum())  # NaN is not 0 either
        self.read(chain, table, found)
        return table

    def write(self, chain: Chain, table: BlockTable) -> None:
        for i in range(table.num_published, len(table.block_ids)):
            self.kv.data[table.block_ids[i]] = canary(chain.owner_of(i))
        self.cache.insert(chain, table, len(chain))
        self.read(chain, table, len(chain))

    def read(self, chain: Chain, table: BlockTable, num_filled: int) -> None:
        values = self.kv.data[table.block_ids[:num_filled], 0, 0, 0, 0, 0].tolist()
        for i, value in enumerate(values):
            self.num_read += 1
            self.num_nan += value != value
            self.num_foreign += value == value and value != canary(chain.owner_of(i))

    def poison(self) -> None:
        """Put NaN into every free block that was ever used."""
        pool = self.cache.pool
        free = [block_id for block_id in pool._free if pool.owners[block_id]]
        self.kv.data[free] = float("nan")


def canary(owner: str) -> float:
    return {PUBLIC: 1.0, "a": 2.0, "b": 3.0, "c": 4.0}[owner]


def test_in_many_random_steps_nobody_reads_a_foreign_block_or_a_freed_one() -> None:
    """Every free block is full of NaN, which only zeroing or writing cures. In a third of the sequences the digests of
    all owners are forced to be equal, so that only the comparison of what is behind them keeps them apart."""
    torch.set_num_threads(1)
    num_steps = 30_000
    rng, reader = random.Random(3), Reader(24)
    forced = [bytes([i]) * 16 for i in range(8)]
    live: list[tuple[Chain, BlockTable]] = []
    for _ in range(num_steps):
        choice = rng.random()
        if choice < 0.45 and len(live) < 4:
            num_blocks = rng.randrange(1, 7)
            num_public = rng.randrange(min(3, num_blocks))
            chain = make_chain(num_blocks, rng.choice("abc"), rng.randrange(3), num_public=num_public)
            if rng.random() < 0.3:
                chain.hashes = forced[: len(chain)]
            table = reader.open(chain)
            if table is not None:
                reader.write(chain, table)
                live.append((chain, table))
        elif choice < 0.9 and live:
            reader.cache.free(live.pop(rng.randrange(len(live)))[1])
            reader.poison()
        elif choice < 0.95:
            reader.cache.evict(rng.randrange(1, 8), rng.choice("abc"))
            reader.poison()
        else:
            floors = {owner: Quota(rng.randrange(4), rng.choice([None, 8, 16])) for owner in "abc"}
            reader.cache.set_quotas(floors)
            reader.poison()
    assert reader.num_read > 1.5 * num_steps
    assert reader.cache.statistics().num_collisions > num_steps / 100
    assert (reader.num_foreign, reader.num_nan) == (0, 0)
