"""Attention over the paged KV store: the contract, the readable reference, and the gather path for any device.

An `Attention` sees a step three times: `arrange` says in which order its slices shall be packed, `begin` prepares
what all layers share (indices, masks), `attend` is called once per layer, after that layer's new keys and values have
been written to the store. Grouped queries never repeat keys: the queries of one KV head are taken as several of it.

`ReferenceAttention` is the oracle of every other path: slow, and obviously right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.batch import Batch
from kvasir.worker.model.cascade import Stem, attend_heads, attend_with_lse
from kvasir.worker.model.config import ModelConfig

_MASK_ELEMENTS = 1 << 24  # of one prefill mask; longer chunks are attended in pieces
_GATHER_BYTES = 1 << 28  # gathered at a time
_LONG_PAST = 512  # tokens before a chunk, from which on a CPU attends to them by themselves


Attend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Attention of queries [num_kv_heads, rows, head_dim] to something, with its log-sum-exps [num_kv_heads, rows]."""


class Attention(ABC):
    """The contract; a path that keeps nothing between steps and takes any order has only `begin` and `attend`."""

    name = ""
    fallback_reason = ""  # why it runs instead of a faster one

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def arrange(self, slices: Sequence[SequenceSlice], kv: KvStore) -> tuple[list[SequenceSlice], list[SequenceSlice]]:
        """Return the singles and the chunks among `slices` in the order in which they shall lie in the pack; let go
        what is kept of other sequences."""
        singles = [piece for piece in slices if len(piece.token_ids) == 1]
        return singles, [piece for piece in slices if len(piece.token_ids) > 1]

    @abstractmethod
    def begin(self, batch: Batch, kv: KvStore) -> None:
        """Prepare a step; `kv` does not hold its tokens yet."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        """Return the attention's output [num_tokens, num_heads * head_dim] of one layer.

        `q` [num_tokens, num_heads, head_dim], `k` and `v` [num_tokens, num_kv_heads, head_dim] hold the packed new
        tokens, rotated; `kv` holds them as well by now.
        """


def reference_attend(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of one sequence, written out.

    `q` [num_new, num_heads, head_dim] are positions start.. of the sequence; `keys` and `values`
    [start + num_new, num_kv_heads, head_dim] all its positions. A query at position p sees positions
    max(0, p - window + 1)..p.
    Computed in fp32, or fp64 when given that. Returns [num_new, num_heads, head_dim].
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // keys.shape[1]
    keys = keys.to(exact).repeat_interleave(group, dim=1)
    values = values.to(exact).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(exact), keys) * scale
    scores = scores.masked_fill(~visible(start, q.shape[0], keys.shape[0], window, q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).to(q.dtype)


def visible(start: int, num_new: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return [num_new, num_keys] bool: which keys the queries at positions start.. may see."""
    query = torch.arange(start, start + num_new, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def gather(kv: KvStore, layer: int, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return copies [num_tokens, num_kv_heads, head_dim] of one sequence's keys and values."""
    keys, values = kv.layer(layer)
    return keys[block_table].flatten(0, 1)[:num_tokens], values[block_table].flatten(0, 1)[:num_tokens]


class ReferenceAttention(Attention):
    """Every sequence by itself through `reference_attend`, everything read back from the store."""

    name = "reference"

    def begin(self, batch: Batch, kv: KvStore) -> None:
        self._pieces = [*batch.singles, *batch.chunks]
        self._tables = block_tables(self._pieces, kv)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        window, scale = self._config.sliding_windows[layer], self._config.scale
        out, row = [], 0
        for piece, table in zip(self._pieces, self._tables, strict=True):
            queries = q[row : row + len(piece.token_ids)]
            keys, values = gather(kv, layer, table, piece.end)
            out.append(reference_attend(queries, keys, values, piece.start, scale, window))
            row += len(piece.token_ids)
        return torch.cat(out).flatten(1)


def block_tables(pieces: Sequence[SequenceSlice], kv: KvStore) -> list[Tensor]:
    """Return each sequence's block table, cut to the blocks that hold its tokens after the step."""
    tables = []
    for piece in pieces:
        num_blocks = -(-piece.end // kv.block_size)
        tables.append(torch.tensor(piece.block_table[:num_blocks], dtype=torch.int64, device=kv.data.device))
    return tables


@dataclass(slots=True)
class _Group:
    """Singles of about the same length that are gathered together."""

    rows: Tensor  # [num_rows] of the singles
    unused: Tensor  # slots in the gathered blocks whose content may be anything
    table: Tensor  # [num_rows, width]
    masks: dict[int | None, Tensor]  # by window: [num_rows, 1, 1, width * block_size], True where seen

    def gather(self, blocks: Tensor) -> Tensor:
        """Gather `blocks` [num_blocks, block_size, num_kv_heads, head_dim] to [rows, num_kv_heads, keys, head_dim]."""
        gathered = blocks[self.table]
        gathered.view(-1, *blocks.shape[2:]).index_fill_(0, self.unused, 0)  # zero times NaN would be NaN
        return gathered.flatten(1, 2).transpose(1, 2)


class GatherAttention(Attention):
    """Torch's own fused attention over gathered keys and values: right on any device, fast on none.

    Singles are gathered in groups of about the same length, chunks one by one; a chunk without a cached prefix needs
    no gather at all. So a step takes the memory of one layer's keys and values of its longest sequence, or
    `_GATHER_BYTES`, if that is more.
    """

    name = "gather"

    def __init__(self, config: ModelConfig, fallback_reason: str = "") -> None:
        super().__init__(config)
        self.fallback_reason = fallback_reason

    def begin(self, batch: Batch, kv: KvStore) -> None:
        self.begin_singles(batch.singles, kv)
        self.begin_chunks(batch.chunks, kv)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        num_singles = len(self._singles)
        if num_singles == q.shape[0]:
            return self.attend_singles(layer, q, kv)
        chunks = self.attend_chunks(layer, q[num_singles:], k[num_singles:], v[num_singles:], kv)
        return torch.cat((self.attend_singles(layer, q[:num_singles], kv), chunks)) if num_singles else chunks

    def begin_singles(self, singles: list[SequenceSlice], kv: KvStore) -> None:
        """Prepare block tables and masks of each group of `singles`; padding repeats a sequence's first block."""
        self._singles = singles
        self._groups = [self._group(singles, rows, kv) for rows in self._group_rows(singles, kv)]

    def _group_rows(self, singles: list[SequenceSlice], kv: KvStore) -> list[list[int]]:
        """Put rows of about the same length together, no more than `_GATHER_BYTES` gathered unless a row alone is."""
        block_bytes = kv.data[0, 0].nbytes  # of one layer
        groups: list[list[int]] = []
        longest = 0
        for row in sorted(range(len(singles)), key=lambda row: -singles[row].end):
            num_blocks = -(-singles[row].end // kv.block_size)
            fits = bool(groups) and (len(groups[-1]) + 1) * longest * block_bytes <= _GATHER_BYTES
            if not fits or num_blocks < longest // 2:
                groups.append([])
                longest = num_blocks
            groups[-1].append(row)
        return groups

    def _group(self, singles: list[SequenceSlice], rows: list[int], kv: KvStore) -> _Group:
        block_size, device = kv.block_size, kv.data.device
        width = -(-singles[rows[0]].end // block_size)
        padded: list[list[int]] = []
        unused: list[int] = []
        for i, row in enumerate(rows):
            end = singles[row].end
            used = singles[row].block_table[: -(-end // block_size)]
            unused += range(i * width * block_size + end, (i * width + len(used)) * block_size)
            padded.append(used + used[:1] * (width - len(used)))
        ends = torch.tensor([singles[row].end for row in rows], device=device)[:, None]
        key = torch.arange(width * block_size, device=device)[None, :]
        masks = {}
        for window in set(self._config.sliding_windows):
            seen = key < ends if window is None else (key < ends) & (key >= ends - window)
            masks[window] = seen[:, None, None, :]
        indices = [torch.tensor(values, dtype=torch.int64, device=device) for values in (rows, unused, padded)]
        return _Group(indices[0], indices[1], indices[2], masks)

    def attend_singles(self, layer: int, q: Tensor, kv: KvStore) -> Tensor:
        """Return [num_singles, num_heads * head_dim] for `q` [num_singles, num_heads, head_dim]."""
        num_kv_heads = self._config.num_kv_heads
        window = self._config.sliding_windows[layer]
        out = q.new_empty(q.shape)
        for group in self._groups:
            keys, values = (group.gather(part) for part in kv.layer(layer))
            queries = q[group.rows].view(len(group.rows), num_kv_heads, -1, self._config.head_dim)
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=group.masks[window])
            out[group.rows] = attended.flatten(1, 2)
        return out.flatten(1)

    def begin_chunks(self, chunks: list[SequenceSlice], kv: KvStore, stems: Sequence[Stem] = ()) -> None:
        """Prepare the chunks' block tables; what a chunk has before it in one of `stems` is not gathered."""
        self._chunks = chunks
        self._chunk_tables = block_tables(chunks, kv)
        self._chunk_stems = [
            max((stem for stem in stems if stem.begins(piece)), key=lambda stem: stem.length, default=None)
            for piece in chunks
        ]

    def attend_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        """Return [num_chunk_tokens, num_heads * head_dim] for the packed tokens of the chunks."""
        window, row, out = self._config.sliding_windows[layer], 0, []
        for piece, table, stem in zip(self._chunks, self._chunk_tables, self._chunk_stems, strict=True):
            rows = slice(row, row + len(piece.token_ids))
            shared, num_shared = (None, 0) if stem is None else (partial(stem.attend, layer), stem.length)
            keys, values = k[rows], v[rows]
            if piece.start > num_shared:
                keys, values = gather(kv, layer, table[num_shared // kv.block_size :], piece.end - num_shared)
            out.append(chunk_attend(q[rows], keys, values, piece.start - num_shared, window, shared))
            row = rows.stop
        return torch.cat(out) if len(out) > 1 else out[0]


def chunk_attend(
    q: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None, shared: Attend | None = None
) -> Tensor:
    """Fused causal attention of one prefill chunk; arguments as of `reference_attend`.

    `shared` attends to what comes before all of that; on a CPU, no window.
    Returns [num_new, num_heads * head_dim]. Works through the chunk in pieces, which keep the mask small and leave out
    the keys that no query of a piece can see.
    """
    num_new, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    queries = q.reshape(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    if shared is not None or (start >= _LONG_PAST and window is None and q.device.type == "cpu"):
        pasts: list[Attend] = [] if shared is None else [shared]
        if start:
            pasts.append(partial(attend_heads, keys=keys[:, :start], values=values[:, :start]))
        out = _attend_part_by_part(queries, pasts, keys[:, start:], values[:, start:])
        return out.permute(2, 0, 1, 3).reshape(num_new, -1)
    keys = keys[:, None].expand(-1, group, -1, -1)
    values = values[:, None].expand(-1, group, -1, -1)
    if start == 0 and (window is None or window >= num_keys):
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return out.permute(2, 0, 1, 3).reshape(num_new, -1)
    step = max(16, _MASK_ELEMENTS // num_keys)
    pieces = []
    for first in range(0, num_new, step):
        piece = queries[:, :, first : first + step]
        begin = start + first
        end = begin + piece.shape[2]
        seen_from = 0 if window is None else max(0, begin - window + 1)
        mask = visible(begin - seen_from, piece.shape[2], end - seen_from, window, q.device)
        span = slice(seen_from, end)
        pieces.append(scaled_dot_product_attention(piece, keys[:, :, span], values[:, :, span], attn_mask=mask))
    out = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return out.permute(2, 0, 1, 3).reshape(num_new, -1)


def _attend_part_by_part(q: Tensor, pasts: Sequence[Attend], keys: Tensor, values: Tensor) -> Tensor:
    """Return causal attention [num_kv_heads, group, num_new, head_dim], merged from that to each past and to the chunk.

    `q` is of that shape, the chunk's `keys` and `values` are [num_kv_heads, num_new, head_dim]. Without a mask, and a
    past is read once for all query heads of a key head: 1.1 to 1.4 times as fast on a CPU.
    """
    own_keys, own_values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    out, lse = attend_with_lse(q, own_keys, own_values, is_causal=True)
    for attend in pasts:
        past, past_lse = attend(q.flatten(1, 2))
        past_lse = past_lse.reshape(lse.shape)
        share = (past_lse - lse).sigmoid_().to(out.dtype)
        out = torch.lerp(out, past.reshape(out.shape), share[..., None])
        lse = torch.logaddexp(lse, past_lse)
    return out
