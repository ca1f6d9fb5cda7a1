"""Calls of tools and reasoning in the text of an answer: each format, in whatever pieces it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.text.answer_parser import TOOL_PARSERS, AnswerParser, ReasoningParser, find_format
from kvasir.gateway.text.answer_parts import MAX_SPACE, joined
from kvasir.protocol.client_messages import AnswerPart, ReasoningPart, TextPart, ToolCallPart

TOOLS: dict[str, dict[str, Any]] = {
    "add": {
        "properties": {
            "a": {"type": "integer"},
            "x": {"type": ["number", "null"]},
            "flag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "items": {"type": "array"},
            "o": {"type": "object"},
        }
    },
    "write": {"properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    "now": {},
}
Found = tuple[str, list[tuple[str, Any]]]


def parse(name: str, pieces: Sequence[str], **options: Any) -> list[AnswerPart]:
    """Return all parts of an answer that comes in `pieces`, neighbours joined."""
    parser = TOOL_PARSERS[name](TOOLS, **options)
    return joined([part for piece in pieces for part in parser.push(piece)] + parser.finish())


def found(name: str, text: str, **options: Any) -> Found:
    """Return the content, and the calls with their arguments decoded (as text if they are no JSON)."""
    content, calls = "", []
    for part in parse(name, [text], **options):
        if isinstance(part, TextPart):
            content += part.text
        elif isinstance(part, ToolCallPart) and part.name:
            calls.append([part.name, ""])
        elif isinstance(part, ToolCallPart):
            calls[part.index][1] += part.arguments
    return content, [(called, _decoded(arguments)) for called, arguments in calls]


def _decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def function(name: str, **parameters: str) -> str:
    """Return a call as Qwen3-Coder writes it."""
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<function={name}>\n{inside}</function>"


ADD = '{"name": "add", "arguments": {"a": 1, "x": {"y": [2, "}]"]}}}'
ADDED = ("add", {"a": 1, "x": {"y": [2, "}]"]}})
A1, NOW = ("add", {"a": 1}), ("now", {})
CODE = '\n  if 1 < 2:\n    "x"\n'
Calls = list[tuple[str, Any]]

HERMES: list[tuple[str, str, Calls]] = [
    (f"<tool_call>\n{ADD}\n</tool_call>", "", [ADDED]),
    (f"So.\n{call(ADD)}\n{call(ADD)}\n", "So.", [ADDED, ADDED]),
    (f"{call(ADD)}\n\nDone. ", "Done. ", [ADDED]),
    (f"<tool_call>{ADD} and no end", "and no end", [ADDED]),
    (call('{"arguments": {"a": 1}, "name": "add"}'), "", [A1]),
    (call('{"name": "now"}'), "", [NOW]),
    (call('{"name": "now", "arguments": null}'), "", [NOW]),
    (call('{"name": "add", "arguments": "{\\"a\\": 1}"}'), "", [A1]),
    (call('{"id": [1], "name": "n\\u00e9", "arguments": {}}'), "", [("né", {})]),
    (call('{"name": "w", "arguments": {"c": "</tool_call>"}}'), "", [("w", {"c": "</tool_call>"})]),
    (f"a {call('no json')} b", f"a {call('no json')} b", []),
    (f'x <tool_call>{{"a" 1}} {call(ADD)}', 'x <tool_call>{"a" 1}', [ADDED]),
    (call('{"name": 3, "arguments": {}}'), call('{"name": 3, "arguments": {}}'), []),
    ('<tool_call>{"name": "add", "arguments": {"a": ', "", [("add", '{"a": ')]),
    ('<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    (call('{"name": "now", "arguments": {}, 7') + " x", "x", [NOW]),
    ("1 < 2 and <tool_cal", "1 < 2 and <tool_cal", []),
    (call('{"' + "k" * 300 + '": 1}'), call('{"' + "k" * 300 + '": 1}'), []),
]
CODER: list[tuple[str, str, Calls]] = [
    (
        call(function("add", a="7", x="1.5", flag="True", items='[1, "é"]', o="{}")),
        "",
        [("add", {"a": 7, "x": 1.5, "flag": True, "items": [1, "é"], "o": {}})],
    ),
    (
        f"So.\n\n{call(function('write', path='a.py', content=CODE))}\n{call(function('now'))}",
        "So.",
        [("write", {"path": "a.py", "content": CODE}), NOW],
    ),
    ("<function=write>\n<parameter=path>x</parameter></function>", "", [("write", {"path": "x"})]),
    (
        f"{call(function('add', a='seven', x='null', zzz='12'))}.",
        ".",
        [("add", {"a": "seven", "x": None, "zzz": "12"})],
    ),
    (
        "<function=write><parameter=path>\na\n<parameter=content>\nb\n</function></tool_call>",
        "",
        [("write", {"path": "a", "content": "b"})],
    ),
    (call(function("write", path="", content="null")), "", [("write", {"path": "", "content": "null"})]),
    ("<tool_call><function=write><parameter=path>\nab", "", [("write", '{"path": "ab"')]),
    ("<tool_call>\nsome text <function", "<tool_call>\nsome text <function", []),
    ("<function=a b<c", "<function=a b<c", []),
]
LLAMA: list[tuple[str, str, Calls]] = [
    (' {"name": "add", "parameters": {"a": 1}}', "", [A1]),
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}', "", [A1, NOW]),
    ('{"name": "Bob", "parameters": {"age": 3}}', '{"name": "Bob", "parameters": {"age": 3}}', []),
    ('{"name": "add"}', '{"name": "add"}', []),
    ('Use {"name": "add", "parameters": {}}', 'Use {"name": "add", "parameters": {}}', []),
    ('\n{"answer": [3]} ok', '\n{"answer": [3]} ok', []),
    ("<|python_tag|>print(1)", "print(1)", []),
]
MISTRAL: list[tuple[str, str, Calls]] = [
    (f"[TOOL_CALLS] [{ADD}, {ADD}]", "", [ADDED, ADDED]),
    ('Sure.\n[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}', "Sure.", [A1, NOW]),
    ('[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": "]}"}', "", [("add", {"a": "]}"})]),
    ('[TOOL_CALLS]add{"a": 1} done', "done", [A1]),
    ("x [TOOL_CALLS] not a call", "x [TOOL_CALLS] not a call", []),
    ('[TOOL_CALLS][{"a": 1}] x', '[TOOL_CALLS][{"a": 1}] x', []),
    ('[TOOL_CALLS]add[ARGS]{"a": ', "", [("add", '{"a": ')]),
    ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
]
CASES = [
    (name, *case)
    for name, cases in (("hermes", HERMES), ("qwen3_coder", CODER), ("llama3", LLAMA), ("mistral", MISTRAL))
    for case in cases
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_an_answer_has_this_content_and_these_calls(
    name: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    assert found(name, text) == (content, calls)
    assert parse(name, list(text)) == parse(name, [text]), "character by character"


TAGS = "<tool_call> </tool_call> <function=add> </function> <parameter=a> </parameter> <function= <|python_tag|>"
FRAGMENTS = [
    *TAGS.split(),
    *(
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "add",
        "now",
        "\n",
        " ",
        ";",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        "\\",
        "<",
    ),
    *(ADD, '{"name": "add", "arguments": {', '"name"', '"parameters": {"a": "\\', "null", "7", "é😀", "x y"),
]


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text like a model's gone wrong, and the same in pieces."""
    if draw(st.booleans()):
        text = draw(st.sampled_from([text for _, text, _, _ in CASES]))
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *FRAGMENTS])) + text[at + draw(st.integers(0, 3)) :]
    else:
        text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_a_name_may_be_followed_by_a_line_break_before_what_ends_it() -> None:
    text = '[TOOL_CALLS]add\n[ARGS]{"a": 1}'
    assert (
        parse("mistral", [text])
        == parse("mistral", list(text))
        == [ToolCallPart(0, "000000000", "add"), ToolCallPart(0, arguments='{"a": 1}')]
    )
    cut_short = "[TOOL_CALLS]add\n[AR"
    assert parse("mistral", [cut_short]) == parse("mistral", list(cut_short)) == [TextPart(cut_short)]


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_what_is_found_does_not_depend_on_how_the_text_is_cut(name: str, one_call: bool) -> None:
    @settings(max_examples=150)
    @given(cut_texts())
    def check(case: tuple[str, list[str]]) -> None:
        text, pieces = case
        whole = parse(name, [text], one_call=one_call)
        assert parse(name, pieces, one_call=one_call) == whole
        assert parse(name, list(text), one_call=one_call) == whole
        calls = [part.index for part in whole if isinstance(part, ToolCallPart) and part.name]
        assert calls == list(range(len(calls)))[: 1 if one_call else None]

    check()


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=100)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_text_without_calls_is_content_to_the_letter(name: str, text: str) -> None:
    marks = ("<", "[", "{")
    if not any(mark in text for mark in marks):
        assert parse(name, list(text)) == ([TextPart(text)] if text else [])


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_text_is_let_out_as_soon_as_it_is_sure_to_stay(name: str) -> None:
    parser = TOOL_PARSERS[name](TOOLS)
    assert parser.push("Hello") == [TextPart("Hello")]
    assert parser.push(" world") == [TextPart(" world")]


