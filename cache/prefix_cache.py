"""The prefix cache: finds, keeps and evicts blocks by what they hold.

A published block's identity is (hash, namespace, parent, token ids). The hash finds it, the other three decide: a
digest with other contents is a miss. Published blocks are immutable, and none outlives its parent. A block whose last
reference goes stays resident, *idle*, until its room is needed.

Consecutive blocks that have always been used together are kept as one run (`cache.run`). Every operation works on runs
or slices of them, so its cost hardly depends on the number of blocks.

Every block that is not free has an owner; floors and caps (`cache.ownership`) decide which owner gives blocks up, and
`cache.eviction` lets them go. Pinned blocks are referenced by the cache itself.

Knows nothing of tensors or scheduling; what time it is, `advance` says. Not thread-safe.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

from kvasir.cache.block_pool import PUBLIC, BlockPool, IntegrityError
from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.events import EventLog, Stored
from kvasir.cache.eviction import Eviction
from kvasir.cache.ownership import Owners, check_quotas
from kvasir.cache.policies.lru import Lru
from kvasir.cache.policy import Observer, PolicyFactory
from kvasir.cache.run import BLOCK_IDS, Run
from kvasir.cache.run_tree import RunTree
from kvasir.protocol.messages import KvAccount, Quota
from kvasir.protocol.sampling import RetentionHint
from kvasir.protocol.tokens import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Blocks now, and counters since the start. `num_collisions`: equal digests with other contents."""

    num_blocks: int
    num_free: int
    num_idle: int
    num_published: int
    num_matched: int
    num_inserted: int
    num_duplicates: int
    num_evicted: int
    num_collisions: int
    num_pinned: int


