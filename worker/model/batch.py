"""How the tokens of one engine step are packed into one row of tokens.

All linear layers run over the packed tokens of all sequences at once; only attention tells the sequences apart. The
pack puts *singles* (sequences that compute one token: decoding, or the last token of a cached prompt) first and
*chunks* (prefill) after them. A path may count sequences that decode with drafts, several tokens each, among either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.memory import to_device


@dataclass(slots=True)
class Batch:
    """The packed step: tokens of `singles`, then those of `chunks`, one after the other."""

    singles: list[SequenceSlice]
    chunks: list[SequenceSlice]
    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64, block_id * block_size + offset
    max_position: int
    logit_rows: Tensor | None  # [num_rows] int64 into the pack, in the order of the slices given; None = each once


def pack(
    slices: Sequence[SequenceSlice],
    singles: list[SequenceSlice],
    chunks: list[SequenceSlice],
    block_size: int,
    device: torch.device,
    drawn: Tensor | None = None,
) -> Batch:
    """Pack `slices`, split into `singles` and `chunks` in the order in which they are to lie.

    `drawn` [num_draws] int64 are the draws of the step before, for slices that have one of them as their token.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for piece in [*singles, *chunks]:
        ids += piece.token_ids
        positions += range(piece.start, piece.end)
        slots += _slots(piece, block_size)
    rows = _logit_rows(slices, singles, chunks)
    feed = [i for piece in [*singles, *chunks] for i in _feed(piece)] if drawn is not None else []
    columns = (ids, positions, slots, feed) if feed else (ids, positions, slots)
    token_ids, position_row, slot_row, *fed = to_device(np.array(columns, dtype=np.int64), device)
    if drawn is not None and fed:
        token_ids = feed_tokens(token_ids, fed[0], drawn)
    return Batch(
        singles=singles,
        chunks=chunks,
        token_ids=token_ids,
        positions=position_row,
        slots=slot_row,
        max_position=max(positions),
        logit_rows=None if rows == list(range(len(ids))) else to_device(np.array(rows, dtype=np.int64), device),
    )


def feed_tokens(token_ids: Tensor, feed: Tensor, drawn: Tensor) -> Tensor:
    """Return `token_ids` with the draw `drawn[feed]` where `feed` is not -1; `token_ids` and `feed` of one shape."""
    return torch.where(feed < 0, token_ids, drawn[feed.clamp(min=0)])


def _feed(piece: SequenceSlice) -> list[int]:
    return [-1] * len(piece.token_ids) if piece.drawn is None else [piece.drawn]


def _slots(piece: SequenceSlice, block_size: int) -> list[int]:
    table = piece.block_table
    return [table[p // block_size] * block_size + p % block_size for p in range(piece.start, piece.end)]


def _logit_rows(
    slices: Sequence[SequenceSlice], singles: list[SequenceSlice], chunks: list[SequenceSlice]
) -> list[int]:
    row_after: dict[int, int] = {}  # id of a slice -> first row behind it
    row = 0
    for piece in [*singles, *chunks]:
        row += len(piece.token_ids)
        row_after[id(piece)] = row
    rows: list[int] = []
    for piece in slices:
        after = row_after[id(piece)]
        rows += [*range(after - piece.num_logits, after)] * piece.num_draws
    return rows
