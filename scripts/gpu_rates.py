"""The rates of `scripts/gpu_check.py`: prefill, decode and mixed steps of random models beside what the device gives.

Every cell gets its share of the time that is left, so that the whole takes as long as it may and no longer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_engine import Times, run_continuous, run_engine
from random_model import BLOCK_SIZE, make_store, random_weights

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Mask, SequenceSlice, StepResult
from kvasir.worker.model.attention_paths import choose_attention
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.device_executor import DeviceExecutor, Forward
from kvasir.worker.model.device_start import CudaMeter, choose_graphs, seconds_of
from kvasir.worker.model.linear import Packing
from kvasir.worker.model.loader import weight_bytes
from kvasir.worker.model.model import Model
from kvasir.worker.model.ops import choose_ops

DECODE_STEPS = 32
MAX_STEP_TOKENS = 8192
PREFILL_TOKENS = 65_536  # at most, when timing, beyond one sequence
MIXED_CHUNK = 1024  # prompt tokens beside what decodes
MEMORY_SHARE = 0.8
LEAST_S = 3.0  # for a cell; it is left out if there is less


class Budget:
    """Seconds until all has to be over, shared out among what is left to do."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def share(self, num_left: int) -> float:
        """Return the seconds for the next of `num_left` things."""
        return max(0.0, self._end - self._clock()) / num_left


def timed(work: Callable[[], object], device: torch.device, budget_s: float, repeats: int = 4) -> float:
    """Return the least seconds of some calls within `budget_s`; the first counts only if it takes all of it."""
    spent = best = seconds_of(work, device, repeats=0)
    for turn in range(repeats):
        if spent + best > budget_s:
            break
        seconds = seconds_of(work, device, repeats=0)
        spent += seconds
        best = seconds if turn == 0 else min(best, seconds)
    return best


@dataclass(frozen=True)
class Roofline:
    """What the device gives: bytes per second when copying (read plus write), bf16 operations per second."""

    copy_bytes_per_s: float
    matmul_flops: float


def measure_roofline(device: torch.device, copy_bytes: int = 1 << 30, matmul_size: int = 8192) -> Roofline:
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device, 10)
    a = torch.randn(matmul_size, matmul_size, device=device, dtype=torch.bfloat16)
    matmul_s = seconds_of(lambda: a @ a, device, 10)
    return Roofline(2 * copy_bytes / copy_s, 2 * matmul_size**3 / matmul_s)


def with_graphs(model: Model, kv: KvStore, batch: int, max_context: int) -> tuple[Forward, str]:
    """Return what computes the steps, under graphs where there are any, and its name."""
    if model.device.type != "cuda":
        return model.forward, model.attention.name
    graphs, reason = choose_graphs(model, kv, batch, max_context, 0, CudaMeter(model.device), sizes=[batch])
    if graphs is None:
        return model.forward, f"{model.attention.name}, no graphs ({reason})"
    return graphs.forward, f"{model.attention.name}, graphs"


