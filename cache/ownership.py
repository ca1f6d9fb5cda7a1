"""Owners of a worker's blocks: their accounts, and the eviction orders that floors and caps give them.

An owner without a quota shares one order with all the others without (the commons), and there the policy alone
decides. An owner with a floor or a cap has an order of its own. When room is needed, the rules in this order:

1. An owner at its cap makes room among its own blocks.
2. Blocks of owners above their cap go first.
3. What an owner holds within its floor goes only for itself. While it holds less than its floor, it gives its own
   blocks only when nothing else can go: else a flood by others would make it evict its own.
4. Of what is left, the order whose next victim was released longest ago gives it.

A floor protects what is held, it does not keep free blocks in reserve; blocks in use count as held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvasir.cache.block_pool import PUBLIC, IntegrityError
from kvasir.cache.policy import Policy, PolicyFactory
from kvasir.cache.run import Run
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import KvAccount, Quota

_NEVER = 1 << 62
_NONE = Quota()


@dataclass(slots=True, eq=False)
class Account:
    """Current holdings and lifetime counters of one owner. `block_s`: blocks held times seconds, up to `settled_at`.

    `num_looked_up` and `num_hits` are blocks of prompts and those of them that were found. Evictions: of its
    own blocks for itself, of its own blocks for others (`suffered`) and of others' blocks for it (`caused`).
    """

    owner: str
    num_held: int = 0
    block_s: float = 0.0
    settled_at: float = 0.0
    num_looked_up: int = 0
    num_hits: int = 0
    num_evicted_own: int = 0
    num_suffered: int = 0
    num_caused: int = 0

    def settle(self, now: float) -> None:
        self.block_s += self.num_held * (now - self.settled_at)
        self.settled_at = now

    def statement(self, now: float) -> KvAccount:
        """Return it as of `now`, in the form that the gateway is sent."""
        self.settle(now)
        return KvAccount(
            tenant=self.owner,
            num_held=self.num_held,
            block_s=self.block_s,
            num_looked_up=self.num_looked_up,
            num_hits=self.num_hits,
            num_evicted_own=self.num_evicted_own,
            num_suffered=self.num_suffered,
            num_caused=self.num_caused,
        )


@dataclass(slots=True, eq=False)
class Order:
    """The runs that one policy instance orders. `account` is the owner's, None for the commons.

    Counted in blocks; `num_blocked` of the `num_idle` are blocked by descendants in another order, which may
    have to stay.
    """

    policy: Policy
    account: Account | None = None
    quota: Quota = _NONE
    num_idle: int = 0
    num_blocked: int = 0

    @property
    def num_evictable(self) -> int:
        """Idle blocks that can go whatever happens to other orders."""
        return self.num_idle - self.num_blocked

    @property
    def num_above_floor(self) -> int:
        """How many blocks others may take at most, if so many were idle."""
        return self.num_idle if self.account is None else max(0, self.account.num_held - self.quota.floor)

    @property
    def num_takable(self) -> int:
        """Idle blocks that others' pressure may take."""
        return min(self.num_evictable, self.num_above_floor)

    @property
    def room(self) -> int | None:
        """Blocks that its owner may still allocate, counting its own that can go; None: it has no cap."""
        if self.quota.cap is None or self.account is None:
            return None
        return max(0, self.quota.cap - self.account.num_held + self.num_evictable)

    def num_over_cap(self, num_more: int = 0) -> int:
        """Blocks by which its owner would exceed its cap with `num_more`; 0 or less: it would not."""
        if self.quota.cap is None or self.account is None:
            return 0
        return self.account.num_held + num_more - self.quota.cap

    @property
    def is_below_floor(self) -> bool:
        return self.account is not None and self.account.num_held < self.quota.floor

    def may_give(self, own: Order | None) -> bool:
        """Whether its blocks may go when the owner of `own` needs room and others can give, too."""
        return self.num_above_floor > 0 or (self is own and not self.is_below_floor)


