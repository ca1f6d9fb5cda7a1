"""The core's contract: one Finished per request, tokens in order and once, whatever workers do."""

from __future__ import annotations

import msgspec
import pytest

from kvasir.gateway.core.api import Cancel, Delta
from kvasir.gateway.core.notices import Broken, Joined, Lost, Rejected
from kvasir.gateway.core.requests import QueueConfig
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.protocol.errors import KvasirError, from_info
from kvasir.protocol.messages import Abort, Bye, Generate, Identify, Load, Refused, Resync, Snapshot, Welcome
from kvasir.protocol.tokens import unpack_tokens
from tests.core_helpers import BLOCK_SIZE, Bench, RecordingSink, make_hashes, make_submit, output


def error_code(sink: RecordingSink) -> str:
    return sink.finished.error.code


# ---- the plain path --------------------------------------------------------------------------------------------------


def test_a_request_is_dispatched_streamed_and_finished_once() -> None:
    bench = Bench()
    peer = bench.join()
    sink = bench.submit(max_tokens=3)
    [(to, generate)] = bench.take()
    assert to == peer
    assert (generate.attempt, generate.max_tokens, generate.num_prompt_tokens) == (1, 3, 10)
    assert unpack_tokens(generate.token_ids) == list(range(10))
    bench.now += 0.5
    bench.report(peer, output(b"r1", 0, [7], num_cached_tokens=4))
    bench.report(peer, output(b"r1", 1, [8, 9], "length"))
    assert sink.tokens == [7, 8, 9]
    finished = sink.finished
    assert (finished.reason, finished.num_output_tokens, finished.num_cached_tokens) == ("length", 3, 4)
    assert (finished.worker_id, finished.num_attempts, finished.ttft_s, finished.error) == ("w1", 1, 0.5, None)
    assert bench.core.num_unfinished == 0


def test_welcome_is_sent_before_what_was_queued() -> None:
    bench = Bench(models=frozenset({"demo"}))
    bench.submit()
    bench.join()
    assert [type(command) for _, command in bench.sent] == [Welcome, Generate]
    assert isinstance(bench.notices[0], Joined)


def test_credits_bound_what_a_worker_has_and_the_rest_waits() -> None:
    bench = Bench()
    peer = bench.join(max_requests=2)
    sinks = [bench.submit(b"r%d" % i) for i in range(5)]
    assert [command.req_id for _, command in bench.take()] == [b"r0", b"r1"]
    bench.report(peer, output(b"r0", 0, [1], "stop"))
    assert [command.req_id for _, command in bench.take()] == [b"r2"]
    bench.report(peer, output(b"r1", 0, [1], "stop"), output(b"r2", 0, [1], "stop"))
    assert [command.req_id for _, command in bench.take()] == [b"r3", b"r4"]
    bench.report(peer, output(b"r3", 0, [1], "stop"), output(b"r4", 0, [1], "stop"))
    assert all(sink.finished for sink in sinks)


def test_tenants_take_turns_however_many_requests_one_has_waiting() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    for i in range(4):
        bench.submit(b"a%d" % i, tenant="alpha")
    for i in range(2):
        bench.submit(b"b%d" % i, tenant="beta")
    order = []
    for _ in range(6):
        [(_, generate)] = bench.take()
        order.append(generate.req_id)
        bench.report(peer, output(generate.req_id, 0, [1], "stop"))
    assert order == [b"a0", b"b0", b"a1", b"b1", b"a2", b"a3"]


def test_models_do_not_share_queues_or_workers() -> None:
    bench = Bench()
    bench.join("w1", model="one")
    bench.join("w2", model="two")
    bench.submit(b"r1", model="two")
    bench.submit(b"r2", model="one")
    assert [(peer, command.req_id) for peer, command in bench.take()] == [(b"w2", b"r1"), (b"w1", b"r2")]
    assert bench.core.models()["one"].num_workers == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_are_answers_with_a_reason() -> None:
    bench = Bench(models=frozenset({"demo"}), queue=QueueConfig(max_queued=3, max_queued_per_tenant=2))
    unknown = bench.submit(b"x", model="nothing")
    assert error_code(unknown) == "model_not_found"
    assert "'nothing'" in unknown.finished.error.message and "demo" in unknown.finished.error.message
    bench.submit(b"r1")
    bench.submit(b"r2")
    crowded = bench.submit(b"r3")
    assert error_code(crowded) == "overloaded"
    assert (crowded.finished.error.retry_after_s or 0) >= 1
    bench.submit(b"r4", tenant="beta")
    assert error_code(bench.submit(b"r5", tenant="gamma")) == "overloaded"
    bench.core.drain()
    assert error_code(bench.submit(b"r6", tenant="gamma")) == "unavailable"
    assert bench.core.num_unfinished == 3


def test_draining_finishes_what_is_queued_and_running() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    sinks = [bench.submit(b"r1"), bench.submit(b"r2")]
    bench.core.drain()
    for req_id in (b"r1", b"r2"):
        bench.report(peer, output(req_id, 0, [1], "stop"))
    assert [sink.finished.reason for sink in sinks if sink.finished] == ["stop", "stop"]
    assert bench.core.num_unfinished == 0


# ---- cancelling and deadlines ----------------------------------------------------------------------------------------


def test_cancelling_a_queued_request_takes_it_out() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    bench.submit(b"r1")
    waiting = bench.submit(b"r2")
    bench.core.cancel(Cancel(b"r2"))
    bench.core.cancel(Cancel(b"r2"))
    assert waiting.finished.reason == "abort"
    bench.report(peer, output(b"r1", 0, [1], "stop"))
    assert [command.req_id for _, command in bench.take()] == [b"r1"]