def measure_model(
    config: ModelConfig,
    batch: int,
    model: Model,
    roofline: Roofline,
    context: int,
    steps: int = DECODE_STEPS,
    budget_s: float = 60.0,
) -> dict[str, Any]:
    """Time `steps` tokens each of `batch` sequences that have `context` tokens, their prefill, and mixed steps.

    What they have is random keys and values. As many are prefilled as have `PREFILL_TOKENS` together, at least one.
    """
    device, dtype = model.device, model.dtype
    kv, tables = make_store(config, [context + steps] * batch + [MIXED_CHUNK], device, dtype, has_spare=True)
    for block in kv.data:  # a block at a time: a large store has no room for a second
        block.normal_()
    num_prefilled = min(batch, max(1, PREFILL_TOKENS // context))
    forward, path = with_graphs(model, kv, batch, context + steps)

    def decoding(step: int) -> list[SequenceSlice]:
        return [SequenceSlice(i, [5], context + step, tables[i], 1, drawn=i if step else None) for i in range(batch)]

    def decode() -> None:
        drawn: Tensor | None = None
        for step in range(steps):  # every step is queued behind the one before
            drawn = forward(decoding(step), kv, drawn).argmax(dim=-1)

    def mix() -> None:
        chunk = SequenceSlice(batch, [7] * MIXED_CHUNK, 0, tables[batch], 1)
        for _ in range(steps // 8):
            forward([*decoding(0), chunk], kv, None)

    def prefill() -> None:
        shares = [
            SequenceSlice(i, [3] * min(MAX_STEP_TOKENS, context - start), start, tables[i], int(start == last))
            for i in range(num_prefilled)
            for last in [(context - 1) // MAX_STEP_TOKENS * MAX_STEP_TOKENS]
            for start in range(0, context, MAX_STEP_TOKENS)
        ]
        per_step = max(1, MAX_STEP_TOKENS // context)
        for first in range(0, len(shares), per_step):
            forward(shares[first : first + per_step], kv, None)

    step_s = timed(decode, device, budget_s / 3) / steps
    mixed_s = timed(mix, device, budget_s / 3) / max(1, steps // 8)
    prefill_s = timed(prefill, device, budget_s / 3)
    head = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else head  # an embedding of its own is not multiplied
    matrices = weight_bytes(config, dtype, Packing(), device) / dtype.itemsize - looked_up
    # Multiply-adds per query and key, q·k and p·v.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim

    def prefill_flops(num_tokens: int) -> float:
        return 2 * (num_tokens * (matrices - head) + head + attention * num_tokens * (num_tokens + 1) / 2)

    middle = context + steps / 2
    decode_flops = 2 * batch * (matrices + attention * middle)
    kv_bytes = batch * middle * bytes_per_block(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
    decode_bytes = matrices * dtype.itemsize + kv_bytes
    mixed_flops = decode_flops + prefill_flops(MIXED_CHUNK)
    ideal_mixed_s = max(decode_bytes / roofline.copy_bytes_per_s, mixed_flops / roofline.matmul_flops)
    return {
        "batch": batch,
        "context": context,
        "path": path,
        "prefill_tokens_per_s": num_prefilled * context / prefill_s,
        "prefill_share_of_matmul": num_prefilled * prefill_flops(context) / prefill_s / roofline.matmul_flops,
        "decode_tokens_per_s": batch / step_s,
        "decode_step_ms": step_s * 1e3,
        "decode_share_of_bandwidth": decode_bytes / step_s / roofline.copy_bytes_per_s,
        "mixed_step_ms": mixed_s * 1e3,
        "mixed_share_of_roofline": ideal_mixed_s / mixed_s,
    }


class TimedExecutor(DeviceExecutor):
    """Counts the seconds in which the host waits for the device."""

    waited_s = 0.0

    def collect(self, handle: Any, masks: Sequence[Mask] = ()) -> StepResult:
        begin = time.perf_counter()
        result = super().collect(handle, masks)
        self.waited_s += time.perf_counter() - begin
        return result


def measure_engine(
    config: ModelConfig, batch: int, model: Model, context: int, steps: int, budget_s: float = 60.0
) -> dict[str, Any]:
    """Let the engine, a step ahead, answer `batch` prompts with `steps` tokens each, up to three times."""
    num_blocks = batch * (-(-(context + steps) // BLOCK_SIZE) + 2)
    shape = (num_blocks, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    kv = KvStore(*shape, dtype=model.dtype, device=model.device, has_spare=True)
    executor = TimedExecutor(with_graphs(model, kv, batch, context + steps)[0], kv, model.ops.race)
    engine = Engine(
        executor,
        PrefixCache(num_blocks, BLOCK_SIZE),
        EngineLimits(batch, max(MAX_STEP_TOKENS, batch), config.max_position, max_step_s=60.0),
        vocab_size=config.vocab_size,
        is_ahead=True,
    )
    generator = torch.Generator().manual_seed(3)
    best: tuple[Times, float] | None = None
    begin = time.perf_counter()
    for turn in range(3):
        if turn and (turn + 1) * (time.perf_counter() - begin) / turn > budget_s:
            break
        prompts = torch.randint(config.vocab_size, (batch, context), generator=generator).tolist()
        waited_s = executor.waited_s
        times = run_engine(engine, prompts, steps)
        host_s = times.call_s - (executor.waited_s - waited_s)
        if best is None or times.decode_s < best[0].decode_s:
            best = times, host_s
    assert best is not None
    times, host_s = best
    return {
        "engine_decode_tokens_per_s": batch * (steps - 1) / times.decode_s,
        "host_ms_per_step": 1e3 * host_s / times.num_steps,
        "idle_ms_per_step": 1e3 * times.idle_s,
        "idle_share": times.idle_s * times.num_steps / times.call_s,
    }


def measure_continuous(
    config: ModelConfig, batch: int, device: torch.device, context: int, steps: int
) -> dict[str, Any]:
    """Let the continuous batching of `transformers` do the same, over random weights of the same shape."""
    try:
        import transformers
    except ImportError:
        return {"continuous": "transformers is not installed"}
    try:
        shape = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position,
            rope_theta=config.rope.theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
        with torch.device(device):
            options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
            model = transformers.AutoModelForCausalLM.from_config(shape, **options).eval()
        prompts = torch.randint(config.vocab_size, (batch, context)).tolist()
        run_continuous(model, prompts, 2)  # for what it compiles
        times = run_continuous(model, prompts, steps)
    except Exception as failure:  # another's program, whose versions differ in what they can do
        return {"continuous": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
    return {"continuous_decode_tokens_per_s": batch * (steps - 1) / times.decode_s}


def measure_shapes(
    shapes: dict[str, ModelConfig],
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device,
    roofline: Roofline,
    memory: Callable[[], tuple[int, int]],
    budget: Budget,
    steps: int = DECODE_STEPS,
) -> list[dict[str, Any]]:
    """Time every cell that fits, print it, and return the rows. `memory` returns the bytes free and in all.

    Beside the first context the engine and `transformers` decode, too; they get as much time as a cell.
    """
    titles = f"{'prefill tok/s':>13} {'of matmul':>9} {'decode tok/s':>12} {'of copying':>10} {'mixed':>7}"
    print(f"\n{'model':5} {'batch':>5} {'context':>7} {titles}  path (mixed: of both)")
    rows: list[dict[str, Any]] = []
    cells = [(context, batch) for context in contexts for batch in batches]
    num_left = len(shapes) * (len(cells) + 2 * len(batches))
    for name, config in shapes.items():
        num_after = num_left - len(cells) - 2 * len(batches)
        free, total = memory()
        needed = weight_bytes(config, torch.bfloat16, Packing(), device)
        if total - free + needed > MEMORY_SHARE * total:
            rows.append(_left_out(name, 0, 0, f"{needed / 2**30:.0f} GiB are more than {MEMORY_SHARE:.0%}"))
            num_left = num_after
            continue
        weights = random_weights(config, device, torch.bfloat16)
        attention = choose_attention(config, device, torch.bfloat16, BLOCK_SIZE, 1 << 30)
        model = Model(config, weights, attention, choose_ops(config, device, torch.bfloat16))
        for context, batch in cells:
            budget_s = budget.share(num_left)
            num_left -= 3 if context == contexts[0] else 1
            free, total = memory()
            kv_bytes = bytes_per_block(
                config.num_layers, batch * (context + steps), config.num_kv_heads, config.head_dim, torch.bfloat16
            )
            if total - free + kv_bytes > MEMORY_SHARE * total:
                rows.append(
                    _left_out(name, batch, context, f"{kv_bytes / 2**30:.0f} GiB are more than {MEMORY_SHARE:.0%}")
                )
                continue
            if budget_s < LEAST_S:
                rows.append(_left_out(name, batch, context, "no time is left"))
                continue
            row = {"model": name, **measure_model(config, batch, model, roofline, context, steps, budget_s)}
            rows.append(row)
            print(
                f"{name:5} {batch:5} {context:7} {row['prefill_tokens_per_s']:13,.0f} "
                f"{row['prefill_share_of_matmul']:9.1%} {row['decode_tokens_per_s']:12,.0f} "
                f"{row['decode_share_of_bandwidth']:10.1%} {row['mixed_share_of_roofline']:7.1%}  {row['path']}",
                flush=True,
            )
            if context == contexts[0]:
                row |= measure_engine(config, batch, model, context, steps, budget_s)
                print(
                    f"{'':19} engine: decode {row['engine_decode_tokens_per_s']:,.0f} tok/s; a step costs the host "
                    f"{row['host_ms_per_step']:.2f} ms, the device idles {row['idle_ms_per_step']:.2f} ms of it "
                    f"({row['idle_share']:.1%} of the call)",
                    flush=True,
                )
        num_left = num_after
        del model, weights, attention
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for batch in batches:
            row = next((r for r in rows if (r["model"], r["batch"], r["context"]) == (name, batch, contexts[0])), {})
            if "engine_decode_tokens_per_s" not in row or budget.share(1) < LEAST_S * (num_after + 1):
                continue
            row |= measure_continuous(config, batch, device, contexts[0], steps)
            rate = row.get("continuous_decode_tokens_per_s")
            told = (
                row.get("continuous") or f"{rate:,.0f} tok/s, ours {row['engine_decode_tokens_per_s'] / rate:.2f} times"
            )
            print(f"{name:5} {batch:5} {contexts[0]:7} continuous batching of transformers: {told}", flush=True)
    return rows


def _left_out(name: str, batch: int, context: int, reason: str) -> dict[str, Any]:
    print(f"{name:5} {batch:5} {context:7} left out: {reason}")
    return {"model": name, "batch": batch, "context": context, "left_out": reason}
