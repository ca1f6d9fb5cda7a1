"""How many tokens are drafted: by what drafts have been worth, and what a token costs."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.worker.speculation.costs import StepCosts
from kvasir.worker.speculation.proposer import Draft, Text
from kvasir.worker.speculation.speculator import MAX_DRAFT, Speculator, _num_above
from kvasir.worker.speculation.track import Chances, Counts


class Scripted:
    """Proposes the true continuation, each token wrong with probability 1 - `chance`; `match` as told."""

    name = "scripted"

    def __init__(self, chance: float, match: int = 4) -> None:
        self.chance, self.match = chance, match
        self.rng = random.Random(5)

    def open(self, text: Text) -> Scripted:
        return self

    def close(self, text: Text) -> None: ...

    def forget(self, tenant: str) -> None: ...

    def propose(self, limit: int) -> Draft:
        return Draft([7 if self.rng.random() < self.chance else 0 for _ in range(limit)], self.match)


def play(
    chance: float, cost: float, batch: int = 1, num_steps: int = 600, *, any_cost: float = 0.0, num_able: int = 99
) -> tuple[float, float, Speculator]:
    """Return (tokens per second with drafts over those without, drafts per sequence and step), of the last half.

    Only `num_able` sequences have a chance at all.
    """
    speculator = Speculator(Scripted(chance))
    tracks = [speculator.open(Text("a", b"", [], [])) for _ in range(batch)]
    num_tokens = num_drafts = seconds = 0.0
    for step in range(num_steps):
        speculator.draft([(track, 100) for track in tracks[:num_able]], batch, step)
        num_drafted = sum(len(track.draft_ids) for track in tracks)
        step_s = 0.01 * (1 + cost * num_drafted / batch + any_cost * (num_drafted > 0))
        is_late = step >= num_steps // 2
        num_held = 0
        for track in tracks:
            held = next((i for i, token in enumerate(track.draft_ids) if token != 7), len(track.draft_ids))
            num_held += held
            track.drawn([7] * (held + 1), len(track.draft_ids))
            num_tokens += is_late * (held + 1)
            num_drafts += is_late * len(track.draft_ids)
        speculator.costs.learn(batch, sum(len(track.draft_ids) for track in tracks), num_held, step_s)
        seconds += is_late * step_s
    num_late = num_steps - num_steps // 2
    return num_tokens / seconds * 0.01 / batch, num_drafts / num_late / batch, speculator


def best_gain(chance: float, cost: float) -> float:
    """Return the best that any fixed number of drafts gains."""
    return max(
        (1 + sum(chance ** (i + 1) for i in range(count))) / (1 + cost * count) for count in range(MAX_DRAFT + 1)
    )


@pytest.mark.parametrize(("chance", "cost", "batch"), [*product([0.0, 0.3, 0.8, 0.97], [0.02, 0.2, 0.6, 1.0], [1, 8])])
def test_the_gain_is_near_the_best_and_never_a_loss(chance: float, cost: float, batch: int) -> None:
    gain, _, _ = play(chance, cost, batch)
    assert gain > 0.98
    assert gain > 0.85 * best_gain(chance, cost)


@pytest.mark.parametrize(("chance", "num_able"), [*product([0.0, 0.5, 0.9], [1, 2, 8])])
def test_a_few_drafts_in_a_large_batch_are_left_out_where_having_any_costs_more(chance: float, num_able: int) -> None:
    gain, num_drafts, _ = play(chance, 0.05, 8, any_cost=0.15, num_able=num_able)
    assert gain > 0.985
    if (chance, num_able) == (0.9, 8):
        assert gain > 2 and num_drafts > 4


def test_where_any_draft_costs_and_more_cost_nothing_they_are_long() -> None:
    gain, num_drafts, _ = play(0.9, 0.0, 1, any_cost=0.3)
    assert gain > 0.85 * (1 + sum(0.9**i for i in range(1, MAX_DRAFT + 1))) / 1.3 and num_drafts > 10


def test_likely_drafts_are_long_and_hopeless_or_dear_ones_are_none() -> None:
    assert play(0.99, 0.02)[1] > 12
    assert play(0.0, 0.02)[1] < 0.1
    assert play(0.6, 1.0)[1] < 0.1


def test_a_sequence_that_begins_to_repeat_itself_is_noticed() -> None:
    _, _, speculator = play(0.0, 0.1)
    track = speculator.open(Text("a", b"", [], []))
    scripted = speculator.proposer
    assert isinstance(scripted, Scripted)
    for turn in range(60):
        speculator.draft([(track, 100)], 1, turn)
        track.drawn([7], len(track.draft_ids))
    scripted.chance, scripted.match = 1.0, 16
    lengths = []
    for turn in range(60, 80):
        speculator.draft([(track, 100)], 1, turn)
        lengths.append(len(track.draft_ids))
        track.drawn([7] * (lengths[-1] + 1), lengths[-1])
    assert max(lengths) > 4 and lengths[-1] > 0


def test_no_more_is_drafted_than_a_sequence_may_take() -> None:
    speculator = Speculator(Scripted(1.0, match=16))
    for _ in range(3):
        speculator.costs.learn(4, 0, 0, 0.01)
    tracks = [speculator.open(Text("a", b"", [], [])) for _ in range(4)]
    speculator.draft([*zip(tracks, [0, 1, 3, -1], strict=True)], 4, 0)
    assert [len(track.draft_ids) for track in tracks] == [0, 1, 3, 0]


def test_counts_tell_runs_drafted_and_accepted_tokens() -> None:
    speculator = Speculator(Scripted(1.0))
    track = speculator.open(Text("a", b"", [], []))
    track.proposed = Draft([1, 2, 3], 4)
    track.drawn([1, 2, 9], 2)
    track.drawn([5], 2)
    track.drawn([1], 0)
    assert speculator.experience.counts == {"scripted": Counts(2, 4, 2)}
    assert speculator.experience.news() == {"scripted": Counts(2, 4, 2)} and not speculator.experience.news()


@given(st.lists(st.floats(0, 1), max_size=16), st.floats(0, 1))
def test_a_falling_run_is_cut_where_it_falls_to_the_bar(chances: list[float], bar: float) -> None:
    run = sorted(chances, reverse=True)
    assert _num_above(run, bar) == sum(chance > bar for chance in run)


def test_chances_follow_what_happens_lately() -> None:
    chances = Chances()
    for _ in range(200):
        chances.learn(4, False)
    assert chances.of_run(Draft([1], 4)) == []
    for _ in range(100):
        chances.learn(4, True)
    (chance,) = chances.of_run(Draft([1], 4))
    assert chance > 0.8


def test_costs_are_measured_per_size_of_batch_and_forget_what_was_too_high() -> None:
    costs, rng = StepCosts(), random.Random(3)
    assert costs.relative(4) is None
    for step in range(500):
        drafts = rng.choice([0, 0, 4, 8]) if step > 5 else 0
        costs.learn(4, drafts, 4 * drafts, 0.01 * (1 + 0.4 * drafts / 4) * rng.choice([1, 1, 1, 1.02]))
    any_cost, cost = costs.relative(4) or (9.0, 9.0)
    assert any_cost + 1.5 * cost == pytest.approx(1.5 * 0.4, abs=0.08)
    assert costs.relative(5) is None and costs.relative(64) is None
    for _ in range(40):
        costs.learn(4, 8, 99, 0.2)
    assert sum(costs.relative(4) or ()) > 1
    for _ in range(5_000):
        costs.learn(4, 0, 0, 0.01)
    assert sum(costs.relative(4) or (9.0,)) < 0.4


def test_a_step_without_drafts_is_asked_for_now_and_then() -> None:
    costs = StepCosts()
    for _ in range(3):
        assert costs.relative(2) is None
        costs.learn(2, 0, 0, 0.01)
    num_drafted = 0
    while costs.relative(2) is not None:
        costs.learn(2, 4, 4, 0.01)
        num_drafted += 1
    assert 20 < num_drafted < 100
    costs.learn(2, 0, 0, 0.01)
    assert costs.relative(2) is not None


def test_drafts_that_cost_in_vain_rest_until_the_steps_without_have_made_that_good() -> None:
    costs, num_plain, num_tokens, seconds = StepCosts(), 0, 0, 0.0
    for _ in range(5_000):  # whatever costs and chances say, every step that may have drafts has one, which never holds
        has_draft = costs.relative(1) is not None
        num_plain += not has_draft
        step_s = 0.01 * (1 + 0.2 * has_draft)
        costs.learn(1, int(has_draft), 0, step_s)
        num_tokens, seconds = num_tokens + 1, seconds + step_s
    assert num_plain < 5_000 and seconds < 1.01 * 0.01 * num_tokens
    for _ in range(400):
        costs.learn(1, 0, 0, 0.01)
    before = costs.balance
    costs.learn(1, 4, 4, 0.012)
    assert costs.balance > min(before + 3, 3.9) and costs.relative(1) is not None


def test_no_step_has_more_drafts_than_the_balance_pays_for() -> None:
    costs = StepCosts()
    costs.balance = 2.0
    assert [costs.num_affordable(0.5, cost) for cost in (0.0, 0.05, 0.5, 5.0)] == [16, 16, 3, 1]
    costs.balance = 0.1
    assert [costs.num_affordable(0.5, cost) for cost in (0.0, 0.5)] == [1, 1]


def test_one_slow_step_does_not_stop_drafts_that_hold() -> None:
    costs = StepCosts()
    for step in range(200):
        is_plain = costs.relative(1) is None
        costs.learn(1, 0 if is_plain else 4, 0 if is_plain else 4, 50.0 if step == 100 else 0.012 - 0.002 * is_plain)
    assert costs.balance > 0


def test_a_sequence_begins_with_what_held_in_others() -> None:
    speculator = Speculator(Scripted(0.0))
    first, lengths = [], []
    for _ in range(20):
        track = speculator.open(Text("a", b"", [], []))
        for turn in range(6):
            speculator.costs.learn(1, 0, 0, 0.01)
            speculator.draft([(track, 100)], 1, turn)
            track.drawn([7], track.num_drafts)
            first.append(track.num_drafts)
        lengths.append(sum(first[-6:]))
    assert lengths[0] > 0 == max(lengths[10:])
