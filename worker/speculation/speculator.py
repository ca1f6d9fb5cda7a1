"""How many tokens to draft for each sequence, and by which proposer: as many as are likely enough for what they cost.

Let a step of B sequences take the time 1, any drafts f more, and a draft for each of them b more. With N drafts, of
which G will hold, the step gives B + G tokens in 1 + f + b * N/B. One more draft that holds with chance p makes that
rate better if

    p  >  b * (1 + G/B) / (1 + f + b * N/B)

and all are worth it if G/B > f + b * N/B. The costs are measured per size of the batch (`StepCosts`): b is near 0
where reading weights is what takes the time, 1 and more where computing is. A draft of the draft model costs its share
of a round of that model besides. The chance that a draft holds is measured per sequence. For lookup it goes by the
length of match (`Chances`), whether the draft is computed or not: so a sequence whose drafts are not worth it costs
nothing but the looking, and is noticed when it begins to repeat something. For the draft model a sequence begins with
how drafts have held lately in others. Of the two proposers that one proposes whose drafts gain more. All of this
can be wrong: what drafts have saved and cost in fact bounds what they may cost (`StepCosts.balance`).

A sequence that the draft model has not followed has to be caught up with: if drafts will save more than that takes, in
as many tokens as are likely to come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import neg

from kvasir.worker.speculation.costs import MAX_DRAFT, StepCosts
from kvasir.worker.speculation.draft_model import DraftModel, Job, Lead, Running
from kvasir.worker.speculation.proposer import Proposer, Text
from kvasir.worker.speculation.track import Experience, Track

MAX_PERIOD = 8  # steps from one look to the next at a sequence whose drafts are not worth it
HOPEFUL_PERIOD = 4  # if they would be, were there more in the batch
CATCH_UP_TOKENS = 256  # that the draft model computes of texts it has not seen, per step
NEAR = 16  # tokens that it computes on its way, without asking whether that is worth it

_CATCH_UP_MARGIN = 1.5  # by which drafts to come have to save more than catching up takes
_MARGIN = 1.1  # by which drafts have to gain more than they are thought to cost


@dataclass(slots=True)
class _Choice:
    """What a track may draft: chances that the first 1, 2, ... tokens hold, by lookup and by the draft model, and known
    tokens that the latter has to compute first. Then: which of them it is, how many tokens, how many of those are
    thought to hold, and what they cost."""

    track: Track
    by_lookup: list[float]
    by_model: list[float]
    num_behind: int = 0
    is_model: bool = False
    count: int = 0
    gain: float = 0.0
    spent: float = 0.0

    def choose(self, cost: float, model_cost: float, factor: float) -> None:
        """Take what gains most, given what a draft of either costs; `factor` tokens are what a step without makes."""
        self.is_model = False
        self.count, self.gain, self.spent = _best(self.by_lookup, cost, factor)
        if self.by_model:
            count, gain, spent = _best(self.by_model, model_cost, factor)
            if gain - factor * spent > self.gain - factor * self.spent:
                self.is_model, self.count, self.gain, self.spent = True, count, gain, spent


class Speculator:
    """Drafts for the sequences of an engine, by lookup and, if there is one, by a draft model. Decides nothing about
    tokens: whatever it proposes, the engine draws every token itself, and keeps of a draft what equals the draws."""

    def __init__(self, proposer: Proposer, model: DraftModel | None = None) -> None:
        self.proposer, self.model = proposer, model
        self.costs = StepCosts()
        self.experience = Experience()

    def open(self, text: Text, sequence: Running | None = None) -> Track:
        """Begin with a sequence. The draft model follows `sequence`."""
        track = Track(self.proposer, self.experience, text, self.proposer.open(text))
        if self.model is not None and sequence is not None:
            track.lead, track.model_chance = Lead(sequence), self.experience.begin()
            self.costs.rounds.forget()
        return track

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant."""
        self.proposer.forget(tenant)

    def rest(self) -> None:
        """Nothing is computed for now."""
        if self.model is not None:
            self.model.rest()

    def draft(self, wanted: Sequence[tuple[Track, int]], num_sequences: int, turn: int) -> None:
        """Set the `num_drafts` of tracks, each with the most that it may have, for step `turn`, in which
        `num_sequences` decode."""
        costs, choices = self.costs.relative(num_sequences), []
        for track, limit in wanted:
            track.clear()
            if costs is not None and limit > 0 and track.looks_at(turn):
                track.proposed = track.reader.propose(min(limit, MAX_DRAFT))
                choices.append(_Choice(track, track.chances.of_run(track.proposed), self._model_run(track, limit)))
        if costs is None or not choices:
            return
        any_cost, cost = costs
        count = self.costs.num_affordable(any_cost, cost)
        for choice in choices:
            choice.by_lookup, choice.by_model = choice.by_lookup[:count], choice.by_model[:count]
        num_drafting = sum(bool(choice.by_model) for choice in choices)
        if num_drafting:
            self._drop_dear(choices, any_cost, cost, num_drafting, num_sequences)
        factor = 1.0
        for is_last in (False, False, True):  # what the others gain and cost moves the bar
            model_cost = cost + self.costs.relative_round(num_sequences, max(1, num_drafting))
            for choice in choices:
                choice.choose(cost, model_cost, factor)
            num_gained, spent = (sum(getattr(choice, name) for choice in choices) for name in ("gain", "spent"))
            if not is_last:
                factor = (1 + num_gained / num_sequences) / (1 + any_cost + spent / num_sequences)
                num_drafting = sum(choice.is_model for choice in choices)
        is_worth_it = num_gained > _MARGIN * (spent + any_cost * num_sequences)
        for choice in choices:
            period = min(2 * choice.track.period, HOPEFUL_PERIOD if choice.count else MAX_PERIOD)
            choice.track.period = 1 if is_worth_it and choice.count else period
        if is_worth_it:
            self._plan(choices)

    def compute(self, tracks: Sequence[tuple[Track, int]]) -> None:
        """Let the draft model do the jobs of `tracks`. Each has blocks for so many drafts, and gets no more."""
        jobs = []
        for track, count in tracks:
            track.draft_ids = track.draft_ids[:count]
            if track.job is not None:
                track.job.num_drafts = min(track.job.num_drafts, count)
                jobs.append(track.job)
        if jobs and self.model is not None:
            self.costs.rounds.learn(self.model.run(jobs))
        for track, _ in tracks:
            if track.job is not None:
                track.draft_ids = track.job.draft_ids

    def _model_run(self, track: Track, limit: int) -> list[float]:
        if self.model is None or track.lead is None:
            return []
        return track.model_run(min(limit, MAX_DRAFT, self.model.window - track.lead.sequence.num_known))

    def _drop_dear(
        self, choices: Sequence[_Choice], any_cost: float, cost: float, num_drafting: int, num_sequences: int
    ) -> None:
        """Leave the draft model out where its drafts are not worth it, or catching up is not."""
        assert self.model is not None
        model_cost = cost + self.costs.relative_round(num_sequences, num_drafting)
        any_share = any_cost * num_sequences / num_drafting
        token_s = self.costs.plain_s(num_sequences) / num_sequences  # without drafts
        for choice in choices:
            lead, num_tokens = choice.track.lead, len(choice.track.text.output_ids)
            count, gain, spent = _best(choice.by_model, model_cost, 1.0)
            if lead is None or not count:
                choice.by_model = []
                continue
            choice.num_behind = self.model.backlog(lead)
            num_coming = max(self.experience.answer_length - num_tokens, num_tokens)
            saved_s = num_coming * token_s * (gain - spent - any_share) / (1 + gain)
            if choice.num_behind > NEAR and saved_s < _CATCH_UP_MARGIN * choice.num_behind * self.costs.rounds.token_s:
                choice.by_model = []

    def _plan(self, choices: Sequence[_Choice]) -> None:
        num_left = CATCH_UP_TOKENS
        for choice in choices:
            track = choice.track
            if not choice.is_model or track.lead is None:
                track.num_drafts = choice.count
                track.draft_ids = [*track.proposed.token_ids[: choice.count]]
            elif choice.num_behind <= max(num_left, NEAR):
                track.num_drafts = choice.count
                track.job = Job(track.lead, choice.num_behind, choice.count)
                num_left -= choice.num_behind if choice.num_behind > NEAR else 0
            elif num_left > 0:
                track.job = Job(track.lead, num_left, 0)
                num_left = 0


def _best(run: Sequence[float], cost: float, factor: float) -> tuple[int, float, float]:
    """Return how many of `run`, which falls, are worth their cost, how many of them will hold, and what they cost."""
    count = _num_above(run, cost * factor)
    return count, sum(run[:count]), cost * count


def _num_above(run: Sequence[float], bar: float) -> int:
    """Return how many of `run`, which falls, are above `bar`."""
    return bisect_left(run, -bar, key=neg)
