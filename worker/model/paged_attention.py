"""Attention that reads the blocks where they lie: our Triton kernels, their work lists and launches.

Cost and memory grow with the sum of the contexts of a step, never with its longest times their number. Singles, short
chunks and long ones are the same kind of work, in two sizes of tiles. What several singles begin with is read once for
a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention
from kvasir.worker.model.batch import Batch
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.memory import to_device
from kvasir.worker.model.paged_kernels import (
    ITEM_FIELDS,
    LIST_FIELDS,
    MERGE_FIELDS,
    QUERY_FIELDS,
    attend_items,
    merge_partials,
)

SPAN = 512  # keys of a single (and of a chunk as small) that one program reads
CHUNK_SPAN = 4096  # the same of a chunk of up to `MAX_CUT_QUERIES`; longer ones have programs enough without cuts
MAX_CUT_QUERIES = 64
MAX_PROGRAMS = 1056  # of a fixed launch, that take turns: eight for each multiprocessor of an H200


Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Work:
    """What the kernels have to do for one step and one window."""

    small: Ints  # [num_items, ITEM_FIELDS], of small tiles
    large: Ints
    merges: Ints  # [num_merges, MERGE_FIELDS]
    queries: Ints  # [num_queries, QUERY_FIELDS]: all rows, then for each item of several sequences its own
    num_partial_rows: int

    @property
    def lists(self) -> tuple[Ints, Ints, Ints]:
        return self.small, self.large, self.merges


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernels are launched for one window: the number of programs of each list of work (0: no launch)."""

    lists_at: int  # where in the plan it says where the three lists are
    num_programs: tuple[int, int, int]
    num_partial_rows: int


