"""The prefix cache: finds, keeps and evicts blocks by what they hold.

A published block's identity is (hash, namespace, parent hash, token ids). The hash finds it, the other three decide:
a digest with other contents is a miss. Published blocks are immutable, and none outlives its parent. A block whose
last reference goes stays resident, *idle*, until its room is needed.

Every block that is not free has an owner; floors and caps of owners (`cache.ownership`) say whose blocks go. Pinned
blocks are referenced by the cache itself.

Knows nothing of tensors or scheduling; what time it is, `advance` says. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cache.block_pool import PUBLIC, Block, BlockPool, IntegrityError
from cache.block_table import BlockTable, Chain
from cache.ownership import Account, Owners, OwnerStatistics, Quota, check_quotas
from cache.policy import Lru, Observer, PolicyFactory


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Blocks now, and counters since the start. `num_collisions`: equal digests with other contents."""

    num_blocks: int
    num_free: int
    num_idle: int
    num_published: int
    num_matched: int
    num_inserted: int
    num_twins: int
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
        self._pins: dict[str, BlockTable] = {}
        self._now = 0.0
        self._num_releases = 0
        self._by_hash: dict[bytes, Block] = {}
        self._stored: dict[bytes, None] = {}  # this step's events; a dict keeps the order: parents before children
        self._removed: dict[bytes, None] = {}
        self._num_matched = self._num_inserted = self._num_twins = self._num_evicted = self._num_collisions = 0

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can hand to an owner without a quota: free ones and idle ones that may go.

        With quotas there may be some more: those above other owners' blocks, which may have to stay, are not counted.
        """
        return self.pool.num_free + self._owners.num_takable

    def reserve_of(self, owner: str) -> int:
        """Return how many blocks `allocate` can hand to `owner` beyond `num_available`: idle ones within his floor."""
        order = self._owners.order_of(owner)
        return order.num_evictable - order.num_takable

    def room_of(self, owner: str) -> int | None:
        """Return how many blocks the cap of `owner` lets him have anew, those counted that he can evict of his own.

        None: he has no cap.
        """
        order = self._owners.order_of(owner)
        if order.quota.cap is None or order.account is None:
            return None
        return max(0, order.quota.cap - order.account.num_held + order.num_evictable)

    def quota_of(self, owner: str) -> Quota:
        return self._owners.order_of(owner).quota

    def num_above_floor(self, owner: str) -> int:
        """Return how many of the blocks that `owner` holds are not within his floor."""
        return max(0, self._account(owner).num_held - self._owners.order_of(owner).quota.floor)

    def is_below_floor(self, owner: str) -> bool:
        return self._owners.order_of(owner).is_below_floor

    def advance(self, now: float) -> None:
        """Say what time it is, in seconds of any clock that does not go back."""
        self._now = max(self._now, now)

    def match(self, chain: Chain, table: BlockTable, max_blocks: int, *, again: bool = False) -> int:
        """Fill the empty `table` with the longest resident run of `chain`, referenced; return its length in blocks.

        At most `max_blocks`. A digest whose stored parent, namespace or token ids differ counts as a miss. `again`: a
        sequence comes back, which is no use of the cache that its owner's account should show.
        """
        by_hash = self._by_hash
        tokens, num_public = chain.tokens, chain.num_public_blocks
        block_ids = table.block_ids
        previous: Block | None = None
        for i, digest in enumerate(chain.hashes[:max_blocks]):
            block = by_hash.get(digest)
            if block is None:
                break
            namespace = chain.public_namespace if i < num_public else chain.namespace
            if (
                block.parent is not previous
                or block.tokens != tokens[i]
                or block.namespace != namespace
                or (previous is None and block.parent_hash != chain.root)
            ):
                self._num_collisions += 1
                break
            self._reference(block)
            block_ids.append(block.block_id)
            previous = block
        table.num_published = len(block_ids)
        self._num_matched += len(block_ids)
        if not again:
            account = self._account(chain.owner)
            account.num_looked_up += min(max_blocks, len(chain))
            account.num_hits += len(block_ids)
            if self._observer is not None:
                self._observer.on_match(chain, table, self._now)
        return len(block_ids)

    def probe(self, chain: Chain, max_blocks: int) -> tuple[int, int]:
        """Return (blocks that `match` would find, how many of them are idle) without changing anything.

        O(log n), since a resident block's parent is resident and a referenced block's parent is referenced. Compares
        no token ids: a forecast for the scheduler, not a hit.
        """
        by_hash = self._by_hash
        hashes = chain.hashes
        num_resident = _partition(min(max_blocks, len(hashes)), lambda i: hashes[i] in by_hash)
        num_in_use = _partition(num_resident, lambda i: by_hash[hashes[i]].ref_count > 0)
        return num_resident, num_resident - num_in_use

    def allocate(self, chain: Chain, table: BlockTable, num_blocks: int) -> list[int] | None:
        """Append `num_blocks` fresh blocks to `table`, evicting idle ones where none are free or the owner's cap asks
        for it.

        Returns the ids of those that had another owner and must be zeroed before anything reads them, or None when
        that many cannot be had: then `table` is as it was. Up to `num_available` (and `reserve_of`, and within
        `room_of`) that cannot happen; beyond, it tries, and what it has evicted in vain stays evicted.
        """
        owner, block_ids = chain.owner, table.block_ids
        start = len(block_ids)
        num_public = min(max(0, chain.num_public_blocks - start), num_blocks)
        if not self._make_room(owner, num_blocks, num_blocks - num_public):
            return None
        to_zero: list[int] = []
        self._hand_out(PUBLIC, num_public, block_ids, to_zero)
        self._hand_out(owner, num_blocks - num_public, block_ids, to_zero)
        return to_zero

    def insert(self, chain: Chain, table: BlockTable, num_blocks: int) -> None:
        """Publish the first `num_blocks` blocks of `table`, all full and computed, as far as they are not yet.

        Where the same block is resident already (two sequences computed it at the same time) the first one stays
        the published one, and `table` references it beside its own. A hash collision ends publishing for `table`.
        """
        if not table.publishable:
            return
        parent = self._resident(table, table.num_published - 1) if table.num_published else None
        for i in range(table.num_published, num_blocks):
            digest = chain.hashes[i]
            block = self._by_hash.get(digest)
            if block is None:
                block = self.pool.blocks[table.block_ids[i]]
                self._publish(block, digest, parent, chain, i)
            elif (
                block.parent is parent
                and block.tokens == chain.tokens[i]
                and block.namespace == chain.namespace_of(i)
                and (parent is not None or block.parent_hash == chain.root)
            ):
                self._add_twin(table, i, block)
            else:
                self._num_collisions += 1
                table.publishable = False
                return
            parent = block
            table.num_published = i + 1

    def free(self, table: BlockTable) -> None:
        """Give back everything that `table` references and empty it. Published blocks stay resident, idle."""
        blocks, twins = self.pool.blocks, table.twins
        if self._observer is not None:
            self._observer.on_free(table, self._now)
        for i in range(len(table.block_ids) - 1, -1, -1):  # the tail first: children before parents
            self._release(blocks[table.block_ids[i]])
            if twins and i in twins:
                self._release(twins[i])
        table.block_ids = []  # a new list: slices of the last step may still show the old one
        table.twins = {}
        table.num_published = 0
        table.publishable = True

    def evict(self, num_blocks: int, owner: str | None = None) -> int:
        """Evict up to `num_blocks` idle blocks to make room for `owner`, and return how many went.

        `owner` None: for nobody; all floors hold.
        """
        num_evicted = 0
        while num_evicted < num_blocks:
            turn = self._owners.choose(owner)
            block = turn.order.victim() if turn is not None else None
            if turn is None or block is None:
                break
            while block is not None:
                parent = block.parent
                self._evict(block, owner)
                num_evicted += 1
                is_within = parent is None or parent.order is turn.order  # else another order has a new leaf
                block = turn.next() if is_within and num_evicted < num_blocks else None
        return num_evicted

    def clear(self, owner: str) -> int:
        """Evict all idle blocks of `owner` on which no other block builds, and return how many went."""
        num_evicted = 0
        for block in reversed(list(self._by_hash.values())):  # children come after their parents
            if block.owner == owner and not block.ref_count and not block.num_children:
                self._evict(block, owner)
                num_evicted += 1
        return num_evicted

    def set_quotas(self, quotas: Mapping[str, Quota]) -> None:
        """Put these quotas in the place of all there are, at once: whoever holds more than his cap loses idle blocks.

        O(num_blocks) when somebody gets a quota or loses it.

        Raises:
            BadRequest: the floors do not fit together, or published blocks were given a quota; nothing has changed.
        """
        check_quotas(quotas, self.pool.num_blocks, self._num_pinned)
        for order in self._owners.set_quotas(quotas, self.pool.blocks, self._now):
            while order.is_over_cap and order.account is not None and (block := order.victim()) is not None:
                self._evict(block, order.account.owner)

    def pin(self, name: str, chain: Chain) -> int:
        """Keep what is resident of `chain` until `unpin(name)`; return how many blocks that are now.

        Call it again when more is resident. What was pinned under that name is pinned no more.
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
        """Let go of what is pinned under `name`: unless somebody uses it, it can be evicted from now on."""
        table = self._pins.pop(name, None)
        if table is not None:
            self.free(table)

    def take_events(self) -> tuple[bytes, bytes]:
        """Return the packed hashes stored and removed since the last call, netted: no hash is in both."""
        stored, removed = b"".join(self._stored), b"".join(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def resident_hashes(self) -> bytes:
        """Return the packed hashes of all published blocks, parents before their children."""
        return b"".join(self._by_hash)

    def block_of(self, digest: bytes) -> Block | None:
        """Return the published block of `digest`, to be read and not kept, or None if it is not resident."""
        return self._by_hash.get(digest)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            num_blocks=self.pool.num_blocks,
            num_free=self.pool.num_free,
            num_idle=self._owners.num_idle,
            num_published=len(self._by_hash),
            num_matched=self._num_matched,
            num_inserted=self._num_inserted,
            num_twins=self._num_twins,
            num_evicted=self._num_evicted,
            num_collisions=self._num_collisions,
            num_pinned=self._num_pinned,
        )

    def owner_statistics(self) -> list[OwnerStatistics]:
        """Return the accounts of all owners there ever were."""
        return self._owners.statistics(self._now)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Check pool, index, tree and policy against each other and against `tables`, all that exist. O(num_blocks).

        Raises:
            IntegrityError: with the first contradiction found.
        """
        tables = [*tables, *self._pins.values()]
        self.pool.check_integrity(block_id for table in tables for block_id in table.references())
        num_children: dict[int, int] = {}
        for digest, block in self._by_hash.items():
            if block.hash != digest:
                raise IntegrityError(f"block {block.block_id} is indexed under a hash that is not its own")
            parent = block.parent
            if parent is None:
                continue
            num_children[parent.block_id] = num_children.get(parent.block_id, 0) + 1
            if parent.hash is None or parent.hash != block.parent_hash:
                raise IntegrityError(f"block {block.block_id} has outlived its parent")
            if block.ref_count and not parent.ref_count:
                raise IntegrityError(f"block {block.block_id} is referenced, its parent {parent.block_id} is not")
        for block in self.pool.blocks:
            if block.num_children != num_children.get(block.block_id, 0):
                raise IntegrityError(f"block {block.block_id} counts {block.num_children} children wrongly")
            if block.hash is not None and self._by_hash.get(block.hash) is not block:
                raise IntegrityError(f"block {block.block_id} is published but cannot be found")
        self._owners.check_integrity(self.pool.blocks)
        for table in tables:
            for i in range(table.num_published):
                if self._resident(table, i).hash is None:
                    raise IntegrityError(f"a table counts block {table.block_ids[i]} as published; it is not")

    def _resident(self, table: BlockTable, index: int) -> Block:
        """The published block of `table` at `index`: its own or the twin's."""
        return table.twins.get(index) or self.pool.blocks[table.block_ids[index]]

    def _publish(self, block: Block, digest: bytes, parent: Block | None, chain: Chain, index: int) -> None:
        block.hash = digest
        block.namespace = chain.namespace_of(index)
        block.tokens = chain.tokens[index]
        block.parent = parent
        if parent is None:
            block.parent_hash = chain.root
        else:
            assert parent.hash is not None
            block.parent_hash = parent.hash
            parent.num_children += 1
            if block.order is not parent.order:
                self._owners.shield(parent)
        self._by_hash[digest] = block
        assert block.order is not None
        block.order.policy.on_insert(block)
        self._num_inserted += 1
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._stored[digest] = None

    def _add_twin(self, table: BlockTable, index: int, block: Block) -> None:
        self._reference(block)
        table.twins[index] = block
        self._num_twins += 1

    def _reference(self, block: Block) -> None:
        order = block.order
        assert order is not None
        block.ref_count += 1
        order.policy.on_hit(block)
        if block.ref_count == 1:
            order.num_idle -= 1
            if block.num_shields:
                order.num_shielded -= 1

    def _release(self, block: Block) -> None:
        block.ref_count -= 1
        if block.ref_count:
            return
        if block.hash is None:
            self._give_back(block)
            return
        order = block.order
        assert order is not None
        self._num_releases += 1
        block.released_at = self._num_releases
        order.num_idle += 1
        if block.num_shields:
            order.num_shielded += 1
        order.policy.on_release(block)

    def _make_room(self, owner: str, num_blocks: int, num_own: int) -> bool:
        """Evict until `num_blocks` are free and the cap of `owner` leaves room for `num_own` of them."""
        room = self.room_of(owner)
        num_idle = self._owners.num_takable_at_most + self.reserve_of(owner)
        if (room is not None and room < num_own) or num_blocks > self.pool.num_free + num_idle:
            return False
        if room is not None:
            order = self._owners.order_of(owner)
            assert order.account is not None and order.quota.cap is not None
            for _ in range(order.account.num_held + num_own - order.quota.cap):
                block = order.victim()
                if block is None:
                    return False
                self._evict(block, owner)
        num_missing = num_blocks - self.pool.num_free
        return num_missing <= 0 or self.evict(num_missing, owner) == num_missing

    def _hand_out(self, owner: str, num_blocks: int, block_ids: list[int], to_zero: list[int]) -> None:
        if not num_blocks:
            return
        order = self._owners.order_of(owner)
        for _ in range(num_blocks):
            block, is_foreign = self.pool.allocate(owner)
            block.order = order
            block_ids.append(block.block_id)
            if is_foreign:
                to_zero.append(block.block_id)
        self._account(owner).hold(num_blocks, self._now)

    def _give_back(self, block: Block) -> None:
        assert block.owner is not None
        block.order = None
        self._account(block.owner).hold(-1, self._now)
        self.pool.free(block)

    def _evict(self, block: Block, requester: str | None) -> None:
        digest, order, parent = block.hash, block.order, block.parent
        assert digest is not None and order is not None and block.owner is not None
        order.policy.on_evict(block)
        order.num_idle -= 1
        del self._by_hash[digest]
        block.hash = block.parent = None
        block.parent_hash = block.namespace = block.tokens = b""
        self._give_back(block)
        if parent is not None:
            parent.num_children -= 1
            if order is not parent.order:
                self._owners.unshield(parent)
            if not parent.num_children and not parent.ref_count:
                assert parent.order is not None
                parent.order.policy.on_leaf(parent)
                parent.order.reconsider()
        self._num_evicted += 1
        if digest in self._stored:
            del self._stored[digest]
        else:
            self._removed[digest] = None
        if requester == block.owner:
            self._account(block.owner).num_evicted_own += 1
        else:
            self._account(block.owner).num_suffered += 1
            if requester is not None:
                self._account(requester).num_caused += 1

    # ---- owners

    @property
    def _num_pinned(self) -> int:
        return sum(len(table.block_ids) for table in self._pins.values())

    def _account(self, owner: str) -> Account:
        return self._owners.account(owner, self._now)


def _partition(length: int, holds: Callable[[int], bool]) -> int:
    """Return how many of 0..length-1 hold, given that all that hold come first."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            low = middle + 1
        else:
            high = middle
    return low