class Owners:
    """All accounts and orders of one cache. The cache tells it what happens to blocks and asks which ones go."""

    def __init__(self, make_policy: PolicyFactory) -> None:
        self._make_policy = make_policy
        self.commons = Order(make_policy())
        self.orders = [self.commons]
        self._own: dict[str, Order] = {}  # by owner: those that have a quota
        self._accounts: dict[str, Account] = {}
        self.now = 0.0  # as the cache was told

    @property
    def total_floor(self) -> int:
        return sum(order.quota.floor for order in self.orders)

    @property
    def num_idle(self) -> int:
        return sum(order.num_idle for order in self.orders)

    @property
    def num_takable(self) -> int:
        """Idle blocks that an owner without a quota may take, those blocked by descendants not counted."""
        return sum(order.num_takable for order in self.orders)

    @property
    def num_takable_at_most(self) -> int:
        """The same with those that are unblocked when their descendants go."""
        return sum(min(order.num_idle, order.num_above_floor) for order in self.orders)

    def account(self, owner: str) -> Account:
        account = self._accounts.get(owner)
        if account is None:
            account = self._accounts[owner] = Account(owner, settled_at=self.now)
        return account

    def hold(self, owner: str, num_blocks: int) -> Account:
        """Count `num_blocks` blocks more of `owner` (fewer, if negative); return its account."""
        account = self.account(owner)
        account.settle(self.now)
        account.num_held += num_blocks
        return account

    def order_of(self, owner: str) -> Order:
        return self._own.get(owner, self.commons)

    def choose(self, owner: str | None) -> tuple[Run, int] | None:
        """Choose what goes when `owner` (None: no owner in particular) needs room, by rules 2 to 4.

        Returns a leaf and how many of its blocks may go before this has to be asked again; None if nothing may go. A
        run was released at once: no other block was released between two of its own.
        """
        if len(self.orders) == 1:
            run = self.commons.policy.victim()
            return None if run is None else (run, len(run))
        best: tuple[Order, Run] | None = None
        best_key = (True, _NEVER)
        own = self._own.get(owner) if owner is not None else None
        for order in self.orders:
            if not order.may_give(own) or (run := order.policy.victim()) is None:
                continue
            key = (order.num_over_cap() <= 0, run.released_at)
            if key < best_key:
                best, best_key = (order, run), key
        if best is None:
            run = own.policy.victim() if own is not None else None
            return None if run is None else (run, 1)
        order, run = best
        max_blocks = min(len(run), order.num_above_floor + (order is own))
        num_over_cap = order.num_over_cap()
        if num_over_cap > 0:
            max_blocks = min(max_blocks, num_over_cap)
        return run, max_blocks

    def are_apart(self, parent: Run, run: Run) -> bool:
        """Whether the two runs are in different orders."""
        return parent.owner != run.owner and self.order_of(parent.owner) is not self.order_of(run.owner)

    def block(self, run: Run | None, sign: int = 1) -> None:
        """Count one more child of `run` that is in another order or blocked by descendants itself (`sign` -1: less)."""
        while run is not None:
            was_blocked = run.num_blocking > 0
            run.num_blocking += sign
            if (run.num_blocking > 0) == was_blocked:
                return
            if not run.ref_count:
                self.order_of(run.owner).num_blocked += sign * len(run)
            run = None if run.parent is None or self.are_apart(run.parent, run) else run.parent

    def set_quotas(self, quotas: Mapping[str, Quota], runs: Sequence[Run]) -> list[Order]:
        """Put `quotas`, which fit, in the place of all before; return the orders that have one now.

        `runs`: all there are. O(len(runs)) when an owner gets its first quota or loses it.
        """
        wanted = {owner: quota for owner, quota in quotas.items() if quota != _NONE}
        before = dict(self._own)
        for owner in self._own.keys() - wanted.keys():
            del self._own[owner]
        for owner, quota in wanted.items():
            if owner not in self._own:
                self._own[owner] = Order(self._make_policy(), self.account(owner))
            self._own[owner].quota = quota
        self.orders = [self.commons, *self._own.values()]
        if before.keys() != wanted.keys():
            self._move(runs, before)
        return self.orders[1:]

    def _move(self, runs: Sequence[Run], before: Mapping[str, Order]) -> None:
        """Put all runs into the orders that are their owners' now, and count again what blocks them.

        `before`: the owners that had an order of their own, with it.
        """
        for run in sorted(runs, key=lambda run: run.released_at):
            old, new = before.get(run.owner, self.commons), self.order_of(run.owner)
            if old is new:
                continue
            old.policy.on_evict(run, len(run))
            if not run.ref_count:
                old.num_idle -= len(run)
                new.num_idle += len(run)
                new.policy.on_release(run)
        for order in self.orders:
            order.num_blocked = 0
        for run in runs:
            run.num_blocking = 0
        for run in runs:
            if run.parent is not None and self.are_apart(run.parent, run):
                self.block(run.parent)

    def statements(self) -> list[KvAccount]:
        """Return the accounts of all owners there ever were."""
        return [account.statement(self.now) for account in self._accounts.values()]

    def check_integrity(self, runs: Sequence[Run], private_owners: Iterable[str]) -> None:
        """Check accounts, orders and policies against `runs`, all there are, whose tree is sound, and the owners of all
        blocks that are used but not published.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        held = Counter(private_owners)
        blocking: Counter[Run] = Counter()
        for run in runs:
            held[run.owner] += len(run)
            if run.parent is not None and (self.are_apart(run.parent, run) or run.num_blocking):
                blocking[run.parent] += 1
        for owner in held.keys() | self._accounts.keys():
            if self.account(owner).num_held != held[owner]:
                raise IntegrityError(f"{owner} holds {held[owner]} blocks, counted {self.account(owner).num_held}")
        for run in runs:
            if run.num_blocking != blocking[run]:
                raise IntegrityError(
                    f"the run of block {run.block_ids[0]} counts {run.num_blocking} children that block it, "
                    f"it has {blocking[run]}"
                )
        for order in self.orders:
            _check_order(order, [run for run in runs if self.order_of(run.owner) is order and not run.ref_count])


def _check_order(order: Order, idle: Sequence[Run]) -> None:
    num_idle = sum(map(len, idle))
    num_blocked = sum(len(run) for run in idle if run.num_blocking)
    if (num_idle, num_blocked) != (order.num_idle, order.num_blocked):
        raise IntegrityError(
            f"{num_idle} blocks are idle, {num_blocked} of them blocked, in an order that counts "
            f"{order.num_idle} and {order.num_blocked}"
        )
    leaves = list(order.policy.leaves())
    expected = {run for run in idle if not run.num_children}
    if len(leaves) != len(expected) or set(leaves) != expected:
        raise IntegrityError(f"{len(expected)} runs of an order are leaves, its policy has {len(leaves)}")
    victim = order.policy.victim()
    if (victim is None) != (not expected) or (victim is not None and victim not in expected):
        raise IntegrityError("the next victim of an order is none of its leaves")


def check_quotas(quotas: Mapping[str, Quota], num_blocks: int, num_pinned: int = 0) -> None:
    """Check that all floors can be kept at once beside the pinned blocks, and that published ones have none.

    Raises:
        BadRequest: they cannot, or a quota makes no sense.
    """
    if PUBLIC in quotas:
        raise BadRequest("published blocks take no KV floor or cap; pin the prefix instead")
    for owner, quota in quotas.items():
        if quota.floor < 0 or (quota.cap is not None and not max(1, quota.floor) <= quota.cap):
            raise BadRequest(
                f"the KV floor of {quota.floor} blocks and the cap of {quota.cap} of {owner} do not go together; "
                "a cap is at least one block and not below the floor"
            )
    total = sum(quota.floor for quota in quotas.values())
    if total + num_pinned > num_blocks:
        raise BadRequest(
            f"KV floors of {total} blocks in all do not fit: of {num_blocks} blocks {num_pinned} are pinned; "
            "lower a floor or unpin a prefix"
        )