def test_cancelling_a_running_request_aborts_it_and_frees_the_credit_when_the_worker_answers() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    sink = bench.submit(b"r1")
    bench.take()
    bench.report(peer, output(b"r1", 0, [1]))
    bench.core.cancel(Cancel(b"r1", "stop"))
    assert sink.finished.reason == "stop"
    assert bench.take(Abort) == [(peer, Abort(b"r1", 1))]
    bench.submit(b"r2")
    bench.report(peer, output(b"r1", 1, [2]))  # was on its way: not delivered
    assert sink.tokens == [1]
    assert bench.take() == []
    bench.report(peer, output(b"r1", 2, [], "abort"))
    assert [command.req_id for _, command in bench.take()] == [b"r2"]


def test_a_sink_may_cancel_in_answer_to_the_last_delta() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    submit, _ = make_submit(arrived=bench.now)
    inner = RecordingSink()

    class StopAtOnce:
        def put(self, event: object) -> None:
            inner.put(event)  # type: ignore[arg-type]
            if isinstance(event, Delta):
                bench.core.cancel(Cancel(submit.req_id, "stop"))

    bench.core.submit(msgspec.structs.replace(submit, sink=StopAtOnce()))
    bench.report(peer, output(b"r1", 0, [1], "length"))
    assert inner.finished.reason == "stop"
    bench.submit(b"r1")  # the id and the credit are free again
    assert len(bench.take()) == 2


def test_deadlines_end_queued_and_running_requests() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    running = bench.submit(b"r1", deadline=bench.now + 2.0)
    queued = bench.submit(b"r2", deadline=bench.now + 1.0)
    [(_, generate)] = bench.take()
    assert generate.deadline_s == pytest.approx(2.0)
    bench.pass_time(1.5)
    assert queued.finished.reason == "deadline"
    assert error_code(queued) == "deadline_exceeded"
    assert running.finished is None
    bench.pass_time(1.0)
    assert running.finished.reason == "deadline"
    assert bench.take(Abort)[-1] == (peer, Abort(b"r1", 1))
    bench.report(peer, output(b"r1", 0, [], "deadline"))


def test_expired_work_is_dropped_before_it_is_sent() -> None:
    bench = Bench(models=frozenset({"demo"}))
    late = bench.submit(deadline=bench.now + 1.0)
    bench.now += 2.0
    bench.join()
    assert bench.take() == []
    assert error_code(late) == "deadline_exceeded"


def test_without_a_worker_requests_wait_and_then_get_a_clear_answer() -> None:
    bench = Bench(models=frozenset({"demo"}), no_worker_timeout_s=5.0)
    sink = bench.submit()
    bench.pass_time(4.9)
    assert sink.finished is None
    bench.pass_time(0.3)
    assert error_code(sink) == "unavailable"
    assert "'demo' has had no worker for 5 s" in sink.finished.error.message


# ---- workers die -----------------------------------------------------------------------------------------------------


def test_a_lost_workers_request_goes_on_elsewhere_from_prompt_and_delivered() -> None:
    bench = Bench()
    bench.join("w1")
    sink = bench.submit(max_tokens=8)
    bench.take()
    bench.report(b"w1", output(b"r1", 0, [50, 51], num_cached_tokens=0))
    bench.report(b"w1", output(b"r1", 2, [52]))
    bench.join("w2")
    bench.core.worker_lost("w1", "its process ended")
    [(peer, generate)] = bench.take()
    tokens = [*range(10), 50, 51, 52]
    assert peer == b"w2"
    assert (generate.attempt, generate.max_tokens, generate.num_prompt_tokens) == (2, 5, 10)
    assert unpack_tokens(generate.token_ids) == tokens
    assert generate.prefix_hashes == make_hashes(tokens)  # as if it had been the prompt all along
    bench.report(b"w2", output(b"r1", 3, [53], attempt=2, num_cached_tokens=12))
    bench.report(b"w2", output(b"r1", 4, [54], "stop", attempt=2))
    assert sink.tokens == [50, 51, 52, 53, 54]
    assert (sink.finished.reason, sink.finished.num_attempts, sink.finished.worker_id) == ("stop", 2, "w2")
    assert sink.finished.num_cached_tokens == 0  # what the first attempt found


def test_handed_back_requests_keep_their_order_before_their_tenants_others() -> None:
    bench = Bench()
    bench.join("w1", max_requests=3)
    for i in range(5):
        bench.submit(b"r%d" % i)
    bench.take()
    bench.core.worker_lost("w1", "gone")
    bench.join("w2", max_requests=8)
    assert [command.req_id for _, command in bench.take()] == [b"r0", b"r1", b"r2", b"r3", b"r4"]


def test_death_after_the_last_token_and_before_the_end_is_an_end() -> None:
    bench = Bench()
    bench.join("w1")
    whole = bench.submit(b"r1", max_tokens=2)
    stopped = bench.submit(b"r2", max_tokens=9, stop_token_ids=(77,))
    more = bench.submit(b"r3", max_tokens=3)
    bench.take()
    bench.report(b"w1", output(b"r1", 0, [1, 2]), output(b"r2", 0, [1, 77]), output(b"r3", 0, [1, 2]))
    bench.join("w2")
    bench.core.worker_lost("w1", "gone")
    assert whole.finished.reason == "length"
    assert stopped.finished.reason == "stop"
    assert more.finished is None
    assert [(command.req_id, command.max_tokens) for _, command in bench.take()] == [(b"r3", 1)]