@pytest.mark.parametrize(
    ("name", "begun", "rest"),
    [
        ("hermes", '<tool_call>\n{"name": "write", "arguments": {"path": "a', "bc"),
        ("qwen3_coder", "<tool_call>\n<function=write>\n<parameter=path>\na", "bc"),
        ("llama3", '{"name": "write", "parameters": {"path": "a', "bc"),
        ("mistral", '[TOOL_CALLS]write[ARGS]{"path": "a', "bc"),
    ],
)
def test_arguments_are_let_out_while_they_come(name: str, begun: str, rest: str) -> None:
    parser = TOOL_PARSERS[name](TOOLS)
    first = joined(parser.push(begun))
    assert first == [ToolCallPart(0, parser.call_id(b"", 0), "write"), ToolCallPart(0, arguments='{"path": "a')]
    assert parser.push(rest) == [ToolCallPart(0, arguments="bc")]


@pytest.mark.parametrize(
    ("name", "begun", "piece"),
    [
        ("hermes", '<tool_call>{"', "key "),
        ("hermes", '<tool_call>{"name": "', "key "),
        ("hermes", '<tool_call>{"arguments": {"a": "', "key "),
        ("hermes", "<tool_call>", "    "),
        ("qwen3_coder", "<tool_call><function=", "key "),
        ("qwen3_coder", "<function=add><parameter=items>", "[1, "),
        ("qwen3_coder", "<function=write><parameter=path>", "abc\n"),
        ("llama3", '{"', "key "),
        ("mistral", "[TOOL_CALLS]", "key "),
        ("mistral", "[TOOL_CALLS]add[ARGS]", "key "),
        ("hermes", "x", " " * 300),
        ("llama3", "", " " * 300),
    ],
)
def test_a_long_answer_costs_each_piece_about_the_same(name: str, begun: str, piece: str) -> None:
    """What has come is not looked at from its beginning with every piece: 20,000 of them take a second, not minutes."""
    parser = TOOL_PARSERS[name](TOOLS)
    parser.push(begun)
    began = time.process_time()
    for _ in range(20_000):
        parser.push(piece)
    parser.finish()
    assert time.process_time() - began < 6


