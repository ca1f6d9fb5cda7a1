"""Random lives of four owners' sequences under changing floors, caps and pins, against a model that scans.

The model knows no orders, heaps or counters. A resident block is the path of contents that leads to it, with
its owner and the moment of its last release; what may go is found by looking at all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from kvasir.cache.block_pool import PUBLIC
from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.cache.run import Run
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import Quota
from kvasir.protocol.tokens import TOKEN_BYTES

SIZE = 1
NUM_BLOCKS = 10
OWNERS = {"a": b"a", "b": b"b", "c": b"g", "d": b"g"}  # c and d share a namespace
Path = tuple[tuple[bytes, bytes], ...]  # (namespace, tokens) of a block and all its ancestors


@dataclass(slots=True)
class Resident:
    owner: str
    released_at: int = 0


@dataclass(eq=False, slots=True)
class Live:
    chain: Chain
    table: BlockTable
    paths: list[Path]


class OwnershipMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_BLOCKS, SIZE)
        self.live: list[Live] = []
        self.pins: dict[str, list[Path]] = {}
        self.resident: dict[Path, Resident] = {}
        self.quotas: dict[str, Quota] = {}
        self.ticks = 0
        self.now = 0.0
        self.block_s = dict.fromkeys([*OWNERS, PUBLIC], 0.0)
        self.suffered = dict.fromkeys([*OWNERS, PUBLIC], 0)
        self.caused = dict.fromkeys([*OWNERS, PUBLIC], 0)
        self.evicted_own = dict.fromkeys([*OWNERS, PUBLIC], 0)

    # ---- the model

    def in_use(self) -> set[Path]:
        used = {path for live in self.live for path in live.paths[: live.table.num_published]}
        return used.union(*self.pins.values())

    def held(self) -> dict[str, int]:
        """Resident blocks by owner, and the unpublished ones of live tables, counted block by block."""
        counts = dict.fromkeys([*OWNERS, PUBLIC], 0)
        for block in self.resident.values():
            counts[block.owner] += 1
        for live in self.live:
            for i in range(len(live.table.block_ids)):
                if i >= live.table.num_published or i in live.table.duplicates:
                    counts[live.chain.owner_of(i)] += 1
        return counts

    def quota(self, owner: str) -> Quota:
        return self.quotas.get(owner, Quota())

    def leaves(self) -> list[Path]:
        used = self.in_use()
        parents = {path[:-1] for path in self.resident}
        return [path for path in self.resident if path not in used and path not in parents]

    def go(self, path: Path, requester: str | None) -> None:
        owner = self.resident.pop(path).owner
        if owner == requester:
            self.evicted_own[owner] += 1
        else:
            self.suffered[owner] += 1
            if requester is not None:
                self.caused[requester] += 1

    def take_own(self, owner: str) -> bool:
        mine = [path for path in self.leaves() if self.resident[path].owner == owner]
        if not mine:
            return False
        self.go(min(mine, key=lambda path: self.resident[path].released_at), owner)
        return True

    def take_any(self, requester: str | None) -> bool:
        held = self.held()

        def may_go(path: Path) -> bool:
            owner = self.resident[path].owner
            floor = self.quota(owner).floor
            return held[owner] > floor or (owner == requester and held[owner] == floor)

        def key(path: Path) -> tuple[bool, int]:
            block = self.resident[path]
            cap = self.quota(block.owner).cap
            return cap is None or held[block.owner] <= cap, block.released_at

        best = min(filter(may_go, self.leaves()), key=key, default=None)
        if best is not None:
            self.go(best, requester)
        return best is not None or (
            requester is not None and bool(self.quota(requester).floor) and self.take_own(requester)
        )

    def make_room(self, owner: str, num_blocks: int, num_own: int) -> bool:
        cap = self.quota(owner).cap
        while cap is not None and self.held()[owner] + num_own > cap:
            if not self.take_own(owner):
                return False
        while NUM_BLOCKS - sum(self.held().values()) < num_blocks:
            if not self.take_any(owner):
                return False
        return True

    def release(self, paths: list[Path]) -> None:
        """Call it when nobody references `paths` for the one who did."""
        used = self.in_use()
        for path in reversed(paths):
            if path not in used:
                self.ticks += 1
                self.resident[path].released_at = self.ticks

    def allocate(self, live: Live, num_blocks: int) -> bool:
        chain, table = live.chain, live.table
        indices = range(len(table.block_ids), len(table.block_ids) + num_blocks)
        num_own = sum(chain.owner_of(i) == chain.owner for i in indices)
        before = self.resident.copy(), self.suffered.copy(), self.caused.copy(), self.evicted_own.copy()
        fits = self.make_room(chain.owner, num_blocks, num_own)
        num_evicted = self.cache.statistics().num_evicted
        done = self.cache.allocate(chain, table, num_blocks) is not None
        assert done == fits
        if not done and self.cache.statistics().num_evicted == num_evicted:
            self.resident, self.suffered, self.caused, self.evicted_own = before  # refused without trying
        if not done and self.cache.statistics().num_evicted > num_evicted:
            assert self.quotas, "an allocation failed half-way without any quota"
            assert self.cache.num_available + self.cache.reserve_of(chain.owner) < num_blocks, "it would be tried again"
        return done

    # ---- what sequences do

    @rule(
        target=sequences,
        owner=st.sampled_from(list(OWNERS)),
        num_public=st.integers(0, 3),
        tokens=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=5),
    )
    def submit(self, owner: str, num_public: int, tokens: list[int]) -> Live:
        return self.begin(owner, num_public, tokens)

    @rule(
        owner=st.sampled_from(list(OWNERS)),
        num_public=st.integers(0, 2),
        visits=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4),
    )
    def visit(self, owner: str, num_public: int, visits: list[list[int]]) -> None:
        """Whole lives, one after the other: what fills a cache with idle blocks."""
        for tokens in visits:
            live = self.begin(owner, num_public, tokens)
            self.publish_all(live)
            self.end(live)

    def begin(self, owner: str, num_public: int, tokens: list[int]) -> Live:
        chain = make_chain(owner, num_public)
        chain.extend(tokens)
        live = Live(chain, BlockTable(), make_paths(chain))
        found = self.cache.match(chain, live.table, len(chain))
        assert found == next((i for i, path in enumerate(live.paths) if path not in self.resident), len(chain))
        self.live.append(live)
        self.allocate(live, len(chain) - found)
        return live

    @rule(live=sequences)
    def publish(self, live: Live) -> None:
        self.publish_all(live)

    def publish_all(self, live: Live) -> None:
        start, end = live.table.num_published, len(live.table.block_ids)
        self.cache.insert(live.chain, live.table, end)
        for i in range(start, end):
            self.resident.setdefault(live.paths[i], Resident(live.chain.owner_of(i)))

    @rule(live=consumes(sequences))
    def finish(self, live: Live) -> None:
        self.end(live)

    def end(self, live: Live) -> None:
        self.live.remove(live)
        self.release(live.paths[: live.table.num_published])
        self.cache.free(live.table)

    # ---- what operators do

    @rule(owner=st.sampled_from(list(OWNERS)), floor=st.integers(0, 6), cap=st.none() | st.integers(1, 9))
    def set_quota(self, owner: str, floor: int, cap: int | None) -> None:
        quotas = self.quotas | {owner: Quota(floor, cap)}
        num_pinned = sum(map(len, self.pins.values()))
        fits = sum(quota.floor for quota in quotas.values()) + num_pinned <= NUM_BLOCKS and (
            cap is None or floor <= cap
        )
        try:
            self.cache.set_quotas(quotas)
        except BadRequest:
            assert not fits
            return
        assert fits
        self.quotas = quotas
        self.shrink_to_caps()

    @rule(owner=st.sampled_from(list(OWNERS)))
    def lift_quota(self, owner: str) -> None:
        self.quotas.pop(owner, None)
        self.cache.set_quotas(self.quotas)
        self.shrink_to_caps()  # of the others, what was in use when their caps were set

    def shrink_to_caps(self) -> None:
        for owner, quota in self.quotas.items():
            while quota.cap is not None and self.held()[owner] > quota.cap and self.take_own(owner):
                pass

    @rule(name=st.sampled_from(["x", "y"]), tokens=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3))
    def pin(self, name: str, tokens: list[int]) -> None:
        chain = make_chain("a", 3)
        chain.extend(tokens)
        paths = make_paths(chain)
        found = next((i for i, path in enumerate(paths) if path not in self.resident), len(paths))
        old = self.pins.pop(name, [])
        others = sum(map(len, self.pins.values()))
        pinned = sum(quota.floor for quota in self.quotas.values()) + others + found <= NUM_BLOCKS
        self.pins[name] = paths[:found]  # while the old one goes
        self.release(old)
        if not pinned:
            del self.pins[name]
            self.release(paths[:found])
        assert self.cache.pin(name, chain) == (found if pinned else 0)

    @rule(name=st.sampled_from(["x", "y"]))
    def unpin(self, name: str) -> None:
        self.release(self.pins.pop(name, []))
        self.cache.unpin(name)

    @rule(owner=st.sampled_from([*OWNERS, PUBLIC]))
    def clear(self, owner: str) -> None:
        while any(self.resident[path].owner == owner for path in self.leaves()):
            self.take_own(owner)
        self.cache.clear(owner)

    @rule(num_blocks=st.integers(1, 3), owner=st.none() | st.sampled_from(list(OWNERS)))
    def evict(self, num_blocks: int, owner: str | None) -> None:
        expected = [self.take_any(owner) for _ in range(num_blocks)].count(True)
        assert self.cache.evict(num_blocks, owner) == expected

    @precondition(lambda self: self.resident)
    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.cache.advance(self.now)
        for owner, num_held in self.held().items():
            self.block_s[owner] += num_held * seconds

    @invariant()
    def nothing_contradicts(self) -> None:
        self.cache.check_integrity([live.table for live in self.live])
        assert self.cache.statistics().num_published == len(self.resident)
        held, seen = self.held(), {s.tenant: s for s in self.cache.accounts()}
        for owner, account in seen.items():
            assert account.num_held == held[owner]
            assert account.block_s == self.block_s[owner]
            assert (account.num_suffered, account.num_caused, account.num_evicted_own) == (
                self.suffered[owner],
                self.caused[owner],
                self.evicted_own[owner],
            )
        assert sum(held.values()) == NUM_BLOCKS - self.cache.pool.num_free
        seen_owners = {path: run.owner for run in self.cache._tree for path in paths_of(run)}
        assert seen_owners == {path: block.owner for path, block in self.resident.items()}


def make_chain(owner: str, num_public: int) -> Chain:
    return Chain(
        owner=owner,
        root=bytes(16),
        public_namespace=b"p" * 16,
        namespace=OWNERS[owner] * 16,
        num_public_blocks=num_public,
        block_size=SIZE,
    )


def make_paths(chain: Chain) -> list[Path]:
    contents = [(chain.namespace_of(i), chain.tokens_of(i, i + 1)) for i in range(len(chain))]
    return [tuple(contents[: i + 1]) for i in range(len(contents))]


def paths_of(run: Run) -> list[Path]:
    """The paths of the blocks of `run`."""
    above = paths_of(run.parent)[-1] if run.parent is not None else ()
    size = SIZE * TOKEN_BYTES
    contents = [(run.namespace, run.tokens[i * size : (i + 1) * size]) for i in range(len(run))]
    return [(*above, *contents[: i + 1]) for i in range(len(contents))]


OwnershipMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestOwnershipMachine = OwnershipMachine.TestCase


def test_what_was_in_use_when_a_cap_was_set_goes_when_quotas_are_set_again() -> None:
    machine = OwnershipMachine()
    live = machine.begin("b", 0, [0, 0])
    machine.publish_all(live)
    machine.set_quota("b", 0, 1)
    machine.end(live)
    machine.lift_quota("a")
    machine.nothing_contradicts()
    assert machine.cache.statistics().num_published == 1