def test_poison_is_given_up_when_a_worker_dies_that_had_nothing_else_and_the_others_are_not() -> None:
    bench = Bench()
    bench.join("w1")
    healthy, poison = bench.submit(b"r2"), bench.submit(b"r1")
    for death in (1, 2):
        bench.core.worker_lost(f"w{death}", "gone")
        assert bench.core.num_unfinished == 2
        bench.join(f"w{death + 1}")
    assert [command.req_id for peer, command in bench.take() if peer == b"w3"] == [b"r2"]  # alone
    bench.report(b"w3", output(b"r2", 0, [1], "stop", attempt=3))
    assert healthy.finished.reason == "stop"
    fresh = bench.submit(b"r3")
    assert [command.req_id for _, command in bench.take()] == [b"r1"]  # alone: r3 waits
    bench.core.worker_lost("w3", "gone")
    assert error_code(poison) == "request_failed"
    assert "3 workers died" in poison.finished.error.message
    bench.join("w4")
    assert [command.req_id for _, command in bench.take()] == [b"r3"]
    assert fresh.finished is None
    assert bench.core.statistics().totals.num_poisoned == 1


def test_thirty_requests_survive_two_unrelated_deaths() -> None:
    bench = Bench()
    for worker_id in ("w1", "w2", "w3"):
        bench.join(worker_id, max_requests=16)
    sinks = [bench.submit(b"r%d" % i, [i, *range(9)]) for i in range(30)]
    for worker_id in ("w1", "w2"):
        bench.core.worker_lost(worker_id, "gone")
        bench.join(worker_id + "again", max_requests=16)
        bench.pass_time(1.0)
    answered: set[bytes] = set()
    while todo := [(peer, g) for peer, g in bench.take() if g.req_id not in answered]:
        for peer, generate in todo:
            request = output(generate.req_id, 0, [1], "stop", attempt=generate.attempt)
            bench.report(peer, request)  # what a dead worker says counts for nothing
        answered = {sink_id for sink_id, sink in bench.sinks.items() if sink.finished}
    assert [sink.finished.reason for sink in sinks if sink.finished] == ["stop"] * 30


def test_a_suspect_empties_one_worker_and_the_others_go_on() -> None:
    bench = Bench(max_deaths=1)
    bench.join("w0")
    bench.submit(b"suspect")
    bench.take()
    bench.core.worker_lost("w0", "gone")
    for worker_id in ("w1", "w2"):
        bench.join(worker_id, max_requests=2)
    [(home, generate)] = bench.take()
    assert generate.req_id == b"suspect"
    for i in range(5):
        bench.submit(b"r%d" % i)
    sent = bench.take()
    assert len(sent) == 2 and home not in {peer for peer, _ in sent}
    bench.core.worker_lost(home.decode(), "left", cause="bye")  # no death: a suspect still, and both are busy
    assert bench.take() == []
    [other, _] = sent
    bench.report(other[0], output(other[1].req_id, 0, [1], "stop"))
    assert bench.take() == []  # half empty: nothing is added
    bench.report(other[0], output(sent[1][1].req_id, 0, [1], "stop"))
    assert [command.req_id for _, command in bench.take()] == [b"suspect"]
    bench.report(other[0], output(b"suspect", 0, [1], "stop", attempt=3))
    assert len(bench.take()) == 2


def test_a_death_is_not_counted_against_a_prompt_that_was_not_being_computed() -> None:
    bench = Bench(max_deaths=1)
    bench.join("w1", max_step_tokens=64)
    bench.submit(b"short", range(60))
    bench.submit(b"long", range(100, 300))
    bench.submit(b"longer", range(300, 600))
    bench.core.worker_lost("w1", "gone")
    bench.take()
    bench.join("w2")
    assert [command.req_id for _, command in bench.take()] == [b"short"]  # and "long", of which the step had a slice
    bench.report(b"w2", output(b"short", 0, [1], "stop", attempt=2))
    assert [command.req_id for _, command in bench.take()] == [b"long"]
    bench.report(b"w2", output(b"long", 0, [1], "stop", attempt=2))
    assert [command.req_id for _, command in bench.take()] == [b"longer"]


# ---- one request or one worker must not end it for all ---------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"stop_token_ids": (1 << 70,)}, {"prefix_hashes": None}], ids=["huge id", "a bug"])
def test_an_exception_while_one_request_is_handled_fails_that_request(wrong) -> None:
    bench = Bench()
    bench.join("w1")
    submit, bad = make_submit(b"bad", arrived=bench.now)
    bench.core.submit(msgspec.structs.replace(submit, **wrong))
    assert error_code(bad) == "internal_error"
    assert [notice.req_id for notice in bench.notices if isinstance(notice, Broken)] == [b"bad"]
    good = bench.submit(b"good")
    bench.report(b"w1", output(b"good", 0, [1], "stop"))
    assert good.finished.reason == "stop"
    assert bench.core.num_unfinished == 0
    assert bench.core._requests.models["demo"].queue.num_active == 0


def test_an_exception_while_a_report_is_taken_in_fails_the_request_that_it_is_about() -> None:
    bench = Bench()
    bench.join("w1")
    bad, good = bench.submit(b"bad"), bench.submit(b"good")
    bench.core.savings.add = lambda submit, num_cached: 1 / (submit.req_id != b"bad")  # type: ignore[method-assign]
    bench.report(b"w1", output(b"bad", 0, [1], num_cached_tokens=0), output(b"good", 0, [1], "stop"))
    assert error_code(bad) == "internal_error"
    assert good.finished.reason == "stop"
    bench.report(b"w1", output(b"bad", 1, [], "abort"))


def test_a_request_goes_to_workers_that_hold_it_and_waits_without_holding_up_others() -> None:
    bench = Bench(no_worker_timeout_s=5.0)
    bench.join("small", max_context=8)
    assert bench.core.models()["demo"].max_context == 8
    bench.join("large", max_context=1_000, max_requests=1)
    assert bench.core.models()["demo"].max_context == 1_000
    first, second = bench.submit(b"long1"), bench.submit(b"long2")
    bench.submit(b"short", [1, 2], max_tokens=6, tenant="beta")
    assert [(peer, g.req_id) for peer, g in bench.take()] == [(b"large", b"long1"), (b"small", b"short")]
    bench.report(b"large", output(b"long1", 0, [1], "stop"))
    assert [(peer, g.req_id) for peer, g in bench.take()] == [(b"large", b"long2")]
    bench.core.worker_lost("large", "gone")
    assert first.finished is not None and second.finished is None
    bench.report(b"small")
    bench.pass_time(4.0)
    bench.report(b"small")
    assert second.finished is None
    bench.pass_time(2.0)
    assert error_code(second) == "unavailable"


