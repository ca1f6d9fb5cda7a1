"""The table of request fields: it is what is parsed, what docs/api.md shows, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvasir.gateway.edges.anthropic_requests import MessagesBody, read_messages
from kvasir.gateway.edges.chat_turns import Turn
from kvasir.gateway.edges.field_check import FieldCheck
from kvasir.gateway.edges.openai_bodies import ChatBody, CompletionBody, StreamOptions
from kvasir.gateway.edges.openai_requests import MAX_PROMPTS, read_chat, read_completion
from kvasir.gateway.edges.request_fields import FIELDS, Row
from kvasir.gateway.edges.responses_requests import ResponsesBody, read_responses
from kvasir.protocol.errors import BadRequest

DOCS = Path(__file__).resolve().parents[3] / "docs" / "api.md"


def chat(**more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **more}).encode()


def completion(**more: Any) -> bytes:
    return json.dumps({"prompt": "x", **more}).encode()


READERS: dict[str, tuple[Callable[[bytes], object], dict[str, Any]]] = {
    "chat": (read_chat, {"messages": [{"role": "user", "content": "x"}]}),
    "completions": (read_completion, {"prompt": "x"}),
    "responses": (read_responses, {"input": "x"}),
    "anthropic": (read_messages, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
}


def docs_line(row: Row) -> str:
    names = " ".join(f"`{name}`" for name in row.names.split())
    return f"| {names} | {', '.join(row.places)} | {row.verdict} | {row.note} |"


def test_the_docs_show_the_table_row_by_row() -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert lines == [docs_line(row) for row in FIELDS]


@pytest.mark.parametrize(
    ("check", "body"),
    [
        (FieldCheck("chat"), ChatBody),
        (FieldCheck("completions"), CompletionBody),
        (FieldCheck("message"), Turn),
        (FieldCheck("stream_options"), StreamOptions),
        (FieldCheck("responses"), ResponsesBody),
        (FieldCheck("anthropic"), MessagesBody),
    ],
)
def test_what_is_called_honoured_is_what_has_a_type(check: FieldCheck, body: type) -> None:
    assert set(check.honoured) == {field.encode_name for field in msgspec.structs.fields(body)}


def test_every_refused_field_is_refused_by_name_and_passes_with_what_changes_nothing() -> None:
    for row in FIELDS:
        for place in row.places:
            for name in row.names.split() if row.verdict == "refused" else ():

                def read(value: Any, name: str = name, place: str = place) -> object:
                    if place == "message":
                        return read_chat(chat(messages=[{"role": "user", "content": "x", name: value}]))
                    if place == "stream_options":
                        return read_chat(chat(stream=True, stream_options={name: value}))
                    read_place, body = READERS[place]
                    return read_place(json.dumps({**body, name: value}).encode())

                with pytest.raises(BadRequest, match=f"{name} is not supported here") as caught:
                    read({"some": "thing"})
                assert caught.value.param is not None and caught.value.param.endswith(name)
                for value in (None, *row.off):
                    read(value)


def test_harmless_fields_pass_and_unknown_ones_are_refused_with_the_nearest_name() -> None:
    read_chat(chat(user="me", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k"))
    for raw, param, words in (
        (chat(max_token=3), "max_token", "did you mean 'max_tokens'"),
        (chat(temprature=0), "temprature", "did you mean 'temperature'"),
        (chat(zzz=1), "zzz", "docs/api.md"),
        (chat(stream_options={"include_usge": True}), "stream_options.include_usge", "include_usage"),
        (chat(messages=[{"role": "user", "contents": "x"}]), "messages[0].contents", "did you mean 'content'"),
    ):
        with pytest.raises(BadRequest, match=words) as caught:
            read_chat(raw)
        assert caught.value.param == param


def test_bodies_with_harmless_fields_are_read_without_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FieldCheck, "honoured_of")
    turns = [{"role": "assistant", "content": "x", "refusal": None, "annotations": [{}]}]
    options = {"include_usage": True, "include_obfuscation": False}
    asked = read_chat(chat(messages=turns, stream=True, stream_options=options, user={"any": ["thing"]}, store=True))
    assert asked.wants_usage and [message.content for message in asked.requests[0].messages or ()] == ["x"]
    assert read_completion(completion(user="me", stream_options=options)).wants_usage


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
def test_a_message_without_content_is_refused_with_its_index(content: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"messages\[1\] has no content") as caught:
        read_chat(chat(messages=[{"role": "user", "content": "x"}, {"role": "user", **content}]))
    assert caught.value.param == "messages[1].content"


def test_each_choice_of_each_prompt_draws_by_its_own_seed() -> None:
    for given in ({}, {"seed": 7}):
        asked = read_completion(completion(prompt=["x"] * 3, n=2, **given))
        assert len({request.sampling.seed for request in asked.requests}) == 6
    again = read_completion(completion(prompt=["x"] * 3, n=2, seed=7))
    assert [request.sampling.seed for request in again.requests] == [r.sampling.seed for r in asked.requests]
    alone = read_completion(completion(n=2, seed=7))
    assert [r.sampling.seed for r in alone.requests] == [r.sampling.seed for r in asked.requests[:2]]
    assert alone.requests[0].sampling.seed == 7


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [("x", ["text"]), (["x", "["], ["text"] * 2), ([1, 2], ["token_ids"]), ([[1], [2, 3]], ["token_ids"] * 2)],
)
def test_a_prompt_is_known_by_its_shape(prompt: Any, kinds: list[str]) -> None:
    requests = read_completion(completion(prompt=prompt)).requests
    assert ["text" if request.token_ids is None else "token_ids" for request in requests] == kinds


@pytest.mark.parametrize(
    "prompt", [[], [1, "x"], ["x", 1], [[1], 2], {"a": 1}, 3, None, [[1]] * (MAX_PROMPTS + 1), [-1], [1 << 40], [1.5]]
)
def test_a_prompt_of_no_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        read_completion(completion(prompt=prompt))
    assert caught.value.param == "prompt"


def test_large_values_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of small lists or a large dictionary take a second to decode, under Python's lock."""
    with pytest.raises(BadRequest, match=r"logit_bias has \d+ bytes"):
        read_chat(chat(logit_bias={str(number): 1 for number in range(20_000)}))
    decoded: list[object] = []
    real = msgspec.json.decode
    monkeypatch.setattr(msgspec.json, "decode", lambda raw, **kind: decoded.append(kind) or real(raw, **kind))
    with pytest.raises(BadRequest, match="up to 256 prompts"):
        read_completion(b'{"prompt": [' + b"[1]," * 100_000 + b"[1]]}")
    assert len(decoded) == 1, "the names alone"
