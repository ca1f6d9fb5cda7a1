"""Attention on CUDA: torch's own paged kernel where it proves itself at start, gathers where it does not.

`torch.nn.attention.varlen` reads scattered blocks without a copy, singles and chunks in one call per layer. Whether it
may be used depends on the torch version (its signature moved between releases), the GPU and the block size (the kernel
for older GPUs wants pages of 256 tokens). So nothing is assumed: the signature is probed, then a small random case is
computed and compared with the reference. Chosen once at start, never per request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.batch import Batch, pack
from kvasir.worker.model.config import ModelConfig

_NEEDED = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"}
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 2e-3}


def cuda_attention(config: ModelConfig, block_size: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """Return `PagedAttention` if it is there and right on this machine, else `GatherAttention`."""
    varlen = find_varlen()
    if varlen is not None and agrees_with_reference(PagedAttention(config, varlen), config, block_size, device, dtype):
        return PagedAttention(config, varlen)
    return GatherAttention(config)


def find_varlen() -> Callable[..., Any] | None:
    """Return torch's variable-length attention if this torch has it with block tables, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(inspect.signature(varlen_attn).parameters) >= _NEEDED else None


class PagedAttention(Attention):
    """One call of a paged variable-length kernel per layer, for singles and chunks alike."""

    def __init__(self, config: ModelConfig, varlen: Callable[..., Any]) -> None:
        super().__init__(config)
        self._varlen = varlen

    def begin(self, batch: Batch, kv: KvStore) -> None:
        pieces = [*batch.singles, *batch.chunks]
        ends = [piece.end for piece in pieces]
        counts = [len(piece.token_ids) for piece in pieces]
        width = -(-max(ends) // kv.block_size)
        tables = []
        for piece in pieces:
            used = piece.block_table[: -(-piece.end // kv.block_size)]
            tables.append(used + [0] * (width - len(used)))
        device = kv.data.device
        self._block_table = torch.tensor(tables, dtype=torch.int32, device=device)
        self._num_keys = torch.tensor(ends, dtype=torch.int32, device=device)
        self._query_ends = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
        self._longest = max(counts), max(ends)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        window = self._config.sliding_windows[layer]
        keys, values = kv.layer(layer)
        out: Tensor = self._varlen(
            q,
            keys,
            values,
            self._query_ends,
            None,
            *self._longest,
            scale=self._config.scale,
            window_size=(-1 if window is None else window - 1, 0),  # how many keys before the query's own, after it
            enable_gqa=True,
            seqused_k=self._num_keys,
            block_table=self._block_table,
        )
        return out.flatten(1)


@torch.inference_mode()
def agrees_with_reference(
    attention: Attention, config: ModelConfig, block_size: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether `attention` computes a small mixed step as the reference does; False also when it raises."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    length = 9 * block_size
    slices = [
        SequenceSlice(0, [0], length - 3, list(range(0, 20, 2)), 0),
        SequenceSlice(1, [0], 0, [20], 0),
        SequenceSlice(2, [0] * (block_size + 3), length - 2 * block_size, list(range(19, 0, -2)), 0),
    ]
    shape = (21, config.num_layers, block_size, config.num_kv_heads, config.head_dim)
    kv, reference = KvStore(*shape, dtype=dtype, device=device), ReferenceAttention(config)
    kv.data.copy_(random(*kv.data.shape))
    try:
        batch = pack(slices, attention.arrange(slices[:2], kv), slices[2:], block_size, device)
        attention.begin(batch, kv)
        reference.begin(batch, kv)
        rows = kv.rows(batch.slots)
        for layer in (config.sliding_windows.index(window) for window in set(config.sliding_windows)):
            q = random(len(rows), config.num_heads, config.head_dim)
            k, v = (random(len(rows), config.num_kv_heads, config.head_dim) for _ in range(2))
            kv.write(layer, rows, k, v)
            difference = attention.attend(layer, q, k, v, kv) - reference.attend(layer, q, k, v, kv)
            if not difference.abs().max().item() <= _TOLERANCE.get(dtype, 1e-5):  # also False for NaN
                return False
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True
