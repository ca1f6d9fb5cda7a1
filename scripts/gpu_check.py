"""Is the CUDA path right on this machine, and how near does it come to what the hardware gives?

First the attention kernels are compared with the reference over a grid of cases, then every model family, with small
random weights, is run on the GPU and compared with the readable reference on the CPU. Then a 1 B- and an 8 B-shaped
random bf16 model are timed beside the copy bandwidth and the bf16 matmul rate measured in the same run: prefill as a
share of the matmul rate, decode as a share of the copy bandwidth, and steps that mix both as a share of the time that
their bytes and operations would take at those two rates. Last the whole engine decodes, and the time per step is told
in which the device has nothing to compute. Cells that need over 80 % of the memory are left out.
Without CUDA it says so and exits 0.

    python scripts/gpu_check.py [--json FILE] [--models 1b,8b] [--batch 1,8,64] [--contexts 1024,8192,65536]
    TRITON_INTERPRET=1 python scripts/gpu_check.py --kernels-only     # the first part without a GPU, in an interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_engine import Times, run_engine

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.attention_paths import TOLERANCE, choose_attention, largest_error
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.device_executor import DeviceExecutor
from kvasir.worker.model.graphs import DecodeGraphs
from kvasir.worker.model.linear import Linear, Packing
from kvasir.worker.model.loader import weight_bytes
from kvasir.worker.model.model import LayerWeights, Model, Weights
from kvasir.worker.model.ops import FusedOps, choose_ops, largest_difference

BLOCK_SIZE = 16
DECODE_STEPS = 32
MAX_STEP_TOKENS = 8192
PREFILL_TOKENS = 65_536  # at most, when timing, beyond one sequence
MIXED_CHUNK = 1024  # prompt tokens beside what decodes
MEMORY_SHARE = 0.8
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # of the logits, relative to the largest
CPU = torch.device("cpu")


def make_config(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **changes: Any
) -> ModelConfig:
    config = ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        max_position=131_072,
        rope=RopeConfig(theta=500_000.0),
        sliding_windows=(None,) * layers,
    )
    return replace(config, **changes)


SHAPES = {
    "1b": make_config(16, 2048, 8192, 32, 8, 128_256, tie_word_embeddings=True),
    "8b": make_config(32, 4096, 14_336, 32, 8, 128_256),
}
FAMILIES = {
    "llama": make_config(3, 256, 384, 8, 2, 500, rope=RopeConfig("llama3", 10_000.0, 8.0, 64)),
    "mistral": make_config(3, 256, 384, 8, 2, 500, family="mistral", sliding_windows=(40, 40, 40)),
    "qwen2": make_config(3, 256, 384, 8, 4, 500, family="qwen2", qkv_bias=True, sliding_windows=(None, 40, 40)),
    "qwen3": make_config(3, 256, 384, 8, 8, 500, family="qwen3", qk_norm=True, head_dim=64),
}


SHARING_CASE = "what singles begin with alike"  # as far as they go, their blocks are the same

# Name -> (query heads, key heads, head_dim), block size, windows, dtype, (tokens in the store, tokens computed) of each
# sequence of one step. Spans are cut at 512 keys, and at 4,096 for the chunks.
KERNEL_CASES: dict[
    str, tuple[tuple[int, int, int], int, tuple[int | None, ...], torch.dtype, list[tuple[int, int]]]
] = {
    "singles fp32": ((8, 2, 64), 16, (None,), torch.float32, [(1299, 1), (0, 1), (15, 1), (16, 1), (511, 1), (512, 1)]),
    "singles fp16": ((8, 2, 64), 16, (None,), torch.float16, [(1299, 1), (0, 1), (15, 1), (16, 1), (511, 1)]),
    "singles bf16": ((8, 2, 64), 16, (None,), torch.bfloat16, [(1299, 1), (0, 1), (15, 1), (16, 1), (511, 1)]),
    "chunks fp32": ((8, 2, 64), 16, (None,), torch.float32, [(0, 33), (48, 1), (17, 80), (300, 3), (0, 2)]),
    "chunks fp16": ((8, 2, 64), 16, (None,), torch.float16, [(0, 130), (200, 1), (100, 70)]),
    "chunks bf16": ((8, 2, 128), 16, (None,), torch.bfloat16, [(0, 130), (200, 1), (100, 70)]),
    "windows": ((6, 2, 20), 8, (None, 20, 1), torch.float32, [(700, 1), (5, 1), (0, 50), (100, 9)]),
    "a window of several spans": ((2, 2, 32), 16, (1100,), torch.float32, [(1500, 1), (1200, 2)]),
    "no groups": ((8, 8, 32), 32, (None,), torch.float32, [(50, 1), (1030, 1), (3, 40)]),
    "one key head": ((32, 1, 128), 16, (40, None), torch.bfloat16, [(90, 1), (10, 5), (600, 1)]),
    "odd blocks": ((6, 3, 40), 11, (None,), torch.float16, [(10, 1), (11, 1), (100, 1), (0, 23)]),
    "a chunk cut into spans": ((2, 1, 16), 64, (None,), torch.float32, [(4090, 20)]),
    SHARING_CASE: ((4, 2, 32), 16, (None, 900), torch.float32, [(1030, 1), (1100, 1), (1029, 1), (700, 1), (90, 4)]),
}


GRAPH_CASE = "a padded decode step"
OPS_CASES = {
    "fused fp32": (torch.float32, 1e-5),
    "fused bf16": (torch.bfloat16, 4e-2),
    "fused fp16": (torch.float16, 6e-3),
}


def check_kernels(device: torch.device) -> list[dict[str, Any]]:
    """Compare `PagedAttention` with the reference, both on `device`; one row per case."""
    from kvasir.worker.model.paged_attention import PagedAttention

    rows = []
    for name, ((num_heads, num_kv_heads, head_dim), block_size, windows, dtype, shares) in KERNEL_CASES.items():
        heads = {"head_dim": head_dim, "sliding_windows": windows}
        config = make_config(len(windows), 64, 64, num_heads, num_kv_heads, 8, **heads)
        num_shared = 1 << 20 if name == SHARING_CASE else 0
        attention = PagedAttention(config, dtype)
        error = largest_error(attention, config, block_size, device, dtype, shares, num_shared)
        limit = 1e-5 if dtype == torch.float32 else TOLERANCE[dtype]
        rows.append({"case": name, "max_error": error, "ok": error <= limit})
    return rows


def check_ops(device: torch.device) -> list[dict[str, Any]]:
    """Compare what is fused between the matrices with the plain way."""
    config, rows = make_config(1, 64, 1500, 6, 3, 8, head_dim=40), []
    for name, (dtype, limit) in OPS_CASES.items():
        error = largest_difference(FusedOps(config), config, device, dtype)
        rows.append({"case": name, "max_error": error, "ok": error <= limit})
    return rows


def check_graphs(device: torch.device) -> dict[str, Any]:
    """Compare a decode step of several spans and windows, padded (and on CUDA captured), with the reference."""
    from kvasir.worker.model import paged_attention

    if device.type == "cpu":
        paged_attention.MAX_PROGRAMS = 8  # an interpreter takes them one by one
    config = make_config(2, 64, 96, 4, 2, 100, sliding_windows=(None, 600))
    weights = move(random_weights(config, CPU, torch.float32), device, torch.float32)
    lengths = [1300, 1, 16, 40, 513]
    kv, tables = make_store(config, [length + 1 for length in lengths], device, torch.float32, has_spare=True)
    kv.data[: kv.num_blocks].normal_(generator=torch.Generator(device).manual_seed(5))
    kv.data[kv.num_blocks :].fill_(float("nan"))
    slices = [SequenceSlice(i, [7 + i], n, tables[i], 1) for i, n in enumerate(lengths)]
    expected = Model(config, weights, ReferenceAttention(config)).forward(slices, kv)
    model = Model(config, weights, paged_attention.PagedAttention(config, torch.float32))
    graphs = DecodeGraphs(model, kv, 8, 2048)
    if device.type == "cuda":
        graphs.capture()
    actual = graphs.forward(slices, kv)
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return {"case": GRAPH_CASE, "max_error": error, "ok": error <= 1e-5 and graphs.num_padded == 1}


@dataclass(frozen=True)
class Roofline:
    """What the device gives: bytes per second when copying (read plus write), bf16 operations per second."""

    copy_bytes_per_s: float
    matmul_flops: float


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Return weights whose activations stay of the size of one, made on `device`."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(rows**-0.5)

    def vector(size: int, mean: float) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(0.1).add_(mean)

    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    layers = [
        LayerWeights(
            input_norm=vector(hidden, 1.0),
            qkv=Linear(matrix(hidden, qkv_size), vector(qkv_size, 0.0) if config.qkv_bias else None),
            output=Linear(matrix(config.num_heads * head_dim, hidden)),
            post_norm=vector(hidden, 1.0),
            gate_up=Linear(matrix(hidden, 2 * inner)),
            down=Linear(matrix(inner, hidden)),
            q_norm=vector(head_dim, 1.0) if config.qk_norm else None,
            k_norm=vector(head_dim, 1.0) if config.qk_norm else None,
        )
        for _ in range(config.num_layers)
    ]
    lm_head = matrix(hidden, config.vocab_size)
    embedding = lm_head.t() if config.tie_word_embeddings else matrix(config.vocab_size, hidden)
    return Weights(embedding, layers, vector(hidden, 1.0), Linear(lm_head))


def move(weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return a copy of `weights` elsewhere."""

    def moved(value: Linear | Tensor | None) -> Any:
        if isinstance(value, Linear):
            return Linear(moved(value.plain), moved(value.bias))
        return None if value is None else value.to(device=device, dtype=dtype, copy=True)

    names = LayerWeights.__dataclass_fields__
    layers = [LayerWeights(**{name: moved(getattr(layer, name)) for name in names}) for layer in weights.layers]
    return Weights(moved(weights.embedding), layers, moved(weights.final_norm), moved(weights.lm_head))


