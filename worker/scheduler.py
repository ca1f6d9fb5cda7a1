"""Who computes what in the next step: a pure decision over the sequences and the cache.

One token budget per step. Sequences with one token to compute (decoding) come first, chunks of prompts fill the rest,
the smallest key first:

    key = uncached seconds of work left - ageing * seconds waited

so that a cold long prompt does not stop a short one, nor waits for ever. A waiting sequence is admitted when all its
prompt's blocks can be had beside what the running prefills still need; if the first in the order does not fit, nobody
overtakes it. When decoding needs a block and none can be had, the youngest sequence is preempted: it goes back to
waiting and recomputes what is not in the cache any more. The oldest is never preempted while it runs beside others,
so somebody always gets through.

Floors and caps (`cache.ownership`) hold here, too. Whoever finds his owner's cap full waits for his owner alone, and
others overtake him. A shortage is first met by preempting one of the same owner, unless he holds less than his floor;
nobody is preempted for others who holds no more than his. What is above its owner's cap is failed with the reason. If
nothing else can be done, the first in the order is tried as a last resort: it gets its blocks, or is failed.

Requests that come together with the same uncached prefix compute it once: one leads, the others wait for the blocks
that it publishes, at most `share_wait_s`. Where all tokens are the same (the choices of one request, `n` > 1), the
others become *forks* of the first: when it has computed the last token, they take over its blocks and draw from the
same logits, and compute nothing. They wait for it as long as it runs, since none would be ready sooner by itself: the
first has what they have, and its turn comes before theirs. A fork that does not fit then is admitted later like
any other.

The order is from a simulation of agentic and chat traces; decode first with chunked prefill is Sarathi's
(arXiv 2403.02310).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from cache.prefix_cache import PrefixCache
from worker.sequence import Sequence

MIN_CHUNK = 64


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`max_requests` run at a time; `max_context` tokens per sequence; `max_step_tokens` is a step's budget.

    Prefill in one step takes no more than about `max_step_s`, as far as chunks of `MIN_CHUNK` tokens allow: a slow
    machine must not stop decoding, or seem dead, for a whole budget of prompt tokens.
    """

    max_requests: int
    max_step_tokens: int
    max_context: int
    max_step_s: float = 0.5
    ageing: float = 0.2
    share_wait_s: float = 10.0


