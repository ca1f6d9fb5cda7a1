"""Random lives of sequences over a small pool, against a plain model of leaf-first LRU and of every hit.

The model knows no hashes, ref counts or lists: a resident block is the path of contents that leads to it, with the
moment of its last release. It scans where the cache computes.
"""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import split_hashes

SIZE = 2
NUM_BLOCKS = 10
Path = tuple[tuple[str, bytes], ...]  # (owner, tokens) of a block and all its ancestors


@dataclass(eq=False)
class Live:
    """A sequence: its chain, its table, and the path of each of its full blocks."""

    chain: Chain
    table: BlockTable
    paths: list[Path]


class CacheMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_BLOCKS, SIZE)
        self.live: list[Live] = []
        self.released: dict[Path, int] = {}  # resident paths -> when last released
        self.clock = 0
        self.reported: set[bytes] = set()  # what a follower of the events believes
        self.last_owner: dict[int, str] = {}

    # ---- the model

    def in_use(self) -> set[Path]:
        return {path for live in self.live for path in live.paths[: live.table.num_published]}

    def model_match(self, paths: list[Path]) -> int:
        return next((i for i, path in enumerate(paths) if path not in self.released), len(paths))

    def model_evict(self) -> Path | None:
        in_use = self.in_use()
        leaves = [
            path
            for path in self.released
            if path not in in_use and not any(other[: len(path)] == path for other in self.released if other != path)
        ]
        victim = min(leaves, key=lambda path: self.released[path], default=None)
        if victim is not None:
            del self.released[victim]
        return victim

    def model_release(self, live: Live) -> None:
        still = self.in_use()
        for path in reversed(live.paths[: live.table.num_published]):
            self.clock += 1
            if path not in still:
                self.released[path] = self.clock

    def allocate(self, live: Live, num_blocks: int) -> bool:
        num_free = self.cache.pool.num_free
        to_zero = self.cache.allocate(live.chain, live.table, num_blocks)
        num_idle = len(set(self.released) - self.in_use())
        assert (to_zero is None) == (num_blocks > num_free + num_idle)
        if to_zero is None:
            return False
        for _ in range(num_blocks - num_free):
            assert self.model_evict() is not None
        first = len(live.table.block_ids) - num_blocks
        for i, block_id in enumerate(live.table.block_ids[first:], first):
            owner = live.chain.owner_of(i)
            assert (block_id in to_zero) == (self.last_owner.get(block_id, owner) != owner)
            self.last_owner[block_id] = owner
        return True

    # ---- what sequences do

    @rule(
        target=sequences,
        tenant=st.sampled_from(["a", "b"]),
        num_public=st.integers(0, 2),
        tokens=st.lists(st.sampled_from([0, 1]), min_size=0, max_size=7),
    )
    def submit(self, tenant: str, num_public: int, tokens: list[int]) -> Live:
        chain = make_chain(tenant, num_public)
        chain.extend(tokens)
        live = Live(chain, BlockTable(), make_paths(chain))
        expected = self.model_match(live.paths)
        num_found, num_idle = self.cache.probe(chain, len(chain))
        in_use = self.in_use()
        assert (num_found, num_idle) == (expected, sum(path not in in_use for path in live.paths[:expected]))
        assert self.cache.match(chain, live.table, len(chain)) == expected
        self.live.append(live)
        self.allocate(live, len(chain) - expected)
        return live

    @rule(live=sequences, tokens=st.lists(st.sampled_from([0, 1]), min_size=SIZE, max_size=SIZE))
    def grow(self, live: Live, tokens: list[int]) -> None:
        if len(live.table.block_ids) < len(live.chain):  # out of blocks when it was submitted
            self.allocate(live, len(live.chain) - len(live.table.block_ids))
        elif self.allocate(live, 1):
            live.chain.extend(tokens)
            live.paths = make_paths(live.chain)

    @rule(live=sequences)
    def publish(self, live: Live) -> None:
        num_blocks = min(len(live.chain), len(live.table.block_ids))
        self.cache.insert(live.chain, live.table, num_blocks)
        assert live.table.num_published == num_blocks
        for path in live.paths[:num_blocks]:
            self.released.setdefault(path, 0)

    @rule(live=consumes(sequences))
    def cancel(self, live: Live) -> None:
        self.live.remove(live)
        self.model_release(live)
        self.cache.free(live.table)

    @rule(live=sequences)
    def preempt_and_resume(self, live: Live) -> None:
        self.live.remove(live)
        self.model_release(live)
        self.cache.free(live.table)
        self.live.append(live)
        assert self.cache.match(live.chain, live.table, len(live.chain)) == self.model_match(live.paths)

    @rule(num_blocks=st.integers(1, 3))
    def evict(self, num_blocks: int) -> None:
        num_evicted = self.cache.evict(num_blocks)
        assert [self.model_evict() is not None for _ in range(num_blocks)].count(True) == num_evicted

    @rule()
    def step_ends(self) -> None:
        pieces, packed = self.cache.take_events()
        stored, removed = {block.hashes for piece in pieces for block in piece.blocks()}, set(split_hashes(packed))
        assert not stored & removed
        assert not stored & self.reported
        assert removed <= self.reported
        self.reported -= removed
        for piece in pieces:
            for block in piece.blocks():
                assert block.parent is None or block.parent in self.reported, "a child came before its parent"
                self.reported.add(block.hashes)
        assert self.reported == set(split_hashes(self.cache.resident_hashes()))

    @invariant()
    def nothing_contradicts(self) -> None:
        self.cache.check_integrity([live.table for live in self.live])
        assert self.cache.statistics().num_published == len(self.released)


def make_chain(tenant: str, num_public: int) -> Chain:
    return Chain(
        owner=tenant,
        root=bytes(16),
        public_namespace=b"p" * 16,
        namespace=tenant.encode() * 16,
        num_public_blocks=num_public,
        block_size=SIZE,
    )


def make_paths(chain: Chain) -> list[Path]:
    contents = [(chain.owner_of(i), chain.tokens_of(i, i + 1)) for i in range(len(chain))]
    return [tuple(contents[: i + 1]) for i in range(len(contents))]


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestCacheMachine = CacheMachine.TestCase
