"""`/metrics`: the gateway's counters in Prometheus' text format (version 0.0.4).

Written by hand because every figure exists already in `statistics()` and only needs spelling; a client library would
keep a second copy of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvasir.gateway.core.statistics import (
    CoreStatistics,
    HistogramStatistics,
    KvStatistics,
    TenantStatistics,
    WorkerStatistics,
)
from kvasir.gateway.http.connection import HttpStatistics

Sample = tuple[Mapping[str, str], float]

_WORKER_GAUGES = {
    "in_flight": ("num_in_flight", "Requests sent to the worker and not finished."),
    "running": ("running", "Sequences running, as the worker last said."),
    "waiting": ("waiting", "Sequences waiting inside the worker."),
    "blocks": ("num_blocks", "KV blocks."),
    "free_blocks": (
        "num_free_blocks",
        "KV blocks that no request uses: free ones, and idle ones with cached contents.",
    ),
    "pinned_blocks": ("num_pinned_blocks", "KV blocks of pinned prefixes."),
    "index_blocks": ("num_index_blocks", "Blocks that the gateway's prefix index knows of."),
    "prefill_tokens_per_second": ("prefill_tokens_per_s", "Learned prefill rate."),
    "decode_round_seconds": ("decode_round_s", "Learned time of one decode step."),
}
_WORKER_COUNTERS = {
    "requests": ("num_requests", "Requests sent."),
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens sent."),
    "output_tokens": ("num_output_tokens", "Tokens generated and delivered."),
    "predicted_cached_tokens": ("num_predicted_cached_tokens", "Cached tokens that the router expected."),
    "actual_cached_tokens": ("num_actual_cached_tokens", "Cached tokens that the worker found."),
    "mispredicted_tokens": ("num_mispredicted_tokens", "Sum of |predicted - actual| cached tokens."),
    "stale_outputs": ("num_stale_outputs", "Outputs dropped because their attempt was over."),
    "index_gaps": ("num_index_gaps", "Gaps in the block events, each mended by a snapshot."),
}
_KV_GAUGES = {"blocks": ("num_held", "KV blocks held: allocated, or cached and idle.")}
_KV_COUNTERS = {
    "block_seconds": ("block_s", "KV blocks held times seconds."),
    "byte_seconds": ("byte_s", "KV memory held times seconds."),
    "looked_up_blocks": ("num_looked_up", "Whole blocks of prompts that the worker began to serve."),
    "hit_blocks": ("num_hits", "Of them found in its cache."),
    "evicted_own_blocks": ("num_evicted_own", "Own blocks evicted for oneself."),
    "suffered_blocks": ("num_suffered", "Own blocks evicted for others."),
    "caused_blocks": ("num_caused", "Others' blocks evicted for oneself."),
}
_TENANT_GAUGES = {
    "queued": ("queued", "Requests waiting for a worker."),
    "running": ("running", "Requests on workers."),
}
_TENANT_COUNTERS = {
    "requests": ("num_requests", "Requests received."),
    "refused": ("num_refused", "Requests refused by the queue."),
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens of finished requests."),
    "cached_tokens": ("num_cached_tokens", "Of them found in a KV cache."),
    "output_tokens": ("num_output_tokens", "Tokens generated for finished requests."),
}


def render_metrics(core: CoreStatistics, http: HttpStatistics | None) -> bytes:
    """Return all metrics. Tenants appear by id: names are for people and may change."""
    lines: list[str] = []
    for name, count, text in (
        ("dispatches", core.num_dispatches, "Requests sent to workers, repeated ones included."),
        ("redispatches", core.num_redispatches, "Requests that went on elsewhere after a worker was lost."),
        ("poisoned", core.num_poisoned, "Requests given up because workers died under them."),
        ("resyncs", core.num_resyncs, "Snapshots asked for after a gap in block events."),
        ("refused_workers", core.num_refused_workers, "Workers that were not let in."),
    ):
        _add(lines, f"kvasir_{name}_total", "counter", text, [({}, count)])
    _add(
        lines,
        "kvasir_workers_lost_total",
        "counter",
        "Workers lost, by cause.",
        [({"cause": cause}, count) for cause, count in sorted(core.num_lost.items())],
    )
    _add(lines, "kvasir_draining", "gauge", "1 while the gateway shuts down.", [({}, int(core.is_draining))])
    models = [({"model": model.model}, model) for model in core.models]
    _add(lines, "kvasir_queued", "gauge", "Requests waiting.", [(labels, model.queued) for labels, model in models])
    _add(lines, "kvasir_workers", "gauge", "Live workers.", [(labels, model.num_workers) for labels, model in models])
    _histogram(lines, "kvasir_ttft_seconds", "Arrival to first token.", [(lb, model.ttft_s) for lb, model in models])
    _histogram(lines, "kvasir_queue_seconds", "Time in the queue.", [(lb, model.queue_s) for lb, model in models])
    _table(lines, "kvasir_worker_", "gauge", _WORKER_GAUGES, core.workers, _worker_labels)
    _table(lines, "kvasir_worker_", "counter", _WORKER_COUNTERS, core.workers, _worker_labels)
    _table(lines, "kvasir_tenant_", "gauge", _TENANT_GAUGES, core.tenants, _tenant_labels)
    _table(lines, "kvasir_tenant_", "counter", _TENANT_COUNTERS, core.tenants, _tenant_labels)
    _table(lines, "kvasir_kv_", "gauge", _KV_GAUGES, core.kv, _kv_labels)
    _table(lines, "kvasir_kv_", "counter", _KV_COUNTERS, core.kv, _kv_labels)
    if http is not None:
        by_status = [({"status": str(status)}, count) for status, count in sorted(http.by_status.items())]
        _add(lines, "kvasir_http_responses_total", "counter", "HTTP answers by status.", by_status)
        _add(lines, "kvasir_http_connections", "gauge", "Open HTTP connections.", [({}, http.num_open)])
        _add(lines, "kvasir_http_cut_total", "counter", "HTTP connections cut for slowness.", [({}, http.num_cut)])
    return "".join(lines).encode()


def _worker_labels(worker: WorkerStatistics) -> Mapping[str, str]:
    return {"worker": worker.worker_id, "model": worker.model}


def _tenant_labels(tenant: TenantStatistics) -> Mapping[str, str]:
    return {"tenant": tenant.tenant_id}


def _kv_labels(account: KvStatistics) -> Mapping[str, str]:
    return {"worker": account.worker_id, "tenant": account.tenant_id}


def _table(lines: list[str], prefix: str, kind: str, rows: dict[str, tuple[str, str]], items: Iterable, labels) -> None:  # type: ignore[no-untyped-def,type-arg]
    items = list(items)
    suffix = "_total" if kind == "counter" else ""
    for name, (attribute, text) in rows.items():
        samples = [(labels(item), getattr(item, attribute)) for item in items]
        _add(lines, f"{prefix}{name}{suffix}", kind, text, samples)


def _add(lines: list[str], name: str, kind: str, text: str, samples: Iterable[Sample]) -> None:
    lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
    lines += [f"{name}{_labels(labels)} {value!r}\n" for labels, value in samples]


def _histogram(
    lines: list[str], name: str, text: str, samples: Iterable[tuple[Mapping[str, str], HistogramStatistics]]
) -> None:
    lines.append(f"# HELP {name} {text}\n# TYPE {name} histogram\n")
    for labels, histogram in samples:
        total = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            total += count
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f"{name}_bucket{_labels({**labels, 'le': le})} {total}\n")
        lines.append(f"{name}_sum{_labels(labels)} {histogram.sum!r}\n{name}_count{_labels(labels)} {total}\n")


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
