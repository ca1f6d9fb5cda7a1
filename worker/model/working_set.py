"""The decode working set: a contiguous mirror of the keys and values of the sequences that decode now.

Facts: on a CPU, decode attention is bound by reading keys and values once; gathering scattered blocks first reads them,
writes them and reads them again. Between two steps a decoding sequence gains one token, or a few where it had drafts.
From this follows: copy a sequence once when it begins to decode, append its tokens in every step, over those of drafts
that did not hold, and let the fused attention run over the copy.

What we chose: sequences stand in rows of *shelves*, four to every power of two of length, so that a short sequence is
not padded to a long one and rows are at most a quarter longer than what they hold, beyond 512 tokens. A sequence that
outgrows its shelf is copied anew. The set holds exactly the sequences that decode in this step: one that is absent, or
has become longer elsewhere, has lost its row, so nothing stale can be read. Beyond `limit_bytes` sequences are
gathered every step instead. What several sequences begin with is not in their rows but in a stem
(`worker.model.cascade`), if that saves more than it costs; not where a layer has a sliding window. Chunks that go on
from a stem read it there, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import GatherAttention
from kvasir.worker.model.batch import Batch
from kvasir.worker.model.cascade import (
    Stem,
    attend_with_lse,
    copy_blocks,
    find_group,
    make_stem,
    probe_packed_attention,
)
from kvasir.worker.model.config import ModelConfig

_MIN_CAPACITY = 128  # tokens
_CALL = 1 << 19  # multiplications that take as long as one more call of attention, some 40 us


class WorkingSetAttention(GatherAttention):
    """Sequences that decode from the working set, chunks (and what does not fit) gathered."""

    name = "working set"

    def __init__(self, config: ModelConfig, limit_bytes: int = 1 << 30, *, has_stems: bool = True) -> None:
        super().__init__(config)
        self.limit_bytes = limit_bytes
        self._has_stems = has_stems and set(config.sliding_windows) == {None}
        self.stem_of: dict[int, Stem] = {}  # by seq_key
        self._shelves: dict[int, _Shelf] = {}  # by capacity
        self._rows: dict[int, _Shelf] = {}  # seq_key -> its shelf

    @property
    def allocated_bytes(self) -> int:
        return sum(shelf.size_bytes for shelf in self._shelves.values()) + sum(stem.size_bytes for stem in self._stems)

    @property
    def _stems(self) -> set[Stem]:
        return set(self.stem_of.values())

    @property
    def num_sequences(self) -> int:
        return len(self._rows)

    def arrange(self, slices: Sequence[SequenceSlice], kv: KvStore) -> tuple[list[SequenceSlice], list[SequenceSlice]]:
        """Let absent sequences go, take new ones in; the singles lie shelf by shelf, row by row."""
        by_key = {piece.seq_key: piece for piece in slices if piece.is_decoding}
        for shelf in list(self._shelves.values()):
            for seq_key in reversed(shelf.seq_keys):  # from the last row on, so that no row moves that leaves as well
                if not self._continues(shelf, seq_key, by_key.get(seq_key)):
                    self._drop(seq_key)
        new = [piece for piece in by_key.values() if piece.seq_key not in self._rows]
        if self._has_stems and new:
            new = self._give_stems(new, by_key, kv)
        coming = Counter(_capacity(piece.end - self._base(piece), kv.block_size) for piece in new)
        left = {piece.seq_key for piece in new if not self._admit(piece, kv, coming)}
        self._active = [self._shelves[capacity] for capacity in sorted(self._shelves)]
        for shelf in self._active:
            shelf.pieces = [by_key[key] for key in shelf.seq_keys]
        singles, chunks = super().arrange([p for p in slices if p.seq_key in left or not p.is_decoding], kv)
        self._overflow = singles
        return [piece for shelf in self._active for piece in shelf.pieces] + singles, chunks

    def begin(self, batch: Batch, kv: KvStore) -> None:
        self._num_single_rows = sum(len(piece.token_ids) for piece in batch.singles)
        queries: dict[Stem, list[int]] = {stem: [] for stem in self._stems}
        row = 0
        for piece in batch.singles:
            if piece.seq_key in self.stem_of:
                queries[self.stem_of[piece.seq_key]] += range(row, row + len(piece.token_ids))
            row += len(piece.token_ids)
        for stem, rows in queries.items():
            stem.queries = torch.tensor(rows, device=kv.data.device)
        self._step_stems = list(queries)
        for shelf in self._active:
            shelf.begin_step(set(self._config.sliding_windows))
        self.begin_singles(self._overflow, kv)
        self.begin_chunks(batch.chunks, kv, self._step_stems)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        window, row, out = self._config.sliding_windows[layer], 0, []
        lses = []
        for shelf in self._active:
            rows = slice(row, row + shelf.num_queries)
            attended, lse = shelf.attend(layer, q[rows], k[rows], v[rows], window)
            out.append(attended)
            lses.append(lse)
            row = rows.stop
        if self._step_stems:
            out = [torch.cat(out)]
            lse = torch.cat(lses)
            for stem in self._step_stems:
                stem.add_to(layer, q, out[0], lse)
        if self._overflow:
            out.append(self.attend_singles(layer, q[row : self._num_single_rows], kv))
        if self._chunks:
            rest = slice(self._num_single_rows, None)
            out.append(self.attend_chunks(layer, q[rest], k[rest], v[rest], kv))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _continues(self, shelf: _Shelf, seq_key: int, piece: SequenceSlice | None) -> bool:
        """Return whether the set holds what is before `piece`, and has room for it."""
        stem = self.stem_of.get(seq_key)
        return piece is not None and (stem is None or stem.begins(piece)) and shelf.continues(piece)

    def _give_stems(
        self, new: list[SequenceSlice], present: dict[int, SequenceSlice], kv: KvStore
    ) -> list[SequenceSlice]:
        """Let `new` sequences share stems with each other and with `present` ones; return which need rows.

        Those that had a row with all that they hold, and share now, are among them.
        """
        config, block_size = self._config, kv.block_size
        packs = kv.data.device.type == "cpu" and probe_packed_attention(kv.data.dtype)
        block_bytes = bytes_per_block(1, block_size, config.num_kv_heads, config.head_dim, kv.data.dtype)
        alone = {key: piece for key, piece in present.items() if key not in self.stem_of}
        coming = {piece.seq_key: piece for piece in new}
        for piece in new:
            if piece.seq_key in self.stem_of:
                continue
            fitting = [stem for stem in self._stems if stem.begins(piece)]
            stem, group = max(fitting, key=lambda stem: stem.length, default=None), [piece]
            if stem is None:
                others = [other for key, other in alone.items() if key != piece.seq_key]
                num_shared, sharing = find_group(piece, others, block_size, block_bytes)
                size_bytes = num_shared * block_bytes * config.num_layers * (1 + packs)
                if not num_shared or size_bytes > self.limit_bytes - self.allocated_bytes:
                    continue
                stem = make_stem(kv, piece.block_table[:num_shared], packs=packs)
                group = [piece, *sharing]
            for member in group:
                if member.seq_key in self._rows:
                    self._drop(member.seq_key)
                self.stem_of[member.seq_key] = stem
                coming[member.seq_key] = member
                del alone[member.seq_key]
        return list(coming.values())

    def _base(self, piece: SequenceSlice) -> int:
        """Return how many of its first tokens are not in its row."""
        stem = self.stem_of.get(piece.seq_key)
        return 0 if stem is None else stem.length

    def _drop(self, seq_key: int) -> None:
        self.stem_of.pop(seq_key, None)
        shelf = self._rows.pop(seq_key)
        shelf.remove(seq_key)
        if not shelf.seq_keys:
            del self._shelves[shelf.capacity]

    def _admit(self, piece: SequenceSlice, kv: KvStore, coming: Counter[int]) -> bool:
        """Copy a sequence into a row, or return False when that would go beyond the limit.

        `coming` counts the sequences still to be admitted, by capacity, so that a shelf grows once for all of them.
        """
        base = self._base(piece)
        capacity = _capacity(piece.end - base, kv.block_size)
        shelf = self._shelves.get(capacity) or _Shelf(capacity, self._config, kv.data.dtype, kv.data.device)
        free_bytes = self.limit_bytes - self.allocated_bytes
        if not shelf.reserve(coming[capacity], free_bytes) and not shelf.reserve(1, free_bytes):
            self.stem_of.pop(piece.seq_key, None)
            return False
        coming[capacity] -= 1
        shelf.add(piece, kv, base)
        self._shelves[capacity] = shelf
        self._rows[piece.seq_key] = shelf
        return True


@dataclass(slots=True)
class _Pass:
    """Rows of a shelf that are attended in one call, with `width` queries each."""

    first: int
    last: int
    width: int
    places: Tensor | None  # [rows * width] of the queries; None: all of the shelf's, in order
    of_window: dict[int | None, tuple[int, int, Tensor | None]]  # first and last key, mask


@dataclass(slots=True)
class _Shelf:
    """Rows of `capacity` tokens each; rows 0..len(seq_keys)-1 are in use, all their values finite from end to end."""

    capacity: int
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    seq_keys: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)  # seq_key -> tokens in its row
    bases: dict[int, int] = field(default_factory=dict)  # seq_key -> position of the first of them
    data: list[Tensor] = field(default_factory=list)  # per layer: [2, num_rows, num_kv_heads, capacity, head_dim]
    pieces: list[SequenceSlice] = field(default_factory=list)  # of this step, row by row
    num_queries: int = 0  # of this step
    appends: Tensor | None = None  # [num_queries * num_kv_heads] where keys go in a layer's [.., head_dim]
    passes: list[_Pass] = field(default_factory=list)  # of this step

    @property
    def size_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.data)

    def continues(self, piece: SequenceSlice) -> bool:
        """Return whether the row of `piece` holds what is before it, and has room for it."""
        base = self.bases[piece.seq_key]
        return base <= piece.start <= base + self.lengths[piece.seq_key] and piece.end <= base + self.capacity

    def reserve(self, count: int, limit_bytes: int) -> bool:
        """Make room for `count` more rows; False when that takes more than `limit_bytes` beyond what is held now.

        Moves layer by layer, so that no more than one layer's rows are there twice meanwhile.
        """
        used = len(self.seq_keys)
        if self.data and used + count <= self.data[0].shape[1]:
            return True
        config = self.config
        row_bytes = bytes_per_block(config.num_layers, self.capacity, config.num_kv_heads, config.head_dim, self.dtype)
        most = (limit_bytes + self.size_bytes) // row_bytes
        if used + count > most:
            return False
        num_rows = min(most, max(used + count, used + used // 2))
        shape = (2, num_rows, config.num_kv_heads, self.capacity, config.head_dim)
        for layer in range(config.num_layers):
            grown = torch.empty(shape, dtype=self.dtype, device=self.device)
            if layer < len(self.data):
                grown[:, :used] = self.data[layer][:, :used]
                self.data[layer] = grown
            else:
                self.data.append(grown)
        return True

    def add(self, piece: SequenceSlice, kv: KvStore, base: int) -> None:
        """Copy what the store holds of a sequence from position `base` on into the next free row, zeros behind it."""
        block_ids = piece.block_table[base // kv.block_size : -(-piece.start // kv.block_size)]
        blocks, num_blocks = copy_blocks(kv, block_ids), len(block_ids)
        for layer, its_blocks in zip(self.data, blocks, strict=True):
            row = layer[:, len(self.seq_keys)]  # [2, num_kv_heads, capacity, head_dim]
            row.view(*row.shape[:2], -1, kv.block_size, row.shape[-1])[:, :, :num_blocks] = its_blocks
            row[:, :, piece.start - base :] = 0
        self.seq_keys.append(piece.seq_key)
        self.lengths[piece.seq_key] = piece.start - base
        self.bases[piece.seq_key] = base

    def remove(self, seq_key: int) -> None:
        """Free a row; the last one moves into its place."""
        row, last = self.seq_keys.index(seq_key), len(self.seq_keys) - 1
        if row != last:
            self.seq_keys[row] = self.seq_keys[last]
            length = self.lengths[self.seq_keys[row]]
            for layer in self.data:
                layer[:, row, :, :length] = layer[:, last, :, :length]
        del self.seq_keys[last], self.lengths[seq_key], self.bases[seq_key]

    def begin_step(self, windows: set[int | None]) -> None:
        """Count this step's tokens of every row and prepare what the layers share."""
        num_kv_heads, count = self.config.num_kv_heads, len(self.pieces)
        spans = [(p.start - self.bases[p.seq_key], p.end - self.bases[p.seq_key]) for p in self.pieces]  # of their rows
        counts = [end - start for start, end in spans]
        self.num_queries, width = sum(counts), max(counts)
        slots = [row * num_kv_heads * self.capacity + p for row, span in enumerate(spans) for p in range(*span)]
        heads = torch.arange(num_kv_heads, device=self.device) * self.capacity
        self.appends = (torch.tensor(slots, device=self.device)[:, None] + heads).view(-1)
        for piece, (_, end) in zip(self.pieces, spans, strict=True):
            self.lengths[piece.seq_key] = end
        neighbours = _runs([n > 1 for n in counts])
        widths = [max(counts[first:last]) - 1 for first, last in neighbours]
        num_saved = count * (width - 1) - sum(w * (b - a) for w, (a, b) in zip(widths, neighbours, strict=True))
        per_query = max(end for _, end in spans) * self.config.num_heads * self.config.head_dim
        if num_saved * per_query <= len(neighbours) * _CALL:
            self.passes = [self._pass(spans, 0, count, 0, width, windows)]
        else:  # the first query of every row, then those of neighbouring rows that have more
            self.passes = [self._pass(spans, 0, count, 0, 1, windows)]
            self.passes += [
                self._pass(spans, first, last, 1, w, windows)
                for w, (first, last) in zip(widths, neighbours, strict=True)
            ]

    def _pass(
        self, spans: list[tuple[int, int]], first: int, last: int, skip: int, width: int, windows: set[int | None]
    ) -> _Pass:
        """Prepare to attend with `width` queries of each of the rows first..last-1, but for their first `skip` ones. A
        row with fewer repeats its last one."""
        begins = [0, *accumulate(end - start for start, end in spans)]  # of each row's queries
        mine = range(first, last)
        nth = [min(skip + i, spans[row][1] - spans[row][0] - 1) for row in mine for i in range(width)]
        rows = [row for row in mine for _ in range(width)]
        places = [begins[row] + n for row, n in zip(rows, nth, strict=True)]
        positions = [spans[row][0] + n for row, n in zip(rows, nth, strict=True)]
        nearest, longest = min(positions), max(positions) + 1
        at = torch.tensor(positions, device=self.device).view(last - first, width, 1)
        of_window = {}
        for window in windows:
            begin = 0 if window is None else max(0, nearest + 1 - window)
            mask = None if nearest + 1 == longest else self._mask(at, begin, longest, window)
            of_window[window] = begin, longest, mask
        is_all = places == list(range(self.num_queries))
        return _Pass(first, last, width, None if is_all else torch.tensor(places, device=self.device), of_window)

    def _mask(self, at: Tensor, begin: int, end: int, window: int | None) -> Tensor:
        """Return [rows, 1, width * group, end - begin]: 0 where the query at `at` [rows, width, 1] sees, else -inf."""
        key = torch.arange(begin, end, device=self.device)
        hidden = key > at if window is None else (key > at) | (key <= at - window)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        if at.shape[1] > 1:
            mask = mask.repeat_interleave(self.config.num_heads // self.config.num_kv_heads, dim=1)
        return mask[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Append this step's tokens to their rows and attend to those.

        Returns [num_queries, num_heads * head_dim] and the log-sum-exps [num_queries, num_heads] of the scores.
        """
        assert self.appends is not None
        keys, values = self.data[layer]  # [num_rows, num_kv_heads, capacity, head_dim]
        keys.view(-1, q.shape[2]).index_copy_(0, self.appends, k.reshape(-1, q.shape[2]))
        values.view(-1, q.shape[2]).index_copy_(0, self.appends, v.reshape(-1, q.shape[2]))
        if self.passes[0].places is None:
            out, lse = self._attend(self.passes[0], q, keys, values, window)
            return out.flatten(1), lse
        all_out, all_lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for each in self.passes:
            assert each.places is not None
            out, lse = self._attend(each, q.index_select(0, each.places), keys, values, window)
            all_out.index_copy_(0, each.places, out)
            all_lse.index_copy_(0, each.places, lse.to(all_lse.dtype))
        return all_out.flatten(1), all_lse

    def _attend(
        self, each: _Pass, q: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return [rows * width, num_heads, head_dim] and [rows * width, num_heads] for `q`, which is like the first."""
        count, width, num_heads, num_kv_heads = each.last - each.first, each.width, q.shape[1], keys.shape[1]
        begin, end, mask = each.of_window[window]
        keys, values = keys[each.first : each.last, :, begin:end], values[each.first : each.last, :, begin:end]
        queries = q.reshape(count, width, num_kv_heads, -1, q.shape[2]).transpose(1, 2).flatten(2, 3)
        out, lse = (
            x.view(count, num_kv_heads, width, -1, *x.shape[3:]).transpose(1, 2).reshape(-1, num_heads, *x.shape[3:])
            for x in attend_with_lse(queries, keys, values, mask)  # [count, num_kv_heads, width * group, ...]
        )
        return out, lse


def _runs(has_more: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the first and the last but one of every run of True."""
    edges = [i for i in range(len(has_more) + 1) if (i < len(has_more) and has_more[i]) != (i > 0 and has_more[i - 1])]
    return [*zip(edges[::2], edges[1::2], strict=True)]


def _capacity(num_tokens: int, block_size: int) -> int:
    """Return the next multiple of a quarter of the power of two below, rounded up to whole blocks."""
    step = max(_MIN_CAPACITY, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    capacity = -(-num_tokens // step) * step
    return -(-capacity // block_size) * block_size