@pytest.mark.parametrize("cut", [1, 7, 4095, 100_000])
@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=now></function></tool_call>"),
        ("mistral", "[TOOL_CALLS]now[ARGS]{}"),
        ("llama3", '{"name": "now", "parameters": {}}'),
    ],
)
def test_of_very_much_white_space_before_a_call_only_the_end_is_held_back(name: str, called: str, cut: int) -> None:
    text = "x" * (name != "llama3") + "\n" * (2 * MAX_SPACE + 5) + called
    parts = parse(name, [text[at : at + cut] for at in range(0, len(text), cut)])
    assert parts == parse(name, [text])
    content = "".join(part.text for part in parts if isinstance(part, TextPart))
    if name == "llama3":  # a call is all of an answer there
        assert content == text
    else:
        assert content == "x" + "\n" * (MAX_SPACE + 5) and isinstance(parts[1], ToolCallPart)


@pytest.mark.parametrize("called", ["add", ""])
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_an_answer_can_begin_with_a_call(name: str, called: str) -> None:
    """The prompt ends in the opening, and the model writes the rest."""
    kind = TOOL_PARSERS[name]
    rests = {"hermes": '{"a": 1}}\n</tool_call>', "llama3": '{"a": 1}}', "mistral": '{"a": 1}}]'}
    rests["qwen3_coder"] = "<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    begun = kind.opening("add")[len(kind.opening("")) :] if not called else ""
    parser = kind(TOOLS)
    parser.begin_with(kind.opening(called))
    parts = joined([part for piece in begun + rests[name] for part in parser.push(piece)] + parser.finish())
    assert parts[0] == ToolCallPart(0, kind.call_id(b"", 0), "add") and not any(
        isinstance(part, TextPart) for part in parts
    )
    assert json.loads(parts[1].arguments) == {"a": 1}


