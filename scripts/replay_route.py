"""Routing rules side by side on traces of requests, in virtual time: the inside of `replay_trace.py route`.

`N` workers, each with its share of the cache (leaf-first LRU), compute 20,000 prompt tokens per second and beside that
a token per 30 ms of up to 64 requests; neither slows the other. Arrivals are scaled so that the workers would be busy
with prefill for a share `load` of the time if they had one infinite cache; `native`: at the recorded times. Policies:

    kvasir          the product's core, with workers that compute in its own order
    kvasir-fifo     the same, with workers that compute first come, first served
    pooled-lru, pooled-optimum   bounds: one cache of the whole capacity; the optimum knows the future
    round-robin, least-in-flight, power-of-two, hash-K, overlap, sglang, dynamo, wait+Cmiss   see `route_policies`

With tenants: how much later a tenant's slowest requests get their first token than if it were alone (the ratio of the
99th percentiles), and Jain's index of what the tenants got in the middle half of the time over their max-min fair
shares; where they have weights, of what was computed for them over those, while every tenant had a request waiting (the
longest such time). With a flood the flooding tenant is no victim. Where some tenants are of the high class, those are
the victims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from replay_cache import Trace
from route_arrivals import PREFILL_TOKENS_PER_S, Arrival, arrivals, flooded, uncached_tokens
from route_peers import Served, run_peer, run_pooled_lru, run_pooled_optimum
from route_policies import PEERS, make_policy
from route_product import ProductOptions, run_product

BOUNDS = {"pooled-lru": run_pooled_lru, "pooled-optimum": run_pooled_optimum}
PRODUCT = {"kvasir": False, "kvasir-fifo": True}
POLICIES = [*PRODUCT, *PEERS, *BOUNDS]
DEFAULT_POLICIES = ["kvasir", "kvasir-fifo", "sglang", "dynamo", "wait+2miss", *BOUNDS]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one row measures. `capacity`: a share of the trace's distinct blocks, or, an int, blocks, of all workers
    together. `load` None: recorded times. `slo_s`: a first token within that time is good. `weights`: of the tenants,
    in turn."""

    policy: str
    num_workers: int
    capacity: float | int
    load: float | None
    num_tenants: int = 1
    is_flooded: bool = False
    slo_s: float = 5.0
    step_tokens: int = 2048
    step_s: float = 0.0
    delay_s: float = 0.0
    weights: tuple[int, ...] = (1,)
    num_high: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. Rates and shares from 0 to 1; `goodput` of all requests, refused ones too; `imbalance` is
    the most prompt tokens computed by a worker over the mean."""

    trace: str
    policy: str
    workers: int
    capacity_share: float
    load: float | None
    token_hit_rate: float
    imbalance: float
    ttft_mean_s: float
    ttft_p99_s: float
    goodput: float
    tenants: int = 1
    flood: bool = False
    victim_p99_over_solo: float | None = None
    jain: float | None = None


def measure(trace: Trace, cell: Cell) -> Row:
    """Run one cell."""
    total = cell.capacity if isinstance(cell.capacity, int) else int(cell.capacity * trace.num_distinct + 1e-9)
    run = _runner(trace, cell, total)
    normal = arrivals(trace, cell.num_workers, cell.load, cell.num_tenants)
    coming, flooder = flooded(normal, cell.num_workers, trace.block_tokens) if cell.is_flooded else (normal, None)
    served = run(coming)
    answered = [one for one in served if one.worker is not None]
    times = sorted(one.ttft_s for one in answered)
    computed: Counter[int | None] = Counter()
    for one in answered:
        computed[one.worker] += one.num_computed
    victims = jain = None
    if cell.num_tenants > 1:
        victims = _victims(served, normal, flooder, cell.num_high or cell.num_tenants, run)
        jain = jain_by_weight(served, cell) if len(cell.weights) > 1 else _jain(served, cell, trace.block_tokens)
    return Row(
        trace=trace.name,
        policy=cell.policy,
        workers=cell.num_workers,
        capacity_share=total / trace.num_distinct,
        load=cell.load,
        token_hit_rate=sum(one.num_hit_tokens for one in answered) / sum(a.request.num_tokens for a in coming),
        imbalance=max(computed.values()) / (computed.total() / cell.num_workers) if computed else 1.0,
        ttft_mean_s=mean(times) if times else 0.0,
        ttft_p99_s=percentile(times, 0.99),
        goodput=sum(time_s <= cell.slo_s for time_s in times) / len(served),
        tenants=cell.num_tenants,
        flood=cell.is_flooded,
        victim_p99_over_solo=victims,
        jain=jain,
    )


def is_policy(name: str) -> bool:
    return name in PRODUCT or name in BOUNDS or make_policy(name) is not None


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that `share` of `ordered` are below."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _runner(trace: Trace, cell: Cell, total: int) -> Callable[[Sequence[Arrival]], list[Served]]:
    num_workers, num_blocks = cell.num_workers, max(1, total // cell.num_workers)
    if cell.policy in BOUNDS:
        return lambda coming: BOUNDS[cell.policy](trace, coming, num_workers, max(1, total))
    if cell.policy in PRODUCT:
        options = ProductOptions(
            PRODUCT[cell.policy], cell.step_tokens, cell.step_s, cell.delay_s, cell.weights, cell.num_high
        )
        return lambda coming: run_product(trace, coming, num_workers, num_blocks, options)

    def run(coming: Sequence[Arrival]) -> list[Served]:
        policy = make_policy(cell.policy)
        assert policy is not None, f"there is no policy {cell.policy}"
        return run_peer(trace, coming, policy, num_workers, num_blocks)

    return run


def _victims(
    served: Sequence[Served],
    normal: Sequence[Arrival],
    flooder: int | None,
    num_victims: int,
    run: Callable[[Sequence[Arrival]], list[Served]],
) -> float:
    """Return the 99th percentile of the victims' times over that of the same requests, each tenant by itself."""
    tenants = sorted({arrival.tenant for arrival in normal if arrival.tenant < num_victims} - {flooder})
    alone = [one.ttft_s for t in tenants for one in run([a for a in normal if a.tenant == t]) if one.worker is not None]
    together = [one.ttft_s for one in served if one.arrival.tenant in tenants and one.worker is not None]
    return percentile(sorted(together), 0.99) / max(1e-9, percentile(sorted(alone), 0.99))


