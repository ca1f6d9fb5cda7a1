"""The engine over the oracle model: every token depends on every word in the paged store that came before it."""

import random
import time
from collections import Counter

import pytest

from kvasir.cache.block_pool import IntegrityError
from kvasir.protocol.messages import Generate, Quota
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.engine.step import Sampled, SampleRow, SequenceSlice
from kvasir.worker.model.oracle_model import OracleStore
from tests.engine_helpers import (
    GREEDY,
    SIZE,
    Rig,
    Stream,
    expected_tokens,
    make_generate,
    make_prompt,
)
from tests.engine_loads import run_random_load

SEEDED = Sampling(temperature=0.7, seed=12345)


def run_alone(prompt: list[int], max_tokens: int = 8, **options: object) -> Stream:
    rig = Rig()
    stream = rig.submit(make_generate(prompt, max_tokens, **options))  # type: ignore[arg-type]
    rig.run()
    return stream


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 100])
def test_a_stream_equals_the_model_without_any_store(length: int, sampling: Sampling) -> None:
    stream = run_alone(make_prompt(length), 20, sampling=sampling)
    assert stream.token_ids == expected_tokens(make_prompt(length), 20, sampling)
    assert (stream.finish_reason, stream.num_cached) == ("length", 0)


def test_prompts_are_computed_in_chunks_of_the_budget_and_batched_with_others() -> None:
    rig = Rig(max_step_tokens=10)
    prompts = [make_prompt(n, salt=n) for n in (33, 7, 21, 1)]
    streams = [rig.submit(make_generate(p, 12, req_id=bytes([i + 1]))) for i, p in enumerate(prompts)]
    rig.run()
    assert [s.token_ids for s in streams] == [expected_tokens(p, 12) for p in prompts]
    assert max(sum(len(piece.token_ids) for piece in step) for step in rig.model.steps) <= 10
    assert any(len({len(p.token_ids) for p in step}) > 1 for step in rig.model.steps), "nothing was ever mixed"


def test_the_same_prompt_again_is_cached_but_for_its_last_token() -> None:
    rig = Rig()
    for expected_cached in (0, 16 - SIZE):
        stream = rig.submit(make_generate(make_prompt(16), req_id=bytes([expected_cached + 1])))
        rig.run()
        assert (stream.num_cached, stream.token_ids) == (expected_cached, expected_tokens(make_prompt(16), 8))


def test_the_next_turn_of_a_conversation_hits_its_own_answer() -> None:
    rig = Rig()
    first = rig.submit(make_generate(make_prompt(10), 11, req_id=b"1"))
    rig.run()
    history = make_prompt(10) + first.token_ids + make_prompt(5, salt=1)
    second = rig.submit(make_generate(history, 4, req_id=b"2"))
    rig.run()
    assert second.num_cached == 20  # of 21 tokens the last one's keys were never computed
    assert second.token_ids == expected_tokens(history, 4)


def test_equal_prompts_of_two_tenants_share_the_public_zone_only() -> None:
    rig = Rig()
    cached = []
    for i, (tenant, num_public) in enumerate([("a", 2), ("b", 2), ("b", 2), ("c", 0)]):
        stream = rig.submit(make_generate(make_prompt(20), tenant=tenant, num_public=num_public, req_id=bytes([i + 1])))
        rig.run()
        cached.append(stream.num_cached)
        assert stream.token_ids == expected_tokens(make_prompt(20), 8)
    assert cached == [0, 2 * SIZE, 4 * SIZE, 0]


def test_a_request_resumed_elsewhere_goes_on_with_the_same_tokens() -> None:
    prompt, sampling = make_prompt(13), SEEDED
    whole = run_alone(prompt, 20, sampling=sampling).token_ids
    for num_delivered in (1, 3, 4, 11, 19):
        rig = Rig()
        command = make_generate(
            prompt, 20 - num_delivered, delivered=whole[:num_delivered], sampling=sampling, attempt=2
        )
        stream = rig.submit(command)
        rig.run()
        assert whole[:num_delivered] + stream.token_ids == whole
        assert stream.finish_reason == "length"


