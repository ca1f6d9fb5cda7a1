"""Drawing token ids from logits by noise that belongs to (seed, position, token id): Gumbel-max, told as a race.

Every token i runs for E_i / w_i, where w_i is its weight and E_i exponential noise from a counter-based hash; the first
to arrive is drawn, token i with probability w_i / sum(w) (the argmin of E_i / w_i is the argmax of log w_i + Gumbel
noise). A draw depends on logits, parameters, seed and position and on nothing else: not on the batch, the worker, or
how often the request was moved. Where logits differ in their last bits, the same token nearly always wins, which
is not so if one number inverts the cumulative distribution: there a small change early in the order shifts all after.

The noise is made in blocks of 64 token ids, so that few of a large vocabulary have to be hashed: the least of a block
is its own number M (exponential, 64 times as fast), which goes to one of its tokens; the others have M plus an
exponential of their own. That is how the least of 64 and the rest are distributed, since exponentials know no past.
A block whose M / (its largest weight) is beyond the best time known has no winner.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvasir.worker.engine.step import SampleRow
from kvasir.worker.model.memory import to_device

_BLOCK = 64  # token ids; changing it changes every draw
_FIRST_BLOCK = 1 << 40  # blocks are hashed with numbers that no token has
_ROWS_AT_ONCE = 32  # on a device: with filters, each takes some ten numbers of 8 bytes a token
_DIGIT_BITS = 16  # of a weight's pattern that `_floor` looks at in one pass
_FEW = 1 << 15  # logits: less than that are raced all, which costs less than to find out which need not be


Race = Callable[[Tensor, Tensor], Tensor]


def draw_greedy(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    return token_ids


def draw_plain(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Draw from the whole vocabulary; `logits` [num_rows, vocab]."""
    num_rows, vocab = logits.shape
    keys = row_keys(rows, logits.device)
    if logits.numel() <= _FEW:
        first_ids: list[int] = all_exponentials(keys, vocab).div_(_weights(logits, rows)).argmin(dim=1).tolist()
        return first_ids
    temperature = _column([row.params.temperature for row in rows], logits.device)
    if vocab % _BLOCK:
        logits = torch.nn.functional.pad(logits, (0, -vocab % _BLOCK), value=-torch.inf)
    blocks = logits.view(num_rows, -1, _BLOCK)
    highest = blocks.amax(dim=2)  # [num_rows, num_blocks]
    top, top_block = highest.max(dim=1, keepdim=True)

    def weights(values: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        return (values.double() - top[rows]).div_(temperature[rows]).exp_()

    # 1. the earliest that each block can be, and the best time among the tokens that have their block's least noise
    hashes = _hash(keys, torch.arange(_FIRST_BLOCK, _FIRST_BLOCK + blocks.shape[1], device=logits.device))
    least = _exponential(hashes) / _BLOCK
    bounds = least / weights(highest)
    favoured = blocks.gather(2, (hashes & _BLOCK - 1)[:, :, None])[:, :, 0]
    best = (least / weights(favoured)).amin(dim=1, keepdim=True)
    # 2. or that of the most likely token, whose weight is 1
    of_top_block = blocks.gather(1, top_block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    top_ids = top_block * _BLOCK + of_top_block.argmax(dim=1, keepdim=True)
    best = torch.minimum(best, exponentials(keys, top_ids)) * (1 + 1e-9)  # rounding must leave no winner out
    # 3. the blocks that can be better, token by token
    row, block = ((bounds <= best) & bounds.isfinite()).nonzero(as_tuple=True)
    ids = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    times = exponentials(keys[row], ids) / weights(blocks[row, block], row)
    first = times.min(dim=1)
    of_block = torch.full_like(bounds, torch.inf)
    of_block[row, block] = first.values
    winner = torch.zeros_like(hashes)
    winner[row, block] = ids.gather(1, first.indices[:, None])[:, 0]
    token_ids: list[int] = winner.gather(1, of_block.argmin(dim=1, keepdim=True))[:, 0].tolist()
    return token_ids


def draw_filtered(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Draw from what top-k, top-p and min-p leave: from the most likely tokens, if nothing else can be left."""
    vocab = logits.shape[1]
    weights, keys = _weights(logits, rows), row_keys(rows, logits.device)
    largest_top_k = max((row.params.top_k for row in rows if row.params.top_k < vocab), default=0)
    count = min(vocab, max(64, vocab // 256, largest_top_k + 1))
    ids = weights.topk(count, dim=1).indices.sort(dim=1).values  # equal weights rank by token id
    ranked, order = weights.gather(1, ids).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    filters = _Filters.of(rows, weights, ranked)
    passed = ranked.cumsum(dim=1)
    kept = (passed - ranked < filters.mass) & (ranked >= filters.min_p)
    kept &= torch.arange(count, device=logits.device) < filters.top_k
    kept[:, 0] = True
    times = (exponentials(keys, ids) / ranked).masked_fill_(~kept, torch.inf)
    drawn = ids.gather(1, times.argmin(dim=1, keepdim=True))[:, 0]
    if count < vocab:  # beyond the least candidate nothing is kept, if that is not as likely as one that is
        others = (ranked[:, -1] >= torch.where(kept, ranked, torch.inf).amin(dim=1)).nonzero()[:, 0]
        if len(others):
            drawn[others] = _draw_by_rank(weights[others], keys[others], filters.some(others))
    token_ids: list[int] = drawn.tolist()
    return token_ids


@dataclass(slots=True)
class _Filters:
    """The filters of some rows, each [num_rows, 1]."""

    top_k: Tensor  # the whole vocabulary where there is none
    min_p: Tensor  # the largest weight is 1
    mass: Tensor  # fp64; the tokens ranked before one that is kept weigh less

    @classmethod
    def of(cls, rows: Sequence[SampleRow], weights: Tensor, ranked: Tensor) -> _Filters:
        """`ranked` [num_rows, n]: the largest of `weights`, more than any `top_k`, or all."""
        vocab, device = weights.shape[1], weights.device
        top_k = _column([min(row.params.top_k or vocab, vocab) for row in rows], device).long()
        top_p = _column([row.params.top_p for row in rows], device)
        of_top_k = ranked.cumsum(dim=1).gather(1, top_k.clamp(max=ranked.shape[1]) - 1)
        whole = torch.where(top_k < vocab, of_top_k, weights.sum(dim=1, keepdim=True))  # top-p counts what top-k left
        mass = torch.where(top_p < 1, top_p * whole, torch.inf)
        return cls(top_k, _column([row.params.min_p for row in rows], device), mass)

    def some(self, rows: Tensor) -> _Filters:
        return _Filters(self.top_k[rows], self.min_p[rows], self.mass[rows])


def _draw_by_rank(weights: Tensor, keys: Tensor, filters: _Filters) -> Tensor:
    """Draw [num_rows] without a sort: take the first to arrive if its rank is good enough, else ask those above it.

    Whoever is ranked below a token that is not kept is not kept either, and what is left about halves every time.
    """
    ids = torch.arange(weights.shape[1], device=weights.device)
    times = all_exponentials(keys, len(ids)).div_(weights).masked_fill_(weights < filters.min_p, torch.inf)
    drawn = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    pending = torch.arange(len(weights), device=weights.device)
    while len(pending):
        chosen = times.argmin(dim=1, keepdim=True)
        weight = weights.gather(1, chosen)
        before = (weights > weight) | ((weights == weight) & (ids < chosen))
        num_before = before.sum(dim=1, keepdim=True)
        mass_before = torch.where(before, weights, 0).sum(dim=1, keepdim=True)
        is_kept = ((num_before < filters.top_k) & (mass_before < filters.mass) | (num_before == 0))[:, 0]
        drawn[pending[is_kept]] = chosen[is_kept, 0]
        rest = (~is_kept).nonzero()[:, 0]
        pending, weights, filters = pending[rest], weights[rest], filters.some(rest)
        times = times[rest].masked_fill_(~before[rest], torch.inf)
    return drawn


def race(keys: Tensor, weights: Tensor) -> Tensor:
    """Return which token arrives first [num_rows], for `keys` [num_rows, 1] and `weights` [num_rows, vocab] fp64."""
    return all_exponentials(keys, weights.shape[1]).div_(weights).argmin(dim=1)


def draw_at_once(logits: Tensor, rows: Sequence[SampleRow], race: Race = race) -> Tensor:
    """Draw [num_rows] int64, as the functions above do, on a device that is not waited for: no shape depends on values.

    A row that is not finite draws anything. `race` does what `race` above does.
    """
    if len(rows) > _ROWS_AT_ONCE:
        starts = range(0, len(rows), _ROWS_AT_ONCE)
        parts = [(logits[i : i + _ROWS_AT_ONCE], rows[i : i + _ROWS_AT_ONCE]) for i in starts]
        return torch.cat([draw_at_once(*part, race) for part in parts])
    params, device = [row.params for row in rows], logits.device
    likeliest = logits.argmax(dim=1)
    if all(p.temperature == 0 for p in params):
        return likeliest
    weights = _weights(logits, rows).nan_to_num_(0.0)
    if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):
        weights = _filtered(weights, rows)
    drawn = race(row_keys(rows, device), weights)
    return torch.where(_column([p.temperature for p in params], device)[:, 0] == 0, likeliest, drawn)


def _filtered(weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return `weights` with 0 for what top-k, top-p and min-p leave out."""
    vocab, device = weights.shape[1], weights.device
    top_k = _column([min(row.params.top_k or vocab, vocab) for row in rows], device)
    top_p = _column([row.params.top_p for row in rows], device)
    whole = weights.sum(dim=1, keepdim=True)
    if any(0 < row.params.top_k < vocab and row.params.top_p < 1 for row in rows):
        of_top_k = _keep(weights, _Filters(top_k, top_k * 0, torch.full_like(whole, torch.inf)))
        whole = torch.where(of_top_k, weights, 0).sum(dim=1, keepdim=True)  # top-p counts what top-k left
    mass = torch.where(top_p < 1, top_p * whole, torch.inf)
    min_p = _column([row.params.min_p for row in rows], device)
    return torch.where(_keep(weights, _Filters(top_k, min_p, mass)), weights, 0)


def _keep(weights: Tensor, filters: _Filters) -> Tensor:
    """Return [num_rows, vocab] bool: what the filters leave, found as a radix sort finds it, without a sort.

    The least weight that is kept is found digit by digit of its bit pattern, whose order is that of the weights. Of
    those that weigh as much, the first token ids are kept.
    """
    patterns = weights.view(torch.int64)
    num_above = torch.zeros_like(filters.mass)
    mass_above = torch.zeros_like(filters.mass)
    least = torch.zeros_like(filters.mass, dtype=torch.int64)
    is_near = torch.ones_like(patterns, dtype=torch.bool)  # its digits so far are those of the least weight
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digits = (patterns >> shift) & (1 << _DIGIT_BITS) - 1
        numbers, masses = (
            torch.zeros(len(weights), 1 << _DIGIT_BITS, dtype=torch.float64, device=weights.device).scatter_add_(
                1, digits, values
            )
            for values in (is_near.double(), torch.where(is_near, weights, 0))
        )
        # What is ranked before the first token of each digit: whatever has a higher one.
        numbers_before, masses_before = (
            torch.nn.functional.pad(values.flip(1).cumsum(1).flip(1)[:, 1:], (0, 1)) + above
            for values, above in ((numbers, num_above), (masses, mass_above))
        )
        is_kept = (numbers > 0) & (numbers_before < filters.top_k) & (masses_before < filters.mass)
        is_kept |= (numbers > 0) & (numbers_before == 0)  # the most likely token is always kept
        digit = is_kept.int().argmax(dim=1, keepdim=True)  # the lowest one
        num_above, mass_above = numbers_before.gather(1, digit), masses_before.gather(1, digit)
        is_near &= digits == digit
        least = least | digit << shift
    nth = is_near.cumsum(1) - 1  # among those that weigh as much as the least
    weight = least.view(torch.float64)
    is_kept = is_near & (num_above + nth < filters.top_k) & (mass_above + nth * weight < filters.mass)
    is_first = is_near & (num_above + nth == 0)
    return (((weights > weight) | is_kept) & (weights >= filters.min_p)) | is_first


def _weights(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return unnormalised probabilities [num_rows, vocab] fp64; the most likely token has 1.

    Greedy rows have those of temperature 1.
    """
    exact = logits.double()
    temperature = _column([row.params.temperature or 1.0 for row in rows], logits.device)
    return (exact - exact.amax(dim=1, keepdim=True)).div_(temperature).exp_()


def row_keys(rows: Sequence[SampleRow], device: torch.device) -> Tensor:
    """Return [num_rows, 1] int64: the number that belongs to a row's seed and position."""
    packed = (struct.pack("<QQ", row.params.seed & (1 << 64) - 1, row.position) for row in rows)
    keys = [_signed(xxhash.xxh3_64_intdigest(seed_and_position)) for seed_and_position in packed]
    return to_device(np.array(keys, dtype=np.int64), device)[:, None]


def exponentials(keys: Tensor, ids: Tensor) -> Tensor:
    """Return the noise [num_rows, n] fp64 of the tokens `ids` [num_rows, n] in rows with `keys` [num_rows, 1]."""
    of_block = _hash(keys, ids // _BLOCK + _FIRST_BLOCK)
    least = _exponential(of_block) / _BLOCK
    is_least = (of_block & _BLOCK - 1) == (ids & _BLOCK - 1)
    return torch.where(is_least, least, least + _exponential(_hash(keys, ids)))


def all_exponentials(keys: Tensor, vocab: int) -> Tensor:
    """Return the noise [num_rows, vocab] of all tokens, as `exponentials` does."""
    num_blocks = -(-vocab // _BLOCK)
    of_block = _hash(keys, torch.arange(_FIRST_BLOCK, _FIRST_BLOCK + num_blocks, device=keys.device))
    least = (_exponential(of_block) / _BLOCK)[:, :, None]
    noise = _exponential(_hash(keys, torch.arange(num_blocks * _BLOCK, device=keys.device)))
    noise = noise.view(len(keys), num_blocks, _BLOCK).add_(least)
    noise.scatter_(2, (of_block & _BLOCK - 1)[:, :, None], least)
    return noise.flatten(1)[:, :vocab]


def _hash(keys: Tensor, numbers: Tensor) -> Tensor:
    """Return 64 bits of splitmix64 (Steele, Lea, Flood 2014) at `numbers`, one stream per key."""
    x = numbers * _signed(0x9E3779B97F4A7C15) + keys
    x = (x ^ _shifted(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = (x ^ _shifted(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x ^ _shifted(x, 31)


def _exponential(hashes: Tensor) -> Tensor:
    """Return exponential noise of mean 1 from the upper 53 bits of `hashes`; never 0."""
    uniform = _shifted(hashes, 11).double().add_(0.5).mul_(-(2.0**-53))
    return uniform.log1p_().neg_()


def _shifted(x: Tensor, count: int) -> Tensor:
    """Shift right; torch's own shift of signed numbers would bring in ones."""
    return (x >> count).bitwise_and_((1 << 64 - count) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _column(values: list[float] | list[int], device: torch.device) -> Tensor:
    return to_device(np.array(values, dtype=np.float64), device)[:, None]