@dataclass(slots=True)
class Plan:
    """What to do, in this order: fail (with the reason), preempt, admit (match), then allocate and compute `work`.

    `work` holds each sequence with the number of its tokens to compute: first `num_decodes` times one token, then
    chunks of prompts, those of the admitted among them. `forks` of a sequence, by its key, run from then on, too.
    """

    now: float
    failed: list[tuple[Sequence, str]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    work: list[tuple[Sequence, int]] = field(default_factory=list)
    forks: dict[int, list[Sequence]] = field(default_factory=dict)
    num_decodes: int = 0
    last_resort: Sequence | None = None  # to be failed, if it does not get all blocks for its tokens
    num_pending: int = 0  # uncached prompt tokens that are left after this step


def schedule(
    running: Seq[Sequence], waiting: Seq[Sequence], cache: PrefixCache, limits: EngineLimits, now: float, rate: float
) -> Plan:
    """Return the plan of the next step. `rate`: prompt tokens that this worker computes per second.

    Reads the sequences and the cache and changes neither.
    """
    size = cache.block_size
    plan = Plan(now)
    room = _Room(cache, list(running))
    while True:
        plan.work = [(s, 1) for s in room.running if s.num_remaining == 1]
        plan.num_decodes = len(plan.work)
        needy = [s for s, _ in plan.work if s.num_computed == len(s.table.block_ids) * size]
        short = room.shortage(needy)
        if short is None:
            room.take_for_decoding(needy)
            _add_prefills(plan, room, waiting, limits, rate)
            if plan.work or not room.running:
                return plan
        plan.preempted.append(room.preempt(short))


class _Room:
    """The blocks that can be had, and who is left running, as the plan's preemptions go on.

    `num_shared` blocks are for everybody, `reserve` ones for one owner only; of both together he gets no more than
    `cap_room`.
    """

    def __init__(self, cache: PrefixCache, running: list[Sequence]) -> None:
        self.cache = cache
        self.running = running
        self.num_shared = cache.num_available
        self._reserves: dict[str, int] = {}
        self._cap_rooms: dict[str, int] = {}
        self._given_up: dict[int, int] = {}  # block id -> references that go with the preempted
        self._num_above_floor: dict[str, int] = {}

    def reserve(self, owner: str) -> int:
        if owner not in self._reserves:
            self._reserves[owner] = self.cache.reserve_of(owner)
        return self._reserves[owner]

    def cap_room(self, owner: str) -> int:
        if owner not in self._cap_rooms:
            room = self.cache.room_of(owner)
            self._cap_rooms[owner] = self.cache.pool.num_blocks if room is None else room
        return self._cap_rooms[owner]

    def take(self, owner: str, num_blocks: int, num_own: int, num_reserved: int = 0) -> None:
        """Book `num_blocks`, `num_own` of them the owner's and no published ones; `num_reserved` out of the reserve."""
        num_reserved = min(num_reserved, self.reserve(owner))
        self._reserves[owner] -= num_reserved
        self.num_shared -= num_blocks - num_reserved
        self._cap_rooms[owner] = self.cap_room(owner) - num_own

    def shortage(self, needy: Seq[Sequence]) -> Sequence | None:
        """Return who of `needy`, each of which needs a block to go on, cannot be served; None if all can."""
        num_left, cap_left, reserve_left = self.num_shared, dict[str, int](), dict[str, int]()
        for s in sorted(needy, key=_age):
            owner = s.chain.owner
            cap_left[owner] = cap_left.get(owner, self.cap_room(owner)) - 1
            reserve_left[owner] = reserve_left.get(owner, self.reserve(owner)) - 1
            num_left -= reserve_left[owner] < 0
            if cap_left[owner] < 0 or num_left < 0:
                return s
        return None

    def take_for_decoding(self, needy: Seq[Sequence]) -> None:
        for s in needy:
            self.take(s.chain.owner, 1, 1, num_reserved=1)

    def preempt(self, short: Sequence | None) -> Sequence:
        """Take one out of `running` for `short` (None: somebody, since nobody gets on) and count what becomes free.

        That is the youngest of the same owner, if he has several; else the youngest of all whose owner holds more than
        his floor, or `short` itself. Who has not even his floor is served by the others, if any holds more than his.
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
        victim = max(victims, key=_age)
        self.running.remove(victim)
        self._give_up(victim)
        return victim

    def _above_floor(self, owner: str) -> int:
        if owner not in self._num_above_floor:
            self._num_above_floor[owner] = self.cache.num_above_floor(owner)
        return self._num_above_floor[owner]

    def _give_up(self, victim: Sequence) -> None:
        blocks, owner = self.cache.pool.blocks, victim.chain.owner
        num_public = num_own = 0
        for block_id in victim.table.references():
            count = self._given_up[block_id] = self._given_up.get(block_id, 0) + 1
            if count == blocks[block_id].ref_count:
                num_own += blocks[block_id].owner == owner
                num_public += blocks[block_id].owner != owner
        num_free = min(num_own, self._above_floor(owner))
        self._num_above_floor[owner] -= num_free
        self.num_shared += num_public + num_free
        self._reserves[owner] = self.reserve(owner) + num_own - num_free
        self._cap_rooms[owner] = self.cap_room(owner) + num_own


def _age(s: Sequence) -> tuple[float, int]:
    return s.arrived, s.key


def _num_own(s: Sequence, start: int, end: int) -> int:
    """How many of the blocks start..end-1 of `s` are its owner's, not published ones."""
    return max(0, end - max(start, s.chain.num_public_blocks))


def _add_prefills(plan: Plan, room: _Room, waiting: Seq[Sequence], limits: EngineLimits, rate: float) -> None:
    """Give what the decodes leave of the budget to prefills: extend `work`, `admitted` and `forks`, set the rest."""
    cache = room.cache
    size = cache.block_size
    plan.failed.clear()
    leaders = [s for s in room.running if s.num_remaining > 1]
    if not leaders and not waiting:
        return
    cached = {s.key: cache.probe(s.chain, (s.num_tokens - 1) // size) for s in waiting}
    uncached = {s.key: s.num_tokens - cached[s.key][0] * size for s in waiting}
    num_reserved = 0  # what running prefills still need: of all blocks, and of their owners' own
    num_own_reserved: dict[str, int] = {}
    for s in leaders:
        uncached[s.key] = s.num_remaining
        num_reserved += _reserve(s, size, num_own_reserved, 1)
    originals = {s.given: s for s in room.running if s.is_fresh}
    finishing = {s.key for s, _ in plan.work}  # they compute the last of their tokens in this step
    num_running_of = Counter(s.chain.owner for s in room.running)
    budget = min(limits.max_step_tokens - plan.num_decodes, max(MIN_CHUNK, int(rate * limits.max_step_s)))
    is_open = not plan.preempted  # what a preemption freed is not for newcomers
    closed: set[str] = set()  # owners whose first in the order does not fit under their cap
    plan.num_pending = sum(uncached.values())
    order = sorted([*leaders, *waiting], key=lambda s: uncached[s.key] / rate - limits.ageing * (plan.now - s.arrived))
    for s in order:
        owner = s.chain.owner
        if s.key in cached:
            num_matched, num_idle = cached[s.key]
            num_blocks = -(-s.num_tokens // size)
            cap = cache.quota_of(owner).cap
            if cap is not None and _num_own(s, 0, num_blocks) > cap:
                plan.failed.append((s, _over_cap(_num_own(s, 0, num_blocks), cap)))
                plan.num_pending -= uncached[s.key]
                continue
            original = originals.get(s.given) if s.is_fresh else None
            if original is not None:
                plan.num_pending -= uncached[s.key]
                if original.key not in finishing:
                    continue
                num_matched, num_idle = s.num_tokens // size, 0
            elif budget <= 0 or (plan.now - s.arrived < limits.share_wait_s and _is_led(s, num_matched, leaders, size)):
                continue
            num_own_idle = _num_own(s, num_matched - num_idle, num_matched)
            num_own = _num_own(s, num_matched, num_blocks) + num_own_idle
            num_own += num_own_reserved.get(owner, 0) + num_running_of[owner]
            if owner in closed or num_own > room.cap_room(owner):
                closed.add(owner)
                continue
            num_wanted = num_blocks - num_matched + num_idle + num_reserved
            num_wanted += num_running_of.total()  # each running one may soon want a block
            is_full = num_running_of.total() >= limits.max_requests
            if is_full or num_wanted > room.reserve(owner) + (room.num_shared if is_open else 0):
                is_open = False
                continue
            num_running_of[owner] += 1
            if original is not None:
                plan.forks.setdefault(original.key, []).append(s)
                room.take(owner, num_blocks - num_matched, _num_own(s, num_matched, num_blocks))
                continue
            plan.admitted.append(s)
            leaders.append(s)
            if s.is_fresh:
                originals[s.given] = s
            room.take(owner, num_idle, num_own_idle, num_reserved=num_own_idle)
            num_held, start = num_matched, num_matched * size
        elif budget <= 0:
            continue
        else:
            num_held, start = len(s.table.block_ids), s.num_computed
            num_reserved -= _reserve(s, size, num_own_reserved, -1)  # its turn is now
        num_available = room.num_shared + room.reserve(owner)
        num_available = min(num_available, room.cap_room(owner) + max(0, s.chain.num_public_blocks - num_held))
        count = min(uncached[s.key], budget, (num_held + num_available) * size - start)
        if count <= 0:
            continue
        num_end = max(num_held, -(-(start + count) // size))
        room.take(owner, num_end - num_held, _num_own(s, num_held, num_end))
        budget -= count
        plan.work.append((s, count))
        plan.num_pending -= count
        if count == uncached[s.key]:
            finishing.add(s.key)
    if not (plan.work or room.running or plan.preempted or plan.failed) and waiting:
        s = plan.last_resort = order[0]
        plan.admitted.append(s)
        plan.work.append((s, min(uncached[s.key], budget)))
        plan.num_pending -= plan.work[0][1]


def _reserve(s: Sequence, size: int, num_own_reserved: dict[str, int], sign: int) -> int:
    """Add what `s` still needs for its prompt to its owner's reservation (`sign` -1: take it away); return it."""
    num_held, num_blocks = len(s.table.block_ids), -(-s.num_tokens // size)
    owner = s.chain.owner
    num_own_reserved[owner] = num_own_reserved.get(owner, 0) + sign * _num_own(s, num_held, num_blocks)
    return max(0, num_blocks - num_held)


def _is_led(s: Sequence, num_matched: int, leaders: Seq[Sequence], size: int) -> bool:
    """Whether one of `leaders` will publish the first block that `s` misses."""
    if num_matched >= (s.num_tokens - 1) // size:
        return False
    digest, end = s.chain.hashes[num_matched], (num_matched + 1) * size
    return any(
        len(leader.chain) > num_matched
        and leader.chain.hashes[num_matched] == digest
        and leader.num_computed < end <= leader.num_tokens
        and leader.table.publishable
        for leader in leaders
    )


def _over_cap(num_blocks: int, cap: int) -> str:
    return (
        f"the request needs {num_blocks} KV blocks of this tenant's own, and its cap is {cap}; "
        "shorten the prompt or the answer, or ask the operator to raise the cap (`kvasir tenant set NAME --kv-cap`)"
    )


def no_room(num_blocks: int) -> str:
    """What a request is told that was tried as a last resort, in vain."""
    return (
        f"the request needs {num_blocks} KV blocks; beside other tenants' floors and pinned prefixes this worker has "
        "fewer for it, even when nothing else runs; shorten it, or ask the operator to lower a floor or unpin a prefix"
    )
