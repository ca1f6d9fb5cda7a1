"""Which blocks go when room is needed: the runs of a prefix cache from their last reference to their end.

A run without references is *idle*: it stays until its room is needed. Floors, caps and policies (`cache.ownership`,
`cache.policy`) choose the next victim; here it goes, with its place in the tree, its account and its event.
"""

from __future__ import annotations

from kvasir.cache.block_pool import BlockPool
from kvasir.cache.events import EventLog
from kvasir.cache.ownership import Owners
from kvasir.cache.run import Run
from kvasir.cache.run_tree import RunTree


class Eviction:
    """References of the runs in `tree`, and the eviction of those that are idle into `pool`."""

    def __init__(self, pool: BlockPool, tree: RunTree, owners: Owners, events: EventLog) -> None:
        self._pool = pool
        self._tree = tree
        self._owners = owners
        self._events = events
        self._num_releases = 0
        self.num_evicted = 0

    def reference(self, run: Run) -> None:
        """Count one more table that references `run`."""
        order = self._owners.order_of(run.owner)
        run.ref_count += 1
        run.is_open = False
        order.policy.on_hit(run)
        if run.ref_count == 1:
            order.num_idle -= len(run)
            if run.num_blocking:
                order.num_blocked -= len(run)

    def release(self, run: Run) -> None:
        """Count one table less; the last one leaves `run` idle."""
        run.ref_count -= 1
        if run.ref_count:
            return
        order = self._owners.order_of(run.owner)
        run.is_open = False
        run.released_at = self._num_releases + 1
        self._num_releases += len(run)
        order.num_idle += len(run)
        if run.num_blocking:
            order.num_blocked += len(run)
        order.policy.on_release(run)

    def make_room(self, owner: str, num_blocks: int, num_own: int) -> bool:
        """Evict until `num_blocks` are free and the cap of `owner` leaves room for `num_own` of them.

        False if that cannot be: at once where that is known, else what was evicted in vain stays evicted.
        """
        order = self._owners.order_of(owner)
        room = order.room
        num_reserved = order.num_evictable - order.num_takable
        num_idle = self._owners.num_takable_at_most + num_reserved
        if (room is not None and room < num_own) or num_blocks > self._pool.num_free + num_idle:
            return False
        num_over = order.num_over_cap(num_own)
        if num_over > 0 and self.evict_own(owner, num_over) < num_over:
            return False
        num_missing = num_blocks - self._pool.num_free
        return num_missing <= 0 or self.evict(num_missing, owner) == num_missing

    def evict(self, num_blocks: int, owner: str | None) -> int:
        """Evict up to `num_blocks` blocks of whichever owners have to give them; return how many went."""
        num_evicted = 0
        while num_evicted < num_blocks and (choice := self._owners.choose(owner)) is not None:
            run, max_blocks = choice
            num_gone = min(max_blocks, num_blocks - num_evicted)
            self._evict(run, num_gone, owner)
            num_evicted += num_gone
        return num_evicted

    def evict_own(self, owner: str, num_blocks: int) -> int:
        """Evict up to `num_blocks` blocks of the order of `owner` for itself; return how many went."""
        order = self._owners.order_of(owner)
        num_evicted = 0
        while num_evicted < num_blocks and (run := order.policy.victim()) is not None:
            num_gone = min(len(run), num_blocks - num_evicted)
            self._evict(run, num_gone, owner)
            num_evicted += num_gone
        return num_evicted

    def clear(self, owner: str) -> int:
        """Evict all idle blocks of `owner` on which no other block builds; return how many went."""
        num_evicted = 0
        for run in reversed(self._tree.by_depth()):
            if run.owner == owner and not run.ref_count and not run.num_children:
                num_evicted += len(run)
                self._evict(run, len(run), owner)
        return num_evicted

    def _evict(self, run: Run, num_blocks: int, requester: str | None) -> None:
        """Let the last `num_blocks` blocks of `run`, an idle leaf, go for `requester`."""
        owners, parent = self._owners, run.parent
        order = owners.order_of(run.owner)
        order.policy.on_evict(run, num_blocks)
        order.num_idle -= num_blocks
        is_whole = num_blocks == len(run)
        if is_whole:
            self._tree.remove(run)
        block_ids, hashes = run.trim(num_blocks)
        self._pool.free(block_ids)
        self._events.remove(hashes)
        self.num_evicted += num_blocks
        account = owners.hold(run.owner, -num_blocks)
        if requester == run.owner:
            account.num_evicted_own += num_blocks
        else:
            account.num_suffered += num_blocks
            if requester is not None:
                owners.account(requester).num_caused += num_blocks
        if is_whole and parent is not None:
            if owners.are_apart(parent, run):
                owners.block(parent, -1)
            if not parent.num_children and not parent.ref_count:
                owners.order_of(parent.owner).policy.on_leaf(parent)
