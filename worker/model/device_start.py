"""What a start on a GPU finds out by trying: the memory of the largest step, graphs that are right, the rate of a step.

UNPROVEN ON A DEVICE: tests run it on a CPU, with a meter and a capture of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from kvasir.cache.kv_store import KvStore
from kvasir.protocol.sampling import Sampling
from kvasir.worker.engine.step import SampleRow, SequenceSlice
from kvasir.worker.model.device_executor import Forward
from kvasir.worker.model.graphs import DecodeGraphs
from kvasir.worker.model.linear import Packing
from kvasir.worker.model.loader import weight_bytes
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import start_draws

_COPY_BYTES = 1 << 28
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of logits, relative to the largest; 1e-4 for other types


class Meter(Protocol):
    """Memory of a device, in bytes."""

    def free(self) -> int:
        """Return what can still be taken, after giving back what nothing uses."""

    def begin(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """Return the most that was taken at a time since `begin`, beside what was taken then."""


class CudaMeter:
    """The `Meter` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


def largest_step_bytes(model: Model, block_size: int, max_step_tokens: int, max_requests: int, meter: Meter) -> int:
    """Return what a step of `max_step_tokens` takes beside weights and store, with a draw for each of `max_requests`.

    All but one sequence compute one token, the last one the rest; all draw in the way that takes most.

    Raises: OutOfMemory.
    """
    config = model.config
    counts = [1] * (max_requests - 1) + [max_step_tokens - (max_requests - 1)]
    num_blocks = max_requests - 1 + -(-counts[-1] // block_size)
    shape = (num_blocks, config.num_layers, block_size, config.num_kv_heads, config.head_dim)
    kv = KvStore(*shape, dtype=model.dtype, device=model.device)
    tables = [[i] for i in range(max_requests - 1)] + [[*range(max_requests - 1, num_blocks)]]
    slices = [SequenceSlice(i, [0] * n, 0, tables[i], 1) for i, n in enumerate(counts)]
    rows = [SampleRow(Sampling(top_k=2, top_p=0.9), i, []) for i in range(max_requests)]
    model.forward(slices[-1:], kv)  # compiles and loads what stays
    meter.begin()
    start_draws(model.forward(slices, kv), rows, (), model.ops.race).read()
    peak = meter.peak()
    model.forward([], kv)
    return peak


def choose_graphs(
    model: Model,
    kv: KvStore,
    num_rows: int,
    max_context: int,
    step_bytes: int,
    meter: Meter,
    on_progress: Callable[[int, int], None] | None = None,
    sizes: list[int] | None = None,
) -> tuple[DecodeGraphs | None, str]:
    """Return graphs of decode steps, captured and compared with a step without, or None and the reason.

    They must leave `step_bytes` for a step that is none of theirs. `sizes`: the numbers of rows, if not the usual ones.
    """
    try:
        graphs = DecodeGraphs(model, kv, num_rows, max_context)
        graphs.sizes = sizes or graphs.sizes
        graphs.capture(on_progress)
        difference = graphs.largest_difference()
        if difference > _TOLERANCE.get(model.dtype, 1e-4):
            return None, f"they differ from a step without by {difference:.1e}"
        free_bytes = meter.free()
    except Exception as failure:  # whatever a driver raises: the worker can serve without them
        return None, f"{type(failure).__name__}: {failure}".splitlines()[0][:150]
    if free_bytes < step_bytes:
        return None, f"beside them {free_bytes >> 20} MiB are left, and a step takes {step_bytes >> 20}"
    return graphs, ""


def share_of_bandwidth(model: Model, forward: Forward, kv: KvStore) -> float:
    """Return the rate at which a decode step of one sequence reads its weights, as a share of the rate of copying.

    `forward` computes steps of `model`.
    """
    device = model.device
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device)
    step_s = seconds_of(lambda: forward([SequenceSlice(0, [1], 0, [0], 1)], kv, None), device)
    kv.zero([0])
    return weight_bytes(model.config, model.dtype, Packing(), device) / step_s / (2 * _COPY_BYTES / copy_s)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the least seconds that one call took, after one that counts only if there is no other."""
    times = []
    for _ in range(repeats + 1):
        begin = _now(device)
        work()
        times.append(_now(device) - begin)
    return min(times[1:] or times)


def _now(device: torch.device) -> float:
    """Return the time, once the device has nothing more to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
