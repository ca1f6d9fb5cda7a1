"""Who computes what in the next step: a pure decision over the sequences and the cache.

One token budget per step. Sequences with one token to compute (decoding) come first, chunks of prompts fill the rest,
the smallest key first:

    key = uncached seconds of work left - ageing * seconds waited

so that a cold long prompt does not stop a short one, nor waits for ever. A waiting sequence is admitted when all its
prompt's blocks can be had beside what the running prefills still need; if the first in the order does not fit, nobody
overtakes it. When decoding needs a block and none can be had, the youngest sequence is preempted: it goes back to
waiting and recomputes what is not in the cache any more. The oldest is never preempted while it runs beside others,
so somebody always gets through.

The order is from a simulation of agentic and chat traces; decode first with chunked prefill is Sarathi's
(arXiv 2403.02310).
"""

from __future__ import annotations

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


@dataclass(slots=True)
class Plan:
    """What to do, in this order: preempt, admit (match), then allocate and compute `work`.

    `work` holds each sequence with the number of its tokens to compute: first `num_decodes` times one token, then
    chunks of prompts, those of the admitted among them.
    """

    now: float
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    work: list[tuple[Sequence, int]] = field(default_factory=list)
    num_decodes: int = 0
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
        num_needed = sum(s.num_computed == len(s.table.block_ids) * size for s, _ in plan.work)
        if num_needed <= room.num_available:
            _add_prefills(plan, room, waiting, num_needed, limits, rate)
            if plan.work or not room.running:
                return plan
        plan.preempted.append(room.preempt())


class _Room:
    """The blocks that can be had, and who is left running, as the plan's preemptions go on."""

    def __init__(self, cache: PrefixCache, running: list[Sequence]) -> None:
        self.cache = cache
        self.running = running
        self.num_available = cache.num_available
        self._given_up: dict[int, int] = {}  # block id -> references that go with the preempted

    def preempt(self) -> Sequence:
        """Take the youngest out of `running` and count the blocks that nobody else references."""
        victim = max(self.running, key=lambda s: (s.arrived, s.key))
        self.running.remove(victim)
        blocks = self.cache.pool.blocks
        for block_id in victim.table.references():
            count = self._given_up[block_id] = self._given_up.get(block_id, 0) + 1
            self.num_available += count == blocks[block_id].ref_count
        return victim


def _add_prefills(
    plan: Plan, room: _Room, waiting: Seq[Sequence], num_needed: int, limits: EngineLimits, rate: float
) -> None:
    """Give what the decodes leave of the budget to prefills: extend `work`, set `admitted` and `num_pending`."""
    cache = room.cache
    size = cache.block_size
    prefilling = [s for s in room.running if s.num_remaining > 1]
    if not prefilling and not waiting:
        return
    cached = {s.key: cache.probe(s.chain, (s.num_tokens - 1) // size) for s in waiting}
    uncached = {s.key: s.num_tokens - cached[s.key][0] * size for s in waiting}
    for s in prefilling:
        uncached[s.key] = s.num_remaining
    budget = min(limits.max_step_tokens - plan.num_decodes, max(MIN_CHUNK, int(rate * limits.max_step_s)))
    num_available = room.num_available - num_needed
    num_reserved = sum(s.num_missing_blocks(s.num_tokens, size) for s in prefilling)
    num_running = len(room.running)
    is_open = not plan.preempted  # what a preemption freed is not for newcomers
    plan.num_pending = sum(uncached.values())
    for s in sorted(
        [*prefilling, *waiting], key=lambda s: uncached[s.key] / rate - limits.ageing * (plan.now - s.arrived)
    ):
        if budget <= 0:
            break
        if s.key in cached:
            num_matched, num_idle = cached[s.key]
            num_missing = -(-s.num_tokens // size) - num_matched
            num_wanted = num_missing + num_idle + num_reserved + num_running  # each running one may soon want a block
            is_open = is_open and num_running < limits.max_requests and num_wanted <= num_available
            if not is_open:
                continue
            plan.admitted.append(s)
            num_available -= num_idle
            num_running += 1
            num_held, start = num_matched, num_matched * size
        else:
            num_held, start = len(s.table.block_ids), s.num_computed
            num_reserved -= s.num_missing_blocks(s.num_tokens, size)  # its turn is now
        count = min(uncached[s.key], budget, (num_held + num_available) * size - start)
        if count <= 0:
            continue
        num_blocks = max(0, -(-(start + count) // size) - num_held)
        num_available -= num_blocks
        budget -= count
        plan.work.append((s, count))
        plan.num_pending -= count
