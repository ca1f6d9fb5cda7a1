"""Which worker takes a request: the one with the least predicted wait plus a price for computing what is not cached.

For request r and worker w, all in seconds, m = uncached prompt tokens / w's prefill rate, at least one token:

    wait(r, w) = (uncached tokens that w computes before r) / rate + (steps that takes) * (w's decode round)
    cost(r, w) = wait + (c + x * overtaken) * m  [ + beta * heat(w)  if no worker holds half of r ]

A worker computes its pending prompts shortest first with ageing: the smallest m - a * (time waited - lead) goes first,
where lead is what its tenant is ahead of the others (`TenantQueue.lead`) in seconds of prefill. A worker that lacks an
order of its own computes them as they come. `overtaken` are the pending requests that r goes before because they are
larger. Those that it goes before because their tenants have a lead do not count: with a price on them a flood would
keep others' long prompts away from all its workers. heat is the prefill time lately given to w, decayed. A prompt whose
prefix another request is still computing on w waits for that one. Costs within `tie_s` of the least are equal: then the
fewest running requests decide, then the cost, then the worker's id.

`choose` is a pure function. The form of the rule comes from event-driven simulation of public traces, its
constants from the same with the product itself (`scripts/replay_trace.py route`): c = 3, x = 1, a = 0.2, beta = 0.3,
tau = 30 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvasir.gateway.routing.backlog import Backlog, Pending


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The rule's constants; see the module."""

    miss_price: float = 3.0  # c
    overtake_price: float = 1.0  # x
    ageing: float = 0.2  # a
    heat_price: float = 0.3  # beta
    heat_decay_s: float = 30.0  # tau
    tie_s: float = 0.001


class Candidate(msgspec.Struct, eq=False):
    """A worker that serves the request's model, as the rule sees it.

    Of the cached tokens those beyond `num_resident_blocks` are still to be computed there, by requests that were sent
    before; `leader` is the entry of `backlog` that computes the last of them, if there are any.
    `round_s`: time of one decode step with what is running there now, 0 if nothing is; `step_tokens`: prompt tokens
    that one step takes at most. `slot_wait_s`: until it has a credit, 0 if it has one. `is_fifo`: it computes prompts
    as they come. `is_guess`: what it has cached is not known now, and taken for nothing.
    """

    worker_id: str
    num_cached_tokens: int
    num_resident_blocks: int
    prefill_tokens_per_s: float
    round_s: float
    step_tokens: int
    num_running: int
    heat_s: float
    backlog: Backlog
    leader: Pending | None = None
    slot_wait_s: float = 0.0
    is_fifo: bool = False
    is_guess: bool = False


class Terms(msgspec.Struct, frozen=True, gc=False):
    """One worker's cost for one request and what it is made of; times in seconds. `is_guess`: see `Candidate`."""

    worker_id: str
    cost_s: float
    wait_s: float
    miss_s: float
    num_cached_tokens: int
    num_overtaken: int
    heat_s: float
    num_running: int
    is_guess: bool = False


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes and why: the terms of all candidates. `key` is its place in the worker's backlog, `lead_s`
    of it because of its tenant's lead; `num_resident_blocks` of its prompt are there already. `note`: what else there
    is to say of this attempt."""

    worker_id: str
    num_tokens: int
    terms: tuple[Terms, ...]
    chosen: Terms
    key: float
    lead_s: float
    num_resident_blocks: int
    note: str = ""


def choose(
    num_tokens: int, candidates: Sequence[Candidate], now: float, config: RouterConfig, lead: float = 0.0
) -> Decision:
    """Return the cheapest of `candidates` (at least one) for a request of `num_tokens` tokens, whose tenant has a lead
    of `lead` tokens. Pure, deterministic."""
    most_cached = max([candidate.num_cached_tokens for candidate in candidates])
    heat_price = config.heat_price if 2 * most_cached < num_tokens else 0.0
    scored = [_terms(num_tokens, candidate, now, lead, heat_price, config) for candidate in candidates]
    best = 0
    if len(scored) > 1:
        limit = min([terms.cost_s for terms in scored]) + config.tie_s
        best = min([(_preference(terms), i) for i, terms in enumerate(scored) if terms.cost_s <= limit])[1]
    chosen, candidate = scored[best], candidates[best]
    key, lead_s = _key(chosen.miss_s, candidate, now, lead, config)
    return Decision(chosen.worker_id, num_tokens, tuple(scored), chosen, key, lead_s, candidate.num_resident_blocks)


def _preference(terms: Terms) -> tuple[int, float, str]:
    return terms.num_running, terms.cost_s, terms.worker_id


def _key(miss_s: float, candidate: Candidate, now: float, lead: float, config: RouterConfig) -> tuple[float, float]:
    """Return the place in the worker's order, and how much of it is due to the lead."""
    if candidate.is_fifo:
        return now, 0.0
    lead_s = config.ageing * lead / candidate.prefill_tokens_per_s
    return miss_s + config.ageing * now + lead_s, lead_s


def _terms(
    num_tokens: int, candidate: Candidate, now: float, lead: float, heat_price: float, config: RouterConfig
) -> Terms:
    num_missing = max(1, num_tokens - candidate.num_cached_tokens)
    miss_s = num_missing / candidate.prefill_tokens_per_s
    key, lead_s = _key(miss_s, candidate, now, lead, config)
    num_ahead, num_overtaken = candidate.backlog.ahead(key, lead_s)
    if not num_ahead and len(candidate.backlog):  # it goes first, after the slice that is being computed: half of one
        num_ahead = min(candidate.backlog.front_tokens, candidate.step_tokens) // 2
    leader = candidate.leader
    if leader is not None and leader.key > key:
        num_ahead += leader.num_tokens
    wait_s = num_ahead / candidate.prefill_tokens_per_s
    if candidate.round_s:
        wait_s += (1 + (num_ahead + num_missing) // candidate.step_tokens) * candidate.round_s
    wait_s = max(wait_s, candidate.slot_wait_s)
    price = config.miss_price + config.overtake_price * num_overtaken
    cost_s = wait_s + price * miss_s + heat_price * candidate.heat_s
    return Terms(
        candidate.worker_id,
        cost_s,
        wait_s,
        miss_s,
        candidate.num_cached_tokens,
        num_overtaken,
        candidate.heat_s,
        candidate.num_running,
        candidate.is_guess,
    )
