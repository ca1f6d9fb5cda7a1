"""Decode attention on a CPU: contiguous keys and values, our working set over paged ones, and a plain gather.

Prints milliseconds per decode step (all layers) and ratios to contiguous, side by side in one run:

    python scripts/bench_attention.py [--json FILE] [--ragged]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention
from kvasir.worker.model.batch import pack
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.working_set import WorkingSetAttention

BLOCK_SIZE = 16


def make_config(num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    hidden = num_heads * head_dim
    return ModelConfig(
        "llama",
        4096,
        hidden,
        2 * hidden,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        1e-5,
        8192,
        RopeConfig(),
        (None,) * num_layers,
    )


def contiguous_decode(config: ModelConfig, lengths: list[int], num_steps: int) -> Callable[[], None]:
    """The same decode when every sequence's keys and values lie in one run: append one token, attend."""
    shape = (config.num_layers, 2, len(lengths), config.num_kv_heads, max(lengths) + num_steps, config.head_dim)
    data = torch.randn(shape)
    ends = torch.tensor(lengths)
    rows = torch.arange(len(lengths))
    q, k, v = make_heads(config, len(lengths))
    q = q.view(len(lengths), config.num_kv_heads, -1, config.head_dim)

    def step() -> None:
        nonlocal ends
        longest = int(ends.max()) + 1
        ragged = int(ends.min()) + 1 != longest
        mask = (torch.arange(longest) <= ends[:, None])[:, None, None, :] if ragged else None
        for layer in range(config.num_layers):
            keys, values = data[layer]
            keys[rows, :, ends] = k
            values[rows, :, ends] = v
            scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
        ends = ends + 1

    return step


def paged_decode(config: ModelConfig, attention: Attention, lengths: list[int], num_steps: int) -> Callable[[], None]:
    """Our decode over scattered blocks, with all that a step does for attention: bookkeeping and both writes."""
    blocks_each = [-(-(length + num_steps) // BLOCK_SIZE) for length in lengths]
    ids = list(range(sum(blocks_each)))
    random.Random(0).shuffle(ids)
    kv = KvStore(len(ids), config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, torch.float32, "cpu")
    kv.data.normal_()
    tables = [[ids.pop() for _ in range(count)] for count in blocks_each]
    ends = list(lengths)
    q, k, v = make_heads(config, len(lengths))

    def step() -> None:
        slices = [SequenceSlice(i, [0], end, table, 1) for i, (end, table) in enumerate(zip(ends, tables, strict=True))]
        batch = pack(slices, *attention.arrange(slices, kv), BLOCK_SIZE, kv.data.device)
        attention.begin(batch, kv)
        rows = kv.rows(batch.slots)
        for layer in range(config.num_layers):
            kv.write(layer, rows, k, v)
            attention.attend(layer, q, k, v, kv)
        for i in range(len(ends)):
            ends[i] += 1

    return step


def make_heads(config: ModelConfig, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = torch.randn(batch, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    return heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)


def measure(steps: dict[str, Callable[[], None]], num_steps: int) -> dict[str, float]:
    """Return the median seconds per step of each, taken in turns, so that a noisy neighbour disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(num_steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:  # the first step copies the sequences in
                times[name].append(time.perf_counter() - begin)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--ragged", action="store_true", help="lengths between a quarter of the context and all of it")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = make_config(options.layers, options.heads, options.kv_heads, options.head_dim)
    rows = []
    print(f"{'batch':>5} {'context':>7} | {'contiguous':>12} {'working set':>20} {'plain gather':>20}   ms per step")
    for context in (256, 1024):
        for batch in (1, 8, 32):
            rng = random.Random(1)
            lengths = [rng.randint(context // 4, context) if options.ragged else context for _ in range(batch)]
            with torch.inference_mode():
                seconds = measure(
                    {
                        "contiguous": contiguous_decode(config, lengths, options.steps),
                        "working_set": paged_decode(
                            config, WorkingSetAttention(config, 1 << 34), lengths, options.steps
                        ),
                        "gather": paged_decode(config, GatherAttention(config), lengths, options.steps),
                    },
                    options.steps,
                )
            base = seconds["contiguous"]
            row = {"batch": batch, "context": context, "ragged": options.ragged}
            row |= {f"{name}_ms": value * 1e3 for name, value in seconds.items()}
            row |= {f"{name}_ratio": value / base for name, value in seconds.items()}
            rows.append(row)
            print(
                f"{batch:5} {context:7} | {base * 1e3:12.3f} "
                f"{seconds['working_set'] * 1e3:12.3f} ({seconds['working_set'] / base:4.2f}x) "
                f"{seconds['gather'] * 1e3:12.3f} ({seconds['gather'] / base:4.2f}x)"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
