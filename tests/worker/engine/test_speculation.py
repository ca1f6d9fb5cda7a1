"""Drafts change when tokens come, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import pytest

from kvasir.protocol.messages import Generate, Output
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import num_tokens, unpack_tokens
from kvasir.worker.engine.step import Mask, Sampled, SampleRow
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.proposer import Draft, Text
from kvasir.worker.speculation.speculator import Speculator
from kvasir.worker.speculation.track import Counts
from tests.engine_helpers import GREEDY, SIZE, FixedCosts, Rig, Stream, expected_tokens, make_generate, make_prompt
from tests.engine_loads import run_random_load

SEEDED = Sampling(temperature=0.7, seed=12345)


class Prophet:
    """Knows the answers to prompts, and proposes them with each token right with probability `chance`."""

    name = "prophet"

    def __init__(self, chance: float, seed: int = 0) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.chance, self.dice = chance, random.Random(seed)
        self.closed: list[Text] = []

    def open(self, text: Text) -> _ProphetReader:
        return _ProphetReader(self, text)

    def close(self, text: Text) -> None:
        self.closed.append(text)

    def forget(self, tenant: str) -> None: ...


@dataclass
class _ProphetReader:
    prophet: Prophet
    text: Text

    def propose(self, limit: int) -> Draft:
        prophet, done = self.prophet, len(self.text.output_ids)
        right = prophet.answers[tuple(self.text.prompt_ids)][done : done + limit]
        return Draft([token if prophet.dice.random() < prophet.chance else token ^ 1 for token in right], 16)


class DraftRig(Rig):
    """Counts how many tokens came at once and were computed in vain."""

    def __init__(self, chance: float | None = 0.8, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.prophet = Prophet(chance or 0.0, seed)
        self.longest = self.num_extra = 0
        if chance is not None:
            self.engine.speculator = Speculator(self.prophet)
            self.engine.speculator.costs = FixedCosts()

    def submit(self, command: Generate) -> Stream:
        tokens = unpack_tokens(command.token_ids)
        prompt, delivered = tokens[: command.num_prompt_tokens], tokens[command.num_prompt_tokens :]
        self.prophet.answers[tuple(prompt)] = delivered + expected_tokens(tokens, command.max_tokens, command.sampling)
        return super().submit(command)

    def _take(self, output: Output) -> None:
        super()._take(output)
        self.longest = max(self.longest, num_tokens(output.token_ids))
        self.num_extra += output.num_extra_tokens

    @property
    def counts(self) -> tuple[int, int, int]:
        counts = self.engine.speculator.experience.counts.get("prophet", Counts())
        return counts.num_runs, counts.num_drafted, counts.num_accepted


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_an_answer_is_the_same_token_for_token_and_comes_in_fewer_steps(chance: float, sampling: Sampling) -> None:
    rig, prompt = DraftRig(chance), make_prompt(13)
    stream = rig.submit(make_generate(prompt, 60, sampling=sampling))
    rig.run()
    assert (stream.token_ids, stream.finish_reason) == (expected_tokens(prompt, 60, sampling), "length")
    _, num_drafted, num_accepted = rig.counts
    assert rig.num_extra == num_drafted - num_accepted
    assert len(rig.model.steps) == 60 - num_accepted
    assert num_accepted > 40 if chance == 1.0 else num_drafted > num_accepted
    assert rig.prophet.closed[0].output_ids == stream.token_ids


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_loads_over_tiny_pools_have_the_same_tokens(seed: int, is_ahead: bool) -> None:
    dice = random.Random(seed)
    options = {"max_requests": dice.choice([3, 8]), "max_step_tokens": dice.choice([16, 40])}
    rig = DraftRig(dice.choice([0.5, 0.9]), seed, num_blocks=dice.choice([14, 24, 40]), is_ahead=is_ahead, **options)
    run_random_load(rig, dice, 40)
    assert rig.counts[2] > 20 and rig.longest > 2


def test_random_loads_preempt_and_fork_where_drafts_are_computed() -> None:
    rig = DraftRig(0.9, num_blocks=14, max_requests=8)
    prompt = make_prompt(9)
    streams = [
        rig.submit(make_generate(prompt, 24, req_id=b"%d" % i, sampling=Sampling(temperature=0.0, logprobs=i % 2)))
        for i in range(6)
    ]
    rig.run()
    assert all(stream.token_ids == expected_tokens(prompt, 24) for stream in streams)
    assert rig.engine.num_forked > 0 and rig.engine.num_preempted > 0 and rig.counts[2] > 20


@pytest.mark.parametrize("end", ["stop id", "eos", "max_tokens"])
def test_an_end_inside_an_accepted_run_is_exactly_there(end: str) -> None:
    whole = expected_tokens(make_prompt(9), 30)
    rig = DraftRig(1.0, eos=whole[12] if end == "eos" else -1)
    options = {"stop_token_ids": [whole[12]]} if end == "stop id" else {}
    max_tokens = 13 if end == "max_tokens" else 30
    stream = rig.submit(make_generate(make_prompt(9), max_tokens, **options))
    rig.run()
    assert stream.token_ids == whole[:13]
    assert stream.finish_reason == ("length" if end == "max_tokens" else "stop")
    assert rig.longest > 3
    assert rig.cache.num_unused == 64


def test_what_is_published_is_what_would_be_without_drafts() -> None:
    resident, cached = [], []
    for chance in (None, 0.7, 1.0):
        rig = DraftRig(chance)
        prompt = make_prompt(10)
        for max_tokens in (1, 9, 30, 30):
            stream = rig.submit(make_generate(prompt, max_tokens, req_id=b"%d" % len(prompt)))
            rig.run()
            prompt = prompt + stream.token_ids + make_prompt(3, salt=len(prompt))
            cached.append(stream.num_cached)
        resident.append(sorted(rig.followed))
    assert resident[0] == resident[1] == resident[2]
    assert cached[:4] == cached[4:8] == cached[8:] and cached[-1]


def test_each_draw_has_the_rows_that_it_has_without_drafts() -> None:
    """Penalties, constraints and stop ids see the tokens before, those of drafts among them."""
    rows: list[dict[int, tuple[Any, ...]]] = []
    for chance in (None, 0.6):
        rig, seen = DraftRig(chance), []
        draw = rig.model.sample

        def spy(
            hashes: list[int], given: Sequence[SampleRow], masks: Sequence[Mask], seen: Any = seen, draw: Any = draw
        ) -> list[Sampled]:
            seen += [(r.position, [*r.output_ids], {**r.counts}, r.params, r.stop_token_ids) for r in given]
            return draw(hashes, given)

        rig.executor.sampler = spy
        penalised = Sampling(temperature=0.0, presence_penalty=1.0)
        stream = rig.submit(make_generate([1, 2, 8, 3], 20, delivered=[8, 9], sampling=penalised, stop_token_ids=[5]))
        rig.run()
        output = [8, 9, *stream.token_ids]
        rows.append({row[0]: row[1:] for row in seen if row[1] == output[: len(row[1])]})
        for _, output_ids, counts, *_ in seen:
            assert counts == {**dict.fromkeys([1, 2, 8, 3], 0), **Counter(output_ids)}
    assert rows[0] == rows[1] and len(rows[0]) == 20


def test_drafts_wait_for_blocks_that_others_need_and_preempt_nobody() -> None:
    for chance in (None, 1.0):
        rig = DraftRig(chance, num_blocks=12)
        streams = [rig.submit(make_generate(make_prompt(8, salt=i), 16, req_id=b"%d" % i)) for i in range(2)]
        rig.run()
        assert [s.token_ids for s in streams] == [expected_tokens(make_prompt(8, salt=i), 16) for i in range(2)]
        assert rig.engine.num_preempted == 0


def test_drafts_take_part_in_the_token_budget_and_leave_half_of_it_to_prompts() -> None:
    rig = DraftRig(1.0, max_step_tokens=12, num_blocks=128)
    for i in range(4):
        rig.submit(make_generate(make_prompt(5, salt=i), 60, req_id=b"%d" % i))
    for _ in range(8):
        rig.step()
    long = rig.submit(make_generate(make_prompt(50, salt=9), 4, req_id=b"long"))
    num_steps = len(rig.model.steps)
    while not long.token_ids:
        rig.step()
    assert len(rig.model.steps) - num_steps <= 14
    rig.run()
    assert max(sum(len(piece.token_ids) for piece in step) for step in rig.model.steps) <= 12
    assert rig.longest > 1


def test_a_step_without_memory_or_finite_logits_ends_as_without_drafts() -> None:
    prompt = make_prompt(9)
    whole = expected_tokens(prompt, 30)
    rig = DraftRig(1.0)
    rig.model.max_tokens = 9
    stream = rig.submit(make_generate(prompt[:8], 30))
    rig.run()
    assert stream.token_ids == expected_tokens(prompt[:8], 30) and rig.longest > 1
    outcomes = []
    for chance in (None, 1.0):
        rig = DraftRig(chance)
        sample = rig.executor.sampler

        def sick(hashes: Any, rows: Sequence[SampleRow], masks: Any, sample: Any = sample) -> list[Sampled | None]:
            drawn = sample(hashes, rows, masks)
            return [None if row.position >= 20 else sampled for row, sampled in zip(rows, drawn, strict=True)]

        rig.executor.sampler = sick
        stream = rig.submit(make_generate(prompt, 30))
        rig.run()
        outcomes.append((stream.token_ids, stream.finish_reason, stream.error.partition("(")[0]))
        assert rig.engine.num_not_finite == 1
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == whole[:11]


def test_a_step_ahead_is_launched_while_drafts_are_not_worth_a_look() -> None:
    rig = DraftRig(0.0, is_ahead=True)
    rig.engine.speculator.costs = FixedCosts(0.3)
    for i in range(3):
        rig.submit(make_generate(make_prompt(9, salt=i), 60, req_id=b"%d" % i))
    num_ahead = 0
    while rig.engine.has_work:
        rig.step()
        num_ahead += bool(rig.engine._flights)
    assert num_ahead > 0.6 * len(rig.model.steps)


def test_lookup_speeds_up_what_is_said_again_for_its_tenant_alone() -> None:
    """The second answer is a copy of the first: only the tenant that got the first one profits, and only from it."""
    steps = {}
    for tenant, options in {"a": {}, "b": {}, "a, cleared": {}, "a, leaves nothing": {"no_store": True}}.items():
        rig = Rig(num_blocks=128)
        rig.engine.speculator = Speculator(Lookup())
        rig.engine.speculator.costs = FixedCosts()
        prompt = make_prompt(SIZE * 3 + 1)
        rig.submit(make_generate(prompt, 40, req_id=b"1", **options))
        rig.run()
        if "cleared" in tenant:
            rig.engine.clear_tenant("a")
        num_before = len(rig.model.steps)
        stream = rig.submit(make_generate(prompt, 40, req_id=b"2", tenant=tenant[0]))
        rig.run()
        assert stream.token_ids == expected_tokens(prompt, 40)
        steps[tenant] = len(rig.model.steps) - num_before
    assert steps["a"] < 15
    assert steps["b"] == steps["a, cleared"] == steps["a, leaves nothing"] >= 40


def test_the_hit_rate_is_that_without_drafts() -> None:
    """Twelve conversations, of which some come back often, over a pool for half of them; some drafts hold."""
    without, with_drafts = (mean(_hit_rate(chance, seed) for seed in range(8)) for chance in (None, 0.7))
    assert 0.4 < without < 0.6 and abs(with_drafts - without) < 0.03


def _hit_rate(chance: float | None, seed: int) -> float:
    """Return the share of prompt tokens that were cached, four requests at a time."""
    dice, rig = random.Random(seed), DraftRig(chance, seed, num_blocks=100, max_requests=4)
    talks = [make_prompt(dice.randrange(8, 30), salt=100 * seed + i) for i in range(12)]
    going: dict[int, Stream] = {}
    num_sent = num_given = num_cached = 0
    while num_sent < 120 or going:
        while num_sent < 120 and len(going) < 4:
            which = min(int(dice.expovariate(0.3)), 11)
            while which in going:
                which = (which + 1) % 12
            if len(talks[which]) >= 115:  # another one begins
                talks[which] = make_prompt(dice.randrange(8, 30), salt=10_000 + num_sent)
            talks[which] = [*talks[which], *make_prompt(3, salt=num_sent)]
            going[which] = rig.submit(make_generate(talks[which], 12, req_id=b"%d" % num_sent))
            num_sent += 1
        rig.step()
        for which, stream in list(going.items()):
            if stream.finish_reason is not None:
                num_given, num_cached = num_given + len(talks[which]), num_cached + (stream.num_cached or 0)
                talks[which] = talks[which] + stream.token_ids
                del going[which]
    return num_cached / num_given
