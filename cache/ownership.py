"""Who holds a worker's blocks: accounts per owner, and the eviction orders that floors and caps give them.

An owner without a quota shares one order with all the others without (the commons), and there the policy alone
decides. An owner with a floor or a cap has an order of its own. When room is needed, the rules in this order:

1. Whoever is at his cap makes room among his own blocks.
2. Blocks of owners above their cap go first.
3. What an owner holds within his floor goes only for himself, and as long as he holds less than his floor, only when
   nothing else can go: else a flood would make him eat his own.
4. Of what is left, the order whose next victim was released longest ago gives it.

A floor protects what is held, it does not keep free blocks in reserve; blocks in use count as held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache.block_pool import PUBLIC, Block, IntegrityError
from cache.policy import Policy, PolicyFactory
from protocol.errors import BadRequest

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Quota:
    """In blocks. `cap` None: none."""

    floor: int = 0
    cap: int | None = None


@dataclass(slots=True, eq=False)
class Account:
    """What one owner holds and what it came to. `block_s`: blocks held times seconds, up to `settled_at`.

    `num_looked_up` and `num_hits` are blocks of prompts and those of them that were found. Evictions: of own blocks
    for oneself, of own blocks for others (`suffered`) and of others' for oneself (`caused`).
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

    def hold(self, count: int, now: float) -> None:
        """Count `count` blocks more (fewer, if negative) from `now` on."""
        self.settle(now)
        self.num_held += count

    def settle(self, now: float) -> None:
        self.block_s += self.num_held * (now - self.settled_at)
        self.settled_at = now


@dataclass(slots=True, eq=False)
class Order:
    """The blocks that one policy instance orders. `account` is the owner's, None for the commons.

    `num_shielded` of the `num_idle` blocks have a descendant in another order, which may have to stay.
    """

    policy: Policy
    account: Account | None = None
    quota: Quota = Quota()
    num_idle: int = 0
    num_shielded: int = 0
    _proposal: Block | None = None
    _proposed_at: int = 0

    @property
    def num_evictable(self) -> int:
        """Idle blocks that can go whatever happens to other orders."""
        return self.num_idle - self.num_shielded

    @property
    def num_above_floor(self) -> int:
        """How many blocks others may take at most, if so many were idle."""
        return self.num_idle if self.account is None else max(0, self.account.num_held - self.quota.floor)

    @property
    def num_takable(self) -> int:
        """Idle blocks that others' pressure may take."""
        return min(self.num_evictable, self.num_above_floor)

    @property
    def is_over_cap(self) -> bool:
        cap = self.quota.cap
        return cap is not None and self.account is not None and self.account.num_held > cap

    @property
    def is_below_floor(self) -> bool:
        return self.account is not None and self.account.num_held < self.quota.floor

    def may_give(self, own: Order | None) -> bool:
        """Whether its blocks may go when the owner of `own` needs room and others can give, too."""
        return self.num_above_floor > 0 or (self is own and not self.is_below_floor)

    def victim(self) -> Block | None:
        """Return the policy's next victim. It is asked again only when its last answer is void."""
        block = self._proposal
        if (
            block is None
            or block.ref_count
            or block.num_children
            or block.order is not self
            or block.released_at != self._proposed_at
        ):
            self._proposal = block = self.policy.victim()
            self._proposed_at = block.released_at if block else 0
        return block

    def reconsider(self) -> None:
        """Ask the policy afresh: it has a leaf that may be dearer or cheaper than its last answer."""
        self._proposal = None


@dataclass(frozen=True, slots=True)
class OwnerStatistics:
    """One owner's account. `num_held` blocks now (allocated or resident), `block_s` blocks times seconds.

    Counters since the start, in blocks, as in `Account`.
    """

    owner: str
    floor: int
    cap: int | None
    num_held: int
    block_s: float
    num_looked_up: int
    num_hits: int
    num_evicted_own: int
    num_suffered: int
    num_caused: int