def test_no_more_than_the_prompt_counts_as_cached_where_an_answer_goes_on() -> None:
    rig, prompt = Rig(), make_prompt(13)
    whole = rig.submit(make_generate(prompt, 20, req_id=b"1"))
    rig.run()
    rest = rig.submit(make_generate(prompt, 9, delivered=whole.token_ids[:11], attempt=2, req_id=b"2"))
    rig.run()
    assert whole.token_ids[:11] + rest.token_ids == whole.token_ids
    assert rest.num_cached == 13, "20 tokens were found"


def test_penalties_see_the_prompt_and_all_generated_tokens_apart() -> None:
    rig = Rig()
    seen: list[SampleRow] = []
    draw = rig.model.sample

    def spy(hashes: list[int], rows: list[SampleRow], masks: object) -> list[Sampled]:
        seen.extend(SampleRow(r.params, r.position, list(r.output_ids), dict(r.counts)) for r in rows)
        return draw(hashes, rows)

    rig.executor.sampler = spy
    penalised = Sampling(temperature=0.0, presence_penalty=1.0)
    stream = rig.submit(make_generate([1, 2, 8, 3], 3, delivered=[8, 9], sampling=penalised))
    rig.run()
    first, second, _ = stream.token_ids
    assert [list(row.output_ids) for row in seen] == [[8, 9], [8, 9, first], [8, 9, first, second]]
    for row in seen:
        assert row.counts == {**dict.fromkeys([1, 2, 8, 3], 0), **Counter(row.output_ids)}


def test_tokens_are_counted_only_where_a_penalty_asks() -> None:
    rig = Rig()
    rig.submit(make_generate([1, 2, 3], 2, sampling=Sampling(logit_bias={1: 2.0})))
    (sequence,) = rig.engine._sequences.waiting
    rig.run()
    assert sequence.counts == {} and len(sequence.output_ids) == 2


def test_end_of_sequence_and_stop_tokens_end_a_stream_with_that_token() -> None:
    plain = run_alone(make_prompt(9), 30).token_ids
    eos, stop = plain[12], plain[5]
    cases = [({"stop_token_ids": [stop]}, -1, 6), ({}, eos, 13), ({"ignore_eos": True}, eos, 30)]
    for options, model_eos, length in cases:
        rig = Rig(eos=model_eos)
        stream = rig.submit(make_generate(make_prompt(9), 30, **options))  # type: ignore[arg-type]
        rig.run()
        assert stream.token_ids == plain[:length]
        assert stream.finish_reason == ("stop" if length < 30 else "length")


def test_the_sampler_is_told_which_tokens_would_end_a_sequence() -> None:
    rig, told = Rig(eos=7), []
    draw = rig.model.sample

    def spy(hashes: list[int], rows: list[SampleRow], masks: object) -> list[Sampled]:
        told.extend(row.stop_token_ids for row in rows)
        return draw(hashes, rows)

    rig.executor.sampler = spy
    rig.submit(make_generate([1, 2, 3], 1, stop_token_ids=[5], req_id=b"1"))
    rig.submit(make_generate([1, 2, 3], 1, stop_token_ids=[5], ignore_eos=True, req_id=b"2"))
    rig.run()
    assert sorted(map(sorted, told)) == [[5], [5, 7]]


def test_the_window_ends_a_stream_with_length() -> None:
    rig = Rig(max_context=20)
    stream = rig.submit(make_generate(make_prompt(15), 100))
    rig.run()
    assert (len(stream.token_ids), stream.finish_reason) == (5, "length")


def test_logprobs_come_with_every_token_where_asked_for() -> None:
    rig = Rig()
    rig.submit(make_generate(make_prompt(5), 3, sampling=Sampling(temperature=0, logprobs=2), req_id=b"1"))
    rig.submit(make_generate(make_prompt(5), 3, req_id=b"2"))
    rig.run()
    outputs = [output for report in rig.reports for output in report.outputs]
    assert {(o.req_id, len(o.logprobs)) for o in outputs} == {(b"1", 1), (b"2", 0)}
    assert all(len(o.logprobs[0].top) == 2 for o in outputs if o.req_id == b"1")


