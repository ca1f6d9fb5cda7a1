"""What arrives in the routing lab, and when: a trace at another speed, its tenants, and the flood of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from replay_cache import Request, Trace

PREFILL_TOKENS_PER_S = 20_000.0
FLOOD_LOAD = 1.5


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request at `time_s` of the lab's clock. `is_extra`: the trace has it once, the flood again."""

    time_s: float
    tenant: int
    request: Request
    is_extra: bool = False


def arrivals(trace: Trace, num_workers: int, load: float | None, num_tenants: int = 1) -> list[Arrival]:
    """Return the requests of `trace`, so fast that `num_workers` workers on one infinite cache would be busy with
    prefill for a share `load` of the time. None: at the recorded times."""
    requests, start = trace.requests, trace.requests[0].time_s
    span_s = requests[-1].time_s - start
    speed = 1.0
    if load is not None and span_s > 0:
        speed = load * num_workers * PREFILL_TOKENS_PER_S * span_s / sum(uncached_tokens(requests, trace.block_tokens))
    tenants = tenants_of(requests, num_tenants)
    return [
        Arrival((request.time_s - start) / speed, tenant, request)
        for request, tenant in zip(requests, tenants, strict=True)
    ]


def uncached_tokens(requests: Sequence[Request], block_tokens: int, cached: Iterable[int] = ()) -> list[int]:
    """Return what each request has to compute, at least one token, if `cached` and all before it is cached for ever."""
    seen = set(cached)
    uncached = []
    for request in requests:
        block_ids = request.block_ids
        num_found = next((i for i, block_id in enumerate(block_ids) if block_id not in seen), len(block_ids))
        seen.update(block_ids)
        uncached.append(max(1, request.num_tokens - num_found * block_tokens))
    return uncached


def tenants_of(requests: Sequence[Request], num_tenants: int) -> list[int]:
    """Return the tenant of each request: its session's, or its conversation's where the trace knows no sessions.

    A conversation is known by its first block that fewer than half of all requests have.
    """
    if num_tenants == 1:
        return [0] * len(requests)
    uses = Counter(block_id for request in requests for block_id in request.block_ids)
    common = {block_id for block_id, count in uses.items() if 2 * count >= len(requests)}
    tenants = []
    for request in requests:
        root = next((block_id for block_id in request.block_ids if block_id not in common), 0)
        tenants.append((root if request.session is None else request.session) % num_tenants)
    return tenants


def flooded(normal: Sequence[Arrival], num_workers: int, block_tokens: int) -> tuple[list[Arrival], int]:
    """Return the arrivals when the largest tenant floods, and who that is.

    In the middle half of the time all that it sends comes so many times that the whole load is `FLOOD_LOAD`. The copies
    of one conversation have blocks of their own after what the tenants share, and follow each other closely.
    """
    work = uncached_tokens([arrival.request for arrival in normal], block_tokens)
    end_s = normal[-1].time_s
    begin_s, until_s = end_s / 4, 3 * end_s / 4
    of_tenant: Counter[int] = Counter()
    for arrival, tokens in zip(normal, work, strict=True):
        if begin_s <= arrival.time_s < until_s:
            of_tenant[arrival.tenant] += tokens
    [(flooder, _)] = of_tenant.most_common(1)
    own = [a for a in normal if a.tenant == flooder and begin_s <= a.time_s < until_s]
    shared = {block_id for a in normal if a.tenant != flooder for block_id in a.request.block_ids}
    missing = FLOOD_LOAD * num_workers * PREFILL_TOKENS_PER_S * (until_s - begin_s) - of_tenant.total()
    num_copies = max(0, round(missing / sum(uncached_tokens([a.request for a in own], block_tokens, shared))))
    num_ids = 1 + max(block_id for a in normal for block_id in a.request.block_ids)
    delay_s = (until_s - begin_s) / max(1, len(own)) / (num_copies + 1)
    extra = [
        Arrival(a.time_s + copy * delay_s, flooder, _copy(a.request, shared, copy * num_ids), is_extra=True)
        for copy in range(1, num_copies + 1)
        for a in own
    ]
    return sorted([*normal, *extra], key=lambda arrival: arrival.time_s), flooder


def _copy(request: Request, shared: set[int], offset: int) -> Request:
    return replace(request, block_ids=[b if b in shared else b + offset for b in request.block_ids])
