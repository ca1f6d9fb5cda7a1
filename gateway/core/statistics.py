"""What the core counts, as values for `/metrics`, `kvasir status` and tests."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvasir.gateway.core.requests import Model
    from kvasir.gateway.core.worker import Worker
    from kvasir.protocol.messages import KvAccount

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class HistogramStatistics(msgspec.Struct, frozen=True):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """Counts values in fixed buckets."""

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def statistics(self) -> HistogramStatistics:
        """Return the counts so far."""
        return HistogramStatistics(self._bounds, tuple(self._counts), self._sum)


@dataclass(slots=True)
class TenantCounters:
    """Since the start, but for the two gauges `num_queued` and `num_running`."""

    num_queued: int = 0
    num_running: int = 0
    num_requests: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)  # by reason


@dataclass(slots=True)
class ModelCounters:
    """Since the start. `ttft_s` from arrival to the first token, `queue_s` from arrival to the first dispatch."""

    num_finished: int = 0
    ttft_s: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Totals:
    """Since the start. `num_lost` by cause; `num_stale_outputs` came for attempts that are over."""

    num_dispatches: int = 0
    num_redispatches: int = 0
    num_poisoned: int = 0
    num_stale_outputs: int = 0
    num_resyncs: int = 0
    num_refused_workers: int = 0
    num_lost: dict[str, int] = field(default_factory=dict)


class TenantStatistics(msgspec.Struct, frozen=True):
    """One tenant. `hit_rate`: cached / prompt tokens of finished requests, token-weighted."""

    tenant_id: str
    queued: int
    running: int
    num_requests: int
    num_refused: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    hit_rate: float
    num_finished: dict[str, int]


class WorkerStatistics(msgspec.Struct, frozen=True):
    """One worker. `running`, `waiting`, free and pinned blocks as it last reported; `num_in_flight` as the core counts.

    `hit_rate`: cached tokens it reported / prompt tokens of the same attempts; predicted is what the router expected.
    """

    worker_id: str
    model: str
    state: str
    device: str
    pid: int
    incarnation: str
    joined_s: float
    silent_s: float
    step: int
    num_in_flight: int
    max_requests: int
    running: int
    waiting: int
    num_blocks: int
    num_free_blocks: int
    num_pinned_blocks: int
    num_pending_tokens: int
    prefill_tokens_per_s: float
    decode_round_s: float
    num_requests: int
    num_finished: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_predicted_cached_tokens: int
    num_actual_cached_tokens: int
    num_mispredicted_tokens: int
    hit_rate: float
    num_stale_outputs: int
    num_reports: int
    num_index_blocks: int
    num_index_reserved: int
    num_index_gaps: int
    index_in_sync: bool
    index_bytes: int
    index_bytes_per_block: float


class KvStatistics(msgspec.Struct, frozen=True):
    """What one tenant ("public": published prefixes) holds on one worker, as it last said; see `KvAccount`."""

    worker_id: str
    tenant_id: str
    num_held: int
    block_s: float
    byte_s: float
    num_looked_up: int
    num_hits: int
    num_evicted_own: int
    num_suffered: int
    num_caused: int


class ModelStatistics(msgspec.Struct, frozen=True):
    """One model: its queue and the latencies of its requests."""

    model: str
    queued: int
    running: int
    num_workers: int
    num_finished: int
    ttft_s: HistogramStatistics
    queue_s: HistogramStatistics


class CoreStatistics(msgspec.Struct, frozen=True):
    """Everything at one moment."""

    is_draining: bool
    num_queued: int
    num_running: int
    num_dispatches: int
    num_redispatches: int
    num_poisoned: int
    num_stale_outputs: int
    num_resyncs: int
    num_refused_workers: int
    num_lost: dict[str, int]
    models: list[ModelStatistics]
    workers: list[WorkerStatistics]
    tenants: list[TenantStatistics]
    kv: list[KvStatistics] = []


def core_statistics(
    now: float,
    is_draining: bool,
    models: Iterable[Model],
    workers: Iterable[Worker],
    tenants: Mapping[str, TenantCounters],
    totals: Totals,
) -> CoreStatistics:
    """Return everything as one value."""
    per_model = [model_statistics(model) for model in models]
    workers = list(workers)
    return CoreStatistics(
        is_draining=is_draining,
        num_queued=sum(model.queued for model in per_model),
        num_running=sum(tenant.num_running for tenant in tenants.values()),
        num_dispatches=totals.num_dispatches,
        num_redispatches=totals.num_redispatches,
        num_poisoned=totals.num_poisoned,
        num_stale_outputs=totals.num_stale_outputs,
        num_resyncs=totals.num_resyncs,
        num_refused_workers=totals.num_refused_workers,
        num_lost=dict(totals.num_lost),
        models=per_model,
        workers=[worker_statistics(worker, now) for worker in workers],
        tenants=[tenant_statistics(tenant_id, counters) for tenant_id, counters in tenants.items()],
        kv=[kv_statistics(worker, account) for worker in workers for account in worker.kv.accounts],
    )


def kv_statistics(worker: Worker, account: KvAccount) -> KvStatistics:
    """Return one account."""
    return KvStatistics(
        worker_id=worker.worker_id,
        tenant_id=account.tenant,
        num_held=account.num_held,
        block_s=account.block_s,
        byte_s=account.block_s * worker.hello.bytes_per_block,
        num_looked_up=account.num_looked_up,
        num_hits=account.num_hits,
        num_evicted_own=account.num_evicted_own,
        num_suffered=account.num_suffered,
        num_caused=account.num_caused,
    )


def model_statistics(model: Model) -> ModelStatistics:
    """Return one model's."""
    return ModelStatistics(
        model=model.name,
        queued=len(model.queue),
        running=sum(len(worker.in_flight) for worker in model.workers),
        num_workers=len(model.workers),
        num_finished=model.counters.num_finished,
        ttft_s=model.counters.ttft_s.statistics(),
        queue_s=model.counters.queue_s.statistics(),
    )