def test_the_tenant_for_which_least_was_computed_goes_first() -> None:
    bench = Bench()
    peer = bench.join(max_requests=2)
    bench.submit(b"a0", range(10), tenant="alpha")
    bench.submit(b"b0", range(100, 130), tenant="beta")  # comes while nobody waits: both begin alike
    for i in range(1, 5):
        bench.submit(b"a%d" % i, range(200 * i, 200 * i + 10), tenant="alpha")
        bench.submit(b"b%d" % i, range(900 * i, 900 * i + 30), tenant="beta")
    running = [command.req_id for _, command in bench.take()]
    order = list(running)
    while running:
        bench.report(peer, output(running.pop(0), 0, [1], "stop", num_cached_tokens=0))
        running += [command.req_id for _, command in bench.take()]
        order += running[-1:] if running and running[-1] not in order else []
    assert order == [b"a0", b"b0", b"b1", b"a1", b"a2", b"a3", b"b2", b"a4", b"b3", b"b4"]


def test_nobody_is_promised_the_blocks_of_what_leaves_nothing() -> None:
    for no_store, num_cached in ((False, 8 * BLOCK_SIZE), (True, 0)):
        bench = Bench()
        bench.join("w1")
        tokens = list(range(8 * BLOCK_SIZE + 1))

        bench.submit(b"first", tokens, no_store=no_store)
        bench.submit(b"second", tokens)

        [receipt] = bench.core.receipts.of(b"second") or []
        assert receipt.decision.chosen.num_cached_tokens == num_cached
        [(_, first), _] = bench.take(Generate)
        assert first.no_store == no_store
        bench.report(b"w1", output(b"first", 0, [7], "stop", num_cached_tokens=0))  # checks that no reservation leaks


def test_what_is_found_cached_is_not_charged() -> None:
    bench = Bench()
    peer = bench.join(max_requests=1)
    bench.submit(b"a0", range(40), tenant="alpha")
    for i in (1, 2):
        bench.submit(b"b%d" % i, range(100 * i, 100 * i + 30), tenant="beta")
        bench.submit(b"a%d" % i, range(300 * i, 300 * i + 30), tenant="alpha")
    bench.report(peer, output(b"a0", 0, [1], "stop", num_cached_tokens=36))  # 40 were charged, 4 are right
    assert [command.req_id for _, command in bench.take()] == [b"a0", b"a1"]


def test_a_tenant_of_long_answers_gets_no_more_than_one_of_long_prompts() -> None:
    """One slot; alpha's requests are 10 tokens and answers of 100, beta's 210 tokens and answers of 1."""
    bench = Bench()
    peer = bench.join(max_requests=1)
    for i in range(40):
        bench.submit(b"a%d" % i, range(300 * i, 300 * i + 10), tenant="alpha", max_tokens=100)
        bench.submit(b"b%d" % i, range(300 * i, 300 * i + 208), tenant="beta", max_tokens=1)
    order = []
    for _ in range(40):
        [(_, command)] = bench.take(Generate)
        order.append(command.tenant)
        num_tokens = 100 if command.tenant == "alpha" else 1
        for seq in range(0, num_tokens, 10):
            last = "length" if seq + 10 >= num_tokens else None
            tokens = [7] * min(10, num_tokens)
            cached = 0 if seq == 0 else None
            bench.report(peer, output(command.req_id, seq, tokens, last, num_cached_tokens=cached))
    assert order.count("alpha") == order.count("beta") == 20


def test_long_answers_are_charged_while_they_run() -> None:
    bench = Bench()
    peer = bench.join(max_requests=2)
    bench.submit(b"a0", range(10), tenant="alpha", max_tokens=200)
    bench.submit(b"b0", range(30), tenant="beta", max_tokens=1)
    for i in (1, 2):
        bench.submit(b"a%d" % i, range(100 * i, 100 * i + 10), tenant="alpha")
        bench.submit(b"b%d" % i, range(100 * i, 100 * i + 30), tenant="beta")
    bench.report(peer, output(b"a0", 0, [7] * 100, num_cached_tokens=0))
    bench.report(peer, output(b"b0", 0, [7], "length", num_cached_tokens=0))
    bench.report(peer, output(b"b1", 0, [7], "stop", num_cached_tokens=0))
    assert [command.req_id for _, command in bench.take(Generate)] == [b"a0", b"b0", b"b1", b"b2"]


def test_drafts_that_did_not_hold_are_charged_to_their_tenant_and_billed_to_nobody() -> None:
    turns = {}
    for num_extra in (0, 50):
        bench = Bench()
        peer = bench.join(max_requests=1)
        sink = bench.submit(b"a0", range(40), tenant="alpha")
        for i in (1, 2):
            bench.submit(b"b%d" % i, range(100 * i, 100 * i + 60), tenant="beta")
            bench.submit(b"a%d" % i, range(300 * i, 300 * i + 30), tenant="alpha")
        bench.report(peer, output(b"a0", 0, [1, 2], "stop", num_cached_tokens=36, num_extra_tokens=num_extra))
        turns[num_extra] = [command.req_id for _, command in bench.take(Generate)]
        assert (sink.finished.reason, sink.finished.num_output_tokens) == ("stop", 2)
    assert turns == {0: [b"a0", b"a1"], 50: [b"a0", b"b1"]}


