"""What the SDK makes of parts, tools and several answers, against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import kvasir
from kvasir import (
    AsyncClient,
    ChatMessage,
    Client,
    ReasoningPart,
    TextPart,
    ToolCall,
    ToolCallPart,
    errors,
)
from kvasir.protocol.client_messages import (
    CancelRequest,
    ChatOptions,
    CompletionChunk,
    CompletionDone,
    CompletionRequest,
)
from kvasir.protocol.codec import Message
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.sampling import Grammar
from tests.fake_gateway import API_KEY, FakeGateway

pytestmark = pytest.mark.timeout(30)
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
PARTS = [
    ReasoningPart("Hm. "),
    TextPart("Let me."),
    ToolCallPart(0, "call_1", "add"),
    ToolCallPart(0, arguments='{"a": '),
    ToolCallPart(0, arguments="1}"),
    ToolCallPart(1, "call_2", "now"),
    ToolCallPart(1, arguments="{}"),
]
CALLS = [ToolCall("call_1", "add", '{"a": 1}'), ToolCall("call_2", "now", "{}")]


def in_parts(request: CompletionRequest) -> Iterable[Message]:
    """Answer with `PARTS`, the first three in one chunk."""
    yield CompletionChunk(request.id, parts=PARTS[:3])
    for part in PARTS[3:]:
        yield CompletionChunk(request.id, parts=[part])
    yield CompletionDone(request.id, "tool_calls")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[FakeGateway]:
    with FakeGateway(tmp_path, in_parts) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.endpoint, API_KEY, timeout_s=10) as client:
        yield client


def test_reasoning_text_and_calls_come_as_typed_events_and_make_a_completion(client: Client) -> None:
    stream = client.chat(HI, stream=True, tools=[TOOL])
    events = [event for chunk in stream for event in chunk.events]
    assert events == PARTS
    whole = stream.result
    assert (whole.text, whole.reasoning, whole.tool_calls) == ("Let me.", "Hm. ", CALLS)
    assert whole.finish_reason == "tool_calls"
    assert whole.message == ChatMessage("assistant", "Let me.", reasoning="Hm. ", tool_calls=CALLS)


def test_plain_text_is_an_event_too(client: Client, gateway: FakeGateway) -> None:
    gateway.script = lambda request: [CompletionChunk(request.id, "a"), CompletionDone(request.id, "stop")]
    assert [chunk.events for chunk in client.generate("x", stream=True)] == [[TextPart("a")]]


def test_options_for_chats_reach_the_gateway(client: Client, gateway: FakeGateway) -> None:
    client.chat(
        HI, tools=[TOOL], tool_choice="add", parallel_tool_calls=False, variables={"x": 1}, documents=[{"text": "d"}],
        reasoning_effort="low", max_reasoning_tokens=7, include_reasoning=False, continue_final_message=True,
        min_tokens=1, allowed_token_ids=[5], bad_words=["b"], include_stop=True, skip_special_tokens=False,
        truncate_prompt_tokens=9, cache_salt="s",
    )  # fmt: skip
    request = gateway.wait_for(CompletionRequest)
    assert request.chat == ChatOptions(
        json.dumps([TOOL], separators=(",", ":")).encode(), "required", "add", False, True, False, 7,
        b'[{"text":"d"}]', b'{"x":1}', "low", False, False, True,
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.min_tokens, sampling.allowed_token_ids, sampling.bad_words) == (1, [5], ["b"])
    assert (request.include_stop, request.skip_special_tokens) == (True, False)
    assert (request.truncate_prompt_tokens, request.cache_salt) == (9, "s")
    for choice, expected in (("none", ChatOptions(tool_choice="none")), ("auto", ChatOptions())):
        client.chat(HI, tool_choice=choice)
        assert gateway.wait_for(CompletionRequest).chat == expected


def test_what_an_answer_has_to_match_reaches_the_gateway(client: Client, gateway: FakeGateway) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked: list[tuple[dict[str, Any], Grammar | None]] = [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            Grammar("json_schema", json.dumps(schema, separators=(",", ":"))),
        ),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"choice": ("a", "é")}, Grammar("choice", '["a","é"]')),
    ]
    for options, grammar in asked:
        client.chat(HI, priority="low", no_store=True, **options)
        request = gateway.wait_for(CompletionRequest)
        assert (request.grammar, request.priority, request.no_store) == (grammar, "low", True)
    for wrong in ({"response_format": {"type": "xml"}}, {"regex": "a", "choice": ["a"]}):
        with pytest.raises(errors.BadRequest, match="response_format"):
            client.chat(HI, **wrong)  # type: ignore[arg-type]


def test_messages_may_be_as_openai_has_them_and_an_answer_goes_back_as_it_came(
    client: Client, gateway: FakeGateway
) -> None:
    answer = client.chat(HI, tools=[TOOL])
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"}
    client.chat([*HI, answer.message, openai, {"role": "tool", "content": "2", "tool_call_id": "call_1"}])
    gateway.wait_for(CompletionRequest)
    assert gateway.wait_for(CompletionRequest).messages == [
        ChatMessage("user", "hi"),
        answer.message,
        ChatMessage("assistant", None, reasoning="r", tool_calls=[CALLS[0]]),
        ChatMessage("tool", "2", tool_call_id="call_1"),
    ]


# ---- several answers ---------------------------------------------------------------------------------------------


def numbered(request: CompletionRequest) -> Iterable[Message]:
    yield CompletionChunk(request.id, text=f"<{request.id}>")
    yield CompletionDone(request.id, "stop")


def test_n_answers_are_drawn_by_seeds_of_their_own_and_come_together(client: Client, gateway: FakeGateway) -> None:
    gateway.script = numbered
    whole = client.generate("x", n=3, seed=7)
    requests = [gateway.wait_for(CompletionRequest) for _ in range(3)]
    assert [whole.text, *(other.text for other in whole.others)] == [f"<{request.id}>" for request in requests]
    seeds = [request.sampling.seed for request in requests]
    assert seeds[0] == 7 and len(set(seeds)) == 3
    chunks = list(client.generate("x", n=2, stream=True))
    assert sorted(chunk.index for chunk in chunks) == [0, 1]
    with pytest.raises(errors.BadRequest, match="between 1 and 64"):
        client.generate("x", n=0)


def test_one_of_n_that_fails_ends_all(client: Client, gateway: FakeGateway) -> None:
    def second_fails(request: CompletionRequest) -> Iterable[Message]:
        if request.sampling.seed == 7:
            return [CompletionChunk(request.id, text="first ")]
        return [CompletionDone(request.id, "error", error=ErrorInfo("overloaded", "full"))]

    gateway.script = second_fails
    with pytest.raises(errors.Overloaded):
        client.generate("x", n=2, seed=7)
    assert gateway.wait_for(CancelRequest)


def test_the_async_client_has_the_same(gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            whole = await client.chat(HI, tools=[TOOL], n=2)
            assert whole.tool_calls == whole.others[0].tool_calls == CALLS
            stream = client.chat(HI, stream=True)
            assert [event async for chunk in stream for event in chunk.events] == PARTS

    trio.run(main)


def test_the_package_has_a_version() -> None:
    assert kvasir.__version__[0].isdigit() or kvasir.__version__ == "unknown"
    assert "__version__" in dir(kvasir)