# ---- leaving nothing


def test_what_leaves_nothing_publishes_no_block_through_preemption_and_forks() -> None:
    rig = Rig(num_blocks=14)
    prompts = [make_prompt(9, salt=i) for i in (0, 1, 2, 2)]  # the last two are choices of one request
    streams = [
        rig.submit(make_generate(p, 25, req_id=bytes([i + 1]), sampling=SEEDED, no_store=True))
        for i, p in enumerate(prompts)
    ]
    rig.run()
    assert rig.engine.num_preempted > 0
    assert [s.token_ids for s in streams] == [expected_tokens(p, 25, SEEDED) for p in prompts]
    assert all(not report.stored and not report.removed for report in rig.reports)
    assert not rig.engine.snapshot().hashes and rig.cache.statistics().num_free == 14
    assert [s.num_cached for s in streams] == [0] * 4


def test_what_leaves_nothing_reads_what_is_there_and_nobody_waits_for_it() -> None:
    rig = Rig()
    prompt = make_prompt(12)
    first = rig.submit(make_generate(prompt, 2, req_id=b"1", no_store=True))
    other = rig.submit(make_generate([*prompt[:11], 7], 2, req_id=b"2"))  # shares two blocks with it
    rig.step()
    assert rig.model.steps[0][1].start == 0, "it is not led by what will publish nothing"
    rig.run()
    again = rig.submit(make_generate([*prompt, 5], 2, req_id=b"3", no_store=True))
    rig.run()
    assert (first.num_cached, other.num_cached, again.num_cached) == (0, 0, 8)
    assert len(rig.followed) == 3, "the blocks of the second request alone"


# ---- memory


def test_preempted_sequences_draw_the_same_tokens_and_do_not_count_their_own_recompute_as_cached() -> None:
    rig = Rig(num_blocks=12)
    prompts = [make_prompt(9, salt=i) for i in range(4)]
    streams = [rig.submit(make_generate(p, 25, req_id=bytes([i + 1]), sampling=SEEDED)) for i, p in enumerate(prompts)]
    rig.run()
    assert rig.engine.num_preempted > 0
    assert [s.token_ids for s in streams] == [expected_tokens(p, 25, SEEDED) for p in prompts]
    assert [s.num_cached for s in streams] == [0] * 4


def test_the_oldest_is_not_preempted_for_the_younger() -> None:
    rig = Rig(num_blocks=12)
    for i in range(4):
        rig.clock.now += 1
        rig.submit(make_generate(make_prompt(8, salt=i), 30, req_id=bytes([i + 1])))
    rig.run()
    ends = [o.req_id for report in rig.reports for o in report.outputs if o.finish_reason]
    assert ends[0] == b"\x01"


def test_a_sequence_may_fill_the_whole_pool() -> None:
    rig = Rig(num_blocks=5)
    stream = rig.submit(make_generate(make_prompt(3), 1000))
    rig.run()
    assert stream.token_ids == expected_tokens(make_prompt(3), 17)
    assert stream.finish_reason == "length"


def test_what_can_never_fit_is_answered_at_once() -> None:
    rig = Rig(num_blocks=5)
    stream = rig.submit(make_generate(make_prompt(20)))
    rig.run()
    assert stream.finish_reason == "error"
    assert "20 tokens leave no room for an answer in this worker's 20 tokens" in stream.error


def test_blocks_that_change_tenant_are_zeroed_before_they_are_written() -> None:
    rig = Rig(num_blocks=8)
    rig.submit(make_generate(make_prompt(20), 4, tenant="a", req_id=b"1"))
    rig.run()
    assert rig.kv.zeroed == []
    mine = set(range(8)) - {block_id for block_id, owner in enumerate(rig.cache.pool.owners) if owner is None}
    rig.submit(make_generate(make_prompt(20, salt=1), 4, tenant="b", req_id=b"2"))
    rig.step()
    table = rig.model.steps[-1][0].block_table
    assert set(rig.kv.zeroed) == mine & set(table) != set()
    assert not rig.kv.data[table].reshape(-1)[20:].any(), "beyond what b wrote lies something of a's"
    rig.run()