def test_a_request_waits_for_the_worker_that_is_worth_it_and_others_pass() -> None:
    bench = Bench()
    for worker_id in ("w1", "w2"):
        bench.join(worker_id, max_requests=1)
    shared = list(range(900))
    bench.report(b"w1", event_seq=1, stored=make_hashes(shared), load=Load(num_prefill_tokens=100, step_s=1.0))
    bench.submit(b"r0", [*shared, 1])
    bench.submit(b"r1", [*shared, 2])  # 900 tokens at 100/s take longer than the wait for w1
    bench.submit(b"r2", [7, 8, 9])
    assert [(peer, command.req_id) for peer, command in bench.take()] == [(b"w1", b"r0"), (b"w2", b"r2")]
    bench.report(b"w1", output(b"r0", 0, [1], "stop", num_cached_tokens=900), event_seq=1)
    assert [(peer, command.req_id) for peer, command in bench.take()] == [(b"w1", b"r1")]


def test_a_request_that_waits_for_a_worker_goes_elsewhere_when_that_one_is_lost() -> None:
    bench = Bench()
    for worker_id in ("w1", "w2"):
        bench.join(worker_id, max_requests=1)
    shared = list(range(900))
    bench.report(b"w1", event_seq=1, stored=make_hashes(shared), load=Load(num_prefill_tokens=100, step_s=1.0))
    bench.submit(b"r0", [*shared, 1])
    bench.submit(b"r1", [*shared, 2])
    bench.take()
    bench.core.worker_lost("w1", "gone")
    assert [(peer, command.req_id) for peer, command in bench.take()] == [(b"w2", b"r0")]


def test_a_tenant_has_little_more_waiting_on_a_worker_than_its_window_but_short_prompts_pass() -> None:
    bench = Bench()
    peer = bench.join(max_requests=64, max_context=10_000, num_blocks=10_000)  # 5,000/s: a window of 4,000 tokens
    for i in range(6):
        bench.submit(b"a%d" % i, range(1_500 * i, 1_500 * i + 1_500), tenant="alpha", max_tokens=1)
    assert [command.req_id for _, command in bench.take()] == [b"a0", b"a1", b"a2"]
    bench.submit(b"b0", range(90_000, 96_000), tenant="beta")
    bench.submit(b"b1", range(80_000, 80_010), tenant="beta")
    assert [command.req_id for _, command in bench.take()] == [b"b0", b"b1"]
    bench.report(peer, output(b"a0", 0, [1], "stop", num_cached_tokens=0))
    assert [command.req_id for _, command in bench.take()] == [b"a3"]
    bench.submit(b"a6", range(70_000, 70_010), tenant="alpha")  # it is the fourth that waits, and goes before the long
    assert [command.req_id for _, command in bench.take()] == [b"a6"]


def test_a_worker_without_an_order_of_its_own_gets_a_longer_window_of_a_tenant_that_is_alone() -> None:
    bench = Bench()
    bench.join(max_requests=64, max_context=100_000, num_blocks=100_000, lacks=["order"])  # a window of 32,000 tokens
    for i in range(7):
        bench.submit(b"a%d" % i, range(6_000 * i, 6_000 * i + 6_000), tenant="alpha")
    assert [command.req_id for _, command in bench.take()] == [b"a%d" % i for i in range(6)]


def test_a_worker_without_an_order_of_its_own_gets_little_of_a_tenant_with_a_lead_while_others_have_work() -> None:
    bench = Bench()
    peer = bench.join(max_requests=64, max_context=100_000, num_blocks=100_000, lacks=["order"])
    bench.submit(b"b0", range(90_000, 90_100), tenant="beta")
    bench.submit(b"a0", range(24_000), tenant="alpha")
    bench.submit(b"a1", range(70_000, 70_010), tenant="alpha")
    bench.submit(b"b1", range(80_000, 80_100), tenant="beta")
    assert [command.req_id for _, command in bench.take()] == [b"b0", b"a0", b"b1"]
    bench.report(peer, output(b"a0", 0, [1], "stop", num_cached_tokens=0))  # what is left is less than its window
    assert [command.req_id for _, command in bench.take()] == [b"a1"]


def test_a_flooding_tenants_requests_carry_its_lead() -> None:
    bench = Bench()
    bench.join(max_requests=64)
    bench.submit(b"a0", range(100), tenant="alpha")
    bench.submit(b"b0", range(1_000, 1_010), tenant="beta")
    bench.submit(b"a1", range(2_000, 2_100), tenant="alpha")
    bench.submit(b"a2", range(3_000, 3_100), tenant="alpha")
    bench.submit(b"b1", range(4_000, 4_010), tenant="beta")
    assert [command.lead for _, command in bench.take()] == [0.0, 0.0, 0.0, 50.0, 0.0]


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_the_output_that_counts_is_what_the_client_was_told() -> None:
    bench = Bench()
    bench.join("w1")
    sink = bench.submit()
    bench.report(b"w1", output(b"r1", 0, [1, 2, 3, 4]))
    bench.core.cancel(Cancel(b"r1", "stop", 3))
    assert sink.finished.num_output_tokens == 3
    assert bench.core.statistics().tenants["alpha"].output_tokens == 3


def test_a_prompt_counts_from_its_first_computed_chunk() -> None:
    bench = Bench()
    bench.join("w1", max_requests=3)
    bench.submit(b"waiting", range(400))
    bench.submit(b"begun", range(1_000, 1_200))
    bench.submit(b"running", [7, 8, 9])
    bench.submit(b"queued", range(3_000, 3_400))
    bench.report(b"w1", output(b"running", 0, [1], "length"))
    assert bench.core.statistics().tenants["alpha"].prompt_tokens == 3
    bench.submit(b"queued2", range(2_000, 2_400))
    bench.report(b"w1", load=Load(num_running=1, num_prefill_tokens=64))
    for name in (b"waiting", b"queued", b"queued2"):
        bench.core.cancel(Cancel(name))
    assert bench.core.statistics().tenants["alpha"].prompt_tokens == 3
    bench.core.cancel(Cancel(b"begun"))
    assert bench.core.statistics().tenants["alpha"].prompt_tokens == 203
    sink = bench.sinks[b"waiting"]
    assert sink.finished.num_prompt_tokens == 0


