"""Which attention path a worker runs: the best one for its device that proves itself at start. Never chosen again.

A small random step is computed and compared with the reference. A path that differs or raises is left for
`GatherAttention`, which then says why (`fallback_reason`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.batch import pack
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.working_set import WorkingSetAttention

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 2e-3}
_SHARES = [(141, 1), (0, 1), (112, 19), (0, 40), (700, 1)]  # (start, number of tokens) of the sequences of the check


def choose_attention(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, block_size: int, working_set_limit_bytes: int
) -> Attention:
    """Return the path for `device`, checked. `working_set_limit_bytes` bounds what a CPU mirrors of the store."""
    try:
        attention: Attention
        if device.type == "cpu":
            attention = WorkingSetAttention(config, working_set_limit_bytes)
        else:
            from kvasir.worker.model.paged_attention import PagedAttention  # Triton comes with torch for CUDA

            attention = PagedAttention(config, dtype)
        error = largest_error(attention, config, block_size, device, dtype, _SHARES)
        reason = "" if error <= TOLERANCE.get(dtype, 1e-5) else f"it differs from the reference by {error:.1e}"
    except Exception as failure:  # whatever a compiler or driver raises: the worker can serve without it
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return attention if not reason else GatherAttention(config, fallback_reason=reason)


@torch.inference_mode()
def largest_error(
    attention: Attention,
    config: ModelConfig,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    shares: Sequence[tuple[int, int]],
    num_shared: int = 0,
) -> float:
    """Return by how much `attention` differs from the reference at most in one random step; NaN counts as infinite.

    `shares` holds for each sequence how many tokens are in the store and how many are computed. What is no sequence's
    is NaN, so that whoever reads it will be found out. One layer per window is computed. All begin with the same
    `num_shared` blocks, as far as they have so many.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    counts = [-(-(start + count) // block_size) for start, count in shares]
    ids = torch.randperm(sum(counts), generator=generator).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    longest = max(tables, key=len)
    for (start, _), table in zip(shares, tables, strict=True):
        count = min(num_shared, start // block_size)
        table[:count] = longest[:count]
    slices = [
        SequenceSlice(i, [0] * count, start, table, 0)
        for i, ((start, count), table) in enumerate(zip(shares, tables, strict=True))
    ]
    layers = [config.sliding_windows.index(window) for window in set(config.sliding_windows)]
    kv = KvStore(sum(counts), config.num_layers, block_size, config.num_kv_heads, config.head_dim, dtype, device)
    kv.data.fill_(float("nan"))
    for piece in slices:
        history = [piece.block_table[p // block_size] * block_size + p % block_size for p in range(piece.start)]
        rows = kv.rows(torch.tensor(history, dtype=torch.int64, device=device))
        for layer in layers:
            kv.write(layer, rows, *(random(piece.start, config.num_kv_heads, config.head_dim) for _ in range(2)))
    singles, chunks = attention.arrange(slices, kv)
    batch, reference = pack(slices, singles, chunks, block_size, device), ReferenceAttention(config)
    attention.begin(batch, kv)
    reference.begin(batch, kv)
    rows, worst = kv.rows(batch.slots), 0.0
    for layer in layers:
        q = random(len(rows), config.num_heads, config.head_dim)
        k, v = (random(len(rows), config.num_kv_heads, config.head_dim) for _ in range(2))
        kv.write(layer, rows, k, v)
        difference = (attention.attend(layer, q, k, v, kv) - reference.attend(layer, q, k, v, kv)).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
    attention.arrange([], kv)
    return worst
