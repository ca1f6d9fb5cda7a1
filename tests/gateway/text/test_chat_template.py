"""Chat templates: what `transformers` renders with the same options, and what a template does not know is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvasir.gateway.text.answer_parser import TOOL_PARSERS, find_format
from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.protocol.client_messages import ChatMessage, ChatOptions, ToolCall
from kvasir.protocol.errors import BadRequest
from tests.chat_templates import FAMILIES, FORMATS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}{{ ' ' + m.name if m.name else '' }}|>"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
DOCUMENTS = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + PLAIN
EFFORT = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}Effort: {{ reasoning_effort | default('low') }}"
    + PLAIN
)
CHAT = [ChatMessage("user", "Hi "), ChatMessage("assistant", "Well, I ")]


def render(source: str, messages: list[ChatMessage], **options: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages, ChatOptions(**options))


def expected(source: str, messages: list[ChatMessage], **options: Any) -> str:
    turns = [{"role": m.role, "content": m.content, **({"name": m.name} if m.name else {})} for m in messages]
    texts, _ = render_jinja_template([turns], chat_template=source, **TOKENS, **options)
    return str(texts[0])


@pytest.mark.parametrize("source", [PLAIN, TRIMMING, DOCUMENTS, EFFORT])
def test_a_final_message_is_continued_as_transformers_does(source: str) -> None:
    ours = render(source, CHAT, continue_final_message=True, add_generation_prompt=False)
    assert ours == expected(source, CHAT, continue_final_message=True)
    assert ours.endswith("Well, I" if source == TRIMMING else "Well, I ")


def test_the_cue_can_be_left_out() -> None:
    assert render(PLAIN, CHAT) == expected(PLAIN, CHAT, add_generation_prompt=True)
    assert render(PLAIN, CHAT, add_generation_prompt=False) == expected(PLAIN, CHAT)


def test_names_documents_and_variables_reach_the_template() -> None:
    named = [ChatMessage("user", "Hi", "Ann")]
    documents = [{"title": "A", "text": "b"}]
    ours = render(DOCUMENTS, named, documents=json.dumps(documents).encode(), variables=b'{"enable_thinking": false}')
    assert ours == expected(DOCUMENTS, named, documents=documents, enable_thinking=False, add_generation_prompt=True)
    assert "user Ann" in ours and "[A: b]" in ours and ours.endswith("<think></think>")


def test_reasoning_effort_is_the_templates_own_or_a_matter_of_on_and_off() -> None:
    assert render(EFFORT, CHAT, reasoning_effort="high").startswith("Effort: high")
    assert render(PLAIN, CHAT, reasoning_effort="none").endswith("<think></think>")
    assert render(PLAIN, CHAT, reasoning_effort="high") == render(PLAIN, CHAT)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"documents": b'[{"text": "x"}]'}, "documents", "knows no documents"),
        ({"documents": b'["x"]'}, "documents", "knows no documents"),
        ({"variables": b'{"colour": 1}'}, "chat_template_kwargs", "no variable 'colour' to set; it has: none"),
        ({"variables": b'{"messages": []}'}, "chat_template_kwargs", "no variable 'messages'"),
        ({"variables": b'{"bos_token": "x"}'}, "chat_template_kwargs", "no variable 'bos_token'"),
        ({"variables": b"[1]"}, "chat_template_kwargs", "Expected `object`"),
        ({"variables": b'{"x":' + b"[" * 100_000}, "chat_template_kwargs", "nested too deeply"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "knows no reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message", "needs add_generation_prompt: false"),
    ],
)
def test_what_the_template_does_not_know_is_refused_by_name(options: dict[str, Any], param: str, words: str) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadRequest, match=words) as caught:
        render(source, CHAT, **options)
    assert caught.value.param == param


def test_a_message_that_the_template_drops_or_that_is_empty_cannot_be_continued() -> None:
    options = {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(BadRequest, match="cannot be continued"):
        render("{{ messages[0].content }}", CHAT, **options)
    with pytest.raises(BadRequest, match="no content"):
        render(PLAIN, [ChatMessage("assistant", "")], **options)


# ---- tools, over the templates of public families ------------------------------------------------------------------

ADD = {"name": "add", "description": 'Adds "numbers" <é>', "parameters": {"type": "object", "properties": {}}}
ADD["parameters"]["properties"] = {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "number"}}}  # type: ignore[index]
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {**ADD, "name": "now"}}]
ARGUMENTS = {"a": 1, "b": [1.5, None, True], "c": {"d": 'é"<'}}
CALLS = [{"id": "abcdefgh1", "type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}]
SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 1 + 1? "}
CALLED = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "2"}
THOUGHT = {"role": "assistant", "content": "It is 2.", "reasoning_content": "One and one."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [SYSTEM, QUESTION],
    "a call and its result": [SYSTEM, QUESTION, CALLED, RESULT],
    "a call after content": [SYSTEM, QUESTION, {**CALLED, "content": "Let me see."}, RESULT],
    "a second question": [SYSTEM, QUESTION, CALLED, RESULT, THOUGHT, QUESTION],
}


def message_of(turn: dict[str, Any]) -> ChatMessage:
    calls = [
        ToolCall(c["id"], c["function"]["name"], json.dumps(c["function"]["arguments"]))
        for c in turn.get("tool_calls", ())
    ]
    reasoning = turn.get("reasoning_content", "")
    return ChatMessage(turn["role"], turn["content"], "", reasoning, calls, turn.get("tool_call_id", ""))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tools_and_calls_are_rendered_as_transformers_does(family: str, conversation: str) -> None:
    source, turns = FAMILIES[family], CONVERSATIONS[conversation]
    messages = [message_of(turn) for turn in turns]
    for tools in (TOOLS, None):
        if family == "hermes" and tools is None:
            continue  # a template for requests with tools
        options = {"tools": json.dumps(tools).encode()} if tools else {}
        theirs, _ = render_jinja_template(
            [turns], chat_template=source, tools=tools, add_generation_prompt=True, **TOKENS
        )
        assert render(source, messages, **options) == theirs[0]


def test_documents_and_tools_go_together() -> None:
    documents = [{"doc_id": 1, "title": "T", "text": "é"}]
    for family in ("command-r", "granite"):
        options = {"tools": json.dumps(TOOLS).encode(), "documents": json.dumps(documents).encode()}
        theirs, _ = render_jinja_template(
            [[SYSTEM, QUESTION]],
            chat_template=FAMILIES[family],
            tools=TOOLS,
            documents=documents,
            add_generation_prompt=True,
            **TOKENS,
        )
        assert render(FAMILIES[family], [message_of(SYSTEM), message_of(QUESTION)], **options) == theirs[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_of_calls_is_found_for_the_families_that_are_known(family: str) -> None:
    assert find_format(FAMILIES[family]).tools is TOOL_PARSERS.get(FORMATS.get(family, ""))


def test_tools_are_left_out_with_the_choice_none_and_have_a_template_of_their_own_where_there_is_one() -> None:
    tools = json.dumps(TOOLS).encode()
    template = ChatTemplate(PLAIN, TOKENS, FAMILIES["hermes"])
    messages = [message_of(QUESTION)]
    assert template.render(messages, ChatOptions(tools=tools, tool_choice="none")) == render(PLAIN, messages)
    assert template.render(messages, ChatOptions(tools=tools)) == render(FAMILIES["hermes"], messages, tools=tools)


def test_arguments_that_are_no_object_reach_the_template_as_they_are() -> None:
    message = ChatMessage("assistant", None, tool_calls=[ToolCall("abcdefgh1", "add", '{"a": ')])
    assert '"arguments": {"a": }' in render(FAMILIES["qwen3"], [message_of(QUESTION), message])


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "web_search"}], "tools[0]"),
        ([TOOLS[0], {"type": "function"}], "tools[1].function"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], "tools[0].function.parameters"),
        ({"a": 1}, "tools"),
        ([TOOLS[0]] * 513, "tools"),
    ],
)
def test_what_is_no_tool_is_refused_with_its_place(tools: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        render(FAMILIES["qwen3"], [message_of(QUESTION)], tools=json.dumps(tools).encode())
    assert caught.value.param == param


def test_tools_are_refused_where_the_template_knows_none() -> None:
    with pytest.raises(BadRequest, match="knows no tools"):
        render(PLAIN, CHAT, tools=json.dumps(TOOLS).encode())
