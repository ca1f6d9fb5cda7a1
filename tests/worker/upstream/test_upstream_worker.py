"""Upstream workers between a real core and stand-ins for vLLM: answers, caches, tenants, and every way to die."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.protocol.errors import ConfigurationError, InvalidMessage
from kvasir.protocol.messages import COMMANDS, Generate, Report, Resync
from kvasir.protocol.sampling import Constraint, Grammar, Sampling
from kvasir.worker.upstream import hello, http_client, incarnation, server, streams, worker
from scripts.standin.engine import EngineOptions
from scripts.standin.events import EventOptions
from scripts.vllm_standin import StandinOptions, running_standin
from tests.worker.upstream.fleet import GREEDY, Answer, Fleet, oracle, running_fleet

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look ten times as often as in earnest."""
    monkeypatch.setattr(incarnation, "WATCH_S", 0.1)
    monkeypatch.setattr(incarnation, "SECOND_LOOKS_S", (0.02, 0.05, 0.2))
    monkeypatch.setattr(server, "LOOK_AGAIN_S", 0.05)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(50):
            await body()

    trio.run(main)


def prompt(number: int, num_tokens: int = 100) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(5, 4000) for _ in range(num_tokens)]


def slow(step_ms: float = 5.0, **more: object) -> StandinOptions:
    return StandinOptions(engine=EngineOptions(step_ms=step_ms, **more))  # type: ignore[arg-type]


# ---- answers


@pytest.mark.parametrize("has_scale_out", [True, False])
def test_tokens_come_as_the_engine_draws_them_by_either_route(tmp_path: Path, has_scale_out: bool) -> None:
    async def body() -> None:
        async with (
            running_standin(StandinOptions(has_scale_out=has_scale_out)) as standin,
            running_fleet(tmp_path, standin) as fleet,
        ):
            tokens, finished = await fleet.ask(prompt(1), max_tokens=20)
            assert tokens == oracle(prompt(1), 20)
            assert (finished.reason, finished.num_output_tokens, finished.num_cached_tokens) == ("length", 20, 0)
            stop = tokens[7]
            tokens, finished = await fleet.ask(prompt(1), max_tokens=20, stop_token_ids=(stop,))
            assert tokens == oracle(prompt(1), 8) and finished.reason == "stop"
            assert finished.num_cached_tokens == 96, "three blocks of 32 of 100 tokens"

    run(body)


def test_log_probabilities_pass_and_are_refused_by_name_where_their_ids_would_be_lost(tmp_path: Path) -> None:
    async def body() -> None:
        for has_scale_out in (True, False):
            async with (
                running_standin(StandinOptions(has_scale_out=has_scale_out)) as standin,
                running_fleet(tmp_path, standin) as fleet,
            ):
                _, answer = fleet.submit(prompt(1), max_tokens=3, sampling=Sampling(temperature=0.0, logprobs=2))
                finished = await answer.end()
                logprobs = [entry for delta in answer.deltas for entry in delta.logprobs]
                if has_scale_out:
                    assert len(logprobs) == 3 and all(len(entry.top) == 2 for entry in logprobs)
                    assert [entry.top[0][0] for entry in logprobs] == answer.tokens
                else:
                    assert finished.error is not None and "--enable-scale-out" in finished.error.message

    run(body)


@pytest.mark.parametrize("has_scale_out", [True, False])
def test_an_answer_is_held_to_a_grammar_where_the_engine_was_seen_to_do_so(tmp_path: Path, has_scale_out: bool) -> None:
    async def body() -> None:
        sampling = Sampling(
            constraint=Constraint(grammar=Grammar("lark", "start: <[9]> <[11]> <[9]>")), temperature=0.0
        )
        for holds in (True, False):
            options = StandinOptions(engine=EngineOptions(holds_grammars=holds), has_scale_out=has_scale_out)
            async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
                assert ("grammars" in fleet.core.models()["demo"].lacks) != holds
                _, answer = fleet.submit(prompt(1), max_tokens=3, sampling=sampling)
                finished = await answer.end()
                if holds:
                    assert (answer.tokens, finished.reason) == ([9, 11, 9], "length")
                else:
                    assert finished.error is not None and "grammar" in finished.error.message

    run(body)


