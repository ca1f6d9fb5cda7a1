"""Tools and reasoning over the chat route: what the prompt says, what comes back whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import openai
import pytest

from kvasir.gateway.core.api import Submit
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.sampling import Constraint, ReasoningBudget
from kvasir.protocol.tokens import unpack_tokens
from tests.chat_templates import FAMILIES
from tests.edge_helpers import TEXT, FakeCore, House, decoded, make_text, run
from tests.http_helpers import with_openai

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    },
}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Add."}], "tools": [TOOL], "max_tokens": 500}
ARGUMENTS = {"a": 1, "s": 'é "x"\n'}
ADD = json.dumps({"name": "add", "arguments": ARGUMENTS}, ensure_ascii=False)
QWEN3 = make_text(FAMILIES["qwen3"], ["<think>", "</think>"])
WRITTEN = {
    "qwen3": f"<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>",
    "qwen3-coder": "Let me.\n"
    + '<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\né "x"\n\n</parameter>\n</function>\n'
    "</tool_call>\n" * 2,
    "llama3.1": "; ".join([ADD.replace('"arguments"', '"parameters"')] * 2),
    "mistral": f"Let me.[TOOL_CALLS][{ADD}, {ADD}]",
}
SPECIAL = {"qwen3": ["<think>", "</think>"], "mistral": ["[TOOL_CALLS]", "[ARGS]"], "llama3.1": ["<|python_tag|>"]}


def model(family: str) -> ModelText:
    return make_text(FAMILIES[family], SPECIAL.get(family, ()))


def written(text: ModelText, answer: str) -> Any:
    """Return a script that answers with `answer`, special tokens as such, and an end of sequence."""
    return lambda submit: [*text._tokenizer.encode(answer, add_special_tokens=False).ids, *text.eos_token_ids[:1]]


def ask(body: dict[str, Any], answer: str, text: ModelText = QWEN3) -> tuple[Any, Submit]:
    """Return the decoded answer (events where it was streamed) and what the core got."""
    house, found = House(written(text, answer), text=text), []

    async def main(house: House) -> None:
        response, exchange = await house.ask("/v1/chat/completions", body)
        found.append(exchange.events()[:-1] if response is None else decoded(response))

    run(main, house)
    return found[0], house.core.submits[0] if house.core.submits else None  # type: ignore[return-value]


def prompt_of(submit: Submit, text: ModelText = QWEN3) -> str:
    return str(text._tokenizer.decode(unpack_tokens(submit.token_ids), skip_special_tokens=False))


@pytest.mark.parametrize("family", WRITTEN)
def test_the_openai_client_gets_the_calls_whole_and_through_its_streaming_helper(family: str) -> None:
    text = model(family)

    def work(api: openai.OpenAI, core: FakeCore) -> None:
        whole = api.chat.completions.create(**CHAT).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert [(c.function.name, json.loads(c.function.arguments)) for c in whole.message.tool_calls] == [
            ("add", ARGUMENTS),
            ("add", ARGUMENTS),
        ]
        assert len({call.id for call in whole.message.tool_calls}) == 2
        assert whole.message.content == (None if family == "llama3.1" else whole.message.content)
        with api.chat.completions.stream(**CHAT) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds and final.finish_reason == "tool_calls"
        assert [c.function.arguments for c in final.message.tool_calls] == [
            c.function.arguments for c in whole.message.tool_calls
        ]
        assert (final.message.content or None) == whole.message.content
        # The loop goes on: the calls and their results go back as they came.
        calls = [call.model_dump(exclude={"index", "parsed"}) for call in whole.message.tool_calls]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "2"} for call in calls]
        assistant = {"role": "assistant", "content": whole.message.content, "tool_calls": calls}
        if family != "llama3.1":  # its template takes one call at a time
            again = api.chat.completions.create(**{**CHAT, "messages": [*CHAT["messages"], assistant, *results]})
            assert again.choices[0].message.tool_calls
            assert "2" in prompt_of(core.submits[-1], text) and "add" in prompt_of(core.submits[-1], text)

    with_openai(work, script=written(text, WRITTEN[family]), text=text)


def test_reasoning_is_told_apart_whole_and_streamed_and_counted() -> None:
    body = {key: value for key, value in CHAT.items() if key != "tools"}
    answer = "<think>\nHm, é.\n</think>\n\nIt is 2."
    message = ask(body, answer)[0]["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("\nHm, é.\n", "\n\nIt is 2.")
    assert message["reasoning"] == message["reasoning_content"]
    usage = ask(body, answer)[0]["usage"]
    assert 3 <= usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"] - 4
    events, _ = ask({**body, "stream": True}, answer)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "\nHm, é.\n"
    assert "".join(delta.get("content", "") for delta in deltas) == "\n\nIt is 2."
    left_out = ask({**body, "include_reasoning": False}, answer)[0]["choices"][0]["message"]
    assert left_out["content"] == "\n\nIt is 2." and "reasoning" not in left_out
    together = ask({**body, "separate_reasoning": False, "skip_special_tokens": False}, answer)[0]
    assert together["choices"][0]["message"]["content"] == answer


def test_reasoning_that_the_prompt_has_begun_needs_no_mark() -> None:
    text = make_text(FAMILIES["deepseek"], ["<think>", "</think>"])
    body = {key: value for key, value in CHAT.items() if key != "tools"}
    answer, submit = ask(body, "Hm.</think>Two.", text)
    assert prompt_of(submit, text).endswith("<think>\n")
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", "Two.")


def test_the_budget_of_reasoning_goes_to_the_worker_with_the_tokens_that_frame_it() -> None:
    start, end = map(QWEN3._tokenizer.token_to_id, ("<think>", "</think>"))
    for field in ("max_reasoning_tokens", "thinking_token_budget"):
        _, submit = ask({**CHAT, field: 7}, "x")
        assert submit.sampling.constraint == Constraint(reasoning=ReasoningBudget(end, 7, start))
    deepseek = make_text(FAMILIES["deepseek"], ["<think>", "</think>"])
    body = {key: value for key, value in CHAT.items() if key != "tools"}
    _, submit = ask({**body, "max_reasoning_tokens": 0}, "x", deepseek)
    end = deepseek._tokenizer.token_to_id("</think>")
    assert submit.sampling.constraint == Constraint(reasoning=ReasoningBudget(end, 0))
    refused, _ = ask({**body, "max_reasoning_tokens": 7}, "x", TEXT)
    assert refused["error"]["param"] == "max_reasoning_tokens"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_must_come_is_begun_in_the_prompt(choice: Any) -> None:
    rest = ADD.removeprefix('{"name": "')
    if choice != "required":
        rest = rest.removeprefix('add", "arguments": ')
    answer, submit = ask({**CHAT, "tool_choice": choice}, f"{rest}\n</tool_call>")
    assert prompt_of(submit).endswith(
        '<tool_call>\n{"name": "' + ("" if choice == "required" else 'add", "arguments": ')
    )
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", ARGUMENTS)
    assert answer["choices"][0]["finish_reason"] == "tool_calls" and answer["choices"][0]["message"]["content"] is None


STRICT = {**TOOL, "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("fields", "is_held"),
    [
        ({}, False),
        ({"tools": [STRICT]}, True),
        ({"tools": [STRICT], "tool_choice": "none"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": "required", "tools": [{**TOOL, "function": {**TOOL["function"], "strict": False}}]}, False),  # type: ignore[dict-item]
        ({"response_format": {"type": "json_object"}}, True),
    ],
)
def test_calls_are_held_to_their_schemas_where_that_is_asked_for(fields: dict[str, Any], is_held: bool) -> None:
    _, submit = ask({**CHAT, **fields}, "x")
    constraint = submit.sampling.constraint
    assert (constraint is not None and constraint.grammar is not None) == is_held
    if constraint is not None and constraint.grammar is not None:
        assert constraint.grammar.kind == "calls"
        assert (constraint.reasoning is None) == (fields.get("tool_choice") == "required"), "the call has begun"


def test_strict_tools_of_an_engine_that_cannot_hold_to_them_are_refused() -> None:
    for strict in (True, False):
        house = House(written(QWEN3, "x"), text=QWEN3)
        lacking = msgspec.structs.replace(house.core.infos["demo"], engine="vllm", lacks=frozenset({"grammars"}))
        house.core.infos["demo"] = lacking
        tool = {**TOOL, "function": {**TOOL["function"], "strict": strict}}  # type: ignore[dict-item]
        found = []

        async def main(house: House, tool: Any = tool, found: list[Any] = found) -> None:
            found.append(await house.ask("/v1/chat/completions", {**CHAT, "tools": [tool], "tool_choice": "required"}))

        run(main, house)
        response = found[0][0]
        assert response is not None and response.status == (400 if strict else 200)
        if strict:
            assert decoded(response)["error"]["param"] == "tools" and "say strict: false" in str(decoded(response))


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_answer_ends_after_one(stream: bool) -> None:
    house, found = House(written(QWEN3, WRITTEN["qwen3"]), text=QWEN3), []

    async def main(house: House) -> None:
        body = {**CHAT, "parallel_tool_calls": False, "stream": stream}
        response, exchange = await house.ask("/v1/chat/completions", body)
        found.append(exchange.events()[:-1] if response is None else decoded(response))

    run(main, house)
    [cancel] = house.core.cancels
    assert cancel.reason == "stop" and 0 < (cancel.num_output_tokens or 0) < len(written(QWEN3, WRITTEN["qwen3"])(None))
    if not stream:
        assert len(found[0]["choices"][0]["message"]["tool_calls"]) == 1
        assert found[0]["choices"][0]["finish_reason"] == "tool_calls"


def test_with_the_choice_none_tools_are_not_shown_and_calls_not_looked_for() -> None:
    answer, submit = ask({**CHAT, "tool_choice": "none"}, f"<tool_call>{ADD}</tool_call>")
    assert "tools" not in prompt_of(submit)
    assert answer["choices"][0]["message"]["content"] == f"<tool_call>{ADD}</tool_call>"


def test_an_answer_that_is_cut_within_a_call_says_so() -> None:
    answer, _ = ask({**CHAT, "max_tokens": 30}, WRITTEN["qwen3"])
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param", "words", "family"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice", "tools are: add", "qwen3"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "tools are: none", "qwen3"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "only functions", "qwen3"),
        ({}, "tools", "--tool-parser", "glm"),
        ({"tool_choice": "maybe"}, "tool_choice", "none of those", "qwen3"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "no content", "qwen3"),
    ],
)
def test_what_cannot_be_called_is_refused_with_its_field(
    fields: dict[str, Any], param: str, words: str, family: str
) -> None:
    answer, submit = ask({**CHAT, **fields}, "x", model(family))
    assert submit is None and answer["error"]["param"] == param and words in answer["error"]["message"]
