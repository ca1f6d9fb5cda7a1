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
from worker.room import Room
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
    plan = Plan(now)
    room = Room(cache, list(running))
    queue = _Queue(running, waiting, cache, limits, now, rate)
    while True:
        plan.work = [(s, 1) for s in room.running if s.num_remaining == 1]
        plan.num_decodes = len(plan.work)
        needy = [s for s, _ in plan.work if s.num_computed == len(s.table.block_ids) * cache.block_size]
        short = room.shortage(needy)
        if short is None:
            room.take_for_decoding(needy)
            if queue.order:
                _Prefills(plan, room, queue, limits, rate).add_all()
            if plan.work or not room.running:
                return plan
        plan.preempted.append(room.preempt(short))


class _Queue:
    """Prefills under way and waiting sequences in their order, and how much of each has to be computed.

    `cached` tells of the waiting ones how many of their blocks are resident and how many of those idle.
    """

    def __init__(
        self,
        running: Seq[Sequence],
        waiting: Seq[Sequence],
        cache: PrefixCache,
        limits: EngineLimits,
        now: float,
        rate: float,
    ) -> None:
        size = cache.block_size
        self.cached = {s.key: cache.probe(s.chain, (s.num_tokens - 1) // size) for s in waiting}
        self.uncached = {s.key: s.num_tokens - self.cached[s.key][0] * size for s in waiting}
        leaders = [s for s in running if s.num_remaining > 1]
        self.uncached.update((s.key, s.num_remaining) for s in leaders)
        self.order = sorted(
            [*leaders, *waiting], key=lambda s: self.uncached[s.key] / rate - limits.ageing * (now - s.arrived)
        )


class _Prefills:
    """Gives what the decodes leave of the budget to prefills: extends `plan.work`, sets the rest of the plan."""

    def __init__(self, plan: Plan, room: Room, queue: _Queue, limits: EngineLimits, rate: float) -> None:
        self._plan, self._room, self._queue, self._limits = plan, room, queue, limits
        self._cache = room.cache
        self._size = room.cache.block_size
        self._budget = min(limits.max_step_tokens - plan.num_decodes, max(MIN_CHUNK, int(rate * limits.max_step_s)))
        self._leaders = [s for s in room.running if s.num_remaining > 1]
        self._originals = {s.given: s for s in room.running if s.is_fresh}
        self._finishing = {s.key for s, _ in plan.work}  # they compute the last of their tokens in this step
        self._num_running_of = Counter(s.chain.owner for s in room.running)
        self._num_reserved = 0  # what running prefills still need: of all blocks, and of their owners' own
        self._num_own_reserved: Counter[str] = Counter()
        for s in self._leaders:
            self._reserve(s, 1)
        self._is_open = not plan.preempted  # what a preemption freed is not for newcomers
        self._closed: set[str] = set()  # owners whose first in the order does not fit under their cap

    def add_all(self) -> None:
        plan, queue = self._plan, self._queue
        order = [s for s in queue.order if s not in plan.preempted]
        plan.failed.clear()
        plan.num_pending = sum(queue.uncached[s.key] for s in order)
        for s in order:
            if s.key in queue.cached:
                self._consider(s)
            elif self._budget > 0:
                self._reserve(s, -1)  # its turn is now
                self._compute(s, len(s.table.block_ids), s.num_computed)
        if not (plan.work or self._room.running or plan.preempted or plan.failed) and order:
            s = plan.last_resort = order[0]
            plan.admitted.append(s)
            plan.work.append((s, min(queue.uncached[s.key], self._budget)))
            plan.num_pending -= plan.work[0][1]

    def _consider(self, s: Sequence) -> None:
        """Admit or fork the waiting `s`, fail it, or leave it where it is."""
        plan, owner = self._plan, s.chain.owner
        num_blocks = -(-s.num_tokens // self._size)
        cap = self._cache.quota_of(owner).cap
        if cap is not None and s.num_own_blocks(0, num_blocks) > cap:
            plan.failed.append((s, _over_cap(s.num_own_blocks(0, num_blocks), cap)))
            plan.num_pending -= self._queue.uncached[s.key]
            return
        num_matched, num_idle = self._queue.cached[s.key]
        original = self._originals.get(s.given) if s.is_fresh else None
        if original is not None:
            plan.num_pending -= self._queue.uncached[s.key]
            if original.key not in self._finishing:
                return
            num_matched, num_idle = s.num_tokens // self._size, 0
        elif self._budget <= 0 or self._is_led(s, num_matched):
            return
        if not self._fits(s, num_matched, num_idle, num_blocks):
            return
        self._num_running_of[owner] += 1
        if original is not None:
            plan.forks.setdefault(original.key, []).append(s)
            self._room.take(owner, num_blocks - num_matched, s.num_own_blocks(num_matched, num_blocks))
            return
        plan.admitted.append(s)
        self._leaders.append(s)
        if s.is_fresh:
            self._originals[s.given] = s
        num_own_idle = s.num_own_blocks(num_matched - num_idle, num_matched)
        self._room.take(owner, num_idle, num_own_idle, num_reserved=num_own_idle)
        self._compute(s, num_matched, num_matched * self._size)

    def _fits(self, s: Sequence, num_matched: int, num_idle: int, num_blocks: int) -> bool:
        """Whether all blocks of `s` can be had. If not, nobody overtakes it, or nobody of the same owner."""
        room, owner = self._room, s.chain.owner
        num_own = s.num_own_blocks(num_matched - num_idle, num_blocks)
        num_own += self._num_own_reserved[owner] + self._num_running_of[owner]
        if owner in self._closed or num_own > room.cap_room(owner):
            self._closed.add(owner)
            return False
        num_running = self._num_running_of.total()
        num_wanted = num_blocks - num_matched + num_idle + self._num_reserved
        num_wanted += num_running  # each running one may soon want a block
        num_available = room.reserve(owner) + (room.num_shared if self._is_open else 0)
        if num_running >= self._limits.max_requests or num_wanted > num_available:
            self._is_open = False
            return False
        return True

    def _compute(self, s: Sequence, num_held: int, start: int) -> None:
        """Give `s`, which has `num_held` blocks and `start` tokens computed, a chunk of what is left of the budget."""
        plan, room, owner, size = self._plan, self._room, s.chain.owner, self._size
        num_available = room.num_shared + room.reserve(owner)
        num_available = min(num_available, room.cap_room(owner) + max(0, s.chain.num_public_blocks - num_held))
        count = min(self._queue.uncached[s.key], self._budget, (num_held + num_available) * size - start)
        if count <= 0:
            return
        num_end = max(num_held, -(-(start + count) // size))
        room.take(owner, num_end - num_held, s.num_own_blocks(num_held, num_end))
        self._budget -= count
        plan.work.append((s, count))
        plan.num_pending -= count
        if count == self._queue.uncached[s.key]:
            self._finishing.add(s.key)

    def _reserve(self, s: Sequence, sign: int) -> None:
        """Count what the running `s` still needs for its prompt as reserved (`sign` -1: not any more)."""
        num_held, num_blocks = len(s.table.block_ids), -(-s.num_tokens // self._size)
        self._num_reserved += sign * max(0, num_blocks - num_held)
        self._num_own_reserved[s.chain.owner] += sign * s.num_own_blocks(num_held, num_blocks)

    def _is_led(self, s: Sequence, num_matched: int) -> bool:
        """Whether one that is computed already will publish the first block that `s` misses, and `s` waits for it."""
        size = self._size
        if num_matched >= (s.num_tokens - 1) // size or self._plan.now - s.arrived >= self._limits.share_wait_s:
            return False
        digest, end = s.chain.hashes[num_matched], (num_matched + 1) * size
        return any(
            len(leader.chain) > num_matched
            and leader.chain.hashes[num_matched] == digest
            and leader.num_computed < end <= leader.num_tokens
            and leader.table.publishable
            for leader in self._leaders
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
