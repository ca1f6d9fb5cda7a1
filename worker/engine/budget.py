"""The blocks that a plan may still use, and which sequences give theirs up when those do not suffice."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from itertools import islice

from kvasir.cache.block_table import BlockTable
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.worker.engine.sequence import Sequence

_Reference = tuple[int, int, str | None]
"""One reference to a block: its id, how many there are to it, and whose the block is."""


class BlockBudget:
    """The blocks still available, the sequences left running and those holding blocks, while a plan is made.

    Any owner may use the `num_shared` blocks, one owner its `reserve`; both together at most its `cap_room`. `holders`
    wait with blocks in hold, in their order. `kept` are the sequences that will run, each with the number of resident
    blocks that it will find: those stay in use when another sequence lets them go.
    """

    def __init__(self, cache: PrefixCache, running: list[Sequence], holders: list[Sequence]) -> None:
        self.cache = cache
        self.running = running
        self.holders = holders
        self.kept: list[tuple[Sequence, int]] = []
        self.num_shared = cache.num_available
        self._reserves: dict[str, int] = {}
        self._cap_rooms: dict[str, int] = {}
        self._given_up: dict[int, int] = {}  # block id -> references that go
        self._num_above_floor: dict[str, int] = {}

    def reserve(self, owner: str) -> int:
        if owner not in self._reserves:
            self._reserves[owner] = self.cache.reserve_of(owner)
        return self._reserves[owner]

    def available(self, owner: str) -> int:
        return self.num_shared + self.reserve(owner)

    def cap_room(self, owner: str) -> int:
        if owner not in self._cap_rooms:
            num_blocks = self.cache.room_of(owner)
            self._cap_rooms[owner] = self.cache.pool.num_blocks if num_blocks is None else num_blocks
        return self._cap_rooms[owner]

    def take(self, owner: str, num_blocks: int, num_own: int, num_reserved: int = 0) -> None:
        """Book `num_blocks`, `num_own` of them the owner's and no published ones; `num_reserved` out of the reserve."""
        num_reserved = min(num_reserved, self.reserve(owner))
        self._reserves[owner] -= num_reserved
        self.num_shared -= num_blocks - num_reserved
        self._cap_rooms[owner] = self.cap_room(owner) - num_own

    def shortage(self, needy: Seq[Sequence]) -> tuple[Sequence, bool] | None:
        """Return the first of `needy` that cannot get its next block, and whether its owner's cap is the reason.

        None if each of them can.
        """
        num_left, cap_left, reserve_left = self.num_shared, dict[str, int](), dict[str, int]()
        for s in sorted(needy, key=age):
            owner = s.chain.owner
            cap_left[owner] = cap_left.get(owner, self.cap_room(owner)) - 1
            reserve_left[owner] = reserve_left.get(owner, self.reserve(owner)) - 1
            num_left -= reserve_left[owner] < 0
            if cap_left[owner] < 0 or num_left < 0:
                return s, cap_left[owner] < 0
        return None

    def take_for_decoding(self, needy: Seq[Sequence]) -> None:
        for s in needy:
            self.take(s.chain.owner, 1, 1, num_reserved=1)

    def let_go(self, owner: str, num_blocks: int, num_own: int, among: Seq[Sequence]) -> list[Sequence]:
        """Return the holders `among` these that let go, the last first, until `owner` can have `num_blocks` blocks.

        Its cap must allow `num_own`. None let go if all of them together hold too few. Only the owner's own
        sequences help under its cap; those of an owner at or below its floor are not taken for others.
        """
        let_go: list[Sequence] = []
        while True:
            num_missing, num_own_missing = num_blocks - self.available(owner), num_own - self.cap_room(owner)
            if num_missing <= 0 and num_own_missing <= 0:
                return let_go
            own = [s for s in among if s in self.holders and s.chain.owner == owner]
            useful = [s for s in among if s in self.holders and (s in own or self._above_floor(s.chain.owner))]
            num_own_held, num_held = (sum(len(self._to_give(s)) for s in holders) for holders in (own, useful))
            if num_own_held < num_own_missing or num_held < num_missing:
                return let_go
            holder = own[-1] if num_own_missing > 0 else useful[-1]
            self.holders.remove(holder)
            self._give_up(self._to_give(holder), holder.chain.owner)
            let_go.append(holder)

    def _to_give(self, holder: Sequence) -> list[_Reference]:
        """Return the blocks that `holder` holds and no kept sequence will use."""
        num_held = len(holder.hold.block_ids)
        num_kept = max((_num_common(holder, s, min(count, num_held)) for s, count in self.kept), default=0)
        return self._references(holder.hold, num_kept)

    def preempt(self, short: Sequence | None) -> Sequence:
        """Take one sequence out of `running` for `short` (None: no sequence can go on) and count what becomes free.

        It is the youngest of the same owner, if that has several; else `short` itself or the youngest whose owner is
        above its floor. For an owner below its floor it is a sequence of an owner above its own, if there is one.
        """
        victims = self.running
        if short is not None:
            owner = short.chain.owner
            own = [s for s in victims if s.chain.owner == owner]
            others = [s for s in victims if s.chain.owner != owner and self._above_floor(s.chain.owner)]
            if others and self.cache.is_below_floor(owner) and self.cap_room(owner):
                victims = others
            elif len(own) > 1 or self.cap_room(owner) < 1:
                victims = own
            else:
                victims = [*others, short]
        victim = max(victims, key=age)
        self.running.remove(victim)
        self._give_up(self._references(victim.table), victim.chain.owner)
        return victim

    def _above_floor(self, owner: str) -> int:
        if owner not in self._num_above_floor:
            self._num_above_floor[owner] = self.cache.num_above_floor(owner)
        return self._num_above_floor[owner]

    def _references(self, table: BlockTable, start: int = 0) -> list[_Reference]:
        """Return what `table` references, of its published blocks those from `start` on."""
        owners = self.cache.pool.owners
        found = [(block_id, 1, owners[block_id]) for block_id in table.private_ids()]
        for run in table.runs():
            block_ids = islice(run.block_ids, max(0, start - run.start), None)
            found += [(block_id, run.ref_count, run.owner) for block_id in block_ids]
        return found

    def _give_up(self, references: Seq[_Reference], owner: str) -> None:
        num_public = num_own = 0
        for block_id, ref_count, block_owner in references:
            count = self._given_up[block_id] = self._given_up.get(block_id, 0) + 1
            if count == ref_count:
                num_own += block_owner == owner
                num_public += block_owner != owner
        num_free = min(num_own, self._above_floor(owner))
        self._num_above_floor[owner] -= num_free
        self.num_shared += num_public + num_free
        self._reserves[owner] = self.reserve(owner) + num_own - num_free
        self._cap_rooms[owner] = self.cap_room(owner) + num_own


def _num_common(a: Sequence, b: Sequence, max_blocks: int) -> int:
    """Return how many of their first `max_blocks` blocks are the same; a chained hash stands for all before it."""
    ours, theirs = a.chain.hashes, b.chain.hashes
    return bisect_left(range(max_blocks), True, key=lambda i: ours[i] != theirs[i])


def age(s: Sequence) -> tuple[float, int]:
    return s.arrived, s.key
