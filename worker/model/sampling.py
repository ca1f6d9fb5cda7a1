"""Drawing tokens: penalties, filters, and one uniform per (seed, position).

The uniform comes from a counter-based hash and inverts the cumulative distribution in the order of token ids, in
float64. A draw therefore depends on the logits, the parameters, the seed and the position and on nothing else: not on
the batch, not on the worker, not on how often the request was moved. Rounding differs between batches in the last bits
of the logits; that changes a draw only when the uniform falls into that sliver.

What counts, in this order: the tokens that a grammar allows, penalties and bias, the constraint on what may be drawn,
temperature, top-k, top-p (over what top-k left), min-p (against the most likely token). Equal logits rank by token id.
Reported log probabilities are the model's own, before all that.

The tests compare `sample`, which treats whole batches, with a readable duplicate that draws one token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvasir.protocol.messages import Constraint, ReasoningBudget, Sampling
from kvasir.worker.engine.step import Sampled, SampleRow
from kvasir.worker.model.memory import memory_errors

_NUM_CANDIDATES = 64  # first guess of how many tokens the filters can leave


def uniform(seed: int, position: int) -> float:
    """Return the one number in [0, 1) that belongs to a seed and a position."""
    return (xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed & (1 << 64) - 1, position)) >> 11) * 2.0**-53


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | None]:
    """Draw one token per row of `logits` [num_rows, vocab], which are changed where penalties apply.

    None for a row without a finite maximum: with a NaN, with +inf, or of -inf throughout.
    """
    with memory_errors():
        is_finite = logits.amax(dim=-1).isfinite().tolist()
        if all(is_finite):
            return [*_sample(logits, rows)]
        drawn = iter(
            _sample(logits[torch.tensor(is_finite)], [row for row, good in zip(rows, is_finite, strict=True) if good])
        )
        return [next(drawn) if good else None for good in is_finite]


def _sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    reported = {i: _log_probabilities(logits[i]) for i, row in enumerate(rows) if row.params.logprobs is not None}
    _mask(logits, rows)
    for i, row in enumerate(rows):
        if _is_penalised(row.params):
            _penalise(logits[i], row)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
    plain = [i for i, row in enumerate(rows) if row.params.temperature != 0 and not _is_filtered(row.params)]
    filtered = [i for i, row in enumerate(rows) if row.params.temperature != 0 and _is_filtered(row.params)]
    token_ids = [0] * len(rows)
    for group, draw in ((greedy, _draw_greedy), (plain, _draw_plain), (filtered, _draw_filtered)):
        if group:
            part = logits if len(group) == len(rows) else logits[group]
            for i, token_id in zip(group, draw(part, [rows[i] for i in group]), strict=True):
                token_ids[i] = token_id
    if not reported:
        return [Sampled(token_id) for token_id in token_ids]
    return [_report(token_id, rows[i], reported.get(i)) for i, token_id in enumerate(token_ids)]


def _mask(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Make impossible in `logits` [num_rows, vocab] what `allowed` says of a row; ids that it does not know are not."""
    held = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not held:
        return
    packed = np.frombuffer(b"".join(rows[i].allowed or b"" for i in held), dtype=np.uint8).reshape(len(held), -1)
    bits = np.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little")
    is_banned = torch.from_numpy(bits).to(logits.device) == 0  # [len(held), vocab]
    if len(held) == len(rows):
        logits.masked_fill_(is_banned, -torch.inf)
    else:
        logits[held] = logits[held].masked_fill_(is_banned, -torch.inf)


def _is_penalised(params: Sampling) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.constraint
    )


def _is_filtered(params: Sampling) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """Apply penalties, bias and constraint to `logits` [vocab] in place; ids beyond the vocabulary are passed over."""
    params, device = row.params, logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*row.prompt_ids, *row.output_ids], dtype=torch.int64, device=device)
        values = logits[seen]
        penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = penalised
    changes: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        for token_id in row.output_ids:
            changes[token_id] = changes.get(token_id, -params.presence_penalty) - params.frequency_penalty
    for token_id, bias in params.logit_bias.items():
        if 0 <= token_id < logits.shape[0]:
            changes[token_id] = changes.get(token_id, 0.0) + bias
    if changes:
        ids = torch.tensor(list(changes), dtype=torch.int64, device=device)
        logits[ids] += torch.tensor(list(changes.values()), dtype=logits.dtype, device=device)
    if params.constraint is not None:
        _constrain(logits, params.constraint, row)