def test_ids_of_calls_are_those_that_the_models_templates_take() -> None:
    assert TOOL_PARSERS["hermes"].call_id(b"\xab" * 16, 1) == "call_" + "ab" * 12 + "1"
    short = TOOL_PARSERS["mistral"].call_id(b"\xab" * 16, 300)
    assert len(short) == 9 and short.isalnum()


# ---- reasoning ---------------------------------------------------------------------------------------------------

REASONED = [
    ("<think>\nI see.\n</think>\n\nHi.", False, "\nI see.\n", "\n\nHi."),
    ("\n<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("Hi <think>a</think>", False, "", "Hi <think>a</think>"),
    ("a</think>b", True, "a", "b"),
    ("<thin", False, "", "<thin"),
    (" <", False, "", " <"),
    (" " * MAX_SPACE + "<think>a</think>b", False, "a", "b"),
    (" " * MAX_SPACE + " <think>a</think>", False, "", " " * MAX_SPACE + " <think>a</think>"),
    ("<think>still</thi", False, "still</thi", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), REASONED)
def test_reasoning_is_told_from_content_in_whatever_pieces(
    text: str, is_open: bool, reasoning: str, content: str
) -> None:
    expected = [part for part in (ReasoningPart(reasoning), TextPart(content)) if part.text]
    for pieces in ([text], list(text), [text[:7], text[7:]]):
        parser = AnswerParser(ReasoningParser("<think>", "</think>", is_open=is_open), None)
        assert joined([part for piece in pieces for part in parser.push(piece)] + parser.finish()) == expected


def test_calls_follow_reasoning_and_are_none_within_it() -> None:
    text = f"<think><tool_call>{ADD}</tool_call></think>\n\n<tool_call>{ADD}</tool_call>"
    for keep, expected in ((True, [ReasoningPart(f"<tool_call>{ADD}</tool_call>")]), (False, [])):
        tools = TOOL_PARSERS["hermes"](TOOLS)
        reasoning = ReasoningParser("<think>", "</think>", is_open=False)
        parser = AnswerParser(reasoning, tools, keep_reasoning=keep)
        parts = joined([part for piece in text for part in parser.push(piece)] + parser.finish())
        assert parts[: len(expected)] == expected and parts[len(expected)] == ToolCallPart(0, "call_0", "add")
        assert not any(isinstance(part, TextPart) for part in parts) and parser.num_calls == 1


@pytest.mark.parametrize(
    ("template", "named", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }} arguments </think>", "auto", "hermes", "<think>"),
        ("<tool_call><function=x><parameter=y>", "auto", "qwen3_coder", None),
        ("<|start_header_id|> {\"name\": \"parameters\": }", "auto", "llama3", None),
        ("[TOOL_CALLS] [/THINK]", "auto", "mistral", "[THINK]"),
        ("{{ messages }}", "auto", None, None),
        ("{{ messages }}", "hermes", "hermes", None),
        ("[TOOL_CALLS]", "none", None, None),
    ],
)  # fmt: skip
def test_the_format_is_found_from_the_template_unless_it_is_named(
    template: str, named: str, tools: str | None, reasoning: str | None
) -> None:
    answers = find_format(template, named)
    assert answers.tools is TOOL_PARSERS.get(tools or "")
    assert (answers.reasoning or [None])[0] == reasoning


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_an_answer_that_is_cut_within_the_end_of_a_call_has_no_content_of_it(name: str) -> None:
    written = call('{"name": "now", "arguments": {}}') if name == "hermes" else call(function("now"))
    for length in range(1, len("</tool_call>")):
        assert found(name, written[:-length]) == ("", [NOW])
    assert found(name, written[: -len("</tool_call>")] + "</b>") == ("</b>", [NOW])
