"""`/v1/responses` with the public openai client: whole and streamed, tools, reasoning, what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from kvasir.gateway.core.api import Finished
from kvasir.protocol.errors import Overloaded, RequestFailed
from kvasir.protocol.tokens import unpack_tokens
from tests.chat_templates import FAMILIES
from tests.edge_helpers import ANSWER, House, decoded, make_text, run
from tests.edge_helpers import FakeCore as Core
from tests.gateway.edges.test_tools import ADD, ARGUMENTS, QWEN3, TOOL, written
from tests.http_helpers import with_openai

FUNCTION = {"type": "function", **TOOL["function"]}
CALLING = f"<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{ADD}\n</tool_call>"


def prompt_of(core: Core) -> str:
    return str(QWEN3._tokenizer.decode(unpack_tokens(core.submits[-1].token_ids), skip_special_tokens=False))


def test_a_text_is_answered_whole_and_streamed_with_the_same_response() -> None:
    def work(api: openai.OpenAI, core: Core) -> None:
        asked: dict[str, Any] = {"model": "demo", "input": "Add.", "instructions": "Be brief.", "seed": None}
        asked.pop("seed")
        whole = api.responses.create(
            **asked, max_output_tokens=300, temperature=0.5, store=False, extra_body={"seed": 4}
        )
        assert (whole.output_text, whole.status, whole.object) == (ANSWER, "completed", "response")
        assert core.submits[0].sampling.seed == 4 and core.submits[0].sampling.temperature == 0.5
        assert (whole.instructions, whole.temperature, whole.max_output_tokens) == ("Be brief.", 0.5, 300)
        usage = whole.usage
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.input_tokens_details.cached_tokens == 16
        assert whole._request_id == core.submits[0].req_id.hex() and whole.id == f"resp_{whole._request_id}"
        with api.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert kinds.count("response.output_text.delta") > 3
        assert final.output_text == ANSWER and final.usage == usage

    with_openai(work)


def test_a_response_is_compared_with_an_earlier_one_where_that_is_asked_for() -> None:
    def work(api: openai.OpenAI, core: Core) -> None:
        first = api.responses.create(model="demo", input="Add.")
        assert "prompt_cache_diagnostics" not in first.model_fields_set
        asked: dict[str, Any] = {"model": "demo", "input": "Add.", "prompt_cache_options": {}}
        asked["prompt_cache_options"] = {"comparison_response_id": first.id}
        assert api.responses.create(**asked).prompt_cache_diagnostics.type == "comparison_response_not_found"
        req_id = core.submits[0].req_id
        told = {
            ("tools_changed", 512): ("cache_miss", "tools_changed"),
            ("system_changed", 512): ("cache_miss", "input_changed"),
            ("namespace_changed", 512): ("unavailable", None),
            None: ("cache_hit", None),
        }
        for change, (kind, reason) in told.items():
            core.changes[req_id] = change
            found = api.responses.create(**asked).prompt_cache_diagnostics
            assert (found.type, getattr(found, "reason", None)) == (kind, reason)
            assert getattr(found, "cache_missed_tokens", 512) == 512
        with api.responses.stream(**asked) as stream:
            assert stream.get_final_response().prompt_cache_diagnostics.type == "cache_hit"

    with_openai(work)


def test_sequence_numbers_count_the_events_and_an_answer_that_is_cut_is_incomplete() -> None:
    def work(api: openai.OpenAI, core: Core) -> None:
        events = list(api.responses.create(model="demo", input="x", max_output_tokens=3, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1]
        assert last.type == "response.incomplete" and last.response.status == "incomplete"
        assert last.response.incomplete_details.reason == "max_output_tokens"
        assert last.response.output[0].status == "incomplete"

    with_openai(work)


def test_reasoning_and_calls_are_items_of_their_own_and_go_back_as_they_came() -> None:
    def work(api: openai.OpenAI, core: Core) -> None:
        whole = api.responses.create(model="demo", input="Add.", tools=[FUNCTION], reasoning={"effort": "high"})
        reasoning, message, call = whole.output
        assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "\nHm.\n")
        assert message.content[0].text == "\n\nLet me."
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", ARGUMENTS)
        assert whole.usage.output_tokens_details.reasoning_tokens > 2
        with api.responses.stream(model="demo", input="Add.", tools=[FUNCTION]) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= kinds
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert json.loads(final.output[2].arguments) == ARGUMENTS
        items = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in whole.output]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "it is 2"}
        api.responses.create(
            model="demo", input=[{"role": "user", "content": "Add."}, *items, result], tools=[FUNCTION]
        )
        prompt = prompt_of(core)
        assert "<tool_response>\nit is 2\n</tool_response>" in prompt
        assert prompt.count("<|im_start|>assistant") == 2, "reasoning, message and call are one turn"
        assert "<think>\nHm.\n</think>" in prompt and '"name": "add"' in prompt
        forced = api.responses.create(
            model="demo", input="x", tools=[FUNCTION], tool_choice={"type": "function", "name": "add"}
        )
        assert forced.tool_choice.name == "add" and prompt_of(core).endswith('"arguments": ')

    with_openai(work, script=written(QWEN3, CALLING), text=QWEN3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"inputs": "x"}, "inputs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask("/v1/responses", {"model": "demo", "input": "x", **fields})
        assert response is not None and response.status == 400
        assert decoded(response)["error"]["param"] == param and not house.core.submits

    run(main)


def test_fields_that_agents_send_pass() -> None:
    async def main(house: House) -> None:
        body = {
            "model": "demo",
            "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "x"}]}],
            "store": True,
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "medium", "summary": "auto"},
            "prompt_cache_key": "k",
            "text": {"format": {"type": "text"}},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        response, _ = await house.ask("/v1/responses", body)
        assert response is not None and response.status == 200

    run(main)


def test_an_error_in_mid_stream_fails_the_response_and_before_it_is_a_status() -> None:
    def work(api: openai.OpenAI, core: Core) -> None:
        core.fail = Finished(b"", "error", 1, 0, error=Overloaded("the queue is full").info())
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            api.responses.create(model="demo", input="x", stream=True)
        core.fail = Finished(b"", "error", 1, 5, error=RequestFailed("2 workers died under it").info())
        last = list(api.responses.create(model="demo", input="x", stream=True))[-1]
        assert last.type == "response.failed" and last.response.error.message == "2 workers died under it"

    with_openai(work)


def test_a_model_without_reasoning_takes_an_effort_in_this_dialect() -> None:
    text = make_text(FAMILIES["qwen3"])
    assert "enable_thinking" in FAMILIES["qwen3"]

    async def main(house: House) -> None:
        body = {"model": "demo", "input": "x", "reasoning": {"effort": "none"}, "max_reasoning_tokens": 4}
        response, _ = await house.ask("/v1/responses", body)
        assert response is not None and response.status == 200
        prompt = text._tokenizer.decode(unpack_tokens(house.core.submits[0].token_ids), skip_special_tokens=False)
        assert prompt.endswith("<think>\n\n</think>\n\n")

    run(main, House(text=text))