@dataclass(frozen=True, slots=True)
class Turn:
    """`order` gives its next victim, and goes on giving those released before `until` while nothing else changes."""

    order: Order
    own: Order | None
    is_over_cap: bool
    until: int

    def next(self) -> Block | None:
        """Return the next victim, None if the turn is over."""
        order = self.order
        if order.is_over_cap != self.is_over_cap or not order.may_give(self.own):
            return None
        block = order.victim()
        return block if block is not None and block.released_at < self.until else None


class Owners:
    """All accounts and orders of one cache. The cache tells it what happens to blocks and asks it whose go."""

    def __init__(self, make_policy: PolicyFactory) -> None:
        self._make_policy = make_policy
        self.commons = Order(make_policy())
        self.orders = [self.commons]
        self._own: dict[str, Order] = {}  # by owner: those that have a quota
        self._accounts: dict[str, Account] = {}

    @property
    def total_floor(self) -> int:
        return sum(order.quota.floor for order in self.orders)

    @property
    def num_idle(self) -> int:
        return sum(order.num_idle for order in self.orders)

    @property
    def num_takable(self) -> int:
        """Idle blocks that the pressure of an owner without a quota may take, shielded ones not counted."""
        return sum(order.num_takable for order in self.orders)

    @property
    def num_takable_at_most(self) -> int:
        """The same with the shielded ones that may be bared by what goes."""
        return sum(min(order.num_idle, order.num_above_floor) for order in self.orders)

    def account(self, owner: str, now: float = 0.0) -> Account:
        account = self._accounts.get(owner)
        if account is None:
            account = self._accounts[owner] = Account(owner, settled_at=now)
        return account

    def order_of(self, owner: str) -> Order:
        return self._own.get(owner, self.commons)

    def choose(self, owner: str | None) -> Turn | None:
        """Return whose blocks go when `owner` (None: nobody in particular) needs room, by rules 2 to 4."""
        if len(self.orders) == 1:
            return Turn(self.commons, None, False, _NEVER)
        best: Order | None = None
        best_key = next_key = (True, _NEVER)
        own = self._own.get(owner) if owner is not None else None
        for order in self.orders:
            if not order.may_give(own) or (block := order.victim()) is None:
                continue
            key = (not order.is_over_cap, block.released_at)
            if key < best_key:
                best, best_key, next_key = order, key, best_key
            elif key < next_key:
                next_key = key
        if best is None:
            return None if own is None else Turn(own, own, own.is_over_cap, 0)
        return Turn(best, own, best.is_over_cap, next_key[1] if next_key[0] == best_key[0] else _NEVER)

    def shield(self, block: Block | None) -> None:
        """Count one more child of `block` that is in another order or shielded itself."""
        while block is not None:
            block.num_shields += 1
            if block.num_shields > 1:
                return
            assert block.order is not None
            block.order.num_shielded += not block.ref_count
            block = block.parent if block.parent is None or block.parent.order is block.order else None

    def unshield(self, block: Block | None) -> None:
        """Undo one `shield`."""
        while block is not None:
            block.num_shields -= 1
            if block.num_shields:
                return
            assert block.order is not None
            block.order.num_shielded -= not block.ref_count
            block = block.parent if block.parent is None or block.parent.order is block.order else None

    def set_quotas(self, quotas: Mapping[str, Quota], blocks: Sequence[Block], now: float) -> list[Order]:
        """Put `quotas`, which fit, in the place of all there are; return the orders that have one now.

        `blocks`: all of the pool. O(len(blocks)) when somebody gets a quota or loses it.
        """
        wanted = {owner: quota for owner, quota in quotas.items() if quota != Quota()}
        moved = wanted.keys() ^ self._own.keys()
        for owner in self._own.keys() - wanted.keys():
            del self._own[owner]
        for owner, quota in wanted.items():
            if owner not in self._own:
                self._own[owner] = Order(self._make_policy(), self.account(owner, now))
            self._own[owner].quota = quota
        self.orders = [self.commons, *self._own.values()]
        if moved:
            self._move(blocks)
        return self.orders[1:]

    def _move(self, blocks: Sequence[Block]) -> None:
        """Put all blocks into the orders that are their owners' now, and count the shields anew."""
        published = [block for block in blocks if block.hash is not None]
        for block in sorted(blocks, key=lambda block: block.released_at):
            old = block.order
            if old is None or old is (new := self.order_of(block.owner or "")):
                continue
            block.order = new
            if block.hash is None:
                continue
            old.policy.on_evict(block)
            new.policy.on_insert(block)
            if not block.ref_count:
                old.num_idle -= 1
                new.num_idle += 1
                new.policy.on_release(block)
        for order in self.orders:
            order.num_shielded = 0
            order.reconsider()
        for block in published:
            block.num_shields = 0
        for block in published:
            if block.parent is not None and block.order is not block.parent.order:
                self.shield(block.parent)

    def statistics(self, now: float) -> list[OwnerStatistics]:
        """Return the accounts of all owners there ever were."""
        return [self._statistics(account, now) for account in self._accounts.values()]

    def _statistics(self, account: Account, now: float) -> OwnerStatistics:
        account.settle(now)
        quota = self.order_of(account.owner).quota
        return OwnerStatistics(
            owner=account.owner,
            floor=quota.floor,
            cap=quota.cap,
            num_held=account.num_held,
            block_s=account.block_s,
            num_looked_up=account.num_looked_up,
            num_hits=account.num_hits,
            num_evicted_own=account.num_evicted_own,
            num_suffered=account.num_suffered,
            num_caused=account.num_caused,
        )

    def check_integrity(self, blocks: Sequence[Block]) -> None:
        """Check accounts, orders and policies against `blocks`, all of the pool, whose tree is sound.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        held: dict[str, int] = dict.fromkeys(self._accounts, 0)
        shields: dict[int, int] = {}
        idle: dict[int, list[Block]] = {id(order): [] for order in self.orders}
        for block in blocks:
            if not block.ref_count and block.hash is None:
                if block.order is not None:
                    raise IntegrityError(f"block {block.block_id} is free but belongs to an order")
                continue
            owner = block.owner or ""
            held[owner] = held.get(owner, 0) + 1
            if block.order is not self.order_of(owner):
                raise IntegrityError(f"block {block.block_id} of {owner} is not in its owner's order")
            if block.hash is not None and not block.ref_count:
                idle[id(block.order)].append(block)
            if block.parent is not None and (block.order is not block.parent.order or block.num_shields):
                shields[block.parent.block_id] = shields.get(block.parent.block_id, 0) + 1
        for owner, num_held in held.items():
            if self.account(owner).num_held != num_held:
                raise IntegrityError(f"{owner} holds {num_held} blocks, counted {self.account(owner).num_held}")
        for block in blocks:
            if block.num_shields != shields.get(block.block_id, 0):
                raise IntegrityError(f"block {block.block_id} counts {block.num_shields} shields wrongly")
        for order in self.orders:
            _check_order(order, idle[id(order)])


def _check_order(order: Order, idle: Sequence[Block]) -> None:
    num_shielded = sum(block.num_shields > 0 for block in idle)
    if (len(idle), num_shielded) != (order.num_idle, order.num_shielded):
        raise IntegrityError(
            f"{len(idle)} blocks are idle, {num_shielded} of them shielded, in an order that counts "
            f"{order.num_idle} and {order.num_shielded}"
        )
    leaves = [block.block_id for block in order.policy.leaves()]
    expected = {block.block_id for block in idle if not block.num_children}
    if len(leaves) != len(expected) or set(leaves) != expected:
        raise IntegrityError(f"{len(expected)} blocks of an order are leaves, its policy has {len(leaves)}")
    victim = order.victim()
    if (victim is None) != (not expected) or (victim is not None and victim.block_id not in expected):
        raise IntegrityError("the next victim of an order is none of its leaves")


def check_quotas(quotas: Mapping[str, Quota], num_blocks: int, num_pinned: int = 0) -> None:
    """Check that all floors can be kept at once beside the pinned blocks, and that nobody has one for published ones.

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
