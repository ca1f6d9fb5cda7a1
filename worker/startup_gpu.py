"""A start on a GPU, once the models are loaded: pool, limits, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Executor
from kvasir.worker.log import log, progress
from kvasir.worker.model.device_executor import DeviceExecutor
from kvasir.worker.model.device_start import (
    CudaMeter,
    Meter,
    choose_graphs,
    device_name,
    largest_step_bytes,
    share_of_bandwidth,
)
from kvasir.worker.model.model import Model
from kvasir.worker.options import Options
from kvasir.worker.sizes import MAX_BLOCKS, choose_limits


@dataclass(frozen=True, slots=True)
class OpenedGpu:
    """An executor for each model, all over `num_blocks` blocks; what there is of CUDA graphs, in words."""

    executors: list[Executor]
    num_blocks: int
    limits: EngineLimits
    graphs: str


def open_on_gpu(
    options: Options, models: Sequence[Model], num_blocks_of: Callable[[int], int], meter: Meter | None = None
) -> OpenedGpu:
    """Give the models what is left on their device: the first is the one that answers.

    The pool is what the weights and the largest step leave. `num_blocks_of(free_bytes)` is how many blocks that are.

    Raises: OutOfMemory, ConfigurationError.
    """
    block_size, window, device = options.block_size, models[0].config.max_position, models[0].device
    meter = meter or CudaMeter(device)
    first = choose_limits(options, window=window, num_blocks=MAX_BLOCKS, on_gpu=True)  # a pool limits the context only
    sizes = (block_size, first.max_step_tokens, first.max_requests)
    step_bytes = max(largest_step_bytes(model, *sizes, meter) for model in models)
    num_blocks = num_blocks_of(meter.free() - step_bytes)
    limits = choose_limits(options, window=window, num_blocks=num_blocks, on_gpu=True)
    told = ""
    executors: list[Executor] = []
    for model in models:
        config = model.config
        if model.ops.fallback_reason:
            log("slow_ops", reason=model.ops.fallback_reason)
        shape = (num_blocks, config.num_layers, block_size, config.num_kv_heads, config.head_dim)
        kv = KvStore(*shape, dtype=model.dtype, device=device, has_spare=True)
        graphs, reason, free_bytes = None, "--graphs off", meter.free()
        if options.graphs != "off":
            step = (limits.max_requests, min(limits.max_context, config.max_position), step_bytes)
            graphs, reason = choose_graphs(model, kv, *step, meter, progress("graphs"))
            if graphs is None:
                log("no_graphs", reason=reason)
        told = told or ("CUDA graphs" if graphs is not None else f"no CUDA graphs: {reason}")
        forward = model.forward if graphs is None else graphs.forward
        executors.append(DeviceExecutor(forward, kv, model.ops.race))
        log(
            "device",
            name=device_name(device),
            attention=model.attention.name,
            graphs=0 if graphs is None else len(graphs.sizes),
            graph_bytes=free_bytes - meter.free(),
            step_bytes=step_bytes,
            pool_bytes=kv.data.nbytes,
            decode_share_of_copy_bandwidth=round(share_of_bandwidth(model, forward, kv), 2),
        )
    return OpenedGpu(executors, num_blocks, limits, told)
