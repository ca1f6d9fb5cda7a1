"""Who computes what in the next step: a pure decision over the sequences and the cache.

One token budget per step. Sequences with one token to compute (decoding) come first, with their drafts, which get half
of what decoding leaves at most; chunks of prompts fill the rest, the smallest key first:

    key = uncached seconds of work left - ageing * (seconds waited - its tenant's lead in seconds of work)

so that a cold long prompt does not stop a short one, nor waits for ever, and a tenant that floods the gateway waits for
the others. A waiting sequence is admitted when all its
prompt's blocks can be had beside what the running prefills still need; if the first in the order does not fit, no other
overtakes it. When decoding needs a block and none can be had, the youngest sequence is preempted: it goes back to
waiting and recomputes what is not in the cache any more. The oldest is never preempted while it runs beside others,
so one sequence always gets through.

Floors and caps (`cache.ownership`) hold here, too. A sequence whose owner's cap is full waits for its owner alone, and
others overtake it. A shortage is first met by preempting a sequence of the same owner, unless that owner is below its
floor; an owner at or below its floor is not preempted for others. A request above its owner's cap fails with the
reason. If nothing else can be done, the first in the order is tried as a last resort: it gets its blocks, or fails.

A waiting sequence *holds* its cached blocks, from the first step in which it is not admitted and no other needs them:
they are not evicted then. It lets go, the last in the order first and for good, when no other block is idle and a
running sequence or one before it in the order needs blocks. So no sequence is preempted and none before it waits for
what is held, and a hold costs its sequence one more `match`, or a few where more of it becomes resident.

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

from kvasir.cache.prefix_cache import PrefixCache
from kvasir.worker.engine.budget import BlockBudget
from kvasir.worker.engine.sequence import Sequence

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
    """What to do, in this order: fail (with the reason), let go, preempt, admit (match), hold, allocate and compute.

    `work` holds each sequence with the number of its tokens to compute: first `num_decodes` times one token and its
    drafts, then chunks of prompts, those of the admitted among them. `forks` of a sequence, by its key, run from then
    on, too.
    """

    now: float
    failed: list[tuple[Sequence, str]] = field(default_factory=list)
    let_go: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    held: list[Sequence] = field(default_factory=list)
    work: list[tuple[Sequence, int]] = field(default_factory=list)
    forks: dict[int, list[Sequence]] = field(default_factory=dict)
    num_decodes: int = 0
    num_drafts: int = 0  # that may be computed, if there are blocks for them
    last_resort: Sequence | None = None  # to be failed, if it does not get all blocks for its tokens

    @property
    def takes(self) -> bool:
        """Whether a sequence loses what it has."""
        return bool(self.let_go or self.preempted or self.last_resort)


def schedule(
    running: Seq[Sequence], waiting: Seq[Sequence], cache: PrefixCache, limits: EngineLimits, now: float, rate: float
) -> Plan:
    """Return the plan of the next step. `rate`: prompt tokens that this worker computes per second.

    Reads the sequences and the cache and changes neither.
    """
    plan = Plan(now)
    ending = [s for s in running if s.is_ending]  # nothing is left to plan of them
    running = [s for s in running if not s.is_ending]
    queue = _Queue(running, waiting, cache, limits, now, rate)
    blocks = BlockBudget(cache, list(running), [s for s in queue.order if s.hold.block_ids])
    while True:
        plan.work = [(s, 1) for s in blocks.running if s.num_remaining == 1]
        plan.num_decodes = len(plan.work)
        needy = [s for s, _ in plan.work if s.num_computed == len(s.table.block_ids) * cache.block_size]
        shortage = blocks.shortage(needy)
        if shortage is None:
            blocks.take_for_decoding(needy)
            num_wanted = sum(s.num_drafts for s, _ in plan.work)
            plan.num_drafts = min(num_wanted, (limits.max_step_tokens - plan.num_decodes) // 2)
            if queue.order:
                _Prefills(plan, blocks, queue, limits, rate, ending).add_all()
            if plan.num_drafts:
                _add_drafts(plan, blocks, needy)
            if plan.work or not blocks.running:
                return plan
            plan.preempted.append(blocks.preempt(None))
            continue
        short, is_capped = shortage
        owner = short.chain.owner
        num_blocks, num_own = blocks.available(owner) + (not is_capped), blocks.cap_room(owner) + is_capped
        let_go = blocks.let_go(owner, num_blocks, num_own, queue.order)
        plan.let_go += let_go
        if not let_go:
            plan.preempted.append(blocks.preempt(short))


def _add_drafts(plan: Plan, blocks: BlockBudget, needy: Seq[Sequence]) -> None:
    """Let decoding sequences compute their drafts, in the blocks that nobody else wants in this step."""
    size, num_left = blocks.cache.block_size, plan.num_drafts
    has_block = {s.key for s in needy}
    for i, (s, _) in enumerate(plan.work[: plan.num_decodes]):
        num_blocks, owner = len(s.table.block_ids) + (s.key in has_block), s.chain.owner
        num_more = max(0, min(blocks.available(owner), blocks.cap_room(owner)))
        count = min(s.num_drafts, num_left, (num_blocks + num_more) * size - s.num_computed - 1)
        if count > 0:
            num_taken = max(0, -(-(s.num_computed + 1 + count) // size) - num_blocks)
            blocks.take(owner, num_taken, num_taken, num_reserved=num_taken)
            num_left -= count
            plan.work[i] = s, 1 + count


class _Queue:
    """Prefills under way and waiting sequences in their order, and how much of each has to be computed.

    `cached` holds, for each waiting sequence, how many of its blocks are resident and how many of those are idle.
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
            [*leaders, *waiting],
            key=lambda s: self.uncached[s.key] / rate - limits.ageing * (now - s.arrived - s.lead / rate),
        )


