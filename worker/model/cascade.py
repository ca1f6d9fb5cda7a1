"""Stems: keys and values that several decoding sequences begin with, read once in a step for all of them.

Each sequence attends to its stem, all of them in one call, and to what it has of its own. The two parts are merged by
their log-sum-exps, which is exact (flash-decoding; cascade inference, FlashInfer). Which sequences share a stem is
decided when one begins to decode, by equal block ids: a block in two tables is published, so nothing writes to it.

A stem stays the same, so its keys and values can be weights that oneDNN has packed, where a probe finds that faster
than torch's fused attention. On AMD's processors with AVX-512 it is, by a third, since that goes through MKL.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.linear import apply_packed, gain, pack, probe_packing

_FEW_ROWS = 24  # fewer than so many are left to torch's fused attention
_ROWS = 64  # at a time, so that their scores stay near
_ROUND_ROWS = 16  # numbers of rows are rounded up to these: oneDNN compiles for each
_SAVED_BYTES = 1 << 20  # of a layer's keys and values that are not read again in a step: about what a stem costs


@dataclass(slots=True, eq=False)
class Stem:
    """A run of blocks, contiguous: `data` holds per layer [2, num_kv_heads, length, head_dim]. With `packs` it is kept
    packed as well."""

    block_ids: list[int]
    data: list[Tensor]
    packs: bool = False
    queries: Tensor | None = None  # [num_queries] of this step that see it, indices of the pack
    _heads: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by layer: packed, of every key head

    @property
    def length(self) -> int:
        return self.data[0].shape[2]

    @property
    def size_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.data) * (1 + self.packs)

    def begins(self, piece: SequenceSlice) -> bool:
        """Whether what is before `piece` begins with these blocks."""
        return self.length <= piece.start and piece.block_table[: len(self.block_ids)] == self.block_ids

    def attend(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention of `q` [num_kv_heads, rows, head_dim] to all of the stem, and its log-sum-exps
        [num_kv_heads, rows]."""
        keys, values = self.data[layer]
        if not self.packs or q.shape[1] < _FEW_ROWS:
            return attend_heads(q, keys, values)
        if layer not in self._heads:
            self._heads[layer] = [(pack(k), pack(v.t())) for k, v in zip(keys, values, strict=True)]
        return _attend_packed(q, self._heads[layer])

    def add_to(self, layer: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the attention to this stem into `out` [rows, num_heads * head_dim].

        `q` [rows, num_heads, head_dim]; `lse` [rows, num_heads] are the log-sum-exps of what `out` comes from.
        """
        assert self.queries is not None
        num_kv_heads, head_dim = self.data[layer].shape[1], q.shape[2]
        mine = q.index_select(0, self.queries)  # [n, num_heads, head_dim]
        packed = mine.view(len(mine), num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        shared, shared_lse = self.attend(layer, packed)
        shared = shared.reshape(num_kv_heads, len(mine), -1, head_dim).transpose(0, 1).reshape(mine.shape)
        shared_lse = shared_lse.reshape(num_kv_heads, len(mine), -1).transpose(0, 1).reshape(mine.shape[:2])
        share = (shared_lse - lse.index_select(0, self.queries)).sigmoid_().to(out.dtype)[:, :, None]
        rows = out.view(len(out), -1, head_dim)
        rows.index_copy_(0, self.queries, torch.lerp(rows.index_select(0, self.queries), shared, share))


def attend_with_lse(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what `scaled_dot_product_attention` does, and the log-sum-exp [batch, heads, queries] of the scores.

    It is what that runs on a CPU.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, is_causal, attn_mask=mask
    )
    return out, lse


def attend_heads(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention of `q` [num_kv_heads, rows, head_dim], and its log-sum-exps, to all of `keys` and `values`
    [num_kv_heads, length, head_dim]."""
    out, lse = attend_with_lse(q[None], keys[None], values[None])
    return out[0], lse[0]


def _attend_packed(q: Tensor, heads: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what `attend_heads` does, given every head's packed keys and transposed values."""
    num_rows = q.shape[1]
    q = pad(q * q.shape[2] ** -0.5, (0, 0, 0, -num_rows % _ROUND_ROWS))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for head, (keys, values) in enumerate(heads):
        for start in range(0, q.shape[1], _ROWS):
            rows = slice(start, start + _ROWS)
            scores = apply_packed(q[head, rows], keys)
            weights = scores.softmax(-1)
            out[head, rows] = apply_packed(weights, values)
            torch.sub(scores.amax(-1), weights.amax(-1).log_(), out=lse[head, rows])
    return out[:, :num_rows], lse[:, :num_rows]


@functools.cache
@torch.inference_mode()
def probe_packed_attention(dtype: torch.dtype) -> bool:
    """Return whether attention to packed keys and values is right, and faster than torch's fused one by a tenth."""
    if dtype != torch.float32 or not probe_packing(dtype).packs:
        return False
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(1, rows, 64, generator=generator) for rows in (_ROWS, 1024, 1024))
    heads = [(pack(keys[0]), pack(values[0].t()))]
    expected, actual = attend_heads(q, keys, values), _attend_packed(q, heads)
    if any((a - b).abs().max().item() > 1e-5 for a, b in zip(expected, actual, strict=True)):
        return False
    return gain(lambda: attend_heads(q, keys, values), lambda: _attend_packed(q, heads)) >= 1.1


def find_group(
    piece: SequenceSlice, others: Sequence[SequenceSlice], block_size: int, block_bytes: int
) -> tuple[int, list[SequenceSlice]]:
    """Return how many blocks `piece` should share in a stem, and with which of `others`; 0 if that does not pay.

    `block_bytes`: of one block's keys and values in one layer. Chosen is what saves most reading.
    """
    common = [(_num_common(piece, other, block_size), other) for other in others]
    common.sort(key=lambda found: -found[0])
    saved = [num_blocks * (i + 1) for i, (num_blocks, _) in enumerate(common)]
    best = max(range(len(saved)), key=saved.__getitem__, default=0)
    if not saved or saved[best] * block_bytes < _SAVED_BYTES:
        return 0, []
    return common[best][0], [other for _, other in common[: best + 1]]


def copy_blocks(kv: KvStore, block_ids: Sequence[int]) -> Tensor:
    """Return a copy [num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim] of what the store holds."""
    return kv.data.index_select(0, torch.tensor(block_ids, dtype=torch.int64, device=kv.data.device)).permute(
        1, 2, 4, 0, 3, 5
    )


def make_stem(kv: KvStore, block_ids: list[int], *, packs: bool) -> Stem:
    return Stem(block_ids, [blocks.flatten(2, 3) for blocks in copy_blocks(kv, block_ids)], packs)


def _num_common(a: SequenceSlice, b: SequenceSlice, block_size: int) -> int:
    """Return how many full blocks before both slices are the same ones."""
    ours, theirs = a.block_table, b.block_table
    most = min(a.start, b.start) // block_size
    if not most or ours[0] != theirs[0]:
        return 0
    return bisect_left(range(1, most + 1), True, key=lambda n: ours[:n] != theirs[:n])
