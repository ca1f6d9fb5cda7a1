"""What a vLLM server says of itself: models, settings, metrics. Only the fields and families that somebody reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scripts.standin.calls import MAX_LOGPROBS
from scripts.standin.engine import EngineCounters, EngineOptions


def models_answer(model: str, root: str, max_model_len: int, created: int) -> dict[str, Any]:
    permission = {
        "id": "modelperm-0123456789abcdef",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    listed = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
    return {"object": "list", "data": [listed]}


def server_info(options: EngineOptions, model: str, root: str, num_ranks: int) -> dict[str, Any]:
    """The few of the thousand fields of `/server_info?config_format=json` that somebody reads."""
    return {
        "vllm_config": {
            "model_config": {
                "model": root,
                "dtype": "torch.float32",
                "max_model_len": options.max_model_len,
                "served_model_name": model,
                "max_logprobs": MAX_LOGPROBS,
            },
            "cache_config": {
                "block_size": options.block_size,
                "enable_prefix_caching": True,
                "num_gpu_blocks": options.num_blocks,
            },
            "parallel_config": {"data_parallel_size": num_ranks},
            "scheduler_config": {
                "max_num_seqs": options.max_num_seqs,
                "max_num_batched_tokens": options.max_step_tokens,
            },
        }
    }


Sample = tuple[str, str, dict[str, str], float]  # metric family, its type, labels beside engine and model, value


def metrics_text(
    engines: Iterable[tuple[EngineOptions, EngineCounters, tuple[int, int, float]]], model: str, started: float
) -> bytes:
    """The families of `/metrics` that somebody reads, one sample per engine."""
    lines = ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {started!r}"]
    by_family: dict[str, list[str]] = {}
    for rank, (options, counters, gauges) in enumerate(engines):
        for family, kind, labels, value in _samples(options, counters, gauges):
            known = by_family.setdefault(
                family, [f"# TYPE {family.removesuffix('_count').removesuffix('_sum')} {kind}"]
            )
            named = dict(sorted({"engine": str(rank), "model_name": model, **labels}.items()))
            if family == "vllm:cache_config_info":
                del named["model_name"]
            shown = ",".join([f'{key}="{text}"' for key, text in named.items()])
            known.append(f"{family}{{{shown}}} {float(value)}")
    for known in by_family.values():
        lines += known
    return ("\n".join(lines) + "\n").encode()


def _samples(options: EngineOptions, counters: EngineCounters, gauges: tuple[int, int, float]) -> Iterable[Sample]:
    running, waiting, usage = gauges
    yield "vllm:num_requests_running", "gauge", {}, running
    yield "vllm:num_requests_waiting", "gauge", {}, waiting
    yield "vllm:kv_cache_usage_perc", "gauge", {}, usage
    yield "vllm:prefix_cache_queries_total", "counter", {}, counters.prefix_cache_queries
    yield "vllm:prefix_cache_hits_total", "counter", {}, counters.prefix_cache_hits
    yield "vllm:num_preemptions_total", "counter", {}, counters.num_preemptions
    yield "vllm:prompt_tokens_total", "counter", {}, counters.prompt_tokens
    yield "vllm:prompt_tokens_cached_total", "counter", {}, counters.prompt_tokens_cached
    yield "vllm:generation_tokens_total", "counter", {}, counters.generation_tokens
    for reason, count in counters.finished.items():
        yield "vllm:request_success_total", "counter", {"finished_reason": reason}, count
    yield "vllm:iteration_tokens_total_count", "histogram", {}, counters.iterations
    yield "vllm:iteration_tokens_total_sum", "histogram", {}, counters.iteration_tokens
    yield (
        "vllm:cache_config_info",
        "gauge",
        {
            "block_size": str(options.block_size),
            "enable_prefix_caching": "True",
            "num_gpu_blocks": str(options.num_blocks),
            "prefix_caching_hash_algo": "sha256",
        },
        1,
    )