class _Prefills:
    """Gives prefills what decoding leaves of the token budget; extends `plan`."""

    def __init__(
        self,
        plan: Plan,
        blocks: BlockBudget,
        queue: _Queue,
        limits: EngineLimits,
        rate: float,
        ending: Seq[Sequence],
    ) -> None:
        self._plan, self._blocks, self._queue, self._limits = plan, blocks, queue, limits
        self._order = [s for s in queue.order if s not in plan.preempted]
        self._size = blocks.cache.block_size
        num_left = limits.max_step_tokens - plan.num_decodes - plan.num_drafts
        self._budget = min(num_left, max(MIN_CHUNK, int(rate * limits.max_step_s)))
        running = [*blocks.running, *ending]
        self._leaders = [s for s in running if s.num_tokens // self._size > s.table.num_published]
        self._originals = {s.given: s for s in blocks.running if s.num_computed < s.num_given and s.is_fresh}
        self._finishing = {s.key for s, _ in plan.work}  # they compute the last of their tokens in this step
        self._num_running_of = Counter(s.chain.owner for s in blocks.running)
        self._num_reserved = 0  # what running prefills still need: of all blocks, and of their owners' own
        self._num_own_reserved: Counter[str] = Counter()
        for s in blocks.running:
            if s.num_remaining > 1:
                self._reserve(s, 1)
        self._is_open = not plan.preempted  # what a preemption freed is not for newcomers
        self._closed: set[str] = set()  # owners whose first in the order does not fit under their cap

    def add_all(self) -> None:
        plan, queue = self._plan, self._queue
        plan.failed.clear()
        staying = []
        for place, s in enumerate(self._order):
            if s.key in queue.cached:
                if not self._consider(s, place):
                    staying.append(s)
            elif self._budget > 0:
                self._reserve(s, -1)  # its turn is now
                self._compute(s, len(s.table.block_ids), s.num_computed)
        if plan.work:
            self._hold(staying)
        elif staying and not (self._blocks.running or plan.preempted or plan.failed):
            s = plan.last_resort = self._order[0]
            plan.let_go += [holder for holder in self._blocks.holders if holder is not s]
            plan.admitted.append(s)
            plan.work.append((s, min(queue.uncached[s.key], self._budget)))

    def _consider(self, s: Sequence, place: int) -> bool:
        """Admit or fork the waiting `s`, which is at `place` in the order, or fail it; False: leave it where it is."""
        plan, owner = self._plan, s.chain.owner
        num_blocks = -(-s.num_tokens // self._size)
        cap = self._blocks.cache.quota_of(owner).cap
        if cap is not None and s.num_own_blocks(0, num_blocks) > cap:
            plan.failed.append((s, _over_cap(s.num_own_blocks(0, num_blocks), cap)))
            return True
        num_matched, num_idle = self._cached(s)
        original = self._originals.get(s.given) if s.is_fresh else None
        if original is not None:
            if original.key not in self._finishing:
                return False
            num_matched, num_idle = s.num_tokens // self._size, 0
        elif self._budget <= 0 or self._is_led(s, num_matched):
            return False
        if not self._fits(s, place, num_matched, num_idle, num_blocks):
            return False
        self._num_running_of[owner] += 1
        self._blocks.kept.append((s, num_matched))
        if s in self._blocks.holders:
            self._blocks.holders.remove(s)
        if original is not None:
            plan.forks.setdefault(original.key, []).append(s)
            self._blocks.take(owner, num_blocks - num_matched, s.num_own_blocks(num_matched, num_blocks))
            return True
        plan.admitted.append(s)
        self._leaders.append(s)
        if s.is_fresh:
            self._originals[s.given] = s
        num_own_idle = s.num_own_blocks(num_matched - num_idle, num_matched)
        self._blocks.take(owner, num_idle, num_own_idle, num_reserved=num_own_idle)
        self._compute(s, num_matched, num_matched * self._size)
        return True

    def _cached(self, s: Sequence) -> tuple[int, int]:
        """Return how many blocks of the waiting `s` are resident, and how many of those may be idle."""
        num_matched, num_idle = self._queue.cached[s.key]
        return num_matched, num_matched if self._plan.preempted or self._plan.let_go else num_idle

    def _fits(self, s: Sequence, place: int, num_matched: int, num_idle: int, num_blocks: int) -> bool:
        """Return whether all blocks of `s` are available, counting those that later sequences hold.

        If not, no other sequence overtakes it, or none of the same owner.
        """
        blocks, owner = self._blocks, s.chain.owner
        num_own = s.num_own_blocks(num_matched - num_idle, num_blocks)
        num_own += self._num_own_reserved[owner] + self._num_running_of[owner]
        num_running = self._num_running_of.total()
        num_wanted = num_blocks - num_matched + num_idle + self._num_reserved
        num_wanted += num_running  # each running one may soon want a block
        is_full = num_running >= self._limits.max_requests
        if blocks.holders and self._is_open and not is_full and owner not in self._closed:
            blocks.kept.append((s, num_matched))
            self._plan.let_go += blocks.let_go(owner, num_wanted, num_own, self._order[place + 1 :])
            blocks.kept.pop()
        if owner in self._closed or num_own > blocks.cap_room(owner):
            self._closed.add(owner)
            return False
        if is_full or num_wanted > (blocks.available(owner) if self._is_open else blocks.reserve(owner)):
            self._is_open = False
            return False
        return True

    def _compute(self, s: Sequence, num_held: int, start: int) -> None:
        """Give `s`, which has `num_held` blocks and `start` tokens computed, a chunk of what is left of the budget."""
        plan, blocks, owner, size = self._plan, self._blocks, s.chain.owner, self._size
        num_public = max(0, s.chain.num_public_blocks - num_held)
        if num_held * size == start:  # it needs a block to get on at all
            plan.let_go += blocks.let_go(owner, 1, 1 - num_public, self._order)
        num_available = min(blocks.available(owner), blocks.cap_room(owner) + num_public)
        count = min(self._queue.uncached[s.key], self._budget, (num_held + num_available) * size - start)
        if count <= 0:
            return
        num_end = max(num_held, -(-(start + count) // size))
        blocks.take(owner, num_end - num_held, s.num_own_blocks(num_held, num_end))
        self._budget -= count
        plan.work.append((s, count))
        if count == self._queue.uncached[s.key]:
            self._finishing.add(s.key)

    def _hold(self, staying: Seq[Sequence]) -> None:
        """Let `staying` sequences hold their cached blocks, as far as no other needs them in this step."""
        plan, blocks = self._plan, self._blocks
        for s in staying:
            if not self._queue.cached[s.key][1] or not s.may_hold or s in plan.let_go:
                continue
            num_matched, num_idle = self._cached(s)
            owner, num_own = s.chain.owner, s.num_own_blocks(num_matched - num_idle, num_matched)
            if num_own <= blocks.cap_room(owner) and num_idle <= blocks.num_shared + min(
                num_own, blocks.reserve(owner)
            ):
                blocks.take(owner, num_idle, num_own, num_reserved=num_own)
                plan.held.append(s)

    def _reserve(self, s: Sequence, sign: int) -> None:
        """Count what the running `s` still needs for its prompt as reserved (`sign` -1: not any more)."""
        num_held, num_blocks = len(s.table.block_ids), -(-s.num_tokens // self._size)
        self._num_reserved += sign * max(0, num_blocks - num_held)
        self._num_own_reserved[s.chain.owner] += sign * s.num_own_blocks(num_held, num_blocks)

    def _is_led(self, s: Sequence, num_matched: int) -> bool:
        """Return whether `s` waits for a running sequence that will publish the first block it misses."""
        size = self._size
        if num_matched >= (s.num_tokens - 1) // size or self._plan.now - s.arrived >= self._limits.share_wait_s:
            return False
        digest, end = s.chain.hashes[num_matched], (num_matched + 1) * size
        return any(
            len(leader.chain) > num_matched
            and leader.chain.hashes[num_matched] == digest
            and leader.table.num_published <= num_matched
            and end <= leader.num_tokens
            and leader.table.publishable
            for leader in self._leaders
        )


def _over_cap(num_blocks: int, cap: int) -> str:
    return (
        f"the request needs {num_blocks} KV blocks of this tenant's own, and its cap is {cap}; "
        "shorten the prompt or the answer, or ask the operator to raise the cap (`kvasir tenant set NAME --kv-cap`)"
    )


def no_room(num_blocks: int) -> str:
    """Return the error of a request that did not get its blocks as a last resort."""
    return (
        f"the request needs {num_blocks} KV blocks; beside other tenants' floors and pinned prefixes this worker has "
        "fewer for it, even when nothing else runs; shorten it, or ask the operator to lower a floor or unpin a prefix"
    )
