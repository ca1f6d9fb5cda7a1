"""The HTTP edge over real sockets: the public openai client, hostile input, slow and vanishing clients."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
import trio

from kvasir.gateway.core.api import Allowance, Finished, Standing
from kvasir.gateway.http.limits import HttpLimits
from kvasir.protocol.errors import BudgetExceeded, Overloaded, RateLimited
from tests.edge_helpers import ANSWER, FakeCore
from tests.http_helpers import KEY, open_edge, post_bytes, with_openai

pytestmark = pytest.mark.timeout(60)


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Add."}], **more}


# ---- the public client -------------------------------------------------------------------------------------------


def test_the_openai_client_completes_and_streams_the_same_text() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        whole = api.chat.completions.create(**chat(seed=4, temperature=0.5, user="me", metadata={"a": "b"}))
        assert whole.choices[0].message.content == ANSWER
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.prompt_tokens_details.cached_tokens == 16
        assert core.submits[0].sampling.seed == 4
        assert whole._request_id == whole.id.partition("-")[2] == core.submits[0].req_id.hex()
        chunks = list(api.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True})))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage == whole.usage
        text = api.completions.create(model="demo", prompt="x", max_tokens=3)
        assert (text.usage.completion_tokens, text.choices[0].finish_reason) == (3, "length")
        parts = list(api.completions.create(model="demo", prompt="x", max_tokens=3, stream=True))
        assert "".join(part.choices[0].text for part in parts if part.choices) == text.choices[0].text
        assert [model.id for model in api.models.list()] == ["demo", "other"]
        assert api.models.retrieve("demo").id == "demo"

    with_openai(work)


def test_the_openai_client_gets_typed_errors() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        with pytest.raises(openai.NotFoundError, match="served: demo"):
            api.chat.completions.create(**{**chat(), "model": "gone"})
        with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
            api.chat.completions.create(**chat(max_tokens=0))
        assert caught.value.param == "max_tokens"
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            api.chat.completions.create(
                **chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
            )
        with pytest.raises(openai.BadRequestError, match="temperature"):
            api.chat.completions.create(**chat(temperature=-1))
        core.fail = Finished(b"", "error", 1, 0, error=Overloaded("the queue is full", retry_after_s=7.2).info())
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
                api.chat.completions.create(**chat(stream=stream))
            headers = refused.value.response.headers
            assert (headers["retry-after"], headers["retry-after-ms"]) == ("8", "7200")

    with_openai(work)

    def stranger(api: openai.OpenAI, core: FakeCore) -> None:
        with pytest.raises(openai.AuthenticationError):
            api.models.list()
        assert not core.submits

    with_openai(stranger, key="kv_k1_wrong")


def test_limits_are_told_as_openai_s_clients_read_them_on_answers_streams_and_refusals() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        core.standings["id-alpha"] = Standing(Allowance(600, 599, 0.1), Allowance(20_000, 0, 61.5))
        expected = {"limit-requests": "600", "remaining-requests": "599", "reset-requests": "100ms"}
        expected |= {"limit-tokens": "20000", "remaining-tokens": "0", "reset-tokens": "1m1.5s"}
        with api.chat.completions.with_streaming_response.create(**chat(stream=True)) as streamed:
            for headers in (api.chat.completions.with_raw_response.create(**chat()).headers, streamed.headers):
                assert {name: headers[f"x-ratelimit-{name}"] for name in expected} == expected
        core.fail = Finished(b"", "error", 0, 0, error=RateLimited("too many", retry_after_s=0.05).info())
        with pytest.raises(openai.RateLimitError) as refused:
            api.chat.completions.create(**chat())
        headers = refused.value.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "50")
        assert headers["x-ratelimit-remaining-tokens"] == "0" and refused.value.code == "rate_limit_exceeded"
        core.fail = Finished(b"", "error", 0, 0, error=BudgetExceeded("all spent", retry_after_s=86_400.0).info())
        with pytest.raises(openai.RateLimitError, match="all spent") as refused:
            api.with_options(max_retries=2).chat.completions.create(**chat())
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert refused.value.code == "insufficient_quota" and len(core.submits) == 4, "it was tried again"

    with_openai(work)


def test_the_core_is_told_of_every_answer_that_it_is_over_after_it_was_written() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        def wait_until_closed(num: int) -> None:
            deadline = time.monotonic() + 10
            while len(core.closed_ids) < num and time.monotonic() < deadline:
                time.sleep(0.002)  # the client may have the answer before the write has returned
            assert core.closed_ids == {submit.req_id for submit in core.submits} and len(core.submits) == num

        api.chat.completions.create(**chat(n=2))
        wait_until_closed(2)
        with api.chat.completions.create(**chat(stream=True)) as stream:
            assert sum(1 for _ in stream) > 1
        wait_until_closed(3)
        core.fail = Finished(b"", "error", 0, 0, error=Overloaded("full").info())
        with pytest.raises(openai.RateLimitError):
            api.chat.completions.create(**chat())
        wait_until_closed(4)

    with_openai(work)


def test_choices_draw_from_their_own_seeds_and_the_prompt_is_counted_once() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        answer = api.chat.completions.create(**chat(n=3, seed=1, max_tokens=4))
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len({submit.sampling.seed for submit in core.submits}) == 3
        assert answer.usage.completion_tokens == 12
        assert answer.usage.prompt_tokens == core.submits[0].num_prompt_tokens
        assert [submit.counts_prompt for submit in core.submits] == [True, False, False]

    with_openai(work)


def test_a_stop_string_ends_the_answer_and_tells_the_core(monkeypatch) -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        for stream in (False, True):
            core.cancels.clear()
            answer = api.completions.create(model="demo", prompt="x", max_tokens=100, stop=["return"], stream=stream)
            parts = list(answer) if stream else [answer]
            text = "".join(choice.text for part in parts for choice in part.choices)
            assert text == ANSWER.partition("return")[0]
            assert [choice.finish_reason for part in parts for choice in part.choices][-1] == "stop"
            assert core.cancels[0].reason == "stop"

    with_openai(work)


def test_logprobs_come_with_their_tokens() -> None:
    def work(api: openai.OpenAI, core: FakeCore) -> None:
        answer = api.chat.completions.create(**chat(logprobs=True, top_logprobs=1, max_tokens=3))
        content = answer.choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == answer.choices[0].message.content
        assert content[0].top_logprobs[0].logprob == -0.5
        text = api.completions.create(model="demo", prompt="x", max_tokens=3, logprobs=1)
        assert "".join(text.choices[0].logprobs.tokens) == text.choices[0].text

    with_openai(work)


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_wrong_bodies_and_paths_are_answered_with_an_error_object() -> None:
    async def main() -> None:
        async with open_edge() as edge:
            for body, status, words in (
                (b"{", 400, "valid JSON"),
                (b'{"messages": "\xff"}', 400, "valid JSON|Expected"),
                (b'{"model": "\xff", "messages": []}', 400, "valid JSON"),
                (b"[" * 100_000, 400, "JSON|nested|Expected"),
                ({"model": "demo"}, 400, "messages"),
                (chat(temperature="hot"), 400, "temperature"),
                (
                    {"model": "demo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                    400,
                    "image_url",
                ),
                (
                    {"model": "demo", "messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
                    400,
                    "tool_calls",
                ),
                (chat(n=99), 400, "n must be"),
                (chat(response_format={"type": "structural_tag"}), 400, "response_format"),
                (chat(logit_bias={"x": 1}), 400, "logit_bias"),
            ):
                got, _, answer = await edge.post("/v1/chat/completions", body)
                assert got == status, answer
                message = json.loads(answer)["error"]["message"]
                assert any(word in message for word in words.split("|")), message
            for path, status in (("/nothing", 404), ("/v1/embeddings", 404), ("/v1/models", 405)):
                got, _, answer = await edge.post(path, {})
                assert got == status and json.loads(answer)["error"]["message"]
            answer = await edge.raw(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200") and b'"ok"' in answer
            answer = await edge.raw(b"HEAD /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
            assert not edge.core.submits

    run(main)


WITH_KEY = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + KEY.encode() + b"\r\n"
CHUNKED = WITH_KEY + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
        (CHUNKED + b"xyz\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked, identity\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: b\x00c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
        (WITH_KEY + b"content-length: 99999999\r\n\r\n", 413),
        (CHUNKED + b"5000\r\n" + b"x" * 0x5000 + b"\r\n", 413),
        (b"GET / HTTP/1.1\r\nhost: x\r\nexpect: tea\r\n\r\n", 417),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_closed(data: bytes, status: int) -> None:
    async def main() -> None:
        async with open_edge(HttpLimits(max_body_bytes=10_000)) as edge:
            for pieces in (1, 7):
                answer = await edge.raw(data, pieces=pieces)
                assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
                assert answer.count(b"HTTP/1.1") == 1

    run(main)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ],
)
def test_a_stranger_is_refused_before_it_has_sent_a_body(path: str) -> None:
    async def main() -> None:
        async with open_edge() as edge:
            for key in ("", "kv_no_key"):
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: 8000000\r\n\r\n"
                answer = await edge.raw(head.encode())
                head_, _, body = answer.partition(b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 401 ") and b"\r\nwww-authenticate: Bearer\r\n" in head_
                error = json.loads(body)
                assert error["error"]["type"] == "authentication_error"
                assert ("request_id" in error) == path.startswith("/v1/messages"), "in the form of its dialect"
            assert edge.server.room.num_bytes == 0

    run(main)


@pytest.mark.parametrize(
    ("more", "status", "kinds"),
    [
        (b"content-encoding: br\r\ncontent-length: 10\r\n\r\n", 400, ("invalid_request_error",) * 2),
        (b"transfer-encoding: chunked\r\n\r\nxyz\r\n", 400, ("invalid_request_error",) * 2),
        (b"content-length: 10001\r\n\r\n", 413, ("invalid_request_error", "request_too_large")),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_in_the_form_of_its_dialect(
    more: bytes, status: int, kinds: tuple[str, str]
) -> None:
    async def main() -> None:
        async with open_edge(HttpLimits(max_body_bytes=10_000)) as edge:
            for path, kind in zip((b"/v1/completions", b"/v1/messages"), kinds, strict=True):
                answer = await edge.raw(WITH_KEY.replace(b"/v1/completions", path) + more)
                assert answer.startswith(b"HTTP/1.1 %d " % status)
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == kind

    run(main)


# ---- connections -------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order_on_one_connection() -> None:
    async def main() -> None:
        async with open_edge() as edge:
            many = [
                post_bytes("/v1/completions", b'{"prompt":"x","model":"demo","max_tokens":%d}' % n) for n in (3, 1, 2)
            ]
            data = b"".join(many) + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            answer = await edge.raw(data, pieces=5)
            assert answer.count(b"HTTP/1.1 200") == 4
            order = [int(part.split(b",")[0].rstrip(b"}")) for part in answer.split(b'"completion_tokens":')[1:]]
            assert order == [3, 1, 2]
            assert edge.server.statistics.num_accepted == 1

    run(main)


def test_a_client_that_expects_100_continue_is_told_to_go_on() -> None:
    async def main() -> None:
        async with open_edge() as edge, await edge.connect() as stream:
            body = json.dumps(chat(max_tokens=1)).encode()
            head = post_bytes("/v1/chat/completions", body, close=True)[: -len(body)]
            await stream.send_all(head.replace(b"host: x", b"host: x\r\nexpect: 100-continue"))
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
            await stream.send_all(body)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request(stream: bool) -> None:
    async def main() -> None:
        async with open_edge() as edge:
            edge.core.hold = True
            connection = await edge.connect()
            await connection.send_all(post_bytes("/v1/chat/completions", json.dumps(chat(stream=stream)).encode()))
            while not edge.core.submits:
                await trio.lowlevel.checkpoint()
            if stream:
                assert await connection.receive_some()
            await connection.aclose()
            await edge.core.cancelled.wait()
            assert edge.core.cancels[0].req_id == edge.core.submits[0].req_id
            while edge.server.statistics.num_open:
                await trio.lowlevel.checkpoint()

    run(main)


@pytest.mark.parametrize(
    "data",
    [b"GET /health HT", WITH_KEY + b"content-length: 10\r\n\r\nabc", b""],
    ids=["headers", "body", "idle"],
)
def test_a_slow_client_is_cut_and_others_are_served_meanwhile(data: bytes) -> None:
    async def main() -> None:
        async with open_edge(HttpLimits(headers_s=0.6, body_s=0.6, idle_s=0.6)) as edge, await edge.connect() as slow:
            await slow.send_all(data or b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            status, _, _ = await edge.post("/v1/chat/completions", chat(max_tokens=1))
            assert status == 200
            while await slow.receive_some():
                pass
            assert edge.server.statistics.num_cut == 1

    run(main)


def test_a_client_that_stops_reading_is_cut_and_its_request_cancelled() -> None:
    async def main() -> None:
        async with (
            open_edge(HttpLimits(write_s=0.8), lambda submit: [300] * 400_000) as edge,
            await edge.connect() as slow,
        ):
            edge.core.infos["demo"] = type(edge.core.infos["demo"])("demo", "f", "float32", 16, 1 << 20, 1)
            await slow.send_all(post_bytes("/v1/chat/completions", json.dumps(chat(stream=True)).encode()))
            await edge.core.cancelled.wait()
            assert edge.server.statistics.num_cut == 1

    run(main)


def test_draining_finishes_what_runs_and_closes_what_is_idle() -> None:
    async def main() -> None:
        async with open_edge() as edge, await edge.connect() as busy, await edge.connect() as idle:
            edge.core.hold = True
            await idle.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await idle.receive_some()
            await busy.send_all(post_bytes("/v1/chat/completions", json.dumps(chat()).encode()))
            while not edge.core.submits:
                await trio.lowlevel.checkpoint()
            edge.server.drain()
            assert await idle.receive_some() == b""
            submit = edge.core.submits[0]
            submit.sink.put(Finished(submit.req_id, "stop", 3, 0))
            answer = b"".join([chunk async for chunk in busy])
            assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
            with pytest.raises(OSError):
                await edge.connect()

    run(main)


def test_a_bug_in_the_handler_is_a_plain_500_and_costs_one_connection() -> None:
    async def main() -> None:
        async with open_edge() as edge:
            edge.core.submit = lambda submit: 1 / 0
            status, _, answer = await edge.post("/v1/chat/completions", chat())
            assert status == 500 and b"internal error" in answer and b"ZeroDivision" not in answer
            assert (await edge.raw(b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")

    run(main)
