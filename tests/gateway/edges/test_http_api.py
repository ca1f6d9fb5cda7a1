"""The OpenAI routes as a handler, without sockets: what they cost, what they refuse, what they write."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from kvasir.gateway.core.api import Delta, Finished, Submit
from kvasir.gateway.edges import http_api, http_completions
from kvasir.gateway.edges.answer import MAX_WAITING_EVENTS
from kvasir.gateway.edges.openai_answers import ChatWriter
from kvasir.gateway.http.parser import HttpRequest
from kvasir.protocol.errors import RequestFailed
from kvasir.protocol.terms import Terms
from kvasir.protocol.tokens import pack_tokens
from tests.edge_helpers import ALPHA, ANSWER, KEYS, TEXT, FakeExchange, House, decoded, run

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("token", "key", "status"),
    [
        ("", None, 403),
        ("", "", 403),
        ("", KEYS["alpha"], 403),
        ("secret", None, 401),
        ("secret", KEYS["alpha"], 401),
        ("secret", "sécret", 401),
        ("secret", "secret", 200),
    ],
)
def test_metrics_are_for_the_scraper_s_token_alone_and_off_without_one(token, key, status) -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask("/metrics", method="GET", key=key)
        assert response is not None and response.status == status
        assert (response.body == b"metrics\n") == (status == 200)

    run(main, House(metrics_token=token))


def test_each_request_is_one_line_in_the_access_log() -> None:
    house = House()

    async def main(house: House) -> None:
        await house.ask("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 99})
        await house.ask("/v1/completions", {"prompt": {}})
        await house.ask("/v1/models", method="GET", key="wrong")
        await house.ask("/health", method="GET", key=None)  # has none
        await house.ask("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 99, "stream": True})

    run(main, house)
    whole, wrong, stranger, streamed = house.lines
    assert (streamed["status"], streamed["tokens"]) == (200, whole["tokens"])
    assert (whole["status"], whole["path"], whole["tokens"]) == (200, "/v1/completions", len(TEXT.encode(ANSWER)))
    assert whole["request"] == house.core.submits[0].req_id.hex() and whole["tenant"] == house.core.submits[0].tenant_id
    assert (wrong["status"], wrong["path"], wrong["tenant"]) == (400, "/v1/completions", whole["tenant"])
    assert (stranger["status"], stranger["method"], "tenant" in stranger) == (401, "GET", False)


def test_every_other_route_needs_a_key_but_health() -> None:
    async def main(house: House) -> None:
        for path, method in (
            ("/v1/chat/completions", "POST"),
            ("/v1/completions", "POST"),
            ("/v1/models", "GET"),
            ("/v1/models/demo", "GET"),
        ):
            for key in (None, "kv_k1_wrong", ""):
                response, _ = await house.ask(path, {"prompt": "x"}, method=method, key=key)
                assert response is not None and response.status == 401
                assert ("www-authenticate", "Bearer") in response.headers
                assert decoded(response)["error"]["code"] == "invalid_api_key"
        response, _ = await house.ask("/health", method="GET", key=None)
        assert response is not None and response.status == 200
        assert not house.core.submits

    run(main)


def test_a_wrong_method_is_told_the_right_one() -> None:
    async def main(house: House) -> None:
        for path, method, allowed in (
            ("/v1/completions", "GET", "POST"),
            ("/v1/models", "DELETE", "GET, HEAD"),
            ("/health", "POST", "GET, HEAD"),
        ):
            response, _ = await house.ask(path, method=method)
            assert response is not None and response.status == 405
            assert ("allow", allowed) in response.headers

    run(main)


def test_a_model_is_found_by_its_quoted_name_and_only_by_whom_may_use_it() -> None:
    async def main(house: House) -> None:
        house.core.infos["org/model é"] = house.core.infos["demo"].__class__("org/model é", "f", "f", 16, 64, 1)
        for path in ("/v1/models/org%2Fmodel%20%C3%A9", "/v1/models/org/model%20%C3%A9"):
            response, _ = await house.ask(path, method="GET")
            assert decoded(response)["id"] == "org/model é"
            response, _ = await house.ask(path, method="GET", key=KEYS["beta"])
            assert response is not None and response.status == 404
            assert decoded(response)["error"]["code"] == "model_not_found"

    run(main)


def test_a_tenant_s_aliases_are_among_its_models() -> None:
    async def main(house: House) -> None:
        house.directory.apply(dataclasses.replace(ALPHA, terms=Terms(aliases={"gpt-4o": ["demo"]})))
        response, _ = await house.ask("/v1/models", method="GET")
        assert [card["id"] for card in decoded(response)["data"]] == ["demo", "other", "gpt-4o"]
        response, _ = await house.ask("/v1/models/gpt-4o", method="GET")
        assert decoded(response)["id"] == "gpt-4o" and decoded(response)["max_model_len"] > 0
        response, _ = await house.ask("/v1/models/gpt-4o", method="GET", key=KEYS["beta"])
        assert response is not None and response.status == 404

    run(main)


def test_health_is_bad_while_no_worker_is_there() -> None:
    async def main(house: House) -> None:
        del house.core.infos["demo"]
        response, _ = await house.ask("/health", method="GET", key=None)
        assert response is not None and response.status == 503
        assert decoded(response) == {"status": "no workers", "workers": {"other": 0}}

    run(main)


def test_equal_prompts_are_each_counted_and_choices_of_one_prompt_once() -> None:
    async def main(house: House) -> None:
        one, _ = await house.ask("/v1/completions", {"model": "demo", "prompt": "import os", "max_tokens": 2})
        usage = decoded(one)["usage"]
        two, _ = await house.ask(
            "/v1/completions", {"model": "demo", "prompt": ["import os"] * 2, "n": 3, "max_tokens": 2}
        )
        answer = decoded(two)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == 2 * usage["prompt_tokens"]
        assert answer["usage"]["completion_tokens"] == 12

    run(main)


def test_text_offsets_run_on_from_chunk_to_chunk() -> None:
    async def main(house: House) -> None:
        body = {"model": "demo", "prompt": "x", "max_tokens": 12, "logprobs": 1}
        whole, _ = await house.ask("/v1/completions", body)
        _, streamed = await house.ask("/v1/completions", {**body, "stream": True})
        chunks = [event["choices"][0]["logprobs"] for event in streamed.events() if event and event["choices"]]
        expected = decoded(whole)["choices"][0]["logprobs"]
        assert len([chunk for chunk in chunks if chunk]) > 1
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [value for chunk in chunks if chunk for value in chunk[name]] == expected[name]
        assert expected["text_offset"] == [len("".join(expected["tokens"][:index])) for index in range(12)]

    run(main)


def test_the_bytes_of_a_logprob_are_the_tokens_own_even_within_a_character() -> None:
    async def main(house: House) -> None:
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
        response, _ = await house.ask("/v1/chat/completions", {**body, "max_tokens": 100})
        content = decoded(response)["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == ANSWER
        assert all(bytes(entry["bytes"]) == bytes(entry["top_logprobs"][0]["bytes"]) for entry in content)

    run(main)


def test_an_answer_with_very_many_logprobs_is_written_in_a_thread_or_has_to_be_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written_by: list[threading.Thread] = []

    class Noting(ChatWriter):
        def whole(self, pieces: Any, ends: Any) -> dict[str, Any]:
            written_by.append(threading.current_thread())
            return super().whole(pieces, ends)

    monkeypatch.setattr(http_api, "ChatWriter", Noting)
    monkeypatch.setattr(http_completions, "MAX_WHOLE_LOGPROBS", 10_000)  # each of these tokens has two
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}

    async def main(house: House) -> None:
        for n, max_tokens in ((1, 100), (4, 1000)):
            response, _ = await house.ask("/v1/chat/completions", {**body, "n": n, "max_tokens": max_tokens})
            choices = decoded(response)["choices"]
            assert [len(choice["logprobs"]["content"]) for choice in choices] == [max_tokens] * n
        assert [thread is threading.main_thread() for thread in written_by] == [True, False]
        response, _ = await house.ask("/v1/chat/completions", {**body, "n": 8, "max_tokens": 1000})
        assert response is not None and response.status == 400
        assert decoded(response)["error"]["param"] == "logprobs" and len(written_by) == 2

    ids = TEXT.encode(ANSWER) * 100
    run(main, House(lambda submit: ids[: submit.max_tokens]))


def test_all_tokens_that_came_since_the_last_write_go_out_in_one() -> None:
    async def main(house: House) -> None:
        ids = TEXT.encode(ANSWER)

        def deliver_at_once(submit: Submit) -> None:
            for token_id in ids:
                submit.sink.put(Delta(submit.req_id, pack_tokens([token_id])))
            submit.sink.put(Finished(submit.req_id, "length", 3, len(ids)))

        house.core.submit = deliver_at_once  # type: ignore[method-assign]
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": True}
        _, exchange = await house.ask("/v1/chat/completions", body)
        assert len(exchange.pieces) == 1 and exchange.ended
        events = exchange.events()
        assert [event["choices"][0]["delta"] for event in events[:-1]] == [
            {"role": "assistant", "content": ""},
            {"content": ANSWER},
            {},
        ]
        assert events[-1] is None
        assert all("usage" not in event for event in events[:-1])

    run(main)


def test_an_error_in_mid_stream_is_sent_as_an_event_and_before_it_as_a_status() -> None:
    error = RequestFailed("2 workers died under it").info()

    async def main(house: House) -> None:
        def fail_after(num_tokens: int) -> Callable[[Submit], None]:
            def submit_(submit: Submit) -> None:
                async def later() -> None:
                    if num_tokens:
                        submit.sink.put(Delta(submit.req_id, pack_tokens(TEXT.encode("import"))))
                        await trio.lowlevel.checkpoint()
                        await trio.lowlevel.checkpoint()
                    submit.sink.put(Finished(submit.req_id, "error", 3, num_tokens, error=error))

                house.core.nursery.start_soon(later)

            return submit_

        body = {"model": "demo", "prompt": "x", "stream": True}
        house.core.submit = fail_after(0)  # type: ignore[method-assign]
        response, exchange = await house.ask("/v1/completions", body)
        assert response is not None and response.status == 500 and not exchange.pieces
        house.core.submit = fail_after(1)  # type: ignore[method-assign]
        response, exchange = await house.ask("/v1/completions", body)
        assert response is None and exchange.status == 200 and exchange.ended
        assert [event["error"]["code"] for event in exchange.events() if event and "error" in event] == [error.code]

    run(main)


def test_a_stream_tells_the_core_how_much_was_written_and_a_cancelled_one_pays_for_no_more() -> None:
    async def main(house: House) -> None:
        class Slow(FakeExchange):
            async def write(self, data: bytes) -> None:
                if self.pieces:
                    await trio.sleep_forever()
                self.pieces.append(data)

        submits: list[Submit] = []
        house.core.submit = submits.append  # type: ignore[method-assign]
        body = json.dumps({"model": "demo", "prompt": "x", "stream": True}).encode()
        request = HttpRequest(
            "POST", "/v1/completions", {"authorization": f"Bearer {KEYS['alpha']}"}, body, keep_alive=True
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.api, request, Slow(body))
            await trio.testing.wait_all_tasks_blocked()
            [submit] = submits
            for num in (2, 3):  # the first are written, the others not
                submit.sink.put(Delta(submit.req_id, pack_tokens(TEXT.encode("import os")[:1] * num)))
                await trio.testing.wait_all_tasks_blocked()
            assert house.core.sent_tokens == {submit.req_id: 2}
            nursery.cancel_scope.cancel()
        assert [(cancel.req_id, cancel.num_output_tokens) for cancel in house.core.cancels] == [(submit.req_id, 2)]
        assert house.core.closed_ids == {submit.req_id}

    run(main)


def test_a_stream_whose_client_does_not_read_is_cut_before_it_grows_without_bound() -> None:
    async def main(house: House) -> None:
        blocked = trio.Event()

        class Stuck(FakeExchange):
            async def write(self, data: bytes) -> None:
                blocked.set()
                await trio.sleep_forever()

        body = json.dumps({"model": "demo", "prompt": "x", "stream": True}).encode()
        stuck = Stuck(body)
        submits: list[Submit] = []
        house.core.submit = submits.append  # type: ignore[method-assign]
        headers = {"host": "x", "authorization": f"Bearer {KEYS['alpha']}"}
        request = HttpRequest("POST", "/v1/completions", headers, body, keep_alive=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.api, request, stuck)
            await trio.testing.wait_all_tasks_blocked()
            [submit] = submits
            submit.sink.put(Delta(submit.req_id, pack_tokens([300])))
            await blocked.wait()
            for _ in range(MAX_WAITING_EVENTS):
                submit.sink.put(Delta(submit.req_id, pack_tokens([300])))
            assert not stuck.was_cut
            submit.sink.put(Delta(submit.req_id, pack_tokens([300])))
            assert stuck.was_cut
            nursery.cancel_scope.cancel()
        assert [cancel.req_id for cancel in house.core.cancels] == [submit.req_id]

    run(main)
