"""How many tokens to draft for each sequence: as many as are likely enough for what a token costs now.

Let a step of B sequences take the time a, and a draft for each of them b more. With N drafts, of which G will hold, the
step gives B + G tokens in a + b * N/B. One more draft that holds with chance p makes that rate better if

    p  >  (b/a) * (1 + G/B) / (1 + (b/a) * N/B)

The cost b/a is measured per size of the batch (`StepCosts`): near 0 where reading weights is what takes the time, 1 and
more where computing is. The chance that a draft holds is measured per sequence and length of match (`Chances`), whether
the draft is computed or not: so a sequence whose drafts are not worth it costs nothing but the looking, and is noticed
when it begins to repeat something.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import neg

from kvasir.worker.speculation.costs import StepCosts
from kvasir.worker.speculation.proposer import Draft, Proposer, Reader, Text

MAX_DRAFT = 16
MAX_PERIOD = 8  # steps from one look to the next at a sequence whose drafts are not worth it

_FIRST_CHANCES = ((0.9, 3.0), (1.5, 3.0), (2.2, 3.0), (2.7, 3.0))  # (held, tried) by match: 2, 4, 8, 16 and more
_MAX_TRIED = 32.0  # then the past counts half
_LEAST_CHANCE = 0.02
_NOTHING = Draft()


class Chances:
    """How often the next token was as proposed, by how long a match spoke for it."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [*_FIRST_CHANCES]

    def of_run(self, draft: Draft) -> list[float]:
        """Return the chances that the first 1, 2, ... tokens of `draft` all hold, down to some percent."""
        run, chance = [], 1.0
        for match in range(draft.match, draft.match + len(draft.token_ids)):
            held, tried = self._counts[_class_of(match)]
            chance *= held / tried
            if chance < _LEAST_CHANCE:
                break
            run.append(chance)
        return run

    def learn(self, match: int, has_held: bool) -> None:
        held, tried = self._counts[_class_of(match)]
        if tried >= _MAX_TRIED:
            held, tried = held / 2, tried / 2
        self._counts[_class_of(match)] = held + has_held, tried + 1


def _class_of(match: int) -> int:
    return min(max(match.bit_length() - 2, 0), len(_FIRST_CHANCES) - 1)


@dataclass(slots=True)
class Track:
    """One sequence's drafts. `draft_ids` are to be computed in the next step, after its last token."""

    speculator: Speculator
    text: Text
    reader: Reader
    draft_ids: list[int] = field(default_factory=list)
    chances: Chances = field(default_factory=Chances)
    proposed: Draft = _NOTHING
    period: int = 1  # it is looked at in steps whose numbers are multiples: the same ones for all that seldom are

    def looks_at(self, turn: int) -> bool:
        """Return whether to look for drafts in step `turn`."""
        return turn % self.period == 0

    def drawn(self, token_ids: Sequence[int], num_drafted: int) -> None:
        """Learn from the tokens that the sequence got in a step that computed `num_drafted` drafts for it."""
        num_held = 0
        for proposed, token_id in zip(self.proposed.token_ids, token_ids, strict=False):
            has_held = proposed == token_id
            self.chances.learn(self.proposed.match + num_held, has_held)
            if not has_held:
                break
            num_held += 1
        if num_drafted:
            before = self.speculator.counts
            num_accepted = before.num_accepted + min(num_held, num_drafted)
            self.speculator.counts = Counts(before.num_runs + 1, before.num_drafted + num_drafted, num_accepted)

    def close(self) -> None:
        """The sequence has ended."""
        self.speculator.proposer.close(self.text)


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs of drafts, their tokens, and those that held."""

    num_runs: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class Speculator:
    """Drafts for the sequences of an engine. Decides nothing about tokens: whatever it proposes, the engine draws every
    token itself, and keeps of a draft what equals the draws."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.costs = StepCosts()
        self.counts = Counts()

    def open(self, text: Text) -> Track:
        """Begin with a sequence."""
        return Track(self, text, self.proposer.open(text))

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant."""
        self.proposer.forget(tenant)

    def draft(self, wanted: Sequence[tuple[Track, int]], num_sequences: int, turn: int) -> None:
        """Set the `draft_ids` of tracks, each with the most that it may have, for step `turn`, in which `num_sequences`
        decode."""
        runs: list[tuple[Track, list[float]]] = []
        for track, limit in wanted:
            track.draft_ids, track.proposed = [], _NOTHING
            if limit > 0 and track.looks_at(turn):
                track.proposed = track.reader.propose(min(limit, MAX_DRAFT))
                run = track.chances.of_run(track.proposed)
                runs.append((track, run))
        cost = self.costs.relative(num_sequences) if runs else None
        if cost is None:
            return
        bar = cost
        for _ in range(2):  # what the others gain and cost moves the bar
            kept = [_num_above(run, bar) for _, run in runs]
            num_gained = sum(sum(run[:count]) for (_, run), count in zip(runs, kept, strict=True))
            bar = cost * (1 + num_gained / num_sequences) / (1 + cost * sum(kept) / num_sequences)
        for track, run in runs:
            count = _num_above(run, bar)
            track.draft_ids = [*track.proposed.token_ids[:count]]
            track.period = 1 if count else min(2 * track.period, MAX_PERIOD)


def _num_above(run: Sequence[float], bar: float) -> int:
    """Return how many of `run`, which falls, are above `bar`."""
    return bisect_left(run, -bar, key=neg)
