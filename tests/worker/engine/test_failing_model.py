"""An engine whose model gives no numbers, or runs out of memory."""

from __future__ import annotations

import pytest

from kvasir.protocol.sampling import Sampling
from tests.engine_helpers import Rig, expected_tokens, make_generate, make_prompt


def test_a_request_without_finite_logits_ends_with_an_error_that_names_the_step_and_nobody_else_does() -> None:
    rig, sick, well = Rig(), make_prompt(13, salt=1), make_prompt(13, salt=2)
    rig.model.sick_token = sick[0]
    stream = rig.submit(make_generate(sick, 5, req_id=b"sick"))
    other = rig.submit(make_generate(well, 5, req_id=b"well"))
    rig.run()
    assert (stream.token_ids, stream.finish_reason) == ([], "error")
    assert "logits for token 13 are not finite" in stream.error
    assert other.token_ids == expected_tokens(well, 5)


def test_blocks_of_a_step_without_finite_logits_are_not_published() -> None:
    rig, prompt = Rig(), make_prompt(13)
    rig.model.sick_token = prompt[0]
    rig.submit(make_generate(prompt, 5))
    rig.run()
    assert not rig.engine.snapshot().hashes


def test_all_choices_of_a_request_without_finite_logits_end_and_count_once() -> None:
    rig, prompt = Rig(), make_prompt(13)
    rig.model.sick_token = prompt[0]
    streams = [rig.submit(make_generate(prompt, 5, req_id=bytes([i]))) for i in range(3)]
    rig.run()
    assert [stream.finish_reason for stream in streams] == ["error"] * 3
    assert rig.engine.num_not_finite == 1


def test_finite_logits_of_another_sequence_show_that_the_worker_is_well() -> None:
    rig, sick = Rig(), make_prompt(13)
    rig.model.sick_token = sick[0]
    for i in range(2):
        rig.submit(make_generate(sick, 5, req_id=bytes([i])))
        rig.run()
    assert rig.engine.num_not_finite == 2
    rig.submit(make_generate(make_prompt(9, salt=1), 5, req_id=b"well"))
    rig.run()
    assert rig.engine.num_not_finite == 0


@pytest.mark.parametrize("max_tokens", [1, 7, 40])
def test_a_step_that_runs_out_of_memory_is_computed_again_in_smaller_ones(max_tokens: int) -> None:
    rig = Rig(256, max_step_tokens=256)
    prompts = [make_prompt(50, salt) for salt in range(4)]
    rig.model.max_tokens = max(max_tokens, 16)
    streams = [rig.submit(make_generate(p, 6, req_id=bytes([i]))) for i, p in enumerate(prompts)]
    rig.step()
    assert rig.engine.num_preempted and rig.engine.has_work
    assert not any(stream.finish_reason for stream in streams)
    rig.model.max_tokens = 64  # one sequence at a time, in the smallest steps
    rig.run()
    assert [stream.token_ids for stream in streams] == [expected_tokens(prompt, 6) for prompt in prompts]
    assert rig.engine.num_out_of_memory > 0
    rig.submit(make_generate(make_prompt(50, salt=9), 1, req_id=b"later"))
    assert rig.step().load.num_prefill_tokens == 50, "the limits of a step stayed small"


def test_a_sequence_that_fails_alone_in_the_smallest_step_ends_and_the_others_go_on() -> None:
    rig, long, short = Rig(256, max_step_tokens=256), make_prompt(90), make_prompt(3, salt=1)
    rig.model.max_tokens = 20
    failing = rig.submit(make_generate(long, 6, req_id=b"long"))
    rig.run()
    served = rig.submit(make_generate(short, 6, req_id=b"short"))
    rig.run()
    assert failing.finish_reason == "error" and "too little memory" in failing.error
    assert served.token_ids == expected_tokens(short, 6)
    rig.model.max_tokens = 1 << 30
    again = rig.submit(make_generate(long, 6, req_id=b"again"))
    rig.run()
    assert again.token_ids == expected_tokens(long, 6)


def test_forks_draw_by_their_own_seeds() -> None:
    rig, prompt = Rig(), make_prompt(13)
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in (11, 12, 13)]
    streams = [rig.submit(make_generate(prompt, 6, req_id=bytes([i]), sampling=s)) for i, s in enumerate(seeds)]
    rig.run()
    assert rig.engine.num_forked == 2
    assert [stream.token_ids for stream in streams] == [expected_tokens(prompt, 6, s) for s in seeds]
    assert len({tuple(stream.token_ids) for stream in streams}) == 3
