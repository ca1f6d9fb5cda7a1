"""What drafts cost: the time of a step with them beside that of one without, and the draft model's, by the size of the
batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvasir.worker.speculation.draft_model import Round

MAX_DRAFT = 16  # tokens per sequence and step

_FIRST_COSTS = (0.1, 0.15)  # of a step without: what any drafts add, and each per sequence
_FIRST_PLAIN = 3  # steps without drafts, before there are any
_MAX_SINCE = 48  # steps with drafts, then one without
_PLAIN_FALL, _PLAIN_RISE = 0.2, 0.07  # how much of a surprise is believed: what else runs only ever slows a step
_DRAFT_LEARNING = 0.3
_FORGETTING = 0.002  # per step without drafts, so that drafts once thought too dear are tried again
_MAX_SURPRISE = 0.25  # of what was expected: the rest is the machine's, not the batch's
_ALLOWANCE = 0.003  # of every step without drafts: what they may cost in vain
_FIRST_BALANCE, _MOST_BALANCE = 1.0, 4.0  # steps without drafts
_FIRST_ROUND = 0.1  # of a step without drafts
_ROUND_LEARNING = 0.2
_ROUND_FORGETTING = 0.003  # per sequence


@dataclass(slots=True)
class _Costs:
    """Of batches of about one size. `plain_s`: a step without drafts. Any drafts add `any_s` (several tokens of a
    sequence are computed otherwise than one), and one per sequence `draft_s` more."""

    plain_s: float
    any_s: float = 0.0
    draft_s: float = 0.0
    num_plain: int = 1
    num_since: int = 0  # steps with drafts since the last without

    def forget(self, share: float) -> None:
        """Go some way back to what is thought of drafts that were never computed."""
        self.any_s += share * (_FIRST_COSTS[0] * self.plain_s - self.any_s)
        self.draft_s += share * (_FIRST_COSTS[1] * self.plain_s - self.draft_s)


class StepCosts:
    """What a step takes, and what drafts add, by the number of sequences; from the steps that only decode.

    `balance` is what drafts have saved less what they have cost, in steps without them. No step's drafts may cost more,
    and below zero they have to rest until the allowance of such steps has made that good. So they lose little more than
    that, however wrong the costs and chances are by which they are chosen. What a draft model takes to catch up with a
    text is not counted: that is for many steps.
    """

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, int], _Costs] = {}
        self.rounds = RoundCosts()
        self.balance = _FIRST_BALANCE

    def relative(self, num_sequences: int) -> tuple[float, float] | None:
        """Return what any drafts add to a step, and what each per sequence adds, over the step without; None: the next
        step has to go without, to see what that takes or because drafts have cost too much."""
        costs = self._by_size.get(_size_class(num_sequences))
        if costs is None or costs.num_plain < _FIRST_PLAIN or costs.num_since >= _MAX_SINCE or self.balance < 0:
            return None
        return costs.any_s / costs.plain_s, costs.draft_s / costs.plain_s

    def plain_s(self, num_sequences: int) -> float:
        """Return the seconds of a step without drafts, 0 if there has been none."""
        costs = self._by_size.get(_size_class(num_sequences))
        return 0.0 if costs is None else costs.plain_s

    def relative_round(self, num_sequences: int, num_drafting: int) -> float:
        """Return what the draft model would add with one draft per sequence, if `num_drafting` share its rounds."""
        plain_s, round_s = self.plain_s(num_sequences), self.rounds.round_s(num_drafting)
        relative = _FIRST_ROUND if round_s is None or not plain_s else round_s / plain_s
        return relative * num_sequences / num_drafting

    def num_affordable(self, any_cost: float, cost: float) -> int:
        """Return how many drafts a sequence may have by the balance, one at least; the costs as of `relative`."""
        num_left = self.balance - any_cost
        if cost * MAX_DRAFT <= num_left:
            return MAX_DRAFT
        return max(1, int(num_left / cost)) if cost else 1

    def learn(self, num_sequences: int, num_drafts: int, num_held: int, step_s: float) -> None:
        """Learn from a step that only decodes, of whose drafts `num_held` held; `step_s` without the time of a draft
        model."""
        size = _size_class(num_sequences)
        costs, round_s = self._by_size.get(size), self.rounds.take_spent()
        if num_drafts:
            if costs is not None:
                costs.num_since += 1
                x = num_drafts / num_sequences
                expected_s = costs.plain_s + costs.any_s + costs.draft_s * x
                surprise = _surprise(step_s, expected_s)
                cost = (expected_s + surprise + round_s) / costs.plain_s - 1
                self.balance = min(_MOST_BALANCE, self.balance + num_held / num_sequences - cost)
                step = _DRAFT_LEARNING * surprise / (1 + x * x)
                costs.any_s = max(0.0, costs.any_s + step)
                costs.draft_s = max(0.0, costs.draft_s + step * x)
            return
        self.balance = min(_MOST_BALANCE, self.balance + _ALLOWANCE)
        if costs is None:
            self._by_size[size] = _Costs(step_s)
            self._by_size[size].forget(1.0)
        elif costs.num_plain < _FIRST_PLAIN:  # the first ones make room for what comes
            costs.num_plain += 1
            costs.plain_s = min(costs.plain_s, step_s)
            costs.forget(1.0)
        else:
            costs.num_since = 0
            surprise = _surprise(step_s, costs.plain_s)
            costs.plain_s += surprise * (_PLAIN_FALL if surprise < 0 else _PLAIN_RISE)
            costs.forget(_FORGETTING)


class RoundCosts:
    """What a round of the draft model takes, by the number of sequences that draft, and a token of a text that it has
    not seen."""

    def __init__(self) -> None:
        self._round_s: dict[tuple[int, int], float] = {}
        self._spent_s = 0.0
        self.token_s = 0.0  # until it is measured, so that it is

    def take_spent(self) -> float:
        """Return the seconds of all rounds since the last call in which no text was caught up with."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def round_s(self, num_drafting: int) -> float | None:
        """Return the seconds of a round, None if there has been none yet."""
        if not self._round_s:
            return None
        size = _size_class(num_drafting)
        known = [other for other in self._round_s if other <= size]
        return self._round_s[max(known, default=min(self._round_s))]

    def learn(self, rounds: Iterable[Round]) -> None:
        for each in rounds:
            expected_s = self.round_s(each.num_drafting) if each.num_drafting else 0.0
            if each.num_tokens <= 2 * each.num_drafting:
                self._spent_s += each.seconds
                size = _size_class(each.num_drafting)
                if size in self._round_s:
                    self._round_s[size] += _ROUND_LEARNING * _surprise(each.seconds, self._round_s[size])
                else:
                    self._round_s[size] = each.seconds
            elif expected_s is not None:
                token_s = max(0.0, each.seconds - expected_s) / each.num_tokens
                self.token_s += (_ROUND_LEARNING if self.token_s else 1.0) * (token_s - self.token_s)

    def forget(self) -> None:
        """Think a little better of it, so that a draft model once thought too slow is tried again."""
        for size in self._round_s:
            self._round_s[size] *= 1 - _ROUND_FORGETTING
        self.token_s *= 1 - _ROUND_FORGETTING


def _size_class(num_sequences: int) -> tuple[int, int]:
    """Tell sizes apart exactly up to 7, then four to every power of two."""
    shift = max(0, num_sequences.bit_length() - 3)
    return shift, num_sequences >> shift


def _surprise(step_s: float, expected_s: float) -> float:
    return max(-_MAX_SURPRISE * expected_s, min(_MAX_SURPRISE * expected_s, step_s - expected_s))