def _jain(served: Sequence[Served], cell: Cell, block_tokens: int) -> float:
    """Return Jain's index over tenants of the work done in the middle half of the time, over the fair share of it.

    A request's work is what it would compute on an infinite cache: no rule gets more for missing more.
    """
    end_s = max(one.arrival.time_s for one in served)
    begin_s, until_s = end_s / 4, 3 * end_s / 4
    work = uncached_tokens([one.arrival.request for one in served], block_tokens)
    offered: Counter[int] = Counter()
    done: Counter[int] = Counter()
    for one, tokens in zip(served, work, strict=True):
        arrived_at = one.arrival.time_s
        if begin_s <= arrived_at < until_s:
            offered[one.arrival.tenant] += tokens
        if one.worker is not None and begin_s <= arrived_at + one.ttft_s < until_s:
            done[one.arrival.tenant] += tokens
    shares = fair_shares(offered, cell.num_workers * PREFILL_TOKENS_PER_S * (until_s - begin_s))
    ratios = [done[tenant] / share for tenant, share in shares.items() if share > 0]
    return _index(ratios) if any(ratios) else 1.0


def fair_shares(wanted: Counter[int], capacity: float) -> dict[int, float]:
    """Return the max-min fair shares of `capacity`: nobody gets more than is wanted, the rest goes in equal parts."""
    shares: dict[int, float] = {}
    for num_served, (tenant, amount) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[tenant] = min(amount, capacity / (len(wanted) - num_served))
        capacity -= shares[tenant]
    return shares


def jain_by_weight(served: Sequence[Served], cell: Cell) -> float | None:
    """Return Jain's index over tenants of what was computed for them, over their weights, while all had requests that
    waited for their first tokens; None if that was never."""
    answered = [one for one in served if one.worker is not None]
    begin_s, until_s = _all_waiting(answered, cell.num_tenants)
    computed: Counter[int] = Counter()
    for one in answered:
        if begin_s <= one.arrival.time_s + one.ttft_s < until_s:
            computed[one.arrival.tenant] += one.num_computed
    parts = [computed[tenant] / cell.weights[tenant % len(cell.weights)] for tenant in range(cell.num_tenants)]
    return _index(parts) if any(parts) else None


def _all_waiting(answered: Sequence[Served], num_tenants: int) -> tuple[float, float]:
    """Return the longest time in which every tenant has a request that waits."""
    changes = [(one.arrival.time_s, 1, one.arrival.tenant) for one in answered]
    changes += [(one.arrival.time_s + one.ttft_s, -1, one.arrival.tenant) for one in answered]
    num_waiting, longest, since = [0] * num_tenants, (0.0, 0.0), None
    for time_s, change, tenant in sorted(changes):
        num_waiting[tenant] += change
        if min(num_waiting) > 0:
            since = time_s if since is None else since
        elif since is not None:
            longest, since = max(longest, (since, time_s), key=lambda span: span[1] - span[0]), None
    return longest


def _index(parts: Sequence[float]) -> float:
    """Return Jain's index: 1 if all are equal."""
    return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))


def render(rows: Iterable[Row]) -> str:
    """Return the table of one trace: a line per cell, and the mean and spread of loads within 5 % of each other."""
    head = f"{'policy':16}{'workers':>8}{'cache':>7}{'load':>8}{'hits %':>8}{'imbal.':>8}{'mean s':>9}{'p99 s':>9}"
    lines = [head + f"{'goodput':>9}{'victims':>9}{'Jain':>7}"]
    groups: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.policy, row.workers, row.capacity_share), []).append(row)
        lines.append(_line(row))
    for group in groups.values():
        loads = [row.load for row in group if row.load is not None]
        if len(group) > 2 and len(loads) == len(group) and max(loads) <= 1.11 * min(loads):
            lines.append(_spread(group))
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    load = "native" if row.load is None else f"{row.load:g}"
    line = f"{row.policy:16}{row.workers:8}{100 * row.capacity_share:6.0f}%{load:>8}{100 * row.token_hit_rate:8.1f}"
    line += f"{row.imbalance:8.2f}{row.ttft_mean_s:9.3f}{row.ttft_p99_s:9.2f}{100 * row.goodput:8.1f}%"
    victims = "-" if row.victim_p99_over_solo is None else f"{row.victim_p99_over_solo:.2f}"
    return line + f"{victims:>9}" + (f"{row.jain:7.3f}" if row.jain is not None else f"{'-':>7}")


def _spread(rows: Sequence[Row]) -> str:
    hits, means, p99s = (
        [100 * row.token_hit_rate for row in rows],
        [row.ttft_mean_s for row in rows],
        [row.ttft_p99_s for row in rows],
    )
    return (
        f"{rows[0].policy}, {rows[0].workers} workers, {len(rows)} loads: hits {_around(hits, 2)} %, "
        f"mean {_around(means, 3)} s, p99 {_around(p99s, 2)} s"
    )


def _around(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"
