"""Forks: sequences with the same tokens are computed once, and each goes on as if it had been alone."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from kvasir.protocol.messages import Generate, Quota
from kvasir.protocol.sampling import Sampling
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.oracle_model import OracleStore
from tests.engine_helpers import SIZE, Rig, Stream, expected_tokens, make_generate, make_prompt
from tests.engine_loads import run_random_load

N = 4


class ForkRig(Rig):
    """Checks in every step that what is written to is nobody else's."""

    def __init__(self, num_blocks: int = 64, **options: int) -> None:
        super().__init__(num_blocks, **options)
        forward = self.model.forward

        def watch(slices: list[SequenceSlice], kv: OracleStore) -> list[int]:
            alone = Counter(block_id for s in self.engine._sequences.running for block_id in s.table.private_ids())
            for piece in slices:
                for block_id in piece.block_table[piece.start // SIZE : math.ceil(piece.end / SIZE)]:
                    assert alone[block_id] == 1, "a block is written that others read"
            return forward(slices, kv)

        self.model.forward = watch  # type: ignore[method-assign]

    def num_computed(self, num_prompt: int, first_step: int = 0) -> int:
        """How many tokens at the first `num_prompt` positions were computed, from `first_step` on."""
        pieces = [piece for step in self.model.steps[first_step:] for piece in step]
        return sum(min(piece.end, num_prompt) - min(piece.start, num_prompt) for piece in pieces)

    @property
    def num_used(self) -> int:
        statistics = self.cache.statistics()
        return statistics.num_blocks - statistics.num_free - statistics.num_idle

    @property
    def num_forked(self) -> int:
        return self.engine.num_forked


def make_choices(prompt: list[int], max_tokens: int = 9, count: int = N, **options: object) -> list[Generate]:
    """The choices of one request, each with a seed of its own."""
    return [
        make_generate(prompt, max_tokens, req_id=b"%d" % i, sampling=Sampling(seed=1000 + i), **options)
        for i in range(count)
    ]


def assert_as_alone(choices: list[Generate], streams: list[Stream], prompt: list[int]) -> None:
    for choice, stream in zip(choices, streams, strict=True):
        assert stream.token_ids == expected_tokens(prompt, choice.max_tokens, choice.sampling)
        assert stream.finish_reason == "length"


@pytest.mark.parametrize("budget", [64, 7])
@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 16, 17, 50])
def test_choices_of_one_prompt_compute_it_once_and_draw_what_each_would_draw_alone(
    length: int, is_cached: bool, budget: int
) -> None:
    rig, prompt = ForkRig(max_step_tokens=budget), make_prompt(length)
    if is_cached:
        rig.submit(make_generate(prompt, 1, req_id=b"before"))
        rig.run()
    first_step = len(rig.model.steps)
    choices = make_choices(prompt)
    streams = [rig.submit(choice) for choice in choices]
    while not streams[0].token_ids:
        rig.step()
    assert [len(stream.token_ids) for stream in streams] == [1] * N, "all have their first token in the same step"
    num_cached = (length - 1) // SIZE * SIZE if is_cached else 0
    num_again = is_cached and length % SIZE == 0  # the last token is computed anew, in a block of its own
    assert rig.num_computed(length, first_step) == length - num_cached
    assert rig.num_used == length // SIZE + N * (length % SIZE > 0) + num_again
    rig.run()
    assert_as_alone(choices, streams, prompt)
    assert [stream.num_cached for stream in streams] == [num_cached] + [length // SIZE * SIZE] * (N - 1)
    assert rig.num_forked == N - 1


def test_an_equal_request_that_comes_while_the_prompt_is_computed_joins_and_waits_as_long_as_that_takes() -> None:
    rig, prompt = ForkRig(max_step_tokens=8), make_prompt(61)
    choices = make_choices(prompt)
    streams = [rig.submit(choices[0])]
    for choice in choices[1:]:
        rig.step()
        rig.clock.now += 2 * rig.engine.limits.share_wait_s
        streams.append(rig.submit(choice))
    rig.run()
    assert (rig.num_computed(61), rig.num_forked) == (61, N - 1)
    assert_as_alone(choices, streams, prompt)


def test_who_comes_after_the_first_token_was_drawn_computes_what_is_not_cached() -> None:
    rig, prompt = ForkRig(), make_prompt(14)
    choices = make_choices(prompt, count=2)
    streams = [rig.submit(choices[0])]
    rig.step()
    streams.append(rig.submit(choices[1]))
    rig.run()
    assert (rig.num_forked, streams[1].num_cached) == (0, 12)
    assert_as_alone(choices, streams, prompt)


def test_equal_tokens_of_two_tenants_or_in_other_zones_are_no_forks() -> None:
    rig, prompt = ForkRig(), make_prompt(14)
    options = [{"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "num_public": 1}, {"tenant": "b", "num_public": 2}]
    streams = [rig.submit(make_generate(prompt, 3, req_id=b"%d" % i, **each)) for i, each in enumerate(options)]
    rig.run()
    assert rig.num_forked == 0
    assert [stream.token_ids for stream in streams] == [expected_tokens(prompt, 3)] * 4


def test_tenants_of_one_group_share_full_blocks_but_do_not_fork() -> None:
    rig, prompt = ForkRig(), make_prompt(14)
    commands = [make_generate(prompt, 3, req_id=b"%d" % i) for i in range(2)]
    commands[1].tenant = "b"
    streams = [rig.submit(command) for command in commands]
    rig.run()
    assert (rig.num_forked, [stream.num_cached for stream in streams]) == (0, [0, 12])
    assert [stream.token_ids for stream in streams] == [expected_tokens(prompt, 3)] * 2


def test_penalties_of_a_fork_see_its_own_prompt_and_answer() -> None:
    rig, whole = ForkRig(), make_prompt(10)
    rows = []
    draw = rig.model.sample
    rig.executor.sampler = lambda hashes, given, masks: rows.extend(given) or draw(hashes, given)
    penalised = Sampling(temperature=0.0, frequency_penalty=1.0)
    rig.submit(make_generate(whole, 1, req_id=b"1", sampling=penalised))
    rig.submit(make_generate(whole[:6], 1, req_id=b"2", delivered=whole[6:], sampling=penalised))
    rig.run()
    assert rig.num_forked == 1
    seen = {(tuple(sorted(t for t, count in row.counts.items() if not count)), len(row.output_ids)) for row in rows}
    assert seen == {(tuple(sorted(set(whole))), 1), (tuple(sorted(set(whole[:6]))), 5)}
    assert {row.position for row in rows} == {10}


@pytest.mark.parametrize("max_tokens", [(1, 9, 9, 1), (9, 1, 1, 1), (1, 1, 1, 1)])
def test_each_choice_ends_for_itself_with_its_first_token_too(max_tokens: tuple[int, ...]) -> None:
    rig, prompt = ForkRig(), make_prompt(14)
    choices = [make_choices(prompt, count)[i] for i, count in enumerate(max_tokens)]
    streams = [rig.submit(choice) for choice in choices]
    rig.run()
    assert rig.num_forked == N - 1
    assert_as_alone(choices, streams, prompt)


@pytest.mark.parametrize("victim", range(N))
@pytest.mark.parametrize("num_steps", [0, 2, 6])
def test_the_others_go_on_when_one_is_aborted(victim: int, num_steps: int) -> None:
    rig, prompt = ForkRig(max_step_tokens=8), make_prompt(30)
    choices = make_choices(prompt)
    streams = [rig.submit(choice) for choice in choices]
    for _ in range(num_steps):
        rig.step()
    rig.engine.abort(b"%d" % victim, 1)
    rig.run()
    aborted, _ = streams.pop(victim), choices.pop(victim)
    assert aborted.finish_reason == "abort"
    assert_as_alone(choices, streams, prompt)
    assert rig.num_computed(30) < 30 + SIZE, "who takes over goes on from the blocks that there are"


def test_handing_all_back_ends_each_choice_once() -> None:
    rig = ForkRig(max_step_tokens=8)
    streams = [rig.submit(choice) for choice in make_choices(make_prompt(30))]
    rig.step()
    rig.engine.abort_all("the worker leaves")
    rig.run()
    assert [stream.finish_reason for stream in streams] == ["abort"] * N
    assert rig.num_used == 0


def test_no_more_fork_than_may_run_and_the_rest_follow_later() -> None:
    rig, prompt = ForkRig(max_requests=2), make_prompt(14)
    choices = make_choices(prompt)
    streams = [rig.submit(choice) for choice in choices]
    rig.step()
    assert (len(rig.engine._sequences.running), rig.num_forked) == (2, 1)
    rig.run()
    assert_as_alone(choices, streams, prompt)


def test_forks_fit_under_the_cap_of_their_owner_or_wait() -> None:
    rig, prompt = ForkRig(), make_prompt(22)
    rig.cache.set_quotas({"a": Quota(cap=9)})
    choices = make_choices(prompt, 8)
    streams = [rig.submit(choice) for choice in choices]
    while rig.engine.has_work:
        rig.step()
        assert rig.cache.accounts()[0].num_held <= 9
    assert 0 < rig.num_forked < N - 1
    assert_as_alone(choices, streams, prompt)


def test_a_fork_whose_original_cannot_publish_computes_its_prompt_itself() -> None:
    rig, prompt = ForkRig(), make_prompt(14)
    other = make_generate(make_prompt(14, salt=1), 9, req_id=b"other")
    rig.submit(other)
    rig.run()
    choices = make_choices(prompt, count=2)
    for choice in choices:
        choice.prefix_hashes = other.prefix_hashes  # as if they collided
    streams = [rig.submit(choice) for choice in choices]
    rig.run()
    assert rig.num_forked == 0
    assert_as_alone(choices, streams, prompt)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_random_choices_over_tiny_pools_all_get_their_tokens_or_a_reason(is_ahead: bool) -> None:
    rigs = []
    for seed in range(8):
        dice = random.Random(seed)
        rigs.append(ForkRig(dice.choice([12, 20, 36]), max_requests=8, max_step_tokens=9, is_ahead=is_ahead))
        run_random_load(rigs[-1], dice, 40, has_quotas=True)
    assert sum(rig.num_forked for rig in rigs) > 50
    assert sum(rig.engine.num_preempted for rig in rigs) > 50