def test_a_block_is_published_after_the_step_that_filled_it() -> None:
    rig = Rig(max_step_tokens=6)
    command = make_generate(make_prompt(14), 3)
    rig.submit(command)
    assert [len(split_hashes(rig.step().stored)) for _ in range(3)] == [1, 2, 0]
    rig.run()
    assert rig.followed == set(split_hashes(rig.engine.snapshot().hashes))
    assert set(split_hashes(command.prefix_hashes)) <= rig.followed


def test_the_load_tells_what_is_free_and_what_was_computed() -> None:
    rig = Rig(num_blocks=16, max_step_tokens=6)
    rig.submit(make_generate(make_prompt(14), 3, req_id=b"1"))
    rig.submit(make_generate(make_prompt(10, salt=1), 3, req_id=b"2"))
    load = rig.step().load
    assert (load.num_running, load.num_waiting, load.num_prefill_tokens) == (1, 1, 6)
    assert load.num_free_blocks == 14
    rig.run()
    load = rig.step().load
    assert (load.num_running, load.num_free_blocks, load.step_s) == (0, 16, 0)
    rig.cache.set_quotas({"a": Quota(floor=8)})  # what is idle within a floor is kept for one tenant, but not in use
    assert rig.cache.num_available < rig.step().load.num_free_blocks == 16


@pytest.mark.parametrize(("tokens_per_s", "largest"), [(10_000.0, 400), (200.0, 100), (10.0, 64)])
def test_a_slow_worker_takes_smaller_chunks(tokens_per_s: float, largest: int) -> None:
    rig = Rig(num_blocks=1024, max_step_tokens=400)
    forward = rig.model.forward

    def slow(slices: list[SequenceSlice], kv: OracleStore) -> list[int]:
        rig.clock.now += sum(len(piece.token_ids) for piece in slices) / tokens_per_s
        return forward(slices, kv)

    rig.model.forward = slow  # type: ignore[method-assign]
    stream = rig.submit(make_generate(make_prompt(3000), 1))
    rig.run()
    sizes = [len(step[0].token_ids) for step in rig.model.steps]
    assert sizes[0] == 64
    assert all(abs(size - largest) <= 1 for size in sizes[1:-1])
    assert stream.token_ids == expected_tokens(make_prompt(3000), 1)


# ---- endings


def test_abort_frees_the_blocks_at_once_and_is_answered_once() -> None:
    rig = Rig()
    stream = rig.submit(make_generate(make_prompt(30), 50))
    for _ in range(4):
        rig.step()
    rig.engine.abort(b"r", 1)
    rig.engine.abort(b"r", 1)
    rig.engine.abort(b"unknown", 1)
    assert rig.cache.num_available == 64
    rig.run()
    assert stream.finish_reason == "abort"
    assert stream.token_ids == expected_tokens(make_prompt(30), 4)
    assert rig.model.num_rests == 1  # told once that there is nothing to keep anything for


def test_a_waiting_request_can_be_aborted_too() -> None:
    rig = Rig()
    stream = rig.submit(make_generate(make_prompt(30)))
    rig.engine.abort(b"r", 1)
    rig.run()
    assert (stream.finish_reason, stream.num_cached, rig.model.steps) == ("abort", None, [])


def test_a_deadline_ends_a_request_running_or_waiting() -> None:
    rig = Rig(max_requests=1)
    running = rig.submit(make_generate(make_prompt(8), 500, req_id=b"1", deadline_s=5.0))
    waiting = rig.submit(make_generate(make_prompt(9), 500, req_id=b"2", deadline_s=3.0))
    rig.step()
    rig.clock.now += 4
    rig.step()
    assert (running.finish_reason, waiting.finish_reason) == (None, "deadline")
    rig.clock.now += 1
    rig.step()
    assert running.finish_reason == "deadline"
    assert rig.cache.num_available == 64