def tenant_statistics(tenant_id: str, counters: TenantCounters) -> TenantStatistics:
    """Return one tenant's."""
    return TenantStatistics(
        tenant_id=tenant_id,
        queued=counters.num_queued,
        running=counters.num_running,
        num_requests=counters.num_requests,
        num_refused=counters.num_refused,
        num_prompt_tokens=counters.num_prompt_tokens,
        num_cached_tokens=counters.num_cached_tokens,
        num_output_tokens=counters.num_output_tokens,
        hit_rate=_share(counters.num_cached_tokens, counters.num_prompt_tokens),
        num_finished=dict(counters.num_finished),
    )


def worker_statistics(worker: Worker, now: float) -> WorkerStatistics:
    """Return one worker's."""
    hello, load, counters, index = worker.hello, worker.load, worker.counters, worker.index.statistics()
    return WorkerStatistics(
        worker_id=worker.worker_id,
        model=hello.model,
        state=worker.state,
        device=hello.device,
        pid=hello.pid,
        incarnation=hello.incarnation.hex(),
        joined_s=now - worker.joined_at,
        silent_s=now - worker.last_report_at,
        step=max(0, worker.step),
        num_in_flight=len(worker.in_flight),
        max_requests=hello.limits.max_requests,
        running=load.num_running,
        waiting=load.num_waiting,
        num_blocks=hello.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_pinned_blocks=worker.kv.num_pinned,
        num_pending_tokens=load.pending_tokens,
        prefill_tokens_per_s=worker.rates.prefill_tokens_per_s,
        decode_round_s=worker.rates.round_s,
        num_requests=counters.num_requests,
        num_finished=counters.num_finished,
        num_prompt_tokens=counters.num_prompt_tokens,
        num_output_tokens=counters.num_output_tokens,
        num_predicted_cached_tokens=counters.num_predicted_cached_tokens,
        num_actual_cached_tokens=counters.num_actual_cached_tokens,
        num_mispredicted_tokens=counters.num_mispredicted_tokens,
        hit_rate=_share(counters.num_actual_cached_tokens, counters.num_prompt_tokens),
        num_stale_outputs=counters.num_stale_outputs,
        num_reports=counters.num_reports,
        num_index_blocks=index.num_blocks,
        num_index_reserved=index.num_reserved,
        num_index_gaps=index.num_gaps,
        index_in_sync=index.in_sync,
        index_bytes=index.size_bytes,
        index_bytes_per_block=index.bytes_per_block,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
