"""`/metrics`: the gateway's counters in Prometheus' text format (version 0.0.4).

Written by hand because every figure exists already in `statistics()` and only needs spelling; a client library would
keep a second copy of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvasir.gateway.core.counters import LATENCY_BUCKETS_S, HistogramStatistics
from kvasir.gateway.core.statistics import CoreStatistics
from kvasir.gateway.http.limits import HttpStatistics
from kvasir.gateway.ledger.writer import LedgerStatistics

Labels = Mapping[str, str]
Sample = tuple[Labels, float]

# Metric -> the field that it shows, and what it means.
_TOTALS = {
    "dispatches": ("num_dispatches", "Requests sent to workers, repeated ones included."),
    "redispatches": ("num_redispatches", "Requests that went on elsewhere after a worker was lost."),
    "poisoned": ("num_poisoned", "Requests given up because workers died under them."),
    "resyncs": ("num_resyncs", "Snapshots asked for: after a gap in block events, or because the index had drifted."),
    "refused_workers": ("num_refused_workers", "Workers that were not let in."),
}
_WORKER_GAUGES = {
    "in_flight": ("num_in_flight", "Requests sent to the worker and not finished."),
    "running": ("num_running", "Sequences running, as the worker last said."),
    "waiting": ("num_waiting", "Sequences waiting inside the worker."),
    "blocks": ("num_blocks", "KV blocks."),
    "free_blocks": (
        "num_free_blocks",
        "KV blocks that no request uses: free ones, and idle ones with cached contents.",
    ),
    "index_blocks": ("num_cached_blocks", "Blocks that the gateway's prefix index knows of."),
    "prefill_tokens_per_second": ("prefill_rate", "Learned prefill rate."),
    "decode_round_seconds": ("decode_round_s", "Learned time of one decode step."),
}
_WORKER_COUNTERS = {
    "requests": ("num_requests", "Requests sent."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens sent."),
    "output_tokens": ("output_tokens", "Tokens generated and delivered."),
    "predicted_cached_tokens": ("predicted_cached_tokens", "Cached tokens that the router expected."),
    "actual_cached_tokens": ("cached_tokens", "Cached tokens that the worker found."),
    "mispredicted_tokens": ("mispredicted_tokens", "Sum of |predicted - actual| cached tokens."),
    "drift_tokens": ("drift_tokens", "Cached tokens that the prefix index was wrong about for no reason."),
    "stale_outputs": ("num_stale_outputs", "Outputs dropped because their attempt was over."),
    "index_gaps": ("num_index_gaps", "Gaps in the block events, each mended by a snapshot."),
}
_DRAFT_COUNTERS = {
    "draft_runs": ("num_runs", "Times that drafts were computed after a sequence's last token."),
    "drafted_tokens": ("num_drafted", "Tokens of drafts computed."),
    "accepted_tokens": ("num_accepted", "Of them, those that held."),
}
_CACHE_GAUGES = {"pinned_blocks": ("num_pinned", "KV blocks of pinned prefixes.")}
_KV_GAUGES = {"blocks": ("num_blocks", "KV blocks held: allocated, or cached and idle.")}
_KV_COUNTERS = {
    "block_seconds": ("block_s", "KV blocks held times seconds."),
    "byte_seconds": ("byte_s", "KV memory held times seconds."),
    "looked_up_tokens": ("looked_up_tokens", "Tokens in whole blocks of prompts that the worker began to serve."),
    "saved_tokens": ("saved_tokens", "Of them found in its cache."),
    "evicted_own_blocks": ("evicted_own", "Own blocks evicted for oneself."),
    "suffered_blocks": ("suffered", "Own blocks evicted for others."),
    "caused_blocks": ("caused", "Others' blocks evicted for oneself."),
}
_TENANT_GAUGES = {
    "queued": ("num_waiting", "Requests waiting for a worker."),
    "running": ("num_running", "Requests on workers."),
}
_TENANT_COUNTERS = {
    "requests": ("num_requests", "Requests received."),
    "refused": ("num_refused", "Requests refused by the queue."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of finished requests that a worker had begun to compute."),
    "cached_tokens": ("cached_tokens", "Of them found in a KV cache."),
    "output_tokens": ("output_tokens", "Tokens of finished requests that clients were told."),
}


def render_metrics(core: CoreStatistics, http: HttpStatistics | None, ledger: LedgerStatistics | None = None) -> bytes:
    """Return all metrics. Tenants appear by id: names are for people and may change."""
    lines: list[str] = []
    _table(lines, "kvasir_", "counter", _TOTALS, [({}, core.totals)])
    _add(
        lines,
        "kvasir_workers_lost_total",
        "counter",
        "Workers lost, by cause.",
        [({"cause": cause}, count) for cause, count in sorted(core.totals.num_lost.items())],
    )
    _add(lines, "kvasir_draining", "gauge", "1 while the gateway shuts down.", [({}, int(core.is_draining))])
    models = [({"model": model.model}, model) for model in core.models]
    _add(lines, "kvasir_queued", "gauge", "Requests waiting.", [(labels, model.queued) for labels, model in models])
    _add(lines, "kvasir_workers", "gauge", "Live workers.", [(labels, model.num_workers) for labels, model in models])
    _histogram(lines, "kvasir_ttft_seconds", "Arrival to first token.", [(lb, model.ttft_s) for lb, model in models])
    _histogram(lines, "kvasir_queue_seconds", "Time in the queue.", [(lb, model.queue_s) for lb, model in models])
    workers = [({"worker": worker.id, "model": worker.model}, worker) for worker in core.workers]
    caches = [({"worker": cache.id, "model": cache.model}, cache) for cache in core.caches]
    owners = [({"worker": cache.id, "tenant": kv.tenant}, kv) for cache in core.caches for kv in cache.tenants]
    tenants = [({"tenant": tenant_id}, usage) for tenant_id, usage in core.tenants.items()]
    paths = [({**labels, "device": worker.device, "attention": worker.attention}, 1) for labels, worker in workers]
    _add(lines, "kvasir_worker_info", "gauge", "What the worker computes with.", paths)
    _table(lines, "kvasir_worker_", "gauge", _WORKER_GAUGES, workers)
    _table(lines, "kvasir_worker_", "gauge", _CACHE_GAUGES, caches)
    _table(lines, "kvasir_worker_", "counter", _WORKER_COUNTERS, workers)
    drafting = [({**labels, "proposer": its.proposer}, its) for labels, worker in workers for its in worker.drafts]
    _table(lines, "kvasir_worker_", "counter", _DRAFT_COUNTERS, drafting)
    _table(lines, "kvasir_tenant_", "gauge", _TENANT_GAUGES, tenants)
    _table(lines, "kvasir_tenant_", "counter", _TENANT_COUNTERS, tenants)
    _table(lines, "kvasir_kv_", "gauge", _KV_GAUGES, owners)
    _table(lines, "kvasir_kv_", "counter", _KV_COUNTERS, owners)
    if ledger is not None:
        _add(lines, "kvasir_ledger_writable", "gauge", "1 while rows can be written.", [({}, int(ledger.is_writable))])
        _add(lines, "kvasir_ledger_commits_total", "counter", "Commits of the ledger.", [({}, ledger.num_commits)])
        _add(lines, "kvasir_ledger_waiting", "gauge", "Rows that wait to be written.", [({}, ledger.num_waiting)])
    if http is not None:
        by_status = [({"status": str(status)}, count) for status, count in sorted(http.by_status.items())]
        _add(lines, "kvasir_http_responses_total", "counter", "HTTP answers by status.", by_status)
        _add(lines, "kvasir_http_connections", "gauge", "Open HTTP connections.", [({}, http.num_open)])
        _add(lines, "kvasir_http_cut_total", "counter", "HTTP connections cut for slowness.", [({}, http.num_cut)])
    return "".join(lines).encode()


def _table(
    lines: list[str], prefix: str, kind: str, rows: dict[str, tuple[str, str]], items: Sequence[tuple[Labels, object]]
) -> None:
    suffix = "_total" if kind == "counter" else ""
    for name, (attribute, text) in rows.items():
        samples = [(labels, getattr(item, attribute)) for labels, item in items]
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
        for bound, count in zip((*LATENCY_BUCKETS_S, float("inf")), histogram.counts, strict=True):
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