def test_what_the_engine_refuses_fails_that_request_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin(slow()) as standin, running_fleet(tmp_path, standin) as fleet:
            _, other = fleet.submit(prompt(2), max_tokens=30)
            _, finished = await fleet.ask([999_999, *prompt(1)])
            assert finished.error is not None and "out of vocabulary" in finished.error.message
            assert (await other.end()).reason == "length" and not fleet.losses()

    run(body)


def test_a_request_that_cannot_be_read_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky:
        def decode(self, frame: bytes) -> object:
            command = COMMANDS.decode(frame)
            if isinstance(command, Generate) and command.max_tokens == 5:
                raise InvalidMessage("an unknown field")
            return command

    monkeypatch.setattr(worker, "COMMANDS", Picky())

    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            _, finished = await fleet.ask(prompt(1), max_tokens=5)
            assert finished.error is not None and "cannot read this request: an unknown field" in finished.error.message
            assert (await fleet.ask(prompt(1)))[0] == oracle(prompt(1), 8)

    run(body)


LIES = {
    "a negative token": b'{"choices":[{"token_ids":[-1]}]}',
    "a token of 33 bits": b'{"choices":[{"token_ids":[4294967296]}]}',
    "more tokens than asked for": b'{"choices":[{"token_ids":[5,6,7]},{"token_ids":[5,6,7]}]}',
    "no JSON": b"{",
    "no UTF-8": b'{"choices":[{"finish_reason":"\xff"}]}',
    "a deep nest": b'{"new":' + b"[" * 100_000,
    "less than nothing cached": b'{"usage":{"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":-1}}}',
    "more cached than there is": b'{"usage":{"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":999999}}}',
}


@pytest.mark.parametrize("lie", LIES)
def test_an_event_that_cannot_be_true_fails_its_own_request_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    start, event = http_client.HttpStream.start, http_client.HttpStream.event
    lying: list[http_client.HttpStream] = []

    async def note(stream: http_client.HttpStream, request: bytes) -> None:
        if b'"max_tokens":5' in request:
            lying.append(stream)
        await start(stream, request)

    async def lie_first(stream: http_client.HttpStream) -> bytes | None:
        if stream in lying:
            lying.remove(stream)
            return LIES[lie]
        return await event(stream)

    monkeypatch.setattr(http_client.HttpStream, "start", note)
    monkeypatch.setattr(http_client.HttpStream, "event", lie_first)

    async def body() -> None:
        async with running_standin(slow()) as standin, running_fleet(tmp_path, standin) as fleet:
            _, other = fleet.submit(prompt(2), max_tokens=40)
            tokens, finished = await fleet.ask(prompt(1), max_tokens=5)
            if lie == "more cached than there is":
                assert (tokens, finished.num_cached_tokens) == (oracle(prompt(1), 5), 0)
            else:
                assert finished.error is not None and "the upstream" in finished.error.message
            assert (await other.end()).reason == "length" and other.tokens == oracle(prompt(2), 40)
            assert not fleet.losses()

    run(body)


def test_a_full_queue_upstream_is_waited_for(tmp_path: Path) -> None:
    async def body() -> None:
        options = slow()
        options.max_queued = 2
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            answers = [fleet.submit(prompt(i), max_tokens=10)[1] for i in range(6)]
            assert [(await answer.end()).reason for answer in answers] == ["length"] * 6
            assert [answer.tokens for answer in answers] == [oracle(prompt(i), 10) for i in range(6)]

    run(body)


def test_a_refusal_whose_text_never_comes_is_one_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = http_client.HttpStream.receive
    monkeypatch.setattr(streams, "ASK_TIMEOUT_S", 0.02)

    async def say_no_more(stream: http_client.HttpStream) -> bytes | None:
        return await receive(stream) if stream.status == 200 else await trio.sleep_forever()

    async def body() -> None:
        options = slow()
        options.max_queued = 2
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            monkeypatch.setattr(http_client.HttpStream, "receive", say_no_more)
            answers = [fleet.submit(prompt(i), max_tokens=10)[1] for i in range(6)]
            assert [(await answer.end()).reason for answer in answers] == ["length"] * 6

    run(body)