# ---- hand-backs ------------------------------------------------------------------------------------------------------


def test_requests_handed_back_are_not_tried_for_ever() -> None:
    bench = Bench()
    sink = None
    for attempt in range(1, 5):
        peer = bench.join(f"w{attempt}")
        sink = sink or bench.submit()
        assert [command.attempt for _, command in bench.take()] == [attempt]
        bench.core.worker_report(peer, Bye("leaving"))
    assert error_code(sink) == "request_failed"
    assert sink.finished.num_attempts == 4


def test_an_abort_nobody_asked_for_hands_the_request_back_for_another_worker() -> None:
    bench = Bench()
    bench.join("w1", max_requests=1)
    sink = bench.submit()
    bench.take()
    bench.report(b"w1", output(b"r1", 0, [5]), output(b"r1", 1, [], "abort"))
    assert bench.take() == []  # not to the one that has just handed it back
    bench.join("w2")
    [(peer, generate)] = bench.take()
    assert (peer, generate.attempt, unpack_tokens(generate.token_ids)[-1]) == (b"w2", 2, 5)
    bench.report(b"w2", output(b"r1", 1, [6], "stop", attempt=2))
    assert sink.tokens == [5, 6]


def test_an_engine_error_fails_the_request_with_the_engines_words() -> None:
    bench = Bench()
    bench.join("w1")
    sink = bench.submit()
    bench.report(b"w1", output(b"r1", 0, [], "error", error="needs 90 blocks of 64"))
    assert error_code(sink) == "request_failed"
    assert "needs 90 blocks of 64" in str(from_info(sink.finished.error))


def test_stale_outputs_are_dropped_and_counted() -> None:
    bench = Bench()
    bench.join("w1")
    sink = bench.submit()
    bench.report(b"w1", output(b"r1", 0, [1]))
    bench.report(b"w1", output(b"r1", 0, [9]))  # a repetition
    bench.report(b"w1", output(b"r1", 1, [9], attempt=7))  # another attempt
    bench.report(b"w1", output(b"zz", 0, [9], "stop"))  # nobody's
    assert sink.tokens == [1]
    assert bench.core.statistics().totals.num_stale_outputs == 3
    bench.report(b"w1", output(b"r1", 1, [2], "stop"))
    assert sink.tokens == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        output(b"r1", 2, [9]),
        output(b"r1", 1, range(9)),
        output(b"r1", 0, [], "stop"),
        type(output(b"r1", 1))(b"r1", 1, 1, b"123"),
        output(b"r1", 1, [100]),
        type(output(b"r1", 1))(b"r1", 1, 1, num_cached_tokens=1 << 53),
    ],
    ids=[
        "a gap",
        "more than asked for",
        "an end before the delivered",
        "half a token",
        "no token of the vocabulary",
        "more cached than there is",
    ],
)
def test_a_worker_that_breaks_the_protocol_is_lost_and_its_requests_go_on(bad) -> None:
    bench = Bench()
    bench.join("w1")
    bench.join("w2")
    sink = bench.submit(max_tokens=8, vocab_size=100)
    [(first, _)] = bench.take()
    second = b"w2" if first == b"w1" else b"w1"
    bench.report(first, output(b"r1", 0, [1]))
    bench.report(first, bad)
    [(peer, generate)] = bench.take()
    assert (peer, generate.attempt) == (second, 2)
    bench.report(second, output(b"r1", 1, [2], "stop", attempt=2))
    assert sink.tokens == [1, 2]
    assert bench.core.statistics().totals.num_lost == {"protocol": 1}


def test_an_unreachable_worker_is_lost_and_the_request_goes_on_elsewhere() -> None:
    bench = Bench()
    bench.join("w1")
    bench.join("w2")
    bench.dead = {b"w1", b"w2"}
    sink = bench.submit()
    assert sink.finished is None
    assert bench.core.statistics().workers == []
    bench.join("w3")
    [(peer, generate)] = bench.take()
    assert (peer, generate.attempt) == (b"w3", 3)


def test_cancelling_at_a_dead_worker_hands_back_the_others() -> None:
    bench = Bench()
    bench.join("w1")
    cancelled, other = bench.submit(b"r1"), bench.submit(b"r2")
    bench.join("w2")
    bench.take()
    bench.dead = {b"w1"}
    bench.core.cancel(Cancel(b"r1"))
    assert cancelled.finished.reason == "abort"
    assert [(peer, command.req_id) for peer, command in bench.take()] == [(b"w2", b"r2")]
    assert other.finished is None


# ---- liveness --------------------------------------------------------------------------------------------------------

LIVENESS = LivenessConfig(heartbeat_s=1.0, max_missed_heartbeats=3, stall_s=5.0)


def test_a_worker_whose_step_counter_stands_still_is_stalled_although_it_reports() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.submit()
    bench.report(b"w1", step=4)
    for _ in range(11):
        bench.pass_time(0.5)
        bench.report(b"w1", step=4)
    assert bench.core.statistics().totals.num_lost == {"stalled": 1}
    [lost] = [notice for notice in bench.notices if isinstance(notice, Lost)]
    assert (lost.worker_id, lost.cause, lost.num_requests) == ("w1", "stalled", 1)
    assert bench.core.num_unfinished == 1


def test_steps_keep_a_busy_worker_alive() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.submit(max_tokens=100)
    for i in range(20):
        bench.pass_time(1.0)
        bench.report(b"w1", output(b"r1", i, [1]))
    assert bench.core.statistics().totals.num_lost == {}


