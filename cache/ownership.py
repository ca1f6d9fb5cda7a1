"""Who holds a worker's blocks: accounts per owner, and the eviction orders that floors and caps give them.

An owner without a quota shares one order with all the others without (the commons), and there the policy alone
decides. An owner with a floor or a cap has an order of its own. When room is needed, the rules in this order:

1. Whoever is at his cap makes room among his own blocks.
2. Blocks of owners above their cap go first.
3. What an owner holds within his floor goes only for himself.
4. Of what is left, the order whose next victim was released longest ago gives it.

A floor protects what is held, it does not keep free blocks in reserve; blocks in use count as held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cache.block_pool import Block
from cache.policy import Policy
from protocol.errors import BadRequest


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


def choose_victim(orders: Iterable[Order], own: Order | None) -> Block | None:
    """Return the block that goes when the owner of `own` (None: nobody in particular) needs room: rules 2 to 4."""
    best: Block | None = None
    best_key = (True, 0)
    for order in orders:
        if order is not own and not order.num_above_floor:
            continue
        block = order.victim()
        if block is None:
            continue
        key = (not order.is_over_cap, block.released_at)
        if best is None or key < best_key:
            best, best_key = block, key
    return best


def check_quotas(quotas: Mapping[str, Quota], num_blocks: int, num_pinned: int = 0) -> None:
    """Check that all floors can be kept at once beside the pinned blocks.

    Raises:
        BadRequest: they cannot, or a quota contradicts itself.
    """
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
