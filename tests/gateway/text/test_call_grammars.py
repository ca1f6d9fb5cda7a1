"""Calls held to their schemas, in the way each family writes them: what is parsed as a call is valid, and can be."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from kvasir.gateway.text.answer_parts import joined
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.client_messages import ChatMessage, ChatOptions, TextPart, ToolCallPart
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.grammars import make_matcher
from kvasir.protocol.sampling import Grammar
from tests.chat_templates import FAMILIES
from tests.edge_helpers import make_text
from tests.grammar_helpers import schema_grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"type": "string", "enum": ["km", "mi"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["n", "unit"],
    "additionalProperties": False,
}
FREE = {"type": "object", "properties": {"q": {"type": "string"}}}
GOOD, BAD = {"n": 7, "unit": "km"}, {"n": "x", "unit": "km"}
SPECIAL = {"mistral": ["[TOOL_CALLS]"], "llama3.1": ["<|python_tag|>"]}
TEXTS = {
    family: make_text(FAMILIES[family], SPECIAL.get(family, ()))
    for family in ("qwen3", "qwen3-coder", "llama3.1", "mistral")
}
TEXTS["qwen3, special"] = make_text(FAMILIES["qwen3"], ["<tool_call>", "</tool_call>"])
CONTENT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def options(strict: bool | None = None, schema: dict[str, Any] = SCHEMA, **more: Any) -> ChatOptions:
    said = {} if strict is None else {"strict": strict}
    functions = [{"name": "far", "parameters": schema, **said}, {"name": "look", "parameters": FREE, **said}]
    return ChatOptions(msgspec.json.encode([{"type": "function", "function": each} for each in functions]), **more)


def written(family: str, name: str, arguments: Any) -> str:
    """Return a call as the family writes it, alone."""
    dumped = json.dumps(arguments)
    match family:
        case "qwen3-coder":
            values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
            tags = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
            return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"
        case "llama3.1":
            return f'{{"name": "{name}", "parameters": {dumped}}}'
        case "mistral":
            return f'[TOOL_CALLS][{{"name": "{name}", "arguments": {dumped}}}]'
    return f'<tool_call>\n{{"name": "{name}", "arguments": {dumped}}}\n</tool_call>'


def tokenizer_of(text: ModelText) -> LLTokenizer:
    return LLTokenizer(text._tokenizer.to_str(), n_vocab=text.vocab_size, eos_token=list(text.eos_token_ids))


def matcher(text: ModelText, grammar: Grammar | None) -> LLMatcher:
    return make_matcher(tokenizer_of(text), grammar)


def can_be(text: ModelText, given: ChatOptions, answer: str, content: Grammar | None = None) -> bool:
    """Return whether an answer may be `answer`, all of it."""
    made = matcher(text, text.answers.call_grammar(given, content))
    ids = text._tokenizer.encode(answer, add_special_tokens=False).ids
    return bool(made.try_consume_tokens(ids) == len(ids) and made.is_accepting())


@pytest.mark.parametrize("family", TEXTS)
def test_strict_tools_are_held_amidst_free_text(family: str) -> None:
    text, given = TEXTS[family], options(strict=True)
    before = "" if family == "llama3.1" else "Let me see.\n"
    assert can_be(text, given, "It is 7 < 8 & {far}.")
    assert can_be(text, given, before + written(family, "far", GOOD))
    assert not can_be(text, given, before + written(family, "far", BAD))
    assert not can_be(text, given, before + written(family, "far", {"unit": "km"})), "something is missing"
    assert not can_be(text, given, before + written(family, "near", GOOD)), "there is no such tool"
    assert can_be(text, given, before + written(family, "look", {"q": "a <b> c"}))


@pytest.mark.parametrize("family", TEXTS)
def test_several_calls_follow_each_other_unless_only_one_is_wanted(family: str) -> None:
    text = TEXTS[family]
    one, two = written(family, "far", GOOD), written(family, "look", {"q": "x"})
    both = {"llama3.1": f"{one}; {two}", "mistral": f"{one[:-1]}, {two.removeprefix('[TOOL_CALLS][')}"}
    both_written = both.get(family, f"{one}\n{two}")
    assert can_be(text, options(strict=True), both_written)
    assert not can_be(text, options(strict=True, parallel_tool_calls=False), both_written)
    assert can_be(text, options(strict=True, parallel_tool_calls=False), one)


@pytest.mark.parametrize("family", TEXTS)
def test_a_forced_call_is_held_unless_its_tool_says_otherwise(family: str) -> None:
    text = TEXTS[family]
    parser = text.answers.tools
    for name in ("", "far"):
        forced: dict[str, Any] = {"tool_choice": "required", "tool_name": name}
        rest = written(family, "far", GOOD).removeprefix(parser.opening(name))
        bad = written(family, "far", BAD).removeprefix(parser.opening(name))
        assert can_be(text, options(**forced), rest) and not can_be(text, options(**forced), bad)
        assert not can_be(text, options(**forced), "No.")
        assert text.answers.call_grammar(options(strict=False, **forced), None) is None
        assert can_be(text, options(strict=True, **forced), rest)
    assert text.answers.call_grammar(options(), None) is None, "nothing is asked for"


@pytest.mark.parametrize("family", [family for family in TEXTS if family != "llama3.1"])
def test_beside_tools_content_is_held_to_its_schema(family: str) -> None:
    text = TEXTS[family]
    content = schema_grammar(CONTENT)
    assert can_be(text, options(), '{"ok": true}', content)
    assert not can_be(text, options(), '{"ok": 3}', content) and not can_be(text, options(), "Yes.", content)
    assert can_be(text, options(), written(family, "far", GOOD), content)
    assert not can_be(text, options(), written(family, "far", BAD), content)
    assert can_be(text, options(strict=False), written(family, "far", BAD), content)
    with pytest.raises(BadRequest, match="JSON schema only"):
        text.answers.call_grammar(options(), Grammar("regex", "a"))
    with pytest.raises(BadRequest, match="cannot be told from content"):
        TEXTS["llama3.1"].answers.call_grammar(options(), content)


@pytest.mark.parametrize("family", TEXTS)
def test_whatever_the_model_would_rather_write_what_is_parsed_is_valid(family: str) -> None:
    """Draws each token evenly among those that are allowed, and reads the answer as the edge does."""
    text = TEXTS[family]
    ends, draw = set(text.eos_token_ids), random.Random(3)
    given = options(tool_choice="required", schema=SCHEMA)
    tools = [{"type": "function", "function": {"name": "far", "parameters": SCHEMA}}]
    given = msgspec.structs.replace(given, tools=msgspec.json.encode(tools))
    num_calls = 0
    for _ in range(20):
        made = matcher(text, text.answers.call_grammar(given, None))
        ids: list[int] = []
        while len(ids) < 400 and not made.is_stopped() and not (made.is_accepting() and len(ids) > 60):
            bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
            allowed = [i for i in np.flatnonzero(bits).tolist() if i not in ends and i < text.vocab_size]
            ids.append(draw.choice(allowed))
            assert made.consume_token(ids[-1])
        if not made.is_accepting():
            continue  # one call after the other
        parser = text.answers.parser([ChatMessage("user", "x")], given, [])
        detokenizer = text.detokenizer(for_parser=True)
        parts = joined([*parser.push(detokenizer.push(ids)), *parser.push(detokenizer.finish()), *parser.finish()])
        assert not [part for part in parts if isinstance(part, TextPart) and part.text.strip()]
        assert {part.name for part in parts if isinstance(part, ToolCallPart) and part.name} == {"far"}
        for part in parts:
            if isinstance(part, ToolCallPart) and not part.name:
                jsonschema.validate(json.loads(part.arguments), SCHEMA)
                num_calls += 1
    assert num_calls >= 15


def test_what_a_schema_only_tells_the_model_takes_no_room_in_the_grammar() -> None:
    told = {"title": "T", "description": "D" * 70_000, "properties": {"description": {"type": "integer"}}}
    grammar = TEXTS["qwen3"].answers.call_grammar(options(strict=True, schema={"type": "object", **told}), None)
    assert grammar is not None and "DDD" not in grammar.text
    assert can_be(
        TEXTS["qwen3"],
        options(strict=True, schema={"type": "object", **told, "required": ["description"]}),
        written("qwen3", "far", {"description": 3}),
    )
    with pytest.raises(BadRequest, match="strict: false"):
        TEXTS["qwen3"].answers.call_grammar(options(strict=True, schema={"enum": ["x" * 70_000]}), None)


@pytest.mark.parametrize(
    ("family", "schema", "words"),
    [
        ("qwen3", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uses uniqueItems"),
        ("qwen3", {"type": "object", "x-guidance": {"lenient": True}}, "uses x-guidance"),
        ("qwen3-coder", {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}}, "uses pattern in"),
        ("qwen3-coder", {"anyOf": [{"type": "object"}]}, "uses anyOf in the parameters of far"),
    ],
)
def test_what_calls_cannot_be_held_to_is_named(family: str, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        matcher(TEXTS[family], TEXTS[family].answers.call_grammar(options(strict=True, schema=schema), None))