def test_an_idle_worker_is_lost_when_it_is_silent_and_work_starts_the_stall_timer() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.pass_time(2.5)
    bench.submit()
    bench.pass_time(4.5)
    assert bench.core.statistics().totals.num_lost == {}
    bench.report(b"w1", output(b"r1", 0, [1], "stop"))
    bench.pass_time(3.2)
    assert bench.core.statistics().totals.num_lost == {"silent": 1}


def test_a_worker_that_forgot_its_requests_is_lost() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.submit()
    for _ in range(12):
        bench.pass_time(0.5)
        bench.report(b"w1", load=Load())
    assert bench.core.statistics().totals.num_lost == {"forgot": 1}


def test_a_gateway_that_was_suspended_does_not_blame_its_workers() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.submit()
    bench.pass_time(1.0)
    bench.now += 3_600.0
    bench.core.tick()
    bench.pass_time(4.0)
    assert bench.core.statistics().totals.num_lost == {}
    bench.pass_time(2.0)
    assert bench.core.statistics().totals.num_lost == {"stalled": 1}


def test_a_quiet_workers_link_is_probed_so_that_its_death_is_seen_within_a_heartbeat() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1")
    bench.submit()
    bench.report(b"w1", output(b"r1", 0, [1]))
    bench.dead.add(b"w1")
    bench.pass_time(1.2)
    assert bench.core.statistics().totals.num_lost == {"link": 1}


def test_a_worker_back_from_the_dead_is_asked_who_it_is_and_starts_clean() -> None:
    bench = Bench(liveness=LIVENESS)
    bench.join("w1", max_requests=1)
    sink = bench.submit()
    [(_, welcome)] = bench.take(Welcome)
    bench.take()
    bench.report(b"w1", output(b"r1", 0, [1]))
    bench.pass_time(6.0)
    assert bench.core.statistics().workers == []
    bench.report(b"w1", output(b"r1", 1, [2]))
    bench.report(b"w1", output(b"r1", 2, [3]))
    assert bench.take(Identify) == [(b"w1", Identify())]  # once, not at every report
    assert sink.tokens == [1]
    bench.join("w1", max_requests=1)
    [(_, again)] = bench.take(Welcome)
    assert again.gateway_epoch != welcome.gateway_epoch  # makes it drop what it had
    [(_, generate)] = bench.take()
    assert (generate.attempt, generate.max_tokens) == (2, 7)


