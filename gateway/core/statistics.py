"""The core's state as values for `/metrics`, `kvasir status` and tests: the records of the admin socket where it has
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

import msgspec

from kvasir.gateway.core.counters import HistogramStatistics, Totals
from kvasir.gateway.core.requests import Model
from kvasir.gateway.core.worker import Worker
from kvasir.protocol.admin_records import CacheTenant, CacheWorker, UsageInfo, WorkerInfo


class ModelStatistics(msgspec.Struct, frozen=True):
    """One model: its queue and the latencies of its requests."""

    model: str
    queued: int
    num_workers: int
    ttft_s: HistogramStatistics
    queue_s: HistogramStatistics


class CoreStatistics(msgspec.Struct, frozen=True):
    """Everything at one moment. `tenants` and the owners in `caches` by tenant id."""

    is_draining: bool
    totals: Totals
    models: list[ModelStatistics]
    workers: list[WorkerInfo]
    tenants: dict[str, UsageInfo]
    caches: list[CacheWorker] = []


def core_statistics(
    is_draining: bool,
    totals: Totals,
    models: Iterable[Model],
    workers: Iterable[Worker],
    tenants: Mapping[str, UsageInfo],
) -> CoreStatistics:
    """Return everything as one value, which later events do not change."""
    workers = list(workers)
    return CoreStatistics(
        is_draining=is_draining,
        totals=msgspec.structs.replace(totals, num_lost=dict(totals.num_lost)),
        models=[_model(model) for model in models],
        workers=[_worker(worker) for worker in workers],
        tenants={
            tenant_id: msgspec.structs.replace(usage, num_finished=dict(usage.num_finished))
            for tenant_id, usage in tenants.items()
        },
        caches=[_cache(worker) for worker in workers],
    )


def _model(model: Model) -> ModelStatistics:
    return ModelStatistics(
        model=model.name,
        queued=model.num_waiting,
        num_workers=len(model.workers),
        ttft_s=model.counters.ttft_s.statistics(),
        queue_s=model.counters.queue_s.statistics(),
    )


def _worker(worker: Worker) -> WorkerInfo:
    hello, load, index, round_s = worker.hello, worker.load, worker.index.statistics(), worker.rates.round_s
    return WorkerInfo(
        id=worker.worker_id,
        model=hello.model,
        state=worker.state,
        pid=hello.pid,
        device=hello.device,
        attention=hello.attention,
        num_in_flight=len(worker.in_flight),
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        max_requests=hello.limits.max_requests,
        num_blocks=hello.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_cached_blocks=index.num_blocks,
        num_reserved_blocks=index.num_reserved,
        num_index_gaps=index.num_gaps,
        index_in_sync=index.in_sync,
        prefill_rate=worker.rates.prefill_tokens_per_s,
        decode_rate=load.num_running / round_s if round_s else 0.0,
        decode_round_s=round_s,
        engine=hello.engine,
        hit_blocks=hello.hit_blocks,
        lacks=list(hello.lacks),
        drafts=list(worker.drafts.values()),
        **asdict(worker.counters),
    )


def _cache(worker: Worker) -> CacheWorker:
    hello = worker.hello
    size = hello.block_size
    return CacheWorker(
        id=worker.worker_id,
        model=hello.model,
        block_size=size,
        num_blocks=hello.num_blocks,
        num_free_blocks=worker.load.num_free_blocks,
        num_pinned=worker.kv.num_pinned,
        tenants=[
            CacheTenant(
                tenant=account.tenant,
                num_blocks=account.num_held,
                block_s=account.block_s,
                byte_s=account.block_s * hello.bytes_per_block,
                looked_up_tokens=account.num_looked_up * size,
                saved_tokens=account.num_hits * size,
                evicted_own=account.num_evicted_own,
                suffered=account.num_suffered,
                caused=account.num_caused,
            )
            for account in worker.kv.accounts
        ],
        engine=hello.engine,
        num_cached_blocks=worker.index.statistics().num_blocks,
    )
