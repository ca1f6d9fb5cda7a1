"""What drafts cost: the time of a step with them beside that of one without, by the size of the batch."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_COST = 0.25
_FIRST_PLAIN = 3  # steps without drafts, before there are any
_MAX_SINCE = 48  # steps with drafts, then one without
_PLAIN_LEARNING = 0.2  # how much of a step's surprise is believed
_DRAFT_LEARNING = 0.3
_FORGETTING = 0.002  # per step without drafts, so that drafts once thought too dear are tried again
_MAX_SURPRISE = 0.25  # of what was expected: the rest is the machine's, not the batch's


@dataclass(slots=True)
class _Costs:
    """Of batches of about one size. `plain_s`: a step without drafts. `draft_s`: what one draft per sequence adds."""

    plain_s: float
    draft_s: float
    num_plain: int = 1
    num_since: int = 0  # steps with drafts since the last without


class StepCosts:
    """What a step takes, and what drafts add, by the number of sequences; from the steps that only decode."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, int], _Costs] = {}

    def relative(self, num_sequences: int) -> float | None:
        """Return what one draft per sequence adds to a step, over the step without; None: the next step has to go
        without, to see what that takes."""
        costs = self._by_size.get(_size_class(num_sequences))
        if costs is None or costs.num_plain < _FIRST_PLAIN or costs.num_since >= _MAX_SINCE:
            return None
        return costs.draft_s / costs.plain_s

    def learn(self, num_sequences: int, num_drafts: int, step_s: float) -> None:
        size = _size_class(num_sequences)
        costs = self._by_size.get(size)
        if num_drafts:
            if costs is not None:
                costs.num_since += 1
                x = num_drafts / num_sequences
                surprise = _surprise(step_s, costs.plain_s + costs.draft_s * x)
                costs.draft_s = max(0.0, costs.draft_s + _DRAFT_LEARNING * surprise * x / (1 + x * x))
        elif costs is None:
            self._by_size[size] = _Costs(step_s, _FIRST_COST * step_s)
        elif costs.num_plain < _FIRST_PLAIN:  # the first ones make room for what comes
            costs.num_plain += 1
            costs.plain_s = min(costs.plain_s, step_s)
            costs.draft_s = _FIRST_COST * costs.plain_s
        else:
            costs.num_since = 0
            costs.plain_s += _PLAIN_LEARNING * _surprise(step_s, costs.plain_s)
            costs.draft_s += _FORGETTING * (_FIRST_COST * costs.plain_s - costs.draft_s)


def _size_class(num_sequences: int) -> tuple[int, int]:
    """Tell sizes apart exactly up to 7, then four to every power of two."""
    shift = max(0, num_sequences.bit_length() - 3)
    return shift, num_sequences >> shift


def _surprise(step_s: float, expected_s: float) -> float:
    return max(-_MAX_SURPRISE * expected_s, min(_MAX_SURPRISE * expected_s, step_s - expected_s))