class PagedAttention(Attention):
    """fp16, bf16 and fp32; heads of any size up to 256, blocks of any size.

    All that the kernels have to know of a step is its *plan*, one array of int32. `begin` makes it and launches what it
    asks for; a CUDA graph, whose launches are fixed, is captured by `begin_fixed` and given plans of `plan` later.
    """

    name = "triton"

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Raises: ValueError for what the kernels cannot compute."""
        super().__init__(config)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32) or config.head_dim > 256:
            raise ValueError(f"the kernels do not compute {dtype} with heads of {config.head_dim}")
        self._group = config.num_heads // config.num_kv_heads
        self._rows = tile_rows(config, dtype)
        self._windows = list(dict.fromkeys(config.sliding_windows))

    def begin(self, batch: Batch, kv: KvStore) -> None:
        works, tables = self._work([*batch.singles, *batch.chunks], kv.block_size)
        self._plan = to_device(lay_out(works, tables, 0), kv.data.device)
        self._launches = {
            window: Launch(i * 3 * LIST_FIELDS, (len(work.small), len(work.large), len(work.merges)), rows)
            for i, (window, work) in enumerate(zip(self._windows, works, strict=True))
            for rows in (work.num_partial_rows,)
        }

    def fixed_sizes(self, num_singles: int, num_tokens: int, block_size: int) -> tuple[int, int]:
        """Return the length of a plan for so many singles, `num_tokens` long in all, and its number of partial results.

        Such a result takes `num_heads * (head_dim + 1) * 4` bytes.
        """
        num_spans = num_tokens // SPAN + num_singles  # the last of a sequence may be short
        per_window = 3 * LIST_FIELDS + num_spans * (ITEM_FIELDS + QUERY_FIELDS)
        per_window += num_singles * (MERGE_FIELDS + QUERY_FIELDS)
        return len(self._windows) * per_window + num_tokens // block_size + num_singles, num_spans

    def plan(self, singles: Sequence[SequenceSlice], block_size: int, base: int, num_partial_rows: int) -> Ints | None:
        """Return a step's plan for launches of `begin_fixed`, to lie at `base` of a buffer; None if it does not fit."""
        works, tables = self._work(singles, block_size)
        fits = all(work.num_partial_rows <= num_partial_rows and not len(work.large) for work in works)
        return lay_out(works, tables, base) if fits else None

    def begin_fixed(self, buffer: Tensor, base: int, num_singles: int, num_partial_rows: int) -> None:
        """Launch the same from now on for any plan at `base` of the int32 `buffer`, for at most `num_singles` singles
        and `num_partial_rows` partial results."""
        self._plan = buffer
        num_items = max(num_singles, MAX_PROGRAMS // self._config.num_kv_heads)
        self._launches = {
            window: Launch(base + i * 3 * LIST_FIELDS, (num_items, 0, num_singles), num_partial_rows)
            for i, window in enumerate(self._windows)
        }

    def _work(self, pieces: Sequence[SequenceSlice], block_size: int) -> tuple[list[Work], Ints]:
        """Return the work per window, and the block tables, one behind the other."""
        blocks = [piece.block_table[: -(-piece.end // block_size)] for piece in pieces]
        starts = np.cumsum([0, *map(len, blocks)])[:-1]
        small, large = (rows // self._group for rows in self._rows)
        tables = np.array([i for table in blocks for i in table], dtype=np.int32)
        works = [plan_work(pieces, tables, starts, small, large, window, block_size) for window in self._windows]
        return works, tables

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        config, (num_tokens, num_heads, head_dim) = self._config, q.shape
        window = config.sliding_windows[layer]
        launch = self._launches[window]
        keys, values = kv.layer(layer)
        q = q if q.stride()[1:] == (head_dim, 1) else q.contiguous()
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
        partials = torch.empty((launch.num_partial_rows, num_heads, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((launch.num_partial_rows, num_heads), dtype=torch.float32, device=q.device)
        *num_items, num_merges = launch.num_programs
        for i, (num_programs, rows) in enumerate(zip(num_items, self._rows, strict=True)):
            if num_programs:
                attend_items[num_programs, config.num_kv_heads](
                    q,
                    keys,
                    values,
                    out,
                    partials,
                    lse,
                    self._plan,
                    launch.lists_at + i * LIST_FIELDS,
                    q.stride(0),
                    keys.stride(0),
                    keys.stride(1),
                    config.scale * math.log2(math.e),
                    **constants(config, kv.block_size, rows, window, q.dtype, is_interpreted=q.device.type == "cpu"),
                )
        if num_merges:
            merge_partials[num_merges, num_heads](
                partials,
                lse,
                out,
                self._plan,
                launch.lists_at + 2 * LIST_FIELDS,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded_dim(config),
                TILE=16,
                FIELDS=MERGE_FIELDS,
            )
        return out.flatten(1)


def padded_dim(config: ModelConfig) -> int:
    return max(16, 1 << (config.head_dim - 1).bit_length())


def tile_rows(config: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many rows (a query of one head each) small and large tiles have: as many as spill no registers."""
    large = 16 if dtype == torch.float32 else 128 if config.head_dim <= 128 else 64
    whole_group = 1 << (config.num_heads // config.num_kv_heads - 1).bit_length()
    return max(16, whole_group), max(large, whole_group)


def constants(
    config: ModelConfig, block_size: int, rows: int, window: int | None, dtype: torch.dtype, is_interpreted: bool
) -> dict[str, object]:
    """Return what `attend_items` is compiled for, and how."""
    is_half = dtype != torch.float32
    return {
        "GROUP": config.num_heads // config.num_kv_heads,
        "HEAD_DIM": config.head_dim,
        "PADDED_DIM": padded_dim(config),
        "BLOCK_SIZE": block_size,
        "ROWS": rows,
        "TILE": 64 if is_half else 32,
        "WINDOW": window or 0,
        "PRECISION": "ieee",  # of fp32 operands; the default would round them to TF32
        "UPCAST": is_interpreted and dtype == torch.bfloat16,
        "FIELDS": ITEM_FIELDS,
        "num_warps": 4 if is_half and rows <= 16 else 8,
        "num_stages": 3 if is_half else 2,
    }


def plan_work(
    pieces: Sequence[SequenceSlice],
    tables: Ints,
    table_starts: NDArray[np.int64],
    small: int,
    large: int,
    window: int | None,
    block_size: int,
) -> Work:
    """Return the work of `pieces`, packed in this order, whose block tables begin at `table_starts` of `tables`.

    A piece of at most `small` queries is one small tile, a longer one is cut into large tiles of `large` queries; the
    keys that the queries of a tile can see are cut into spans.
    """
    tiles = []  # table_start, query_row, position, num_queries, key_begin, key_end, span
    row = 0
    for piece, table_start in zip(pieces, table_starts.tolist(), strict=True):
        count = len(piece.token_ids)
        size = small if count <= small else large
        span = SPAN if count <= small else CHUNK_SPAN if count <= MAX_CUT_QUERIES else piece.end
        for first in range(0, count, size):
            num_queries = min(size, count - first)
            position = piece.start + first
            key_begin = 0 if window is None else max(0, position - window + 1)
            tiles.append((table_start, row + first, position, num_queries, key_begin, position + num_queries, span))
        row += count
    tile = np.array(tiles, dtype=np.int64).reshape(-1, 7)
    num_spans = -(-(tile[:, 5] - tile[:, 4]) // tile[:, 6])

    spans_of_row = np.repeat(num_spans, tile[:, 3])
    num_partials = np.where(spans_of_row > 1, spans_of_row, 0)
    queries = np.stack((np.arange(row), num_partials.cumsum() - num_partials), 1)
    is_cut = spans_of_row > 1
    merges = np.concatenate((queries[is_cut], spans_of_row[is_cut, None]), 1)

    of_item = np.repeat(np.arange(len(tile)), num_spans)
    nth_span = np.arange(len(of_item)) - np.repeat(num_spans.cumsum() - num_spans, num_spans)
    items = tile[of_item]
    items[:, 1] *= QUERY_FIELDS
    items[:, 4] += nth_span * items[:, 6]
    items[:, 5] = np.minimum(items[:, 5], items[:, 4] + items[:, 6])
    items[:, 6] = np.where(num_spans[of_item] > 1, nth_span, -1)

    is_small = items[:, 3] <= small
    small_items, large_items = items[is_small], items[~is_small]
    if window is None and SPAN % block_size == 0:
        small_items, queries = _share(small_items, queries, tables, small, block_size)
    small_work, large_work, merge_list, query_list = (
        part.astype(np.int32) for part in (small_items, large_items, merges, queries)
    )
    return Work(small_work, large_work, merge_list, query_list, int(num_partials.sum()))


def _share(
    items: NDArray[np.int64], queries: NDArray[np.int64], tables: Ints, size: int, block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Let up to `size` singles that see all of a span, and have it in the same blocks, read it as one item.

    If the last block of a span is the same, all before it has the same content: a block is in two tables only once it
    is published, and what it is found by is the hash of all up to it.
    """
    is_whole = (items[:, 3] == 1) & (items[:, 5] - items[:, 4] == SPAN) & (items[:, 5] <= items[:, 2])
    whole = items[is_whole]
    last_block = tables[whole[:, 0] + whole[:, 5] // block_size - 1]
    order = np.lexsort((last_block, whole[:, 4]))
    whole, last_block = whole[order], last_block[order]
    is_first = np.ones(len(whole), dtype=bool)  # of those that have the same
    is_first[1:] = (whole[1:, 4] != whole[:-1, 4]) | (last_block[1:] != last_block[:-1])
    firsts = np.flatnonzero(is_first)
    rank = np.arange(len(whole)) - firsts[is_first.cumsum() - 1]
    heads = np.flatnonzero(rank % size == 0)
    shared = whole[heads]
    shared[:, 1] = (len(queries) + heads) * QUERY_FIELDS
    shared[:, 3] = np.diff(heads, append=len(whole))
    return np.concatenate((items[~is_whole], shared)), np.concatenate((queries, queries[whole[:, 1] // QUERY_FIELDS]))


def lay_out(works: Sequence[Work], tables: Ints, base: int) -> Ints:
    """Return the plan that is to lie at `base` of a buffer: where the lists are, the lists, queries, block tables.

    Whatever says where something is counts from the buffer's beginning.
    """
    lists = [part for work in works for part in work.lists]
    parts = [*lists, *(work.queries for work in works), tables]
    begins = base + len(lists) * LIST_FIELDS + np.cumsum([0, *(part.size for part in parts)])
    for work, queries_at in zip(works, begins[len(lists) :], strict=False):
        for items in (work.small, work.large):
            items[:, 0] += begins[-2]
            items[:, 1] += queries_at
    where = np.stack((begins[: len(lists)], [len(part) for part in lists]), 1)
    return np.concatenate([where.astype(np.int32).ravel(), *(part.ravel() for part in parts)])
