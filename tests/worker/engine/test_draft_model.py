"""A draft model runs ahead in a pool of its own: what it drafts is right whenever its own pool is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from kvasir.protocol.messages import Output
from kvasir.protocol.sampling import Sampling
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.step import Mask, OutOfMemory, Sampled, SampleRow, SequenceSlice
from kvasir.worker.model.oracle_model import OracleConfig, OracleModel
from kvasir.worker.speculation.draft_model import DraftModel, Job, Round
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.proposer import Draft, Text
from kvasir.worker.speculation.speculator import CATCH_UP_TOKENS, Speculator
from kvasir.worker.speculation.track import Counts
from tests.engine_helpers import (
    GREEDY,
    SIZE,
    FixedCosts,
    Rig,
    WatchedStore,
    expected_tokens,
    make_generate,
    make_prompt,
)
from tests.engine_loads import run_random_load

SEEDED = Sampling(temperature=0.7, seed=12345)


class Twin(OracleModel):
    """The model that answers, once more, but for what it says at `wrong_of` 8 positions: so where it is not meant to be
    wrong, it is right if, and only if, its pool holds what it should."""

    def __init__(self, wrong_of: int = 0) -> None:
        super().__init__(OracleConfig())
        self.wrong_of = wrong_of
        self.steps: list[list[SequenceSlice]] = []
        self.num_prompt: set[int] = set()  # as rows have it
        self.fails = False

    def forward(self, slices: list[SequenceSlice], kv: Any) -> list[int]:
        if slices:
            self.steps.append(slices)
        slots = [
            piece.block_table[p // SIZE] * SIZE + p % SIZE for piece in slices for p in range(piece.start, piece.end)
        ]
        assert len({*slots}) == len(slots), "written twice"
        if self.fails:
            raise OutOfMemory("no memory for drafts")
        return super().forward(slices, kv)

    def is_wrong(self, position: int) -> bool:
        return position * 2654435761 % 997 % 8 < self.wrong_of

    def sample(self, hashes: Sequence[int], rows: Sequence[SampleRow], masks: Sequence[Mask] = ()) -> list[Sampled]:
        assert all(row.params.logprobs is None for row in rows)
        self.num_prompt |= {row.position - len(row.output_ids) for row in rows}
        drawn = super().sample(hashes, rows, masks)
        return [
            Sampled(draw.token_id ^ 1) if self.is_wrong(row.position) else draw
            for draw, row in zip(drawn, rows, strict=True)
        ]


class Blind(Lookup):
    """Finds nothing."""

    def open(self, text: Text) -> Any:
        return self

    def propose(self, limit: int) -> Draft:
        return Draft()


class CheckedDraftModel(DraftModel):
    """Compares every draft with what the model says after all tokens before it, computed without a pool."""

    twin: Twin
    num_checked = 0

    def run(self, jobs: Sequence[Job]) -> list[Round]:
        rounds = super().run(jobs)
        for job in jobs:
            sequence: Any = job.lead.sequence
            known = sequence.tokens(0, sequence.num_known)
            for i, draft_id in enumerate(job.draft_ids):
                [right] = expected_tokens(known + job.draft_ids[:i], 1, sequence.sampling)
                assert draft_id == right ^ self.twin.is_wrong(len(known) + i)
            assert len(job.draft_ids) <= job.num_drafts
            self.num_checked += len(job.draft_ids)
        return rounds


class MoodyCosts(FixedCosts):
    """Asks for steps without drafts, too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice = random.Random(seed)

    def relative(self, num_sequences: int) -> tuple[float, float] | None:
        return None if self.dice.random() < 0.3 else (0.0, 0.0)


