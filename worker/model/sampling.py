"""Sampling: penalties, filters and a draw for every row; `worker.model.draws` has the draws.

What counts, in this order: the tokens that a grammar allows, penalties and bias, the constraint on what may be drawn,
temperature, top-k, top-p (over what top-k left), min-p (against the most likely token). Equal logits rank by token id.
Reported log probabilities are the model's own, before all that.

The tests compare `sample`, which treats whole batches, with a readable duplicate that draws one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvasir.protocol.sampling import Constraint, ReasoningBudget, Sampling
from kvasir.worker.engine.step import Mask, Sampled, SampleRow, asks_for_counts
from kvasir.worker.model.draws import Race, draw_at_once, draw_filtered, draw_greedy, draw_plain, race
from kvasir.worker.model.memory import Readback, memory_errors


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampleRow], masks: Sequence[Mask] = ()) -> list[Sampled | None]:
    """Draw one token per row of `logits` [num_rows, vocab], which are changed where `masks` and penalties apply.

    None for a row without a finite maximum: with a NaN, with +inf, or of -inf throughout.
    """
    with memory_errors():
        is_finite = logits.amax(dim=-1).isfinite().tolist()
        if all(is_finite):
            return [*_sample(logits, rows, masks)]
        good = [i for i, is_good in enumerate(is_finite) if is_good]
        drawn = iter(_sample(logits[good], [rows[i] for i in good], [masks[i] for i in good] if masks else ()))
        return [next(drawn) if is_good else None for is_good in is_finite]


class Draws:
    """What a device draws, or will have drawn. `ids` [num_rows] int64 stay there, 0 for rows that are not finite."""

    def __init__(self, ids: Tensor, is_finite: Tensor, reports: dict[int, Tensor]) -> None:
        self.ids = torch.where(is_finite, ids, 0)
        self._reports = {i: Readback(report) for i, report in reports.items()}
        self.readback = Readback(torch.stack((ids, is_finite.long())))

    def read(self) -> list[Sampled | None]:
        """Wait for the draws and return them as `sample` does."""
        token_ids, is_finite = self.readback.wait()
        reports = {i: report.wait() for i, report in self._reports.items()}
        drawn = enumerate(zip(token_ids, is_finite, strict=True))
        return [_sampled(token_id, reports.get(i)) if is_good else None for i, (token_id, is_good) in drawn]


@torch.inference_mode()
def start_draws(logits: Tensor, rows: Sequence[SampleRow], masks: Sequence[Mask] = (), race: Race = race) -> Draws:
    """Draw as `sample` does, on a device that is not waited for, unless there are masks, penalties or constraints.

    `race` does what `worker.model.draws.race` does.
    """
    with memory_errors():
        is_finite = logits.amax(dim=-1).isfinite()
        reported = _reported(logits, rows)
        _change(logits, rows, masks)
        ids = draw_at_once(logits, rows, race)
        return Draws(ids, is_finite, {i: _report(reported[i], ids[i], rows[i]) for i in reported})


def _sample(logits: Tensor, rows: Sequence[SampleRow], masks: Sequence[Mask]) -> list[Sampled]:
    reported = _reported(logits, rows)
    _change(logits, rows, masks)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
    plain = [i for i, row in enumerate(rows) if row.params.temperature != 0 and not _is_filtered(row.params)]
    filtered = [i for i, row in enumerate(rows) if row.params.temperature != 0 and _is_filtered(row.params)]
    token_ids = [0] * len(rows)
    for group, draw in ((greedy, draw_greedy), (plain, draw_plain), (filtered, draw_filtered)):
        if group:
            part = logits if len(group) == len(rows) else logits[group]
            for i, token_id in zip(group, draw(part, [rows[i] for i in group]), strict=True):
                token_ids[i] = token_id
    reports = {i: _report(reported[i], torch.tensor(token_ids[i]), rows[i]).tolist() for i in reported}
    return [_sampled(token_id, reports.get(i)) for i, token_id in enumerate(token_ids)]


def _reported(logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, Tensor]:
    """Return the log probabilities [vocab] fp64 of the rows that ask for them."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    return {i: logits[i].double().log_softmax(dim=0) for i in asking}


def _change(logits: Tensor, rows: Sequence[SampleRow], masks: Sequence[Mask]) -> None:
    """Apply masks, penalties, bias and constraints in place."""
    _mask(logits, masks)
    for i, row in enumerate(rows):
        if _is_penalised(row.params):
            _penalise(logits[i], row)


def _mask(logits: Tensor, masks: Sequence[Mask]) -> None:
    """Make impossible in `logits` [num_rows, vocab] what a row's mask forbids; ids that it does not know are not."""
    held = [i for i, mask in enumerate(masks) if mask is not None]
    if not held:
        return
    packed = np.frombuffer(b"".join(masks[i] or b"" for i in held), dtype=np.uint8).reshape(len(held), -1)
    bits = np.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little")
    is_banned = torch.from_numpy(bits).to(logits.device) == 0  # [len(held), vocab]
    if len(held) == len(masks):
        logits.masked_fill_(is_banned, -torch.inf)
    else:
        logits[held] = logits[held].masked_fill_(is_banned, -torch.inf)


def _is_penalised(params: Sampling) -> bool:
    return asks_for_counts(params) or bool(params.logit_bias or params.constraint)


def _is_filtered(params: Sampling) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """Apply penalties, bias and constraint to `logits` [vocab] in place; ids beyond the vocabulary are passed over."""
    params, device = row.params, logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(row.counts), dtype=torch.int64, device=device)
        values = logits[seen]
        penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = penalised
    changes: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        once, each = params.presence_penalty, params.frequency_penalty
        changes = {token_id: -once - each * count for token_id, count in row.counts.items() if count}
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


def _report(log_probabilities: Tensor, token_id: Tensor, row: SampleRow) -> Tensor:
    """Return fp64: the drawn token's log probability, the n largest, and the ids that have them."""
    values, ids = log_probabilities.topk(min(row.params.logprobs or 0, log_probabilities.shape[0]))
    return torch.cat((log_probabilities[token_id].view(1), values, ids.double()))


def _sampled(token_id: int, report: list[float] | None) -> Sampled:
    if report is None:
        return Sampled(token_id)
    count = len(report) // 2
    return Sampled(token_id, report[0], tuple(zip(map(int, report[1 + count :]), report[1 : 1 + count], strict=True)))