def make_store(
    config: ModelConfig,
    num_tokens: list[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_spare: bool = False,
) -> tuple[KvStore, list[list[int]]]:
    """Return a store and one block table per sequence, their blocks interleaved."""
    blocks_each = [-(-count // BLOCK_SIZE) for count in num_tokens]
    ids = iter(torch.randperm(sum(blocks_each), generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(ids) for _ in range(count)] for count in blocks_each]
    shape = (sum(blocks_each), config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return KvStore(*shape, dtype=dtype, device=device, has_spare=has_spare), tables


def continuation(model: Model, prompts: list[list[int]], tokens: list[list[int]], chunk: int) -> Tensor:
    """Return logits [steps, sequences, vocab] on the CPU: forced `tokens` after chunked `prompts`, in mixed steps."""
    kv, tables = make_store(
        model.config, [len(p) + len(t) for p, t in zip(prompts, tokens, strict=True)], model.device, model.dtype
    )
    texts = [prompt + token for prompt, token in zip(prompts, tokens, strict=True)]
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        pieces = []
        for i, text in enumerate(texts):
            if done[i] == len(text):
                continue
            end = min(done[i] + chunk, len(prompts[i])) if done[i] < len(prompts[i]) else done[i] + 1
            pieces.append(SequenceSlice(i, text[done[i] : end], done[i], tables[i], int(end >= len(prompts[i]))))
            done[i] = end
        rows = iter(model.forward(pieces, kv).cpu())
        for piece in pieces:
            if piece.num_logits:
                logits[piece.seq_key].append(next(rows))
    return torch.stack([torch.stack(row) for row in logits], dim=1)


def check_family(
    name: str, device: torch.device, tolerances: dict[torch.dtype, float] = TOLERANCES
) -> list[dict[str, Any]]:
    """Compare the device's paths with the reference on the CPU; one row per path and dtype."""
    config = FAMILIES[name]
    weights = random_weights(config, CPU, torch.float32)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in (3, 70, 129, 16)]
    tokens = [torch.randint(config.vocab_size, (12,), generator=generator).tolist() for _ in prompts]
    expected = continuation(Model(config, weights, ReferenceAttention(config)), prompts, tokens, chunk=48)
    rows = []
    for dtype, tolerance in tolerances.items():
        paths: list[Attention] = [GatherAttention(config), choose_attention(config, device, dtype, BLOCK_SIZE, 1 << 30)]
        for attention in paths[: 1 if type(paths[0]) is type(paths[1]) else 2]:
            model = Model(config, move(weights, device, dtype), attention, choose_ops(config, device, dtype))
            actual = continuation(model, prompts, tokens, chunk=48)
            difference = (actual - expected).abs().max().item() / expected.abs().max().item()
            rows.append(
                {
                    "family": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "path": type(attention).__name__,
                    "max_error": difference,
                    "same_best_token": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
                    "ok": difference <= tolerance,
                }
            )
    return rows


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the least seconds that one call took, after one that does not count."""
    best = float("inf")
    for turn in range(repeats + 1):
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - begin)
    return best


def measure_roofline(device: torch.device, copy_bytes: int = 1 << 30, matmul_size: int = 8192) -> Roofline:
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device, 10)
    a = torch.randn(matmul_size, matmul_size, device=device, dtype=torch.bfloat16)
    matmul_s = seconds_of(lambda: a @ a, device, 10)
    return Roofline(2 * copy_bytes / copy_s, 2 * matmul_size**3 / matmul_s)


def measure_model(
    config: ModelConfig, batch: int, model: Model, roofline: Roofline, context: int, steps: int = DECODE_STEPS
) -> dict[str, Any]:
    """Time `steps` tokens each of `batch` sequences that have `context` tokens, their prefill, and mixed steps.

    What they have is random keys and values. As many are prefilled as have `PREFILL_TOKENS` together, at least one.
    """
    device, dtype = model.device, model.dtype
    kv, tables = make_store(config, [context + steps] * batch + [MIXED_CHUNK], device, dtype)
    for block in kv.data:  # a block at a time: a large store has no room for a second
        block.normal_()
    num_prefilled = min(batch, max(1, PREFILL_TOKENS // context))

    def decoding(step: int) -> list[SequenceSlice]:
        return [SequenceSlice(i, [5], context + step, tables[i], 1) for i in range(batch)]

    def decode() -> None:
        for step in range(steps):
            model.forward(decoding(step), kv).argmax(dim=-1).tolist()

    def mix() -> None:
        chunk = SequenceSlice(batch, [7] * MIXED_CHUNK, 0, tables[batch], 1)
        for step in range(steps // 8):
            model.forward([*decoding(step), chunk], kv).argmax(dim=-1).tolist()

    def prefill() -> None:
        shares = [
            SequenceSlice(i, [3] * min(MAX_STEP_TOKENS, context - start), start, tables[i], int(start == last))
            for i in range(num_prefilled)
            for last in [(context - 1) // MAX_STEP_TOKENS * MAX_STEP_TOKENS]
            for start in range(0, context, MAX_STEP_TOKENS)
        ]
        per_step = max(1, MAX_STEP_TOKENS // context)
        for first in range(0, len(shares), per_step):
            model.forward(shares[first : first + per_step], kv)

    step_s = seconds_of(decode, device, 2) / steps
    mixed_s = seconds_of(mix, device, 2) / max(1, steps // 8)
    prefill_s = seconds_of(prefill, device, 1)
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
        "path": type(model.attention).__name__,
        "prefill_tokens_per_s": num_prefilled * context / prefill_s,
        "prefill_share_of_matmul": num_prefilled * prefill_flops(context) / prefill_s / roofline.matmul_flops,
        "decode_tokens_per_s": batch / step_s,
        "decode_step_ms": step_s * 1e3,
        "decode_share_of_bandwidth": decode_bytes / step_s / roofline.copy_bytes_per_s,
        "mixed_step_ms": mixed_s * 1e3,
        "mixed_share_of_roofline": ideal_mixed_s / mixed_s,
    }


def measure_engine(config: ModelConfig, batch: int, model: Model, context: int, steps: int) -> dict[str, Any]:
    """Let the engine, a step ahead, answer `batch` prompts with `steps` tokens each."""
    num_blocks = batch * (-(-(context + steps) // BLOCK_SIZE) + 2)
    shape = (num_blocks, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    engine = Engine(
        DeviceExecutor(model.forward, KvStore(*shape, dtype=model.dtype, device=model.device)),
        PrefixCache(num_blocks, BLOCK_SIZE),
        EngineLimits(batch, max(MAX_STEP_TOKENS, batch), config.max_position, max_step_s=60.0),
        vocab_size=config.vocab_size,
        is_ahead=True,
    )
    generator = torch.Generator().manual_seed(3)
    best: Times | None = None
    for _ in range(3):
        prompts = torch.randint(config.vocab_size, (batch, context), generator=generator).tolist()
        times = run_engine(engine, prompts, steps)
        best = times if best is None or times.decode_s < best.decode_s else best
    assert best is not None
    return {
        "batch": batch,
        "context": context,
        "engine_decode_tokens_per_s": batch * (steps - 1) / best.decode_s,
        "idle_ms_per_step": 1e3 * best.idle_s,
    }


def measure_shapes(
    shapes: dict[str, ModelConfig],
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device,
    roofline: Roofline,
    memory: Callable[[], tuple[int, int]],
    steps: int = DECODE_STEPS,
) -> list[dict[str, Any]]:
    """Time every cell that fits and print it. `memory` returns the bytes free and in all."""
    titles = f"{'prefill tok/s':>13} {'of matmul':>9} {'decode tok/s':>12} {'of copying':>10} {'mixed':>7}"
    print(f"\n{'model':5} {'batch':>5} {'context':>7} {'path':19} {titles}  (mixed: of both)")
    rows = []
    for name, config in shapes.items():
        free, total = memory()
        needed = weight_bytes(config, torch.bfloat16, Packing(), device)
        if total - free + needed > MEMORY_SHARE * total:
            rows.append(_left_out(name, 0, 0, needed))
            continue
        weights = random_weights(config, device, torch.bfloat16)
        attention = choose_attention(config, device, torch.bfloat16, BLOCK_SIZE, 1 << 30)
        model = Model(config, weights, attention, choose_ops(config, device, torch.bfloat16))
        for context, batch in ((context, batch) for context in contexts for batch in batches):
            free, total = memory()
            kv_bytes = bytes_per_block(
                config.num_layers, batch * (context + steps), config.num_kv_heads, config.head_dim, torch.bfloat16
            )
            if total - free + kv_bytes > MEMORY_SHARE * total:
                rows.append(_left_out(name, batch, context, kv_bytes))
                continue
            row = {"model": name, **measure_model(config, batch, model, roofline, context, steps)}
            rows.append(row)
            print(
                f"{name:5} {batch:5} {context:7} {row['path']:19} {row['prefill_tokens_per_s']:13,.0f} "
                f"{row['prefill_share_of_matmul']:9.1%} {row['decode_tokens_per_s']:12,.0f} "
                f"{row['decode_share_of_bandwidth']:10.1%} {row['mixed_share_of_roofline']:7.1%}",
                flush=True,
            )
            if context == contexts[0]:
                row |= measure_engine(config, batch, model, context, steps)
                rate, idle_ms = row["engine_decode_tokens_per_s"], row["idle_ms_per_step"]
                print(f"{'':19} the engine: decode {rate:,.0f} tok/s, the device idle {idle_ms:.2f} ms a step")
        del model, weights
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _left_out(name: str, batch: int, context: int, size_bytes: int) -> dict[str, Any]:
    print(f"{name:5} {batch:5} {context:7} left out: {size_bytes / 2**30:.0f} GiB are more than {MEMORY_SHARE:.0%}")
    return {"model": name, "batch": batch, "context": context, "left_out": size_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--models", default="1b,8b", help="shapes to time, comma-separated")
    parser.add_argument("--batch", default="1,8,64", help="batch sizes, comma-separated")
    parser.add_argument("--contexts", default="1024,8192,65536", help="tokens per sequence, comma-separated")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the models")
    options = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.cuda.is_available()}
    is_interpreted = options.kernels_only and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not is_interpreted:
        print("No CUDA device here: nothing to check. (The CPU path is checked by the test suite.)")
        _write(options.json, result)
        return 0
    device = CPU if is_interpreted else torch.device("cuda", 0)
    torch.backends.cuda.matmul.allow_tf32 = False
    result["device"] = "Triton's interpreter" if is_interpreted else torch.cuda.get_device_name(device)
    print(f"{result['device']}, torch {torch.__version__}\n")
    result["kernels"] = [*check_kernels(device), *check_ops(device), check_graphs(device)]
    for row in result["kernels"]:
        print(f"{row['case']:28} {row['max_error']:10.2e}{'' if row['ok'] else '   WRONG'}")
    if options.kernels_only:
        _write(options.json, result)
        return 0 if all(row["ok"] for row in result["kernels"]) else 1
    print(f"\n{'family':8} {'dtype':9} {'path':16} {'max error':>10} {'same best':>10}")
    result["checks"] = []
    for name in FAMILIES:
        for row in check_family(name, device):
            result["checks"].append(row)
            verdict = "" if row["ok"] else "   WRONG"
            cells = f"{row['family']:8} {row['dtype']:9} {row['path']:16}"
            print(f"{cells} {row['max_error']:10.2e} {row['same_best_token']:10.1%}{verdict}")
    roofline = measure_roofline(device)
    result["copy_gb_per_s"] = roofline.copy_bytes_per_s / 1e9
    result["matmul_tflops"] = roofline.matmul_flops / 1e12
    print(f"\ncopy {result['copy_gb_per_s']:,.0f} GB/s, bf16 matmul {result['matmul_tflops']:,.0f} TFLOP/s")
    result["rates"] = measure_shapes(
        {name: SHAPES[name] for name in options.models.split(",")},
        [int(text) for text in options.batch.split(",")],
        [int(text) for text in options.contexts.split(",")],
        device,
        roofline,
        lambda: torch.cuda.mem_get_info(device),
    )
    _write(options.json, result)
    return 0 if all(row["ok"] for row in (*result["kernels"], *result["checks"])) else 1


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