class TwinRig(Rig):
    """Checks every draft."""

    def __init__(
        self, wrong_of: int = 0, *, lookup: bool = False, window: int = 1 << 20, vocab: int = 4096, **options: Any
    ) -> None:
        super().__init__(**options)
        self.twin, self.num_extra = Twin(wrong_of), 0
        num_blocks = self.cache.pool.num_blocks
        self.twin_kv = WatchedStore(num_blocks, self.size)
        executor = self.twin_executor = LocalExecutor(self.twin, self.twin_kv, self.twin.sample)
        self.draft_model = CheckedDraftModel(
            executor, num_blocks, self.size, vocab_size=vocab, window=window, token_work=0.25, clock=self.clock
        )
        self.draft_model.twin = self.twin
        self.speculator = self.engine.speculator = Speculator(Lookup() if lookup else Blind(), self.draft_model)
        self.speculator.costs = FixedCosts()

    def _take(self, output: Output) -> None:
        super()._take(output)
        self.num_extra += output.num_extra_tokens

    @property
    def counts(self) -> Counts:
        return self.speculator.experience.counts.get("model", Counts())

    @property
    def num_computed(self) -> int:
        """Tokens that the draft model has computed."""
        return sum(len(piece.token_ids) for step in self.twin.steps for piece in step)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_draft_model_of_the_same_mind_is_always_right_and_computes_each_token_once(sampling: Sampling) -> None:
    rig, prompt = TwinRig(), make_prompt(13)
    stream = rig.submit(make_generate(prompt, 60, sampling=sampling))
    rig.run()
    assert stream.token_ids == expected_tokens(prompt, 60, sampling)
    assert rig.counts.num_accepted == rig.counts.num_drafted > 40
    assert len(rig.model.steps) == 60 - rig.counts.num_accepted
    assert rig.num_computed <= 13 + 60
    assert rig.twin.num_prompt == {13}, "drawn as after other tokens"


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_loads_over_tiny_pools_have_the_same_tokens_and_no_draft_is_wrong_but_those_meant_to_be(
    seed: int, is_ahead: bool
) -> None:
    dice = random.Random(seed)
    options = {"max_requests": dice.choice([3, 8]), "max_step_tokens": dice.choice([16, 40])}
    rig = TwinRig(
        dice.choice([0, 0, 2]), lookup=seed % 2 == 1, num_blocks=dice.choice([14, 24, 40]), is_ahead=is_ahead, **options
    )
    rig.speculator.costs = MoodyCosts(seed)
    run_random_load(rig, dice, 50)
    assert rig.counts.num_accepted > 20 and rig.draft_model.num_checked >= rig.counts.num_drafted


@pytest.mark.parametrize("wrong_of", [0, 2])
def test_rejected_drafts_and_what_the_draft_model_computes_are_work_of_the_request(wrong_of: int) -> None:
    rig = TwinRig(wrong_of)
    rig.submit(make_generate(make_prompt(13), 60))
    rig.run()
    work = rig.counts.num_drafted - rig.counts.num_accepted + 0.25 * rig.num_computed
    assert rig.num_computed > 50 and work - 1 < rig.num_extra <= work


def test_preempted_and_forked_sequences_have_right_drafts() -> None:
    rig, prompt = TwinRig(num_blocks=14, max_requests=8), make_prompt(9)
    streams = [
        rig.submit(make_generate(prompt, 24, req_id=b"%d" % i, sampling=Sampling(temperature=0.0, logprobs=i % 2)))
        for i in range(6)
    ]
    rig.run()
    assert all(stream.token_ids == expected_tokens(prompt, 24) for stream in streams)
    assert rig.engine.num_forked > 0 and rig.engine.num_preempted > 0 and rig.counts.num_accepted > 20


def test_what_sequences_share_is_computed_once_by_the_draft_model_too_and_not_across_tenants() -> None:
    rig, prompt = TwinRig(num_blocks=200), make_prompt(40)
    computed = []
    for tenant in "aab":
        rig.submit(make_generate(prompt, 12, req_id=b"%d" % len(computed), tenant=tenant, no_store=False))
        rig.run()
        computed.append(rig.num_computed)
    first, second, third = computed[0], computed[1] - computed[0], computed[2] - computed[1]
    assert first >= 40 and second <= first - 36 and third == first