@pytest.mark.parametrize("has_scale_out", [True, False])
def test_an_aborted_request_leaves_the_engine_and_frees_its_credit(tmp_path: Path, has_scale_out: bool) -> None:
    async def body() -> None:
        options = slow()
        options.has_scale_out = has_scale_out
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            req_id, answer = fleet.submit(prompt(1), max_tokens=1500)
            await answer.begun.wait()
            fleet.cancel(req_id)
            await fleet.until(lambda: not fleet.info().num_in_flight, timeout_s=streams.ABORT_S)
            assert (await answer.end()).reason == "abort"
            await fleet.until(lambda: not standin.state()["ranks"][0]["running"])
            if has_scale_out:
                assert fleet.info().prompt_tokens == 100, "the aborted stream's last word told what was cached"

    run(body)


def test_a_deadline_ends_a_request_here_and_upstream(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin(slow()) as standin, running_fleet(tmp_path, standin) as fleet:
            _, answer = fleet.submit(prompt(1), max_tokens=1000, deadline=trio.current_time() + 0.2)
            assert (await answer.end()).reason == "deadline"
            await fleet.until(lambda: not standin.state()["ranks"][0]["running"] and not fleet.info().num_in_flight)

    run(body)


def test_many_requests_sent_at_once_all_arrive(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            answers = [fleet.submit(prompt(i, 40), max_tokens=5)[1] for i in range(100)]
            for number, answer in enumerate(answers):
                await answer.end()
                assert answer.tokens == oracle(prompt(number, 40), 5)
            fleet.core.check_integrity()

    run(body)


def test_a_server_that_asks_for_a_key_gets_it(tmp_path: Path) -> None:
    async def body() -> None:
        key = tmp_path / "key"
        key.write_text("secret")
        options = StandinOptions(api_key="secret")
        async with (
            running_standin(options) as standin,
            running_fleet(tmp_path, standin, args=["--api-key-file", str(key)]) as fleet,
        ):
            assert (await fleet.ask(prompt(1)))[0] == oracle(prompt(1), 8)

    run(body)


# ---- what is cached


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_predicted_is_what_the_engine_found_over_turns_tenants_and_evictions(tmp_path: Path, block_size: int) -> None:
    async def body() -> None:
        engine = EngineOptions(block_size=block_size, num_blocks=1 + 2048 // block_size)
        options = StandinOptions(engine=engine)
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            rng = random.Random(block_size)
            chats = [(tenant, prompt(rng.randrange(4), 150)) for tenant in ("alpha", "beta", "gamma") for _ in range(4)]
            for _ in range(5):
                for number, (tenant, tokens) in enumerate(chats):
                    await fleet.settle(standin)
                    answer, finished = await fleet.ask(tokens, tenant=tenant, max_tokens=rng.randrange(1, 60))
                    assert finished.reason == "length"
                    chats[number] = (tenant, [*tokens, *answer, *prompt(rng.randrange(1 << 30), rng.randrange(30))])
            info, counters = fleet.info(), standin.state()["ranks"][0]
            assert info.mispredicted_tokens == 0 and info.predicted_cached_tokens == info.cached_tokens > 0
            assert counters["prefix_cache_hits"] == info.cached_tokens
            assert info.num_cached_blocks < info.num_blocks < 5 * sum(len(tokens) for _, tokens in chats) // 16

    run(body)


def test_equal_prompts_of_two_tenants_share_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            for tenant, num_cached in (("alpha", 0), ("alpha", 96), ("beta", 0), ("beta", 96)):
                await fleet.settle(standin)
                _, finished = await fleet.ask(prompt(1), tenant=tenant)
                assert finished.num_cached_tokens == num_cached
            assert fleet.info().mispredicted_tokens == 0

    run(body)


def test_a_conversation_goes_back_to_the_server_that_has_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            running_standin() as first,
            running_standin(StandinOptions(engine=EngineOptions(block_size=128))) as second,
            running_fleet(tmp_path, first, second) as fleet,
        ):
            answers = [fleet.submit(prompt(number, 300))[1] for number in range(8)]
            places = {number: (await answer.end()).worker_id for number, answer in enumerate(answers)}
            await fleet.settle(first, second)
            assert set(places.values()) == {"w0", "w1"}
            for number in random.Random(1).sample(range(8), 8):
                _, finished = await fleet.ask([*prompt(number, 300), 7])
                assert finished.worker_id == places[number]
                assert finished.num_cached_tokens == (288 if finished.worker_id == "w0" else 256)

    run(body)


def test_without_events_prefixes_are_predicted_from_what_was_sent(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin(StandinOptions(events=None)) as standin, running_fleet(tmp_path, standin) as fleet:
            tokens, _ = await fleet.ask(prompt(1), max_tokens=40)
            _, finished = await fleet.ask([*prompt(1), *tokens])
            assert finished.num_cached_tokens == 128
            info = fleet.info()
            assert (info.predicted_cached_tokens, info.mispredicted_tokens) == (128, 0)

    run(body)


def test_a_server_that_does_not_tell_what_was_cached_is_guessed_at_and_not_audited(tmp_path: Path) -> None:
    async def body() -> None:
        options = StandinOptions(tells_cached_tokens=False)
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            await fleet.ask(prompt(1))
            _, finished = await fleet.ask(prompt(1))
            assert finished.num_cached_tokens == 96, "the client is told the guess"
            assert fleet.info().prompt_tokens == 0, "the audit counts only what the engine said"

    run(body)


def test_a_worker_that_comes_later_knows_what_is_cached_already(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin:
            async with running_fleet(tmp_path, standin) as fleet:
                await fleet.ask(prompt(1))
                await fleet.settle(standin)
                num_blocks = fleet.info().num_cached_blocks
            async with running_fleet(tmp_path, standin) as fleet:
                await fleet.until(lambda: fleet.info().num_cached_blocks == num_blocks > 0)
                _, finished = await fleet.ask(prompt(1))
                assert finished.num_cached_tokens == 96 and fleet.info().mispredicted_tokens == 0

    run(body)


@pytest.mark.parametrize("fault", [{"drop": 2}, {"duplicate": 3}, {"swap": 2}])
def test_lost_doubled_and_swapped_events_are_mended(tmp_path: Path, fault: dict[str, int]) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            await fleet.ask(prompt(1, 200))
            standin.set_faults(**fault)
            for number in range(2, 6):
                await fleet.ask(prompt(number, 200))
            await fleet.settle(standin)
            before = fleet.info().mispredicted_tokens
            for number in range(2, 6):
                await fleet.ask([*prompt(number, 200), 7])
            assert fleet.info().mispredicted_tokens == before
            assert fleet.info().cached_tokens >= 4 * 192

    run(body)


def test_a_cleared_cache_is_an_empty_index_with_the_next_step(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            await fleet.ask(prompt(1, 200))
            await fleet.settle(standin)
            assert standin.clear()
            await fleet.ask(prompt(2, 40))
            await fleet.until(lambda: fleet.info().num_cached_blocks == 2)
            _, finished = await fleet.ask(prompt(1, 200))
            assert finished.num_cached_tokens == 0 and fleet.info().mispredicted_tokens == 0

    run(body)


# ---- death


Harm = Callable[[object], object]


async def streams_go_on(fleet: Fleet, harm: Callable[[], object], num_streams: int = 8) -> list[Answer]:
    """Start streams on both workers, harm one of them, and see that all end as if nothing had happened."""
    answers = [fleet.submit(prompt(i), max_tokens=60)[1] for i in range(num_streams)]
    for answer in answers:
        await answer.begun.wait()
    assert all(fleet.info(worker_id).num_in_flight for worker_id in ("w0", "w1"))
    harm()
    for number, answer in enumerate(answers):
        finished = await answer.end()
        assert (finished.reason, finished.error) == ("length", None)
        assert answer.tokens == oracle(prompt(number), 60)
    return answers


@pytest.mark.parametrize("death", ["kill_engine", "cut", "terminate", "silent"])
def test_streams_go_on_elsewhere_however_a_server_dies(tmp_path: Path, death: str) -> None:
    async def body() -> None:
        async with (
            running_standin(slow()) as first,
            running_standin(slow()) as second,
            running_fleet(tmp_path, first, second) as fleet,
        ):
            harm = {"kill_engine": first.kill_engine, "cut": first.cut, "terminate": first.terminate}
            await streams_go_on(fleet, harm.get(death, lambda: first.terminate(silent=True)))
            [loss] = fleet.losses()
            assert (loss.worker_id, loss.cause) == ("w0", "exited")

    run(body)


def test_a_hung_engine_is_given_up_and_comes_back_when_it_draws_a_token(tmp_path: Path) -> None:
    async def body() -> None:
        liveness = LivenessConfig(heartbeat_s=0.1, max_missed_heartbeats=100, stall_s=0.6)
        async with (
            running_standin(slow()) as first,
            running_standin(slow()) as second,
            running_fleet(tmp_path, first, second, liveness=liveness) as fleet,
        ):
            await streams_go_on(fleet, first.hang)
            assert [(loss.worker_id, loss.cause) for loss in fleet.losses()] == [("w0", "stalled")]
            await trio.sleep(0.5)
            assert [worker.id for worker in fleet.core.statistics().workers] == ["w1"], "its /health says 200 all along"
            first.resume()
            await fleet.ready(2)
            assert (await fleet.ask(prompt(99)))[0] == oracle(prompt(99), 8)

    run(body)


def test_a_long_prefill_without_a_token_is_no_stall(tmp_path: Path) -> None:
    async def body() -> None:
        liveness = LivenessConfig(heartbeat_s=0.1, max_missed_heartbeats=100, stall_s=0.5)
        options = slow(step_ms=100.0, max_step_tokens=64)
        async with (
            running_standin(options) as standin,
            running_fleet(tmp_path, standin, liveness=liveness) as fleet,
        ):
            tokens, finished = await fleet.ask(prompt(1, 1200), max_tokens=2)
            assert tokens == oracle(prompt(1, 1200), 2) and finished.num_attempts == 1 and not fleet.losses()

    run(body)


def test_a_server_that_was_started_anew_is_a_new_incarnation_that_has_nothing_cached(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            await fleet.ask(prompt(1, 200))
            await standin.restart()
            await fleet.until(lambda: bool(fleet.losses()))
            await fleet.ready(1)
            assert fleet.info().num_cached_blocks == 0
            _, finished = await fleet.ask(prompt(1, 200))
            assert finished.num_cached_tokens == 0 and fleet.info().mispredicted_tokens == 0
            await fleet.settle(standin)
            _, finished = await fleet.ask(prompt(1, 200))
            assert finished.num_cached_tokens == 192 and fleet.info().mispredicted_tokens == 0

    run(body)


def test_a_request_with_penalties_ends_with_a_named_error_and_a_sampled_one_says_it_is_another_draw(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        async with (
            running_standin(slow()) as first,
            running_standin(slow()) as second,
            running_fleet(tmp_path, first, second) as fleet,
        ):
            kinds = {
                "greedy": GREEDY,
                "penalised": Sampling(temperature=0.0, presence_penalty=1.0),
                "sampled": Sampling(temperature=1.0, seed=3),
            }
            asked = {
                (kind, number): fleet.submit(prompt(number), max_tokens=60, sampling=sampling)
                for kind, sampling in kinds.items()
                for number in range(4)
            }
            for _, answer in asked.values():
                await answer.begun.wait()
            first.cut()
            moved = set()
            for (kind, number), (req_id, answer) in asked.items():
                finished = await answer.end()
                decisions = [receipt.decision for receipt in fleet.core.receipts.of(req_id) or []]
                if decisions[0].worker_id != "w0":
                    continue
                moved.add(kind)
                if kind == "penalised":
                    assert finished.error is not None and "penalties" in finished.error.message
                    continue
                assert finished.reason == "length" and finished.num_attempts == 2
                assert bool(decisions[1].note) == (kind == "sampled")
                if kind == "greedy":
                    assert answer.tokens == oracle(prompt(number), 60)
            assert moved == set(kinds)

    run(body)


def test_a_gateway_that_was_restarted_gets_the_worker_and_its_index_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin(slow()) as standin, running_fleet(tmp_path, standin) as fleet:
            await fleet.ask(prompt(1, 200))
            await fleet.settle(standin)
            num_blocks = fleet.info().num_cached_blocks
            fleet.submit(prompt(2), max_tokens=1900)
            await fleet.until(lambda: bool(standin.state()["ranks"][0]["running"]))
            fleet.stop()
            await fleet.start()
            await fleet.ready(1)
            await fleet.until(lambda: fleet.info().num_cached_blocks >= num_blocks)
            await fleet.until(lambda: not standin.state()["ranks"][0]["running"])
            _, finished = await fleet.ask(prompt(1, 200))
            assert finished.num_cached_tokens == 192

    run(body)


def test_a_server_that_comes_back_as_another_is_waited_for_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            running_standin() as first,
            running_standin() as second,
            running_fleet(tmp_path, first, second) as fleet,
        ):
            second.options.engine.block_size = 24
            await second.restart()
            await fleet.until(lambda: len(fleet.core.statistics().workers) == 1)
            await trio.sleep(0.2)
            assert (await fleet.ask(prompt(1)))[0] == oracle(prompt(1), 8)
            second.options.engine.block_size = 32
            await second.restart()
            await fleet.ready(2)

    run(body)


# ---- coming and going


def test_a_command_that_comes_with_the_last_words_is_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = incarnation.Incarnation.say

    async def hear_first(self: incarnation.Incarnation, report: Report, timeout_s: float) -> bool:
        if self._end is not None:
            self.take(Resync())
        return await say(self, report, timeout_s)

    monkeypatch.setattr(incarnation.Incarnation, "say", hear_first)

    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin) as fleet:
            fleet.workers[0].drain(1.0)
            await fleet.until(lambda: fleet.codes == [0])

    run(body)


def test_a_slow_name_server_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def look_up(*_: object) -> None:
        assert answered.wait(10), "it waits in Trio's thread"

    monkeypatch.setattr(hello, "check_endpoint", look_up)

    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path) as fleet:
            fleet.front(standin.url)
            await trio.sleep(0.2)
            answered.set()
            await fleet.ready(1)

    run(body)


CARD = b'{"id":"demo","root":"/models/demo","max_model_len":%s}'
FALSE_FACTS = {
    "no UTF-8": ("/v1/models", b'{"data":[{"id":"\xff"}]}', "what no vLLM server does"),
    "a deep nest": ("/v1/models", b'{"data":' + b"[" * 100_000, "what no vLLM server does"),
    "no window": ("/v1/models", b'{"data":[' + CARD % b"-1" + b"]}", r"\$.limits.max_context"),
    "a window of 300 bits": ("/v1/models", b'{"data":[' + CARD % b"9" * 90 + b"]}", "what no vLLM server does|read"),
    "no place in its queue": (
        "/server_info?config_format=json",
        b'{"vllm_config":{"scheduler_config":{"max_num_seqs":-3}}}',
        r"\$.limits.max_requests",
    ),
}


@pytest.mark.parametrize("lie", FALSE_FACTS)
def test_a_server_that_says_what_cannot_be_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    path, told, what = FALSE_FACTS[lie]
    get = server.Server._get

    async def lie_about(self: server.Server, asked: str, default: bytes | None = None) -> bytes:
        return told if asked == path else await get(self, asked, default)

    monkeypatch.setattr(server.Server, "_get", lie_about)

    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path) as fleet:
            fleet.front(standin.url)
            await trio.sleep_forever()

    with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError, match=what), flatten_subgroups=True):
        run(body)


def test_a_process_that_is_to_exit_with_stdin_does_so_though_that_is_no_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvasir.worker", "--engine", "vllm", "--upstream", "http://127.0.0.1:9"]
    command += ["--gateway", f"ipc://{tmp_path}/workers.sock", "--name", "demo", "--exit-with-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_a_process_with_few_descriptors_has_requests_wait_and_takes_no_server_for_dead(tmp_path: Path) -> None:
    async def body() -> None:
        options = slow(step_ms=20.0, max_num_seqs=200)
        async with (
            running_standin(options) as standin,
            running_fleet(tmp_path) as fleet,
            trio.open_nursery() as nursery,
        ):
            worker = f'ulimit -n 64; exec "{sys.executable}" -m kvasir.worker --engine vllm "$@"'
            args = ["--upstream", standin.url, "--gateway", fleet.endpoint, "--name", "demo", "--worker-id", "w0"]
            command = ["bash", "-c", worker, "worker", *args]
            process = await nursery.start(partial(trio.run_process, command, capture_stderr=True, check=False))
            await fleet.ready(1, exact=False)
            answers = [fleet.submit(prompt(i, 40), max_tokens=30)[1] for i in range(100)]
            for number, answer in enumerate(answers):
                assert (await answer.end()).num_attempts == 1
                assert answer.tokens == oracle(prompt(number, 40), 30)
            assert not fleet.losses()
            process.terminate()
            assert await process.wait() == 0

    run(body)


def test_a_drained_worker_finishes_what_runs_and_hands_back_what_takes_too_long(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            running_standin(slow()) as first,
            running_standin(slow()) as second,
            running_fleet(tmp_path, first, second) as fleet,
        ):
            asked = [fleet.submit(prompt(i), max_tokens=20 if i < 4 else 150) for i in range(8)]
            for _, answer in asked:
                await answer.begun.wait()
            fleet.workers[0].drain(0.25)
            for number, (_, answer) in enumerate(asked):
                assert (await answer.end()).reason == "length"
                assert answer.tokens == oracle(prompt(number), 20 if number < 4 else 150)
            await fleet.until(lambda: bool(fleet.codes))
            assert fleet.codes == [0] and [loss.cause for loss in fleet.losses()] == ["bye"]

    run(body)


def test_a_worker_waits_for_a_server_that_is_not_up_yet_and_leaves_at_once_when_told(tmp_path: Path) -> None:
    async def body() -> None:
        async with running_standin() as standin:
            url = standin.url
            standin.cut()
            await standin.is_down.wait()
            async with running_fleet(tmp_path) as fleet:
                early = fleet.front(url)
                await trio.sleep(0.2)
                assert not fleet.core.statistics().workers
                await standin.restart()
                await fleet.ready(1)
                standin.cut()
                await fleet.until(lambda: bool(fleet.losses()))
                early.drain(10.0)
                await fleet.until(lambda: fleet.codes == [0])

    run(body)


def test_blocks_that_are_no_multiple_of_ours_are_refused_with_both_sizes(tmp_path: Path) -> None:
    async def body() -> None:
        options = StandinOptions(engine=EngineOptions(block_size=24))
        async with running_standin(options) as standin, running_fleet(tmp_path) as fleet:
            fleet.front(standin.url)
            await trio.sleep_forever()

    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigurationError, match=r"blocks of 24 tokens.*no multiple of the gateway's 16"),
        flatten_subgroups=True,
    ):
        run(body)