class PrefixCache:
    """`num_blocks` blocks of `block_size` tokens, allocated to tables and shared by what they hold.

    `make_policy` is called once for the common order and once per owner with a quota. If it is an `Observer`, too, it
    is told about requests.
    """

    def __init__(self, num_blocks: int, block_size: int, make_policy: PolicyFactory = Lru) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._owners = Owners(make_policy)
        self._observer = make_policy if isinstance(make_policy, Observer) else None
        self._tree = RunTree()
        self._events = EventLog()
        self._eviction = Eviction(self.pool, self._tree, self._owners, self._events)
        self._pins: dict[str, BlockTable] = {}
        self._num_matched = self._num_inserted = self._num_duplicates = self._num_collisions = 0

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can hand to an owner without a quota: free ones and idle ones that may go.

        With quotas there may be some more: those above other owners' blocks, which may have to stay, are not counted.
        """
        return self.pool.num_free + self._owners.num_takable

    @property
    def num_unused(self) -> int:
        """How many blocks are free or idle, whichever owner may take them."""
        return self.pool.num_free + self._owners.num_idle

    def reserve_of(self, owner: str) -> int:
        """Return how many blocks `allocate` can hand to `owner` beyond `num_available`: idle ones within its floor."""
        order = self._owners.order_of(owner)
        return order.num_evictable - order.num_takable

    def room_of(self, owner: str) -> int | None:
        """Return how many blocks `owner` may still allocate under its cap, counting its own evictable ones.

        None: it has no cap.
        """
        return self._owners.order_of(owner).room

    def quota_of(self, owner: str) -> Quota:
        return self._owners.order_of(owner).quota

    def num_above_floor(self, owner: str) -> int:
        """Return how many of the blocks that `owner` holds are above its floor."""
        return max(0, self._owners.account(owner).num_held - self._owners.order_of(owner).quota.floor)

    def is_below_floor(self, owner: str) -> bool:
        return self._owners.order_of(owner).is_below_floor

    def advance(self, now: float) -> None:
        """Say what time it is, in seconds of any clock that does not go back. Here a policy that learns does so."""
        self._owners.now = max(self._owners.now, now)
        if self._observer is not None:
            self._observer.on_advance(self._owners.now)

    def match(self, chain: Chain, table: BlockTable, max_blocks: int, *, again: bool = False) -> int:
        """Fill the empty `table` with the longest resident run of `chain`, referenced; return its length in blocks.

        At most `max_blocks`. A digest whose stored parent, namespace or token ids differ counts as a miss. `again`: a
        sequence comes back, which is no use of the cache that its owner's account should show.
        """
        end = min(max_blocks, len(chain))
        last: Run | None = None
        start = 0
        while start < end and (run := self._find(chain, start, last)) is not None:
            run = self._share(chain, run, end)
            if run is None:
                break
            table.block_ids += run.block_ids.tolist()
            last, start = run, run.end
        table.last, table.num_published = last, start
        self._num_matched += start
        if not again:
            account = self._owners.account(chain.owner)
            account.num_looked_up += end
            account.num_hits += start
            if self._observer is not None:
                self._observer.on_match(chain, table)
        return start

    def probe(self, chain: Chain, max_blocks: int) -> tuple[int, int]:
        """Return (blocks that `match` would find, how many of them are idle) without changing anything.

        Compares no token ids: a forecast for the scheduler, not a hit. O(log n) per run.
        """
        end = min(max_blocks, len(chain))
        last: Run | None = None
        start = num_idle = 0
        while start < end and (run := self._find(chain, start, last)) is not None:
            num_blocks = chain.num_alike(run, end)
            start += num_blocks
            num_idle += 0 if run.ref_count else num_blocks
            if num_blocks < len(run):
                break
            last = run
        return start, num_idle

    def allocate(self, chain: Chain, table: BlockTable, num_blocks: int) -> list[int] | None:
        """Append `num_blocks` fresh blocks to `table`, evicting idle ones where none are free or the owner's cap asks
        for it.

        Returns the ids of those that had another owner and must be zeroed before anything reads them, or None when
        that many cannot be had: then `table` is as it was. Up to `num_available` (and `reserve_of`, and within
        `room_of`) that cannot happen; beyond, it tries, and what it has evicted in vain stays evicted.
        """
        num_public = min(max(0, chain.num_public_blocks - len(table.block_ids)), num_blocks)
        num_own = num_blocks - num_public
        if not self._eviction.make_room(chain.owner, num_blocks, num_own):
            return None
        return self._hand_out(PUBLIC, num_public, table) + self._hand_out(chain.owner, num_own, table)

    def insert(self, chain: Chain, table: BlockTable, num_blocks: int) -> None:
        """Publish the first `num_blocks` blocks of `table`, all full and computed, as far as they are not yet.

        Where the same block is resident already (two sequences computed it at the same time) the first one stays
        the published one, and `table` references it beside its own. A hash collision ends publishing for `table`.
        """
        if not table.publishable:
            return
        while table.num_published < num_blocks:
            start = table.num_published
            run = self._find(chain, start, table.last)
            if run is None:
                run = self._publish(chain, table, chain.zone_end(start, num_blocks))
            else:
                run = self._share(chain, run, num_blocks)
                if run is None:
                    table.has_collided = True
                    return
                table.duplicates += range(start, run.end)
                self._num_duplicates += len(run)
            table.last, table.num_published = run, run.end

    def free(self, table: BlockTable) -> None:
        """Give back everything that `table` references and empty it. Published blocks stay resident, idle."""
        for hint in table.retention:
            self._retain(table, hint)
        if self._observer is not None:
            self._observer.on_free(table)
        for run in table.runs():  # the deepest first: children before parents
            self._eviction.release(run)
        private_ids = table.private_ids()
        for owner, num_blocks in Counter(map(self.pool.owners.__getitem__, private_ids)).items():
            assert owner is not None
            self._owners.hold(owner, -num_blocks)
        self.pool.free(private_ids)
        table.block_ids = []  # a new list: slices of the last step may still show the old one
        table.duplicates = []
        table.last, table.num_published = None, 0
        table.has_collided = False

    def evict(self, num_blocks: int, owner: str | None = None) -> int:
        """Evict up to `num_blocks` idle blocks to make room for `owner`, and return how many went.

        `owner` None: for no owner in particular; all floors hold.
        """
        return self._eviction.evict(num_blocks, owner)

    def clear(self, owner: str) -> int:
        """Evict all idle blocks of `owner` on which no other block builds, and return how many went."""
        return self._eviction.clear(owner)

    def set_quotas(self, quotas: Mapping[str, Quota]) -> None:
        """Replace all quotas by these, at once: an owner above its new cap loses idle blocks.

        O(number of runs) when an owner gets its first quota or loses it.

        Raises:
            BadRequest: the floors do not fit together, or published blocks were given a quota; nothing has changed.
        """
        check_quotas(quotas, self.pool.num_blocks, self._num_pinned)
        for order in self._owners.set_quotas(quotas, list(self._tree)):
            if order.account is not None:
                self._eviction.evict_own(order.account.owner, order.num_over_cap())

    def pin(self, name: str, chain: Chain) -> int:
        """Keep what is resident of `chain` until `unpin(name)`; return how many blocks that are now.

        Call it again when more is resident. What was pinned under that name before is unpinned.
        """
        table = BlockTable()
        num_blocks = self.match(chain, table, len(chain), again=True)
        self.unpin(name)
        if self._owners.total_floor + self._num_pinned + num_blocks > self.pool.num_blocks:
            self.free(table)
            return 0
        self._pins[name] = table
        return num_blocks

    def num_pinned(self, name: str) -> int:
        """Return how many blocks are pinned under `name`."""
        table = self._pins.get(name)
        return len(table.block_ids) if table else 0

    def unpin(self, name: str) -> None:
        """Unpin what is pinned under `name`: unless it is in use, it can be evicted from now on."""
        table = self._pins.pop(name, None)
        if table is not None:
            self.free(table)

    def take_events(self) -> tuple[list[Stored], bytes]:
        """Return what was stored, parents before children, and the packed hashes removed since the last call.

        Netted: no hash is in both.
        """
        return self._events.take()

    def resident(self) -> list[Stored]:
        """Return all published blocks, parents before their children."""
        return [Stored(run.parent_hash, run.hashes, run.tokens) for run in self._tree.by_depth()]

    def resident_hashes(self) -> bytes:
        """Return the packed hashes of all published blocks, parents before their children."""
        return b"".join(run.hashes for run in self._tree.by_depth())

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            num_blocks=self.pool.num_blocks,
            num_free=self.pool.num_free,
            num_idle=self._owners.num_idle,
            num_published=self._num_inserted - self._eviction.num_evicted,
            num_matched=self._num_matched,
            num_inserted=self._num_inserted,
            num_duplicates=self._num_duplicates,
            num_evicted=self._eviction.num_evicted,
            num_collisions=self._num_collisions,
            num_pinned=self._num_pinned,
        )

    def accounts(self) -> list[KvAccount]:
        """Return the accounts of all owners there ever were."""
        return self._owners.statements()

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Check pool, index, tree and policy against each other and against `tables`, all that exist. O(num_blocks).

        Raises:
            IntegrityError: with the first contradiction found.
        """
        tables = [*tables, *self._pins.values()]
        self._tree.check_integrity(
            Counter(run for table in tables for run in table.runs()), self.block_size * TOKEN_BYTES
        )
        owners = self.pool.owners
        private_ids = [block_id for table in tables for block_id in table.private_ids()]
        self.pool.check_integrity([*private_ids, *(block_id for run in self._tree for block_id in run.block_ids)])
        self._owners.check_integrity(list(self._tree), [owners[block_id] or "" for block_id in private_ids])
        for run in self._tree:
            if any(owners[block_id] != run.owner for block_id in run.block_ids):
                raise IntegrityError(f"the run of block {run.block_ids[0]} of {run.owner} has another owner's block")
        for table in tables:
            if table.num_published != (table.last.end if table.last is not None else 0):
                raise IntegrityError(f"a table counts {table.num_published} blocks as published, its last run does not")

    # ---- runs

    def _find(self, chain: Chain, start: int, parent: Run | None) -> Run | None:
        """Return what may be the run of `chain` that begins at `start` below `parent`: the digest says so."""
        return self._tree.find(chain.root if parent is None else parent, chain.hashes[start])

    def _share(self, chain: Chain, run: Run, end: int) -> Run | None:
        """Reference what `chain` has in common with `run`, which was found for it, before block `end`: all of it, or
        its first part, cut off. Return that; None if there is nothing: the hash of the first block has collided."""
        num_blocks = chain.num_shared(run, end)
        if not num_blocks:
            self._num_collisions += 1
            return None
        if num_blocks < len(run):
            run = self._tree.split(run, num_blocks)
        self._eviction.reference(run)
        return run

    def _publish(self, chain: Chain, table: BlockTable, end: int) -> Run:
        """Publish the blocks of `table` up to `end`, all of one zone, and return the run that they are the end of."""
        start, parent = table.num_published, table.last
        block_ids = array(BLOCK_IDS, table.block_ids[start:end])
        hashes, tokens = b"".join(chain.hashes[start:end]), chain.tokens_of(start, end)
        if parent is not None and parent.is_open and start != chain.num_public_blocks:
            run = parent
            run.grow(block_ids, hashes, tokens)
        else:
            owner = chain.owner_of(start)
            run = Run(parent, chain.root, start, chain.namespace_of(start), owner, block_ids, hashes, tokens)
            self._tree.add(run)
            if parent is not None:
                parent.is_open = False
                if self._owners.are_apart(parent, run):
                    self._owners.block(parent)
        self._num_inserted += end - start
        self._events.store(Stored(chain.hashes[start - 1] if start else None, hashes, tokens))
        return run

    def _retain(self, table: BlockTable, hint: RetentionHint) -> None:
        """Mark what `hint` asks for among the published blocks of `table`, which are cut where that begins and ends.

        Only blocks of owners with a quota: in the common order it would hold on to others' room.
        """
        start = hint.start // self.block_size
        end = table.num_published if hint.end is None else -(-hint.end // self.block_size)
        for depth in (start, end):
            run = next((run for run in self._own_runs(table) if run.start < depth < run.end), None)
            if run is not None:
                self._tree.split(run, depth - run.start)
        for run in self._own_runs(table):
            if start <= run.start and run.end <= end:
                run.priority = hint.priority
                run.retained_until = inf if hint.duration_s is None else self._owners.now + hint.duration_s

    def _own_runs(self, table: BlockTable) -> Iterator[Run]:
        """Yield the runs of `table` whose owners have a quota, and with it an order of their own."""
        return (run for run in table.runs() if self._owners.order_of(run.owner).account is not None)

    def _hand_out(self, owner: str, num_blocks: int, table: BlockTable) -> list[int]:
        """Append free blocks to `table`; return the ids of those to be zeroed."""
        if not num_blocks:
            return []
        block_ids, to_zero = self.pool.allocate(owner, num_blocks)
        table.block_ids += block_ids
        self._owners.hold(owner, num_blocks)
        return to_zero

    @property
    def _num_pinned(self) -> int:
        return sum(len(table.block_ids) for table in self._pins.values())