def test_a_draft_model_takes_over_where_another_sequence_has_come_while_it_runs() -> None:
    """Both have the same prompt. The second one's pool is what the first has computed since."""
    rig, prompt = TwinRig(num_blocks=200), make_prompt(4 * CATCH_UP_TOKENS // 3)
    for i in range(2):
        rig.submit(make_generate([*prompt, *make_prompt(1, salt=i)], 30, req_id=b"%d" % i))
    rig.run()
    assert rig.counts.num_accepted > 20
    assert rig.num_computed < 2 * len(prompt)


def test_a_long_text_is_caught_up_with_in_pieces() -> None:
    rig, prompt = TwinRig(num_blocks=400, max_step_tokens=2000), make_prompt(3 * CATCH_UP_TOKENS)
    stream = rig.submit(make_generate(prompt, 20))
    rig.run()
    assert stream.token_ids == expected_tokens(prompt, 20)
    assert max(sum(len(piece.token_ids) for piece in step) for step in rig.twin.steps) <= CATCH_UP_TOKENS + SIZE
    assert rig.counts.num_accepted > 10


def test_a_text_is_not_caught_up_with_when_that_takes_longer_than_drafts_will_save() -> None:
    for token_s, is_worth_it in ((0.0001, True), (1.0, False)):
        rig = TwinRig(num_blocks=100)
        rig.speculator.costs.learn(1, 0, 0, 1.0)
        rig.speculator.costs.rounds.token_s = token_s
        rig.submit(make_generate(make_prompt(200), 20))
        rig.run()
        assert bool(rig.twin.steps) == is_worth_it


def test_a_useless_draft_model_is_left_alone_and_tried_again_seldom() -> None:
    rig = TwinRig(8, num_blocks=100)
    rig.speculator.costs.cost = 0.1  # type: ignore[attr-defined]
    for i in range(30):
        rig.submit(make_generate(make_prompt(9, salt=i), 20, req_id=b"%d" % i))
        rig.run()
    assert rig.counts.num_accepted == 0 < rig.counts.num_drafted < 30
    rig.twin.wrong_of = 0
    for i in range(100):
        rig.submit(make_generate(make_prompt(9, salt=100 + i), 20, req_id=b"%d" % (100 + i)))
        rig.run()
    assert rig.counts.num_accepted > 500


def test_no_draft_goes_beyond_the_window_and_the_vocabulary_of_the_draft_model() -> None:
    rig, prompt = TwinRig(window=30), make_prompt(13)
    assert rig.submit(make_generate(prompt, 60)) and rig.run() is None
    assert max(piece.end for step in rig.twin.steps for piece in step) == 29
    rig, prompt = TwinRig(vocab=3500, num_blocks=100), [5, 6, 7]
    for i in range(20):
        stream = rig.submit(make_generate([*prompt, i], 10, req_id=b"%d" % i))
        rig.run()
        assert stream.token_ids == expected_tokens([*prompt, i], 10)
    assert all(max(piece.token_ids) < 3500 for step in rig.twin.steps for piece in step)
    assert rig.counts.num_drafted > 20


def test_a_draft_model_without_memory_or_numbers_costs_the_drafts_alone() -> None:
    rig, prompt = TwinRig(num_blocks=100), make_prompt(13)
    stream = rig.submit(make_generate(prompt, 200))
    for _ in range(8):
        rig.step()
    num_drafted, rig.twin.fails = rig.counts.num_drafted, True
    for _ in range(8):
        rig.step()
    assert num_drafted == rig.counts.num_drafted > 0 and stream.finish_reason is None
    rig.twin.fails = False
    sample = rig.twin_executor.sampler
    rig.twin_executor.sampler = lambda logits, rows, masks: [None] * len(rows)
    for _ in range(8):
        rig.step()
    assert num_drafted == rig.counts.num_drafted and stream.finish_reason is None
    rig.twin_executor.sampler = sample
    rig.run()
    assert stream.token_ids == expected_tokens(prompt, 200) and rig.counts.num_drafted > num_drafted


def test_a_block_that_comes_to_hold_something_again_is_not_taken_for_what_it_was() -> None:
    """Two texts that take turns in a pool of three blocks; the second one fills its last block in part."""
    rig = TwinRig(num_blocks=3)
    for i in range(12):
        prompt = make_prompt(5, salt=1) if i % 2 else make_prompt(3 + i % 4, salt=i)
        stream = rig.submit(make_generate(prompt, 12 - len(prompt), req_id=b"%d" % i, no_store=i % 3 == 0))
        rig.run()
        assert stream.token_ids == expected_tokens(prompt, 12 - len(prompt))
    assert rig.counts.num_drafted == rig.counts.num_accepted > 10
    assert {*rig.twin_kv.zeroed} == {0, 1, 2}
