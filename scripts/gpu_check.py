"""Is the CUDA path right on this machine, and how near does it come to what the hardware gives?

First the attention kernels are compared with the reference over a grid of cases, then every model family, with small
random weights, is run on the GPU and compared with the readable reference on the CPU. Then a 1 B- and an 8 B-shaped
random bf16 model are timed beside the copy bandwidth and the bf16 matmul rate measured in the same run: prefill as a
share of the matmul rate, decode as a share of the time that its bytes and operations would take at those two rates.
Without CUDA it says so and exits 0.

    python scripts/gpu_check.py [--json FILE] [--models 1b,8b] [--batch 1,8,64]
    TRITON_INTERPRET=1 python scripts/gpu_check.py --kernels-only     # the first part without a GPU, in an interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.attention_paths import TOLERANCE, choose_attention, largest_error
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.linear import Linear, Packing
from kvasir.worker.model.loader import weight_bytes
from kvasir.worker.model.model import LayerWeights, Model, Weights

BLOCK_SIZE = 16
CONTEXT = 512  # prompt tokens per sequence when timing
DECODE_STEPS = 32
MAX_STEP_TOKENS = 8192
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
        max_position=8192,
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
}


def check_kernels(device: torch.device) -> list[dict[str, Any]]:
    """Compare `PagedAttention` with the reference, both on `device`; one row per case."""
    from kvasir.worker.model.paged_attention import PagedAttention

    rows = []
    for name, ((num_heads, num_kv_heads, head_dim), block_size, windows, dtype, shares) in KERNEL_CASES.items():
        heads = {"head_dim": head_dim, "sliding_windows": windows}
        config = make_config(len(windows), 64, 64, num_heads, num_kv_heads, 8, **heads)
        error = largest_error(PagedAttention(config, dtype), config, block_size, device, dtype, shares)
        limit = 1e-5 if dtype == torch.float32 else TOLERANCE[dtype]
        rows.append({"case": name, "max_error": error, "ok": error <= limit})
    return rows


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
    config: ModelConfig, num_tokens: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[KvStore, list[list[int]]]:
    """Return a store and one block table per sequence, their blocks interleaved."""
    blocks_each = [-(-count // BLOCK_SIZE) for count in num_tokens]
    ids = iter(torch.randperm(sum(blocks_each), generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(ids) for _ in range(count)] for count in blocks_each]
    shape = (sum(blocks_each), config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return KvStore(*shape, dtype=dtype, device=device), tables


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
            actual = continuation(Model(config, move(weights, device, dtype), attention), prompts, tokens, chunk=48)
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
    config: ModelConfig, batch: int, model: Model, roofline: Roofline, context: int = CONTEXT, steps: int = DECODE_STEPS
) -> dict[str, Any]:
    """Time `batch` prompts of `context` tokens and then `steps` tokens each."""
    device, dtype = model.device, model.dtype
    kv, tables = make_store(config, [context + steps] * batch, device, dtype)
    prompt = list(range(2, 2 + context))
    per_step = max(1, MAX_STEP_TOKENS // context)

    def prefill() -> None:
        for first in range(0, batch, per_step):
            several = range(first, min(batch, first + per_step))
            model.forward([SequenceSlice(i, prompt, 0, tables[i], 1) for i in several], kv)

    def decode() -> None:
        tokens = [5] * batch
        for step in range(steps):
            pieces = [SequenceSlice(i, [tokens[i]], context + step, tables[i], 1) for i in range(batch)]
            tokens = model.forward(pieces, kv).argmax(dim=-1).tolist()

    prefill_s = seconds_of(prefill, device, 2)
    step_s = seconds_of(decode, device, 2) / steps
    head = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else head  # an embedding of its own is not multiplied
    matrices = weight_bytes(config, dtype, Packing(), device) / dtype.itemsize - looked_up
    attention = (
        2 * config.num_layers * config.num_heads * config.head_dim
    )  # multiply-adds per query and key, q·k and p·v
    prefill_flops = 2 * batch * (context * (matrices - head) + head + attention * context * (context + 1) / 2)
    middle = context + steps / 2
    decode_flops = 2 * batch * (matrices + attention * middle)
    kv_bytes = batch * middle * bytes_per_block(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
    ideal_s = max(
        (matrices * dtype.itemsize + kv_bytes) / roofline.copy_bytes_per_s, decode_flops / roofline.matmul_flops
    )
    return {
        "batch": batch,
        "path": type(model.attention).__name__,
        "prefill_tokens_per_s": batch * context / prefill_s,
        "prefill_share_of_matmul": prefill_flops / prefill_s / roofline.matmul_flops,
        "decode_tokens_per_s": batch / step_s,
        "decode_step_ms": step_s * 1e3,
        "decode_share_of_roofline": ideal_s / step_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--models", default="1b,8b", help="shapes to time, comma-separated")
    parser.add_argument("--batch", default="1,8,64", help="batch sizes, comma-separated")
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
    result["kernels"] = check_kernels(device)
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
    titles = f"{'prefill tok/s':>14} {'of matmul':>10} {'decode tok/s':>13} {'of roofline':>12}"
    print(f"\n{'model':5} {'batch':>5} {'path':16} {titles}")
    result["rates"] = []
    for shape in options.models.split(","):
        config = SHAPES[shape]
        needed = weight_bytes(config, torch.bfloat16, Packing(), device)
        if needed * 1.5 > torch.cuda.mem_get_info(device)[0]:
            print(f"{shape:5} left out: needs about {needed * 1.5 / 2**30:.0f} GiB of free GPU memory")
            continue
        weights = random_weights(config, device, torch.bfloat16)
        model = Model(config, weights, choose_attention(config, device, torch.bfloat16, BLOCK_SIZE, 1 << 30))
        for batch in map(int, options.batch.split(",")):
            row = {"model": shape, **measure_model(config, batch, model, roofline)}
            result["rates"].append(row)
            print(
                f"{shape:5} {batch:5} {row['path']:16} {row['prefill_tokens_per_s']:14,.0f} "
                f"{row['prefill_share_of_matmul']:10.1%} {row['decode_tokens_per_s']:13,.0f} "
                f"{row['decode_share_of_roofline']:12.1%}"
            )
        del model, weights
        torch.cuda.empty_cache()
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