# ---- who may join ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"protocol_version": 99}, "protocol version 99"),
        ({"block_size": 32}, "blocks of 32 tokens, this gateway of 4; start the worker with --block-size 4"),
        ({"model": "other"}, "model 'other', this gateway is configured for demo"),
        ({"fingerprint": "f2"}, "other weights for model 'demo'"),
        ({"dtype": "bfloat16"}, "in bfloat16, the others in float32"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(wrong, words) -> None:
    bench = Bench(models=frozenset({"demo"}))
    bench.join("w1")
    bench.join("w2", **wrong)
    [(peer, answer)] = bench.take(Refused)
    assert peer == b"w2" and words in answer.reason and "'w2'" in answer.reason
    assert "f1" not in answer.reason  # whoever asks is not told how to pass
    assert isinstance(bench.notices[-1], Rejected)
    assert len(bench.core.statistics().workers) == 1


def test_a_worker_id_is_taken_while_its_worker_lives_and_free_when_its_link_is_dead() -> None:
    bench = Bench()
    bench.join("w1", peer=b"p1", incarnation=b"i1")
    bench.join("w1", peer=b"p2", incarnation=b"i2")
    assert bench.take(Refused) == []  # the other's link is probed first
    bench.join("w1", peer=b"p2", incarnation=b"i2")
    [(_, answer)] = bench.take(Refused)
    assert "'w1' is in use" in answer.reason
    bench.submit()
    bench.take()
    bench.dead.add(b"p1")
    for _ in range(2):
        bench.join("w1", peer=b"p3", incarnation=b"i3")
    [(peer, generate)] = bench.take()
    assert (peer, generate.attempt) == (b"p3", 2)


def test_the_same_incarnation_on_a_new_link_is_a_new_session() -> None:
    bench = Bench()
    bench.join("w1", peer=b"p1")
    bench.submit()
    bench.take()
    bench.join("w1", peer=b"p2")
    [(peer, generate)] = bench.take()
    assert (peer, generate.attempt) == (b"p2", 2)
    assert len({command.gateway_epoch for _, command in bench.take(Welcome)}) == 2


def test_a_repeated_hello_changes_nothing() -> None:
    bench = Bench()
    bench.join("w1")
    bench.submit()
    bench.join("w1")
    assert len({command.gateway_epoch for _, command in bench.take(Welcome)}) == 1
    assert len(bench.take()) == 1
    assert bench.core.statistics().totals.num_lost == {}


def test_models_are_known_without_workers_and_bounded_by_the_largest_one() -> None:
    bench = Bench(models=frozenset({"demo"}))
    assert bench.core.models()["demo"].num_workers == 0
    bench.join("w1", max_context=1000, num_blocks=500)
    assert bench.core.models()["demo"].max_context == 1000
    bench.join("w2", max_context=1000, num_blocks=100)
    info = bench.core.models()["demo"]
    assert (info.max_context, info.num_workers) == (1000, 2)
    bench.core.worker_lost("w1", "gone")
    bench.core.worker_lost("w2", "gone")
    info = bench.core.models()["demo"]
    assert (info.max_context, info.num_workers, info.fingerprint) == (400, 0, "f1")


def test_a_draining_worker_gets_nothing_new_and_its_goodbye_is_no_death() -> None:
    bench = Bench()
    bench.join("w1", max_requests=3)
    sink, handed_back = bench.submit(b"r1"), bench.submit(b"r2")
    bench.take()
    bench.report(b"w1", output(b"r2", 0, [], "abort"))
    assert bench.take() == [] and handed_back.finished is None
    bench.report(b"w1", output(b"r1", 0, [1], "stop"))
    bench.core.worker_report(b"w1", Bye())
    assert sink.finished.reason == "stop"
    assert bench.core.statistics().totals.num_lost == {"bye": 1}
    bench.join("w2")
    assert [command.req_id for _, command in bench.take()] == [b"r2"]


# ---- block events and what is known ----------------------------------------------------------------------------------


def test_a_gap_in_block_events_asks_for_a_snapshot_once() -> None:
    bench = Bench()
    bench.join("w1")
    hashes = make_hashes(range(16))
    bench.report(b"w1", event_seq=1, stored=hashes[:16])
    bench.report(b"w1", event_seq=3, stored=hashes[32:48])
    bench.report(b"w1", event_seq=4, stored=hashes[48:])
    assert bench.take(Resync) == [(b"w1", Resync())]
    [worker] = bench.core.statistics().workers
    assert (worker.index_in_sync, worker.num_cached_blocks, worker.num_index_gaps) == (False, 0, 1)
    bench.core.worker_report(b"w1", Snapshot(4, hashes))
    bench.report(b"w1", event_seq=5, removed=hashes[48:])
    [worker] = bench.core.statistics().workers
    assert (worker.index_in_sync, worker.num_cached_blocks) == (True, 3)


def test_a_reports_block_events_count_for_what_is_dispatched_because_of_it() -> None:
    bench = Bench()
    bench.join("w1", max_requests=1)
    bench.join("w2", max_requests=1)
    tokens = list(range(400))
    bench.submit(b"r1", [1, 2, 3], max_tokens=1)
    bench.submit(b"r2", [4, 5, 6], max_tokens=1)
    bench.take()
    bench.submit(b"r3", tokens)
    last = b"w2"
    bench.report(
        last, output(b"r2" if last == b"w2" else b"r1", 0, [1], "length"), event_seq=1, stored=make_hashes(tokens)
    )
    [(peer, _)] = bench.take()
    assert peer == last
    [decision] = [receipt.decision for receipt in bench.core.receipts.of(b"r3") or []]
    assert decision.chosen.num_cached_tokens == 396  # 400 tokens are 100 blocks, and the last token is always computed


def test_explain_keeps_one_decision_per_attempt_and_forgets_the_oldest() -> None:
    bench = Bench(max_explained=2)
    bench.join("w1")
    bench.submit(b"r1")
    bench.join("w2")
    bench.core.worker_lost("w1", "gone")
    decisions = [receipt.decision for receipt in bench.core.receipts.of(b"r1") or []]
    assert [decision.worker_id for decision in decisions] == ["w1", "w2"]
    assert [terms.worker_id for terms in decisions[1].terms] == ["w2"]
    bench.submit(b"r2")
    bench.submit(b"r3")
    assert bench.core.receipts.of(b"r1") is None
    assert bench.core.receipts.of(b"r3") is not None
    assert bench.core.receipts.find("chatcmpl-" + b"r3".hex()) == bench.core.receipts.of(b"r3")
    assert bench.core.receipts.find("72") == bench.core.receipts.of(b"r3")  # the newest that begins so
    assert bench.core.receipts.find("") is None


def test_statistics_count_tokens_per_worker_and_tenant() -> None:
    bench = Bench()
    bench.join("w1")
    tokens = list(range(12))
    bench.submit(b"r1", tokens, tenant="alpha", max_tokens=4)
    bench.report(b"w1", output(b"r1", 0, [1, 2], "stop", num_cached_tokens=0), event_seq=1, stored=make_hashes(tokens))
    bench.submit(b"r2", [*tokens, 99], tenant="beta", max_tokens=4)
    bench.report(
        b"w1", output(b"r2", 0, [1], num_cached_tokens=8), load=Load(num_running=1, num_free_blocks=7), event_seq=1
    )
    statistics = bench.core.statistics()
    [worker] = statistics.workers
    assert (worker.predicted_cached_tokens, worker.cached_tokens) == (12, 8)
    assert (worker.mispredicted_tokens, worker.num_free_blocks) == (4, 7)
    assert (worker.prompt_tokens, worker.output_tokens, worker.num_requests) == (25, 3, 2)
    alpha, beta = statistics.tenants["alpha"], statistics.tenants["beta"]
    assert (alpha.num_requests, alpha.prompt_tokens, alpha.output_tokens) == (1, 12, 2)
    assert (alpha.num_finished, alpha.num_running, beta.num_running) == ({"stop": 1}, 0, 1)
    [model] = statistics.models
    assert (sum(model.ttft_s.counts), sum(model.queue_s.counts)) == (2, 2)


def test_a_report_from_a_stranger_is_answered_with_identify() -> None:
    bench = Bench()
    bench.report(b"stranger")
    assert bench.sent == [(b"stranger", Identify())]


def test_a_tenant_that_is_gone_is_forgotten_as_soon_as_no_worker_has_anything_of_it() -> None:
    bench = Bench()
    peer = bench.join()
    for number in range(3):
        bench.submit(b"r%d" % number, tenant="gone" if number else "stays")
    bench.core.end_requests("gone", KvasirError("deleted"))
    bench.core.forget("gone")
    bench.core.forget("never seen")
    bench.pass_time(0.2)
    assert set(bench.core.statistics().tenants) == {"gone", "stays"}
    bench.report(peer, *[output(b"r%d" % number, 0, finish_reason="abort") for number in (1, 2)])
    bench.pass_time(0.2)
    bench.core.check_integrity()
    assert set(bench.core.statistics().tenants) == {"stays"}
    assert set(bench.core._requests.models["demo"].queue._tenants) == {"stays"}
