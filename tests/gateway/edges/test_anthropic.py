"""`/v1/messages` with the public anthropic client: whole and streamed, tools, thinking, errors, counting."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio

from kvasir.gateway.core.api import Finished
from kvasir.protocol.errors import Overloaded, RequestFailed
from kvasir.protocol.tokens import unpack_tokens
from tests.edge_helpers import ANSWER, FakeCore, House, decoded, run
from tests.gateway.edges.test_tools import ADD, ARGUMENTS, QWEN3, TOOL, written
from tests.http_helpers import KEY, open_edge

anthropic = pytest.importorskip("anthropic", reason="of the dev dependencies")
pytestmark = pytest.mark.timeout(60)
FUNCTION: dict[str, Any] = {"name": "add", "input_schema": TOOL["function"]["parameters"]}
SYSTEM = "Be brief, and say nothing that was not asked for. " * 4
CALLING = f"<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{ADD}\n</tool_call>"
ASKED: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 300,
    "messages": [{"role": "user", "content": "Add."}],
}


def with_anthropic(work: Callable[[Any, FakeCore], None], key: str = KEY, **edge: Any) -> None:
    async def main() -> None:
        async with open_edge(**edge) as opened:

            def blocking() -> None:
                url = f"http://127.0.0.1:{opened.port}"
                with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=20) as api:
                    work(api, opened.core)

            await trio.to_thread.run_sync(blocking)

    trio.run(main)


def prompt_of(core: FakeCore) -> str:
    return str(QWEN3._tokenizer.decode(unpack_tokens(core.submits[-1].token_ids), skip_special_tokens=False))


def test_a_message_is_answered_whole_and_streamed_alike() -> None:
    def work(api: Any, core: FakeCore) -> None:
        whole = api.messages.create(
            **ASKED, system=SYSTEM, metadata={"user_id": "u"}, extra_body={"temperature": 0.5, "top_k": 3}
        )
        [block] = whole.content
        assert (block.type, block.text, whole.role, whole.model) == ("text", ANSWER, "assistant", "demo")
        assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
        assert (core.submits[0].sampling.temperature, core.submits[0].sampling.top_k) == (0.5, 3)
        usage, num_prompt = whole.usage, core.submits[0].num_prompt_tokens
        assert usage.cache_read_input_tokens == 16 and usage.cache_creation_input_tokens == num_prompt // 16 * 16 - 16
        assert usage.input_tokens == num_prompt - usage.cache_read_input_tokens - usage.cache_creation_input_tokens
        assert whole._request_id == core.submits[0].req_id.hex() and whole.id == f"msg_{whole._request_id}"
        with api.messages.stream(**ASKED, system=SYSTEM) as stream:
            assert "".join(stream.text_stream) == ANSWER
            final = stream.get_final_message()
        assert final.content[0].text == ANSWER and final.stop_reason == "end_turn"
        assert final.usage.output_tokens == usage.output_tokens and final.usage.input_tokens == usage.input_tokens
        cut = api.messages.create(**{**ASKED, "max_tokens": 2})
        assert cut.stop_reason == "max_tokens"
        stopped = api.messages.create(**ASKED, stop_sequences=["zzz", "return"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "return")
        with api.messages.stream(**ASKED, stop_sequences=["return"]) as stream:
            assert stream.get_final_message().stop_sequence == "return"

    with_anthropic(work)


def test_a_message_is_compared_with_the_one_before_where_that_is_asked_for() -> None:
    def work(api: Any, core: FakeCore) -> None:
        first = api.messages.create(**ASKED, extra_body={"diagnostics": {"previous_message_id": None}})
        assert first.diagnostics is None and "diagnostics" in first.model_fields_set
        again: dict[str, Any] = {"extra_body": {"diagnostics": {"previous_message_id": first.id}}}
        reason = api.messages.create(**ASKED, **again).diagnostics.cache_miss_reason
        assert reason.type == "previous_message_not_found"
        req_id = core.submits[0].req_id
        core.changes[req_id] = ("tools_changed", 512)
        reason = api.messages.create(**ASKED, **again).diagnostics.cache_miss_reason
        assert (reason.type, reason.cache_missed_input_tokens) == ("tools_changed", 512)
        core.changes[req_id] = ("tokens_changed", 512)
        with api.messages.stream(**ASKED, **again) as stream:
            assert stream.get_final_message().diagnostics.cache_miss_reason.type == "unavailable"
        core.changes[req_id] = None
        assert api.messages.create(**ASKED, **again).diagnostics is None
        assert "diagnostics" not in api.messages.create(**ASKED).model_fields_set
        strange = api.messages.create(**ASKED, extra_body={"diagnostics": {"previous_message_id": "msg_it is"}})
        assert strange.diagnostics.cache_miss_reason.type == "previous_message_not_found"

    with_anthropic(work)


def test_thinking_and_uses_of_tools_are_blocks_and_go_back_as_they_came() -> None:
    def work(api: Any, core: FakeCore) -> None:
        asked = {**ASKED, "tools": [FUNCTION], "thinking": {"type": "enabled", "budget_tokens": 1024}}
        whole = api.messages.create(**{**asked, "max_tokens": 1500})
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        thinking, text, use = whole.content
        assert (thinking.thinking, text.text) == ("\nHm.\n", "\n\nLet me.")
        assert (use.name, use.input, whole.stop_reason) == ("add", ARGUMENTS, "tool_use")
        constraint = core.submits[0].sampling.constraint
        assert constraint is not None and constraint.reasoning is not None and constraint.reasoning.max_tokens == 1024
        with api.messages.stream(**{**asked, "max_tokens": 1500}) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_message()
        assert {"thinking", "input_json", "content_block_stop"} <= kinds
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[2].input == ARGUMENTS and final.content[0].thinking == "\nHm.\n"
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "it is 2"}]}
        blocks = [block.model_dump(exclude_none=True) for block in whole.content]
        again = [
            *ASKED["messages"],
            {"role": "assistant", "content": blocks},
            {
                "role": "user",
                "content": [result, {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}],
            },
        ]
        api.messages.create(**{**asked, "messages": again, "max_tokens": 1500, "tool_choice": {"type": "any"}})
        prompt = prompt_of(core)
        assert "<tool_response>\nit is 2\n</tool_response>" in prompt and "And now?" in prompt
        assert prompt.index("it is 2") < prompt.index("And now?") and '"name": "add"' in prompt
        assert prompt.endswith('<tool_call>\n{"name": "')
        api.messages.create(
            **{
                **asked,
                "max_tokens": 1500,
                "tool_choice": {"type": "tool", "name": "add"},
                "thinking": {"type": "disabled"},
            }
        )
        assert prompt_of(core).endswith('"arguments": ') and "</think>" in prompt_of(core)

    with_anthropic(work, script=written(QWEN3, CALLING), text=QWEN3)


def test_an_answer_is_held_to_the_format_of_its_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    def work(api: Any, core: FakeCore) -> None:
        api.messages.create(**ASKED, output_config={"format": {"type": "json_schema", "schema": schema}})
        constraint = core.submits[0].sampling.constraint
        assert constraint is not None and constraint.grammar is not None
        assert constraint.grammar.kind == "json_schema" and json.loads(constraint.grammar.text) == schema
        for wrong in ({"type": "xml"}, {"type": "json_schema", "schema": []}, {"type": "json_schema"}):
            with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format"):
                api.messages.create(**ASKED, output_config={"format": wrong})

    with_anthropic(work)


def test_more_tokens_than_fit_are_as_many_as_fit_since_clients_have_to_name_some() -> None:
    def work(api: Any, core: FakeCore) -> None:
        whole = api.messages.create(**{**ASKED, "max_tokens": 32_000})
        assert (whole.content[0].text, whole.stop_reason) == (ANSWER, "end_turn")
        [submit] = core.submits
        assert submit.max_tokens == 2048 - submit.num_prompt_tokens and submit.is_open_ended
        long = [{"role": "user", "content": "x " * 2035}]
        for asked, reason in ((32_000, "model_context_window_exceeded"), (2, "max_tokens")):
            cut = api.messages.create(**{**ASKED, "messages": long, "max_tokens": asked})
            assert cut.stop_reason == reason and ANSWER.startswith(cut.content[0].text)

    with_anthropic(work)


def test_errors_are_those_of_the_clients_own_api() -> None:
    def work(api: Any, core: FakeCore) -> None:
        with pytest.raises(anthropic.NotFoundError) as missing:
            api.messages.create(**{**ASKED, "model": "gone"})
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            api.messages.create(**{**ASKED, "max_tokens": 0})
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
            api.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "x " * 5000}]})
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}
        with pytest.raises(anthropic.BadRequestError, match="'image'"):
            api.messages.create(**{**ASKED, "messages": [{"role": "user", "content": [image]}]})
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            api.messages.create(**ASKED, tools=[{"type": "web_search_20250305", "name": "web_search"}])
        core.fail = Finished(b"", "error", 1, 0, error=Overloaded("the queue is full", retry_after_s=7).info())
        for stream in (False, True):
            with pytest.raises(anthropic.RateLimitError, match="queue is full"):
                api.messages.create(**ASKED, stream=stream)
        core.fail = Finished(b"", "error", 1, 5, error=RequestFailed("2 workers died").info())
        with pytest.raises(anthropic.APIStatusError, match="2 workers died"):
            list(api.messages.create(**ASKED, stream=True))

    with_anthropic(work)
    with pytest.raises(ExceptionGroup) as caught:
        with_anthropic(lambda api, core: api.messages.create(**ASKED) and None, key="kv_k1_wrong")
    assert caught.group_contains(anthropic.AuthenticationError)


def test_tokens_are_counted_as_the_prompt_will_have_them() -> None:
    def work(api: Any, core: FakeCore) -> None:
        messages = {key: ASKED[key] for key in ("model", "messages")}
        counted = api.messages.count_tokens(**messages, system="Be brief.", tools=[FUNCTION]).input_tokens
        api.messages.create(**ASKED, system="Be brief.", tools=[FUNCTION])
        assert counted == core.submits[0].num_prompt_tokens and len(core.submits) == 1
        assert api.messages.count_tokens(**messages).input_tokens < counted

    with_anthropic(work, text=QWEN3)


def test_an_answer_goes_on_with_a_last_message_of_the_assistant() -> None:
    """A prefill: the answer is what follows it."""

    def work(api: Any, core: FakeCore) -> None:
        messages = [*ASKED["messages"], {"role": "assistant", "content": [{"type": "text", "text": "The sum is"}]}]
        whole = api.messages.create(**{**ASKED, "messages": messages})
        assert prompt_of(core).endswith("</think>\n\nThe sum is") and whole.content[0].text == ANSWER
        counted = api.messages.count_tokens(model="demo", messages=messages).input_tokens
        assert counted == core.submits[0].num_prompt_tokens
        use = {"type": "tool_use", "id": "t1", "name": "add", "input": ARGUMENTS}
        messages[-1] = {"role": "assistant", "content": [{"type": "text", "text": "The sum is"}, use]}
        api.messages.create(**{**ASKED, "messages": messages, "tools": [FUNCTION]})
        assert prompt_of(core).endswith("<|im_start|>assistant\n"), "a call is no text to go on with"

    with_anthropic(work, text=QWEN3, script=lambda submit: QWEN3.encode(ANSWER))


def test_what_this_dialect_requires_or_refuses_is_named() -> None:
    async def main(house: House) -> None:
        for fields, words in (
            ({"max_tokens": None}, "max_tokens is required"),
            ({"container": "x"}, "container is not supported"),
            ({"max_token": 3}, "did you mean 'max_tokens'"),
            (
                {"messages": [{"role": "x", "content": ""}]},
                "messages[0].role: 'x' is none of those known here: 'assistant'",
            ),
            ({"tool_choice": {"type": "tool"}, "tools": [FUNCTION]}, "tool_choice.name is missing"),
            ({"system": "x", "messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
            ({"output_config": {"verbosity": "low"}}, "output_config.verbosity is not known here"),
            ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ):
            response, _ = await house.ask("/v1/messages", {**ASKED, **fields})
            assert response is not None and response.status == 400
            answer = decoded(response)
            assert answer["type"] == "error" and words in answer["error"]["message"]
            assert dict(response.headers)["x-request-id"] == answer["request_id"]
        keep = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
        response, _ = await house.ask("/v1/messages", {**ASKED, "context_management": keep, "service_tier": "auto"})
        assert response is not None and response.status == 200
        assert json.loads(response.body)["stop_reason"] == "end_turn"

    run(main)