def test_a_new_attempt_is_another_request_and_a_repeated_one_is_ignored() -> None:
    rig = Rig()
    command = make_generate(make_prompt(8), 4)
    stream = rig.submit(command)
    rig.engine.submit(command)
    rig.run()
    assert stream.token_ids == expected_tokens(make_prompt(8), 4)


def test_dropping_all_frees_everything_without_a_word() -> None:
    rig = Rig(max_requests=1)
    for i in range(3):
        rig.submit(make_generate(make_prompt(20, salt=i), 50, req_id=bytes([i + 1])))
    rig.step()
    rig.engine.drop_all()
    assert not rig.engine.has_work
    assert rig.step().outputs == []
    rig.engine.check_integrity()


def test_more_requests_than_twice_the_credits_are_refused_with_a_reason() -> None:
    rig = Rig(max_requests=2)
    streams = [rig.submit(make_generate(make_prompt(4, salt=i), 2, req_id=bytes([i + 1]))) for i in range(5)]
    rig.run()
    assert [s.finish_reason for s in streams] == ["length"] * 4 + ["error"]
    assert "credits were 2" in streams[4].error


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"token_ids": b""}, "at least one"),
        ({"token_ids": b"12345"}, "no whole number of tokens"),
        ({"num_prompt_tokens": 0}, "num_prompt_tokens is 0, of 9 tokens"),
        ({"num_prompt_tokens": 10}, "num_prompt_tokens is 10, of 9 tokens"),
        ({"prefix_hashes": b"1" * 16}, "do not belong to 2 blocks"),
        ({"num_public_tokens": 3}, "no whole number of blocks"),
        ({"num_public_tokens": 12}, "no whole number of blocks"),
        ({"token_ids": pack_tokens([1] * 8 + [4096])}, "outside the model's vocabulary of 4096"),
    ],
)
def test_a_contradictory_request_is_answered_with_what_is_wrong(change: dict[str, object], text: str) -> None:
    rig = Rig()
    good = make_generate(make_prompt(9))
    fields = {name: getattr(good, name) for name in good.__struct_fields__} | change
    stream = rig.submit(Generate(**fields))
    rig.next_seq[b"r"] = max(0, len(fields["token_ids"]) // 4 - fields["num_prompt_tokens"])
    rig.run()
    assert stream.finish_reason == "error"
    assert text in stream.error


def test_check_integrity_finds_what_is_wrong_in_the_engine() -> None:
    rig = Rig()
    rig.submit(make_generate(make_prompt(9)))
    rig.step()
    rig.engine.check_integrity()
    rig.engine._sequences.running[0].table.block_ids.pop()
    with pytest.raises(IntegrityError):
        rig.engine.check_integrity()


# ---- all together


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_over_tiny_pools_lose_double_and_change_nothing(seed: int) -> None:
    dice = random.Random(seed)
    rig = Rig(dice.choice([14, 24, 40]), max_requests=6, max_step_tokens=dice.choice([8, 17, 64]))
    assert {"length", "stop", "abort", "deadline"} <= run_random_load(rig, dice, 80)
    assert rig.engine.num_preempted > 0
    assert rig.cache.statistics().num_matched > 0
    assert rig.followed == set(split_hashes(rig.engine.snapshot().hashes))


def test_a_decode_step_of_32_sequences_costs_little_beside_the_model() -> None:
    rig = Rig(num_blocks=4096, max_requests=32, max_step_tokens=2048, size=16)
    rig.model.forward = lambda slices, kv: [1] * sum(p.num_logits for p in slices)  # type: ignore[method-assign]
    for i in range(32):
        rig.submit(make_generate(make_prompt(1000, salt=i), 500, req_id=bytes([i + 1]), size=16))
    rig.engine._rate = 1e6
    while rig.engine.step().load.num_decode_tokens < 32:
        pass
    best_s = 1.0
    for _ in range(100):
        started = time.perf_counter()
        rig.engine.step()
        best_s = min(best_s, time.perf_counter() - started)
    assert rig.engine.step().load.num_decode_tokens == 32
    assert best_s < 1e-3, f"{best_s * 1e6:.0f} µs"
