"""A corpus of requests: for every field of the table one value that counts and one that is wrong, in every place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvasir.gateway.edges.request_fields import FIELDS, Verdict

ANY = {"some": "thing"}
USER = {"role": "user", "content": "Add."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION, "strict": True}]
ANTHROPIC_TOOLS = [{"name": "add", "input_schema": FUNCTION["parameters"], "strict": True}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPEN_CHAT = {"messages": [USER, {"role": "assistant", "content": "Sure: "}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]

BASES: dict[str, dict[str, Any]] = {
    "chat": {"model": "demo", "messages": [USER], "seed": 7},
    "completions": {"model": "demo", "prompt": "Add.", "seed": 7, "max_tokens": 300},
    "responses": {"model": "demo", "input": "Add.", "seed": 7},
    "anthropic": {"model": "demo", "messages": [USER], "seed": 7, "max_tokens": 300},
    "message": USER,
    "stream_options": {},
}


class Case(NamedTuple):
    """What is sent as one field: `good`, which must count, and `bad`, refused with `param` (else the field's name).

    `beside`: other fields that it needs. `is_same`: it is understood and says what is so anyway.
    """

    good: Any
    bad: Any
    param: str = ""
    beside: dict[str, Any] = {}
    is_same: bool = False


class Asked(NamedTuple):
    """One field in one place of a request. `plain`: the request without it."""

    place: str
    field: str
    verdict: Verdict
    plain: dict[str, Any]
    good: Any
    bad: Any
    param: str
    is_same: bool


_GUIDED = {
    "guided_json": Case(SCHEMA, 3),
    "guided_regex": Case("a+", 3),
    "guided_choice": Case(["a", "b"], []),
    "guided_grammar": Case('start: "a"', ""),
    "guided_json_object": Case(True, "yes"),
    "response_format": Case({"type": "json_object"}, {"type": "xml"}, "response_format.type"),
    "structured_outputs": Case({"regex": "a+"}, {"regex": "a", "json_object": True}),
}

CASES: dict[str, Case] = {
    **_GUIDED,
    "model": Case("twin", "gone"),
    "messages": Case([{"role": "user", "content": "No."}], "Add."),
    "prompt": Case([5, 6, 7], [1, "x"]),
    "max_tokens": Case(3, 0),
    "max_completion_tokens": Case(3, 0),
    "temperature": Case(0.5, -1),
    "top_p": Case(0.5, 2),
    "top_k": Case(3, -2),
    "min_p": Case(0.1, 2),
    "repetition_penalty": Case(1.1, 0),
    "presence_penalty": Case(1, "x"),
    "frequency_penalty": Case(1, "x"),
    "logit_bias": Case({"5": 1}, {"5": 1000}),
    "seed": Case(8, "x"),
    "n": Case(2, 99),
    "stop": Case("me", [""], "stop[0]"),
    "stop_token_ids": Case([5], [1 << 40]),
    "ignore_eos": Case(True, 3),
    "include_stop_str_in_output": Case(True, 3, beside={"stop": "me"}),
    "min_tokens": Case(3, -1),
    "allowed_token_ids": Case([5], []),
    "bad_words": Case(["x"], [""]),
    "skip_special_tokens": Case(False, "x"),
    "truncate_prompt_tokens": Case(1, 0),
    "return_token_ids": Case(True, "x"),
    "echo": Case(True, "x"),
    "add_generation_prompt": Case(False, "x"),
    "continue_final_message": Case(True, "x", beside=OPEN_CHAT),
    "chat_template_kwargs": Case({"enable_thinking": False}, {"gone": 1}),
    "tools": Case(TOOLS, [{"type": "web_search"}], "tools[0]"),
    "tool_choice": Case("required", "maybe", beside={"tools": TOOLS}),
    "parallel_tool_calls": Case(False, "x", beside={"tools": TOOLS}),
    "include_reasoning": Case(False, "x"),
    "separate_reasoning": Case(False, "x"),
    "max_reasoning_tokens": Case(3, -1),
    "thinking_token_budget": Case(3, "x"),
    "enable_thinking": Case(False, "x"),
    "documents": Case([{"text": "x"}], "x"),
    "reasoning_effort": Case("low", 3),
    "cache_salt": Case("x", ""),
    "stream": Case(True, "x"),
    "stream_options": Case(
        {"include_usage": True}, {"include_usge": 1}, "stream_options.include_usge", {"stream": True}
    ),
    "logprobs": Case(True, "x"),
    "top_logprobs": Case(2, 99, beside={"logprobs": True}),
    "deadline_s": Case(9, -1),
    "no_store": Case(True, "x"),
    "priority": Case("low", "urgent"),
    "cache_hint": Case("one_shot", "never"),
    "retention": Case([{"priority": 80}], [{"priority": 101}], "retention[0].priority"),
    "prompt_cache_options": Case({"mode": "explicit"}, {"mode": "never"}, "prompt_cache_options.mode"),
    "prompt_cache_retention": Case("24h", "ever"),
    "cache_control": Case({"type": "ephemeral"}, {"type": "x"}, "cache_control.type"),
    # Of the other dialects.
    "input": Case([{"role": "user", "content": "No."}], [{"type": "item_reference"}], "input[0]"),
    "instructions": Case("Be brief.", 3),
    "max_output_tokens": Case(3, 0),
    "system": Case("Be brief.", 3),
    "diagnostics": Case({"previous_message_id": "msg_00"}, {"previous": "x"}, "diagnostics"),
    "stop_sequences": Case(["me"], [""], "stop_sequences[0]"),
    "thinking": Case({"type": "disabled"}, {"type": "x"}, "thinking.type"),
    "output_config": Case({"effort": "low"}, {"effect": "low"}, "output_config"),
    "reasoning": Case({"effort": "low"}, {"effort": 3}, "reasoning.effort"),
    "text": Case({"format": {"type": "json_object"}}, {"format": {"type": "xml"}}, "text.format.type"),
    # Of messages.
    "role": Case("system", ""),
    "content": Case([{"type": "text", "text": "No."}], IMAGE),
    "name": Case("bob", 3),
    "tool_calls": Case([CALL], [{"id": "c1"}], "tool_calls[0].function", {"role": "assistant"}),
    "tool_call_id": Case("c1", 3, beside={"role": "tool"}),
    "reasoning_content": Case("Hm.", 3, beside={"role": "assistant"}),
    "include_usage": Case(True, "x"),
}
IN_PLACE: dict[tuple[str, str], Case] = {
    ("chat", "echo"): Case(True, "x", beside={**OPEN_CHAT, "continue_final_message": True}),
    ("completions", "logprobs"): Case(2, 99),
    ("completions", "best_of"): Case(1, 2, is_same=True),
    ("responses", "tools"): Case(FLAT_TOOLS, [{"type": "web_search"}], "tools[0]"),
    ("responses", "tool_choice"): Case("required", "maybe", beside={"tools": FLAT_TOOLS}),
    ("responses", "parallel_tool_calls"): Case(False, "x", beside={"tools": FLAT_TOOLS}),
    ("anthropic", "tools"): Case(ANTHROPIC_TOOLS, [{"type": "bash_20250124", "name": "bash"}], "tools[0]"),
    ("anthropic", "tool_choice"): Case({"type": "any"}, {"type": "x"}, "tool_choice.type", {"tools": ANTHROPIC_TOOLS}),
    ("message", "reasoning"): Case("Hm.", 3, beside={"role": "assistant"}),
}
HARMLESS: dict[str, Any] = {
    "user": "me",
    "metadata": {"user_id": "u"},
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
    "annotations": [],
    "refusal": "no",
    "stream_options": {"include_obfuscation": False},
}


def corpus() -> Iterator[Asked]:
    """Yield every field in every place of the table."""
    for row in FIELDS:
        for place in row.places:
            for field in row.names.split():
                case = Case(HARMLESS.get(field, "x"), ANY)
                if row.verdict == "honoured":
                    case = IN_PLACE.get((place, field)) or CASES[field]
                plain = {**BASES[place], **case.beside}
                yield Asked(place, field, row.verdict, plain, case.good, case.bad, case.param or field, case.is_same)


def body_of(place: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the route, by the name of its place, and the request whose object at `place` has `fields`."""
    if place == "message":
        return "chat", {**BASES["chat"], "messages": [fields]}
    if place == "stream_options":
        return "chat", {**BASES["chat"], "stream": True, "stream_options": fields}
    return place, fields