def _constrain(logits: Tensor, constraint: Constraint, row: SampleRow) -> None:
    """Make impossible in `logits` [vocab] what may not be drawn now; see `Constraint` for what happens if all is."""
    if constraint.reasoning is not None and _is_used_up(constraint.reasoning, row.output_ids):
        end = constraint.reasoning.end
        if end < logits.shape[0]:
            logits.fill_(-torch.inf)
            logits[end] = 0.0
            return
    banned = set(row.stop_token_ids) if len(row.output_ids) < constraint.min_tokens else set()
    for word in constraint.bad_words:
        *before, last = word
        if not before or list(row.output_ids[-len(before) :]) == before:
            banned.add(last)
    allowed = set(constraint.allowed_token_ids)
    if not allowed and not banned:
        return
    given = logits.clone()
    if allowed:
        logits.fill_(-torch.inf)
        _copy(given, logits, allowed - banned)
    else:
        logits[_ids(banned, logits)] = -torch.inf
    if not logits.amax().isfinite():
        _copy(given, logits, allowed)
        if not logits.amax().isfinite():
            logits.copy_(given)


def _is_used_up(budget: ReasoningBudget, output_ids: Sequence[int]) -> bool:
    """Return whether the next token has to end the reasoning."""
    if len(output_ids) < budget.max_tokens or budget.end in output_ids:
        return False
    if budget.start is None:
        return True
    return budget.start in output_ids and len(output_ids) - output_ids.index(budget.start) > budget.max_tokens


def _copy(given: Tensor, logits: Tensor, token_ids: Iterable[int]) -> None:
    ids = _ids(token_ids, logits)
    logits[ids] = given[ids]


def _ids(token_ids: Iterable[int], logits: Tensor) -> Tensor:
    known = [token_id for token_id in token_ids if token_id < logits.shape[0]]
    return torch.tensor(known, dtype=torch.int64, device=logits.device)


def _draw_greedy(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    return token_ids


def _draw_plain(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    token_ids: list[int] = _invert(_weights(logits, rows), rows).tolist()
    return token_ids


def _draw_filtered(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Sort only as many of the most likely tokens as the filters can leave, more where they were too few."""
    weights = _weights(logits, rows)
    vocab = weights.shape[1]
    total = weights.sum(dim=1, keepdim=True)
    token_ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    pending = torch.arange(len(rows), device=logits.device)
    largest_top_k = max((row.params.top_k for row in rows if row.params.top_k < vocab), default=0)
    count = max(_NUM_CANDIDATES, largest_top_k + 1)
    while len(pending):
        asked = [rows[i] for i in pending.tolist()]
        drawn, certain = _draw_among(weights[pending], total[pending], asked, min(vocab, count))
        token_ids[pending[certain]] = drawn[certain]
        pending = pending[~certain]
        count *= 8
    result: list[int] = token_ids.tolist()
    return result


def _draw_among(weights: Tensor, total: Tensor, rows: Sequence[SampleRow], count: int) -> tuple[Tensor, Tensor]:
    """Draw from the `count` most likely tokens; also return [num_rows] bool, False where others might have counted."""
    vocab, device = weights.shape[1], weights.device
    top_k = _column([row.params.top_k or vocab for row in rows], device).long()
    top_p = _column([row.params.top_p for row in rows], device)
    min_p = _column([row.params.min_p for row in rows], device)
    if count < vocab:
        ids = weights.topk(count, dim=1).indices.sort(dim=1).values
        weights = weights.gather(1, ids)
    ranked, order = weights.sort(dim=1, descending=True, stable=True)
    passed = ranked.cumsum(dim=1)
    reference = torch.where(top_k < vocab, passed.gather(1, (top_k - 1).clamp(max=count - 1)), total)
    kept = (passed - ranked < top_p * reference) & (ranked >= min_p * ranked[:, :1])
    kept &= torch.arange(count, device=device) < top_k
    kept[:, 0] = True
    chosen = _invert(weights * torch.zeros_like(kept).scatter_(1, order, kept), rows)
    if count == vocab:
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    last_kept = torch.where(kept, ranked, torch.inf).amin(dim=1)
    return ids.gather(1, chosen[:, None])[:, 0], ranked[:, -1] < last_kept  # beyond the least candidate nothing is kept


def _weights(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return unnormalised probabilities [num_rows, vocab] fp64; the most likely token has 1."""
    exact = logits.double()
    temperature = _column([row.params.temperature for row in rows], logits.device)
    return (exact - exact.amax(dim=1, keepdim=True)).div_(temperature).exp_()


def _invert(weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return [num_rows] column indices: the first whose cumulative weight exceeds uniform × total."""
    passed = weights.cumsum(dim=1)
    uniforms = _column([uniform(row.params.seed, row.position) for row in rows], weights.device)
    return torch.searchsorted(passed, uniforms * passed[:, -1:], right=True)[:, 0].clamp(max=weights.shape[1] - 1)


def _column(values: list[float] | list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(dim=0)


def _report(token_id: int, row: SampleRow, log_probabilities: Tensor | None) -> Sampled:
    if log_probabilities is None or row.params.logprobs is None:
        return Sampled(token_id)
    values, ids = log_probabilities.topk(min(row.params.logprobs, log_probabilities.shape[0]))
    return Sampled(token_id, float(log_probabilities[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