def test_a_worker_that_the_gateway_refuses_ends_with_the_code_for_it(tmp_path: Path) -> None:
    async def body() -> None:
        other = StandinOptions(root="/models/other")
        async with (
            running_standin() as first,
            running_standin(other) as second,
            running_fleet(tmp_path, first) as fleet,
        ):
            fleet.front(second.url)
            await fleet.until(lambda: bool(fleet.codes))
            assert fleet.codes == [incarnation.EXIT_REFUSED]

    run(body)


@pytest.mark.parametrize("args", [["--kv-events", "off"]])
def test_events_may_be_switched_off_here(tmp_path: Path, args: list[str]) -> None:
    async def body() -> None:
        async with running_standin() as standin, running_fleet(tmp_path, standin, args=args) as fleet:
            await fleet.ask(prompt(1))
            assert fleet.info().num_cached_blocks == 6 and not fleet.is_exact(fleet.workers[0])

    run(body)


def test_events_on_a_port_where_nobody_answers_are_predicted_instead(tmp_path: Path) -> None:
    async def body() -> None:
        args = ["--kv-events", f"ipc://{tmp_path}/nobody"]
        async with running_standin() as standin, running_fleet(tmp_path) as fleet:
            fleet.front(standin.url, *args)
            await fleet.ready(1, exact=False)
            await fleet.ask(prompt(1))
            _, finished = await fleet.ask(prompt(1))
            assert finished.num_cached_tokens == 96 and fleet.info().mispredicted_tokens == 0

    run(body)


def test_events_of_another_hash_form_and_wire_form_are_followed_too(tmp_path: Path) -> None:
    async def body() -> None:
        options = StandinOptions(engine=EngineOptions(hash_form="bytes"), events=EventOptions(form="array"))
        async with running_standin(options) as standin, running_fleet(tmp_path, standin) as fleet:
            for _ in range(2):
                await fleet.settle(standin)
                await fleet.ask(prompt(1))
            info = fleet.info()
            assert (info.predicted_cached_tokens, info.cached_tokens, info.mispredicted_tokens) == (96, 96, 0)

    run(body)
