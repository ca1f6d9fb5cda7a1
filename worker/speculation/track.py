"""What is known of one sequence's drafts, and what all drafts have been worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvasir.worker.speculation.draft_model import DraftModel, Job, Lead
from kvasir.worker.speculation.proposer import Draft, Proposer, Reader, Text

_FIRST_CHANCES = ((0.9, 3.0), (1.5, 3.0), (2.2, 3.0), (2.7, 3.0))  # (held, tried) by match: 2, 4, 8, 16 and more
_FIRST_TRIED = 3.0
_MAX_TRIED = 32.0  # then the past counts half
_LEAST_CHANCE = 0.02
_FIRST_MODEL_CHANCE = 0.7
_MODEL_TRIED = 4.0  # what all sequences' drafts say of a new one's
_MODEL_LEARNING = 0.1  # of all sequences, per draft
_MODEL_FORGETTING = 0.003  # per sequence, so that a model once thought useless is tried again
_FIRST_LENGTH = 128.0  # tokens of an answer
_LENGTH_LEARNING = 0.1

NOTHING = Draft()


class Chances:
    """How often the next token was as proposed, by how long a match spoke for it. It begins with what `others` say."""

    __slots__ = ("_counts",)

    def __init__(self, others: Chances | None = None) -> None:
        self._counts = [*_FIRST_CHANCES]
        if others is not None:
            self._counts = [(_FIRST_TRIED * held / tried, _FIRST_TRIED) for held, tried in others._counts]

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
        count = _class_of(match)
        self._counts[count] = _counted(self._counts[count], has_held)


def _class_of(match: int) -> int:
    return min(max(match.bit_length() - 2, 0), len(_FIRST_CHANCES) - 1)


def _counted(counts: tuple[float, float], has_held: bool) -> tuple[float, float]:
    held, tried = counts
    if tried >= _MAX_TRIED:
        held, tried = held / 2, tried / 2
    return held + has_held, tried + 1


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs of drafts, their tokens, and those that held."""

    num_runs: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.num_runs - other.num_runs,
            self.num_drafted - other.num_drafted,
            self.num_accepted - other.num_accepted,
        )


class Experience:
    """Of all sequences: `counts` by proposer since the start, the `chances` that drafts by lookup hold and the
    `model_chance` that those of the draft model do, and how long an answer is."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self._told: dict[str, Counts] = {}
        self.chances = Chances()
        self.model_chance = _FIRST_MODEL_CHANCE
        self.answer_length = _FIRST_LENGTH

    def begin(self) -> tuple[float, float]:
        """Return (held, tried) of the draft model for a new sequence."""
        self.model_chance += _MODEL_FORGETTING * (_FIRST_MODEL_CHANCE - self.model_chance)
        return _MODEL_TRIED * self.model_chance, _MODEL_TRIED

    def learn_model(self, has_held: bool) -> None:
        self.model_chance += _MODEL_LEARNING * (has_held - self.model_chance)

    def learn_length(self, num_tokens: int) -> None:
        self.answer_length += _LENGTH_LEARNING * (num_tokens - self.answer_length)

    def news(self) -> dict[str, Counts]:
        """Return what has been counted since the last call, by proposer."""
        told, self._told = self._told, {**self.counts}
        news = {name: counts - told.get(name, Counts()) for name, counts in self.counts.items()}
        return {name: counts for name, counts in news.items() if counts.num_runs}

    def count(self, name: str, num_drafted: int, num_accepted: int) -> None:
        before = self.counts.get(name, Counts())
        self.counts[name] = Counts(
            before.num_runs + 1, before.num_drafted + num_drafted, before.num_accepted + num_accepted
        )


@dataclass(slots=True)
class Track:
    """One sequence's drafts: `num_drafts` are to be computed in the next step, after its last token. They are
    `draft_ids`; those of a draft model are known once that has done its `job`."""

    proposer: Proposer
    experience: Experience
    text: Text
    reader: Reader
    lead: Lead | None = None  # of the draft model
    num_drafts: int = 0
    draft_ids: list[int] = field(default_factory=list)
    job: Job | None = None
    chances: Chances = field(init=False)
    model_chance: tuple[float, float] = (0.0, 1.0)  # (held, tried)
    proposed: Draft = NOTHING  # by lookup, for the next step
    period: int = 1  # it is looked at in steps whose numbers are multiples: the same ones for all that seldom are

    def __post_init__(self) -> None:
        self.chances = Chances(self.experience.chances)

    def looks_at(self, turn: int) -> bool:
        """Return whether to look for drafts in step `turn`."""
        return turn % self.period == 0

    def clear(self) -> None:
        """Have no drafts in the next step."""
        self.num_drafts, self.draft_ids, self.job, self.proposed = 0, [], None, NOTHING

    def model_run(self, limit: int) -> list[float]:
        """Return the chances that the draft model's first 1, 2, ... tokens all hold, down to some percent."""
        held, tried = self.model_chance
        run: list[float] = []
        chance = held / tried
        while len(run) < limit and chance >= _LEAST_CHANCE:
            run.append(chance)
            chance *= held / tried
        return run

    def drawn(self, token_ids: Sequence[int], num_drafted: int) -> None:
        """Learn from the tokens that the sequence got in a step that computed `num_drafted` drafts for it."""
        held = _held(self.proposed.token_ids, token_ids)
        for i, has_held in enumerate(held):
            self.chances.learn(self.proposed.match + i, has_held)
            self.experience.chances.learn(self.proposed.match + i, has_held)
        if not num_drafted:
            return
        name = self.proposer.name
        if self.job is not None:
            name, held = DraftModel.name, _held(self.draft_ids, token_ids)
            for has_held in held:
                self.model_chance = _counted(self.model_chance, has_held)
                self.experience.learn_model(has_held)
        self.experience.count(name, num_drafted, min(sum(held), num_drafted))

    def take_work(self) -> int:
        """Return what the draft model has computed since the last call, in whole tokens of the model's own."""
        if self.lead is None:
            return 0
        work = int(self.lead.work)
        self.lead.work -= work
        return work

    def close(self) -> None:
        """The sequence has ended."""
        self.proposer.close(self.text)
        self.experience.learn_length(len(self.text.output_ids))


def _held(draft_ids: Sequence[int], token_ids: Sequence[int]) -> list[bool]:
    """Return which of `draft_ids` have held, the first that has not being the last."""
    held = []
    for draft_id, token_id in zip(draft_ids, token_ids, strict=False):
        held.append(draft_id == token_id)
        if not held[-1]:
            break
    return held
