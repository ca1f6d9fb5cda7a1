"""The prefix cache: finds, keeps and evicts blocks by what they hold.

A published block's identity is (hash, namespace, parent hash, token ids). The hash finds it, the other three decide:
a digest with other contents is a miss. Published blocks are immutable, and none outlives its parent. A block whose
last reference goes stays resident, *idle*, until its room is needed.

Knows nothing of tensors, scheduling or time. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cache.block_pool import Block, BlockPool, IntegrityError
from cache.block_table import BlockTable, Chain
from cache.policy import Lru, Policy


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


class PrefixCache:
    """`num_blocks` blocks of `block_size` tokens, allocated to tables and shared by what they hold."""

    def __init__(self, num_blocks: int, block_size: int, policy: Policy | None = None) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._policy: Policy = policy or Lru()
        self._by_hash: dict[bytes, Block] = {}
        self._stored: dict[bytes, None] = {}  # this step's events; a dict keeps the order: parents before children
        self._removed: dict[bytes, None] = {}
        self._num_idle = 0
        self._num_matched = self._num_inserted = self._num_twins = self._num_evicted = self._num_collisions = 0

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can hand out now: free ones and idle ones, all of which can be evicted."""
        return self.pool.num_free + self._num_idle

    def match(self, chain: Chain, table: BlockTable, max_blocks: int) -> int:
        """Fill the empty `table` with the longest resident run of `chain`, referenced; return its length in blocks.

        At most `max_blocks`. A digest whose stored parent, namespace or token ids differ counts as a miss.
        """
        by_hash, policy = self._by_hash, self._policy
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
            block.ref_count += 1
            policy.on_hit(block)
            if block.ref_count == 1:
                self._num_idle -= 1
            block_ids.append(block.block_id)
            previous = block
        table.num_published = len(block_ids)
        self._num_matched += len(block_ids)
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
        """Append `num_blocks` fresh blocks to `table`, evicting idle ones where none are free.

        Returns the ids of those that had another owner and must be zeroed before anything reads them, or None, with
        nothing changed, when fewer than `num_blocks` are available.
        """
        pool = self.pool
        num_missing = num_blocks - pool.num_free
        if num_missing > self._num_idle:
            return None
        if num_missing > 0:
            self.evict(num_missing)
        to_zero = []
        block_ids = table.block_ids
        for index in range(len(block_ids), len(block_ids) + num_blocks):
            block, is_foreign = pool.allocate(chain.owner_of(index))
            block_ids.append(block.block_id)
            if is_foreign:
                to_zero.append(block.block_id)
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
        for i in range(len(table.block_ids) - 1, -1, -1):  # the tail first: children before parents
            self._release(blocks[table.block_ids[i]])
            if twins and i in twins:
                self._release(twins[i])
        table.block_ids = []  # a new list: slices of the last step may still show the old one
        table.twins = {}
        table.num_published = 0
        table.publishable = True

    def evict(self, num_blocks: int) -> int:
        """Evict up to `num_blocks` idle blocks, in the policy's order, and return how many went."""
        for num_evicted in range(num_blocks):
            block = self._policy.victim()
            if block is None:
                return num_evicted
            self._evict(block)
        return num_blocks

    def take_events(self) -> tuple[bytes, bytes]:
        """Return the packed hashes stored and removed since the last call, netted: no hash is in both."""
        stored, removed = b"".join(self._stored), b"".join(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def resident_hashes(self) -> bytes:
        """Return the packed hashes of all published blocks, parents before their children."""
        return b"".join(self._by_hash)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            num_blocks=self.pool.num_blocks,
            num_free=self.pool.num_free,
            num_idle=self._num_idle,
            num_published=len(self._by_hash),
            num_matched=self._num_matched,
            num_inserted=self._num_inserted,
            num_twins=self._num_twins,
            num_evicted=self._num_evicted,
            num_collisions=self._num_collisions,
        )

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Check pool, index, tree and policy against each other and against `tables`, all that exist. O(num_blocks).

        Raises:
            IntegrityError: with the first contradiction found.
        """
        tables = list(tables)
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
        idle = [block.block_id for block in self._policy.idle_blocks()]
        expected = {block.block_id for block in self._by_hash.values() if not block.ref_count}
        if len(idle) != len(expected) or set(idle) != expected or len(idle) != self._num_idle:
            raise IntegrityError(
                f"{len(expected)} blocks are idle, the policy has {len(idle)}, counted {self._num_idle}"
            )
        victim = self._policy.victim()
        if victim is not None and (victim.num_children or victim.ref_count):
            raise IntegrityError(f"the next victim {victim.block_id} is in use or has resident children")
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
        self._by_hash[digest] = block
        self._policy.on_insert(block)
        self._num_inserted += 1
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._stored[digest] = None

    def _add_twin(self, table: BlockTable, index: int, block: Block) -> None:
        block.ref_count += 1
        self._policy.on_hit(block)
        if block.ref_count == 1:
            self._num_idle -= 1
        table.twins[index] = block
        self._num_twins += 1

    def _release(self, block: Block) -> None:
        block.ref_count -= 1
        if block.ref_count:
            return
        if block.hash is None:
            self.pool.free(block)
        else:
            self._num_idle += 1
            self._policy.on_release(block)

    def _evict(self, block: Block) -> None:
        digest = block.hash
        assert digest is not None
        self._policy.on_evict(block)
        del self._by_hash[digest]
        if block.parent is not None:
            block.parent.num_children -= 1
        block.hash = block.parent = None
        block.parent_hash = block.namespace = block.tokens = b""
        self.pool.free(block)
        self._num_idle -= 1
        self._num_evicted += 1
        if digest in self._stored:
            del self._stored[digest]
        else:
            self._removed[digest] = None


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
