"""What the core learns of one worker: rates, heat, what is computed next, counters. By hand-made numbers."""

from __future__ import annotations

import math

import pytest

from kvasir.gateway.core.rates import Rates
from kvasir.gateway.routing.backlog import Backlog
from kvasir.protocol.messages import Load
from tests.core_helpers import Bench, make_hashes, output


def test_the_prefill_rate_is_a_ratio_of_decayed_sums() -> None:
    rates = Rates()  # as if the usual 5,000 tokens/s had been measured for 0.01 s
    rates.learn(Load(num_prefill_tokens=100, step_s=0.05))
    assert rates.prefill_tokens_per_s == pytest.approx((0.9 * 50 + 100) / (0.9 * 0.01 + 0.05))
    rates.learn(Load(num_prefill_tokens=100, step_s=0.0))  # no time: says nothing
    rates.learn(Load(step_s=1.0))  # no work: nothing either
    assert rates.prefill_tokens_per_s == pytest.approx((0.9 * 50 + 100) / (0.9 * 0.01 + 0.05))
    assert rates.round_s == 0.0


def test_the_decode_round_is_smoothed_and_taken_off_a_mixed_step() -> None:
    rates = Rates()
    rates.learn(Load(num_decode_tokens=4, step_s=0.02))
    assert rates.round_s == 0.02
    rates.learn(Load(num_decode_tokens=4, step_s=0.03))
    assert rates.round_s == pytest.approx(0.8 * 0.02 + 0.2 * 0.03)
    rates.learn(Load(num_prefill_tokens=100, num_decode_tokens=4, step_s=0.122))
    assert rates.prefill_tokens_per_s == pytest.approx((45 + 100) / (0.009 + 0.1))
    fast = Rates()
    fast.learn(Load(num_decode_tokens=4, step_s=0.02))
    fast.learn(Load(num_prefill_tokens=100, num_decode_tokens=4, step_s=0.02))  # a tenth is left for prefill
    assert fast.prefill_tokens_per_s == pytest.approx((45 + 100) / (0.009 + 0.002))


def test_a_worker_that_has_not_worked_yet_is_expected_to_be_as_fast_as_the_others() -> None:
    bench = Bench()
    bench.join("w1")
    bench.join("w2")
    bench.submit(b"r1", range(100))
    [(peer, _)] = bench.take()
    bench.report(peer, load=Load(num_running=1, num_prefill_tokens=90_000, step_s=1.0))
    rates = [worker.prefill_rate for worker in bench.core.statistics().workers]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] > 80_000
    bench.join("w3")
    bench.report(b"w3", load=Load(num_running=1, num_prefill_tokens=10, step_s=1.0))
    *_, slow = bench.core.statistics().workers
    assert slow.prefill_rate < 1_000


def test_heat_is_the_prefill_time_sent_and_decays() -> None:
    bench = Bench()
    bench.join("w1")
    bench.submit(b"r1", range(100))
    [worker] = bench.core._fleet.by_id.values()
    miss_s = 100 / 5_000
    assert worker.heat_s(bench.now, 30.0) == pytest.approx(miss_s)
    assert worker.heat_s(bench.now + 15.0, 30.0) == pytest.approx(miss_s * math.exp(-0.5))
    bench.now += 15.0
    bench.submit(b"r2", range(1_000, 1_200))
    assert worker.heat_s(bench.now, 30.0) == pytest.approx(miss_s * math.exp(-0.5) + 2 * miss_s)


def test_a_backlog_is_worked_off_from_the_front_and_keeps_one_token_of_each() -> None:
    backlog = Backlog()
    late, first, second = backlog.add(3.0, 30, b""), backlog.add(1.0, 10, b""), backlog.add(2.0, 20, b"")
    assert [entry.num_tokens for entry in backlog.next_step(11)] == [10, 20]
    assert [entry.num_tokens for entry in backlog.next_step(10)] == [10]
    backlog.advance(12)
    assert (first.num_tokens, second.num_tokens, late.num_tokens, backlog.num_tokens) == (1, 17, 30, 48)
    assert (first.is_begun, second.is_begun, late.is_begun) == (True, True, False)
    assert backlog.front_tokens == 1


def test_a_leader_is_the_first_entry_with_the_same_block() -> None:
    backlog = Backlog()
    shared, other = make_hashes(range(8)), make_hashes(range(50, 58))
    backlog.add(1.0, 8, other)
    second = backlog.add(2.0, 8, shared)
    backlog.add(3.0, 8, shared)
    assert backlog.leader(shared, 2) is second
    assert backlog.leader(shared, 1) is second
    assert backlog.leader(make_hashes(range(90, 98)), 1) is None


def test_counters_of_a_worker() -> None:
    bench = Bench()
    bench.join("w1")
    bench.submit(b"r1", range(40))
    bench.report(b"w1", output(b"r1", 0, [1, 2], num_cached_tokens=8), output(b"r1", 0, [1]))
    [worker] = bench.core.statistics().workers
    assert (worker.num_requests, worker.prompt_tokens, worker.cached_tokens, worker.output_tokens) == (1, 40, 8, 2)
    assert (worker.predicted_cached_tokens, worker.mispredicted_tokens, worker.num_stale_outputs) == (0, 8, 1)


@pytest.mark.parametrize(("lacks", "num_predicted"), [(["order"], 16), ([], 80)])
def test_what_waits_on_a_worker_without_an_order_of_its_own_will_have_evicted_what_is_cached_now(
    lacks: list[str], num_predicted: int
) -> None:
    bench = Bench()
    peer = bench.join(num_blocks=45, max_context=200, lacks=lacks)
    bench.submit(b"r1", range(81))
    hashes = make_hashes(range(81))
    stored = output(b"r1", 0, [1], "stop", num_cached_tokens=0)
    bench.report(peer, stored, event_seq=1, stored=hashes)
    bench.submit(b"r2", range(1_000, 1_160))
    bench.submit(b"r3", range(81))
    [worker] = bench.core._fleet.by_id.values()
    assert worker.in_flight[b"r2"].num_predicted_tokens == 0
    assert worker.in_flight[b"r3"].num_predicted_tokens == num_predicted
    worker.check_integrity()
