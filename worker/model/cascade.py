"""Stems: keys and values that several decoding sequences begin with, read once in a step for all of them.

Each sequence attends to its stem, all of them in one call, and to what it has of its own. The two parts are merged by
their log-sum-exps, which is exact (flash-decoding; cascade inference, FlashInfer). Which sequences share a stem is
decided when one begins to decode, by equal block ids: a block in two tables is published, so nothing writes to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice

_SAVED_BYTES = 1 << 20  # of a layer's keys and values that are not read again in a step: about what a stem costs


@dataclass(slots=True, eq=False)
class Stem:
    """A run of blocks, contiguous: `data` holds per layer [2, num_kv_heads, length, head_dim]."""

    block_ids: list[int]
    data: list[Tensor]
    queries: Tensor | None = None  # [num_queries] of this step that see it, indices of the pack

    @property
    def length(self) -> int:
        return self.data[0].shape[2]

    @property
    def size_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.data)

    def begins(self, piece: SequenceSlice) -> bool:
        """Whether what is before `piece` begins with these blocks."""
        return self.length <= piece.start and piece.block_table[: len(self.block_ids)] == self.block_ids

    def add_to(self, layer: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the attention to this stem into `out` [rows, num_heads * head_dim].

        `q` [rows, num_heads, head_dim]; `lse` [rows, num_heads] are the log-sum-exps of what `out` comes from.
        """
        assert self.queries is not None
        keys, values = self.data[layer]
        num_kv_heads, head_dim = keys.shape[0], keys.shape[2]
        mine = q.index_select(0, self.queries)  # [n, num_heads, head_dim]
        packed = mine.view(len(mine), num_kv_heads, -1, head_dim).transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)
        shared, shared_lse = attend_with_lse(packed, keys[None], values[None])
        shared = shared.view(num_kv_heads, len(mine), -1, head_dim).transpose(0, 1).reshape(mine.shape)
        shared_lse = shared_lse.view(num_kv_heads, len(mine), -1).transpose(0, 1).reshape(mine.shape[:2])
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


def make_stem(kv: KvStore, block_ids: list[int]) -> Stem:
    return Stem(block_ids, [blocks.flatten(2, 3) for blocks in copy_blocks(kv, block_ids)])


def _num_common(a: SequenceSlice, b: SequenceSlice, block_size: int) -> int:
    """Return how many full blocks before both slices are the same ones."""
    ours, theirs = a.block_table, b.block_table
    most = min(a.start, b.start) // block_size
    if not most or ours[0] != theirs[0]:
        return 0
    return bisect_left(range(1, most + 1), True, key=lambda n: ours[:n] != theirs[:n])
