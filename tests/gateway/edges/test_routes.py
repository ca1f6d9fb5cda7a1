"""The smaller routes, and what every answer of the HTTP edge has: request ids, CORS, keys, errors by method."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest

from kvasir.gateway.edges.cors import Cors
from kvasir.gateway.http.content_coding import unpack
from kvasir.gateway.http.parser import MAX_BODY_BYTES, HttpRequest
from kvasir.protocol.errors import TooLarge
from tests.edge_helpers import KEYS, TEXT, FakeExchange, House, decoded, run

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


async def send(house: House, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Any:
    return await house.api(
        HttpRequest(method, path, {"host": "x", **headers}, body, keep_alive=True), FakeExchange(body)
    )  # type: ignore[arg-type]


def test_texts_and_chats_are_tokenised_as_their_prompts_and_back() -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask("/tokenize", {"model": "demo", "prompt": "import os", "return_token_strs": True})
        answer = decoded(response)
        assert answer["tokens"] == TEXT.encode("import os") and answer["count"] == len(answer["tokens"])
        assert "".join(answer["token_strs"]) == "import os" and answer["max_model_len"] == 2048
        chat = decoded((await house.ask("/tokenize", {"messages": CHAT["messages"], "model": "demo"}))[0])
        await house.ask("/v1/chat/completions", CHAT)
        assert chat["count"] == house.core.submits[0].num_prompt_tokens and chat["token_strs"] is None
        back = decoded((await house.ask("/detokenize", {"model": "demo", "tokens": chat["tokens"]}))[0])
        assert back == {"prompt": "<|user|>x<|end|><|assistant|>"}

    run(main)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"model": "other", "prompt": "x"}, "prompt"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 2049}, "tokens"),
        ("/detokenize", {"model": "other", "tokens": [1]}, "model"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_cannot_be_tokenised_is_refused_with_its_field(path: str, body: dict[str, Any], param: str) -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask(path, {"model": "demo", **body})
        assert response is not None and response.status == 400
        assert decoded(response)["error"]["param"] == param

    run(main)


def test_the_version_and_every_new_route_need_a_key_in_either_header() -> None:
    async def main(house: House) -> None:
        response = await send(house, "GET", "/version", {"x-api-key": KEYS["alpha"]})
        assert decoded(response) == {"version": "unknown"}
        for path in ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"):
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong", "x-api-key": KEYS["alpha"]}):
                assert (await send(house, "POST", path, headers, b"{}")).status == 401
        assert not house.core.submits

    run(main)


def test_every_answer_has_a_request_id_that_the_log_knows() -> None:
    house = House()

    async def main(house: House) -> None:
        for path, body, method in (
            ("/v1/chat/completions", CHAT, "POST"),
            ("/v1/chat/completions", {**CHAT, "n": 99}, "POST"),
            ("/v1/models", None, "GET"),
            ("/v1/models", None, "DELETE"),
            ("/gone", None, "GET"),
            ("/health", None, "GET"),
        ):
            response, _ = await house.ask(path, body, method=method)
            [request_id] = [value for name, value in response.headers if name == "x-request-id"]
            assert len(request_id) == 32
        _, exchange = await house.ask("/v1/chat/completions", {**CHAT, "stream": True})
        assert exchange.headers["x-request-id"] == house.core.submits[-1].req_id.hex()
        first = house.core.submits[0].req_id.hex()
        assert house.lines[0]["request"] == first and house.lines[1]["request"] != first

    run(main, house)


def test_answers_carry_a_fingerprint_of_what_computed_them() -> None:
    async def main(house: House) -> None:
        whole = decoded((await house.ask("/v1/chat/completions", CHAT))[0])
        _, exchange = await house.ask("/v1/chat/completions", {**CHAT, "stream": True})
        fingerprints = {event["system_fingerprint"] for event in exchange.events() if event}
        assert fingerprints == {whole["system_fingerprint"]} and len(whole["system_fingerprint"]) == 15

    run(main)


def test_a_wrong_method_is_a_clients_error_of_a_known_type() -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask("/v1/chat/completions", method="GET")
        assert response is not None and response.status == 405
        assert decoded(response)["error"]["type"] == "invalid_request_error"

    run(main)


def test_a_prompt_that_is_too_long_is_told_as_clients_know_it() -> None:
    async def main(house: House) -> None:
        long = {**CHAT, "messages": [{"role": "user", "content": "x y " * 2000}]}
        for path, body, param in (
            ("/v1/chat/completions", long, "messages"),
            ("/v1/completions", {"model": "demo", "prompt": "x y " * 2000}, "prompt"),
            ("/v1/chat/completions", {**CHAT, "max_tokens": 5000}, "max_tokens"),
        ):
            response, _ = await house.ask(path, body)
            assert response is not None and response.status == 400
            error = decoded(response)["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert error["message"].startswith("This model's maximum context length is 2048 tokens")

    run(main)


# ---- packed bodies -----------------------------------------------------------------------------------------------

PACKED = gzip.compress(json.dumps(CHAT).encode())


@pytest.mark.parametrize(
    ("coding", "body", "status", "words"),
    [
        ("gzip", PACKED, 200, ""),
        ("X-GZIP", PACKED, 200, ""),
        ("identity", json.dumps(CHAT).encode(), 200, ""),
        ("gzip", gzip.compress(b'{"model": "demo",') + gzip.compress(json.dumps(CHAT).encode()[1:]), 200, ""),
        ("gzip", PACKED[:-9], 400, "cut short"),
        ("gzip", PACKED + b"no gzip", 400, "no gzip"),
        ("gzip", b"{}", 400, "no gzip"),
        ("gzip", b"", 400, "cut short"),
        ("br", PACKED, 400, "'br' is not known"),
        ("gzip, gzip", gzip.compress(PACKED), 400, "not known"),
        ("gzip", gzip.compress(b" " * (MAX_BODY_BYTES + 1)), 413, f"more than {MAX_BODY_BYTES} bytes"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_a_body_may_be_packed_within_the_bound_of_one_that_is_not(
    coding: str, body: bytes, status: int, words: str
) -> None:
    async def main(house: House) -> None:
        key = {"authorization": f"Bearer {KEYS['alpha']}", "content-encoding": coding}
        response = await send(house, "POST", "/v1/chat/completions", key, body)
        assert response.status == status and words in response.body.decode()

    run(main)


def test_what_would_unpack_to_gigabytes_is_given_up_at_the_bound() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join([packer.compress(bytes(1 << 24)) for _ in range(16)]) + packer.flush()
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            unpack(bomb)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BODY_BYTES
    finally:
        tracemalloc.stop()


# ---- CORS --------------------------------------------------------------------------------------------------------

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


@pytest.mark.parametrize(
    ("allowed", "shown"), [([ORIGIN], ORIGIN), (["*"], "*"), (["https://other"], None), ([], None)]
)
def test_pages_of_allowed_origins_may_ask_and_no_others(allowed: list[str], shown: str | None) -> None:
    async def main(house: House) -> None:
        house.api._cors = Cors(allowed)
        response = await send(house, "OPTIONS", "/v1/chat/completions", PREFLIGHT)
        headers = dict(response.headers)
        assert headers.get("access-control-allow-origin") == shown
        assert response.status == (405 if shown is None else 204)
        assert headers.get("access-control-allow-headers") == (None if shown is None else "authorization, content-type")
        key = {"authorization": f"Bearer {KEYS['alpha']}", "origin": ORIGIN}
        for path, status in (("/v1/models", 200), ("/gone", 404)):
            answer = await send(house, "GET", path, key)
            assert answer.status == status and dict(answer.headers).get("access-control-allow-origin") == shown
        assert ("vary" in headers) == (allowed not in ([], ["*"]))

    run(main)


def test_streams_carry_the_headers_too_and_odd_header_names_are_not_repeated() -> None:
    async def main(house: House) -> None:
        house.api._cors = Cors(["*"])
        _, exchange = await house.ask("/v1/chat/completions", {**CHAT, "stream": True})
        assert exchange.headers["access-control-allow-origin"] == "*"
        odd = {**PREFLIGHT, "access-control-request-headers": 'x"<script>'}
        response = await send(house, "OPTIONS", "/v1/chat/completions", odd)
        assert response.status == 204 and "access-control-allow-headers" not in dict(response.headers)

    run(main)


def test_what_others_serve_and_we_do_not_is_told_from_a_wrong_path() -> None:
    async def main(house: House) -> None:
        for path, words in (
            ("/v1/responses/resp_1", "answers are not stored"),
            ("/v1/messages/batches", "answered as they come"),
            ("/v1/embeddings", "embed none"),
        ):
            response, _ = await house.ask(path, method="GET")
            assert response is not None and response.status == 404
            assert words in decoded(response)["error"]["message"]

    run(main)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/completion", "/v1/completions"),
    ],
)
def test_a_path_that_is_nearly_one_is_told(path: str, near: str) -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask(path, {})
        assert response is not None and response.status == 404
        assert f"did you mean {near!r}?" in decoded(response)["error"]["message"]

    run(main)


@pytest.mark.parametrize("header", ["Basic x", KEYS["alpha"]])
def test_a_key_without_its_scheme_is_told_from_none(header: str) -> None:
    async def main(house: House) -> None:
        response = await send(house, "GET", "/v1/models", {"authorization": header})
        assert response is not None and response.status == 401
        message = decoded(response)["error"]["message"]
        assert "`Bearer KEY`" in message and KEYS["alpha"] not in message
        both = {"authorization": header, "x-api-key": KEYS["alpha"]}  # as from behind a proxy with passwords of its own
        assert (await send(house, "GET", "/v1/models", both)).status == 200

    run(main)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logit_bias": {"hello": 1}}, "logit_bias", "a key of logit_bias: Expected `int`, got `str`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: Expected `int` <= 20"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role is missing, and required"),
        (
            {"tool_choice": "any"},
            "tool_choice",
            "tool_choice: 'any' is none of those known here: 'auto', 'none', 'required'",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "function": {"name": "x"}}},
            "tool_choice.type",
            "tool_choice.type: 'allowed_tools' is none of those known here: 'function'",
        ),
    ],
)
def test_what_is_wrong_in_a_body_is_told_by_its_field(fields: dict[str, Any], param: str, words: str) -> None:
    async def main(house: House) -> None:
        chat = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
        response, _ = await house.ask("/v1/chat/completions", {**chat, **fields})
        error = decoded(response)["error"]
        assert (error["param"], error["message"]) == (param, words)

    run(main)
