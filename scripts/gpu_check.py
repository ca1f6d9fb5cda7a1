"""Is the CUDA path right on this machine, and how near does it come to what the hardware gives?

First the attention kernels are compared with the reference over a grid of cases, what is fused with the plain way and a
padded decode step (on CUDA a captured one) with the reference; then every model family, with small random weights, is
run on the GPU and compared with the readable reference on the CPU. Then a 1 B- and an 8 B-shaped random bf16 model are
timed beside the copy bandwidth and the bf16 matmul rate measured in the same run (`scripts/gpu_rates.py`): prefill as a
share of the matmul rate, decode as a share of the copy bandwidth, and steps that mix both as a share of the time that
their bytes and operations would take at those two rates. For the shortest context the whole engine decodes, with the
host's time per step and the time in which the device has nothing to do; and so does the continuous batching of
`transformers`, where that is installed. Cells that need over 80 % of the memory are left out, and those for which no
time is left: all of it takes at most about `--seconds`. Without CUDA it says so and exits 0.

    python scripts/gpu_check.py [--json FILE] [--models 1b,8b] [--batch 1,8,64] [--contexts 1024,8192,65536]
    TRITON_INTERPRET=1 python scripts/gpu_check.py --kernels-only     # the first part without a GPU, in an interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_rates import Budget, measure_roofline, measure_shapes
from random_model import BLOCK_SIZE, SHAPES, make_config, make_store, random_weights

from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.attention_paths import TOLERANCE, choose_attention, largest_error
from kvasir.worker.model.config import RopeConfig
from kvasir.worker.model.graphs import DecodeGraphs
from kvasir.worker.model.linear import Linear
from kvasir.worker.model.model import LayerWeights, Model, Weights
from kvasir.worker.model.ops import FusedOps, choose_ops, largest_difference

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # of the logits, relative to the largest
CPU = torch.device("cpu")


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


def move(weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return a copy of `weights` elsewhere."""

    def moved(value: Linear | Tensor | None) -> Any:
        if isinstance(value, Linear):
            return Linear(moved(value.plain), moved(value.bias))
        return None if value is None else value.to(device=device, dtype=dtype, copy=True)

    names = LayerWeights.__dataclass_fields__
    layers = [LayerWeights(**{name: moved(getattr(layer, name)) for name in names}) for layer in weights.layers]
    return Weights(moved(weights.embedding), layers, moved(weights.final_norm), moved(weights.lm_head))


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--models", default="1b,8b", help="shapes to time, comma-separated")
    parser.add_argument("--batch", default="1,8,64", help="batch sizes, comma-separated")
    parser.add_argument("--contexts", default="1024,8192,65536", help="tokens per sequence, comma-separated")
    parser.add_argument("--seconds", type=float, default=420.0, help="that all may take (default 420)")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the models")
    options = parser.parse_args()
    budget = Budget(options.seconds)
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
        budget,
    )
    _write(options.json, result)
    return 0 if all(row["ok"] for row in (*result["kernels"], *result["checks"])) else 1


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
