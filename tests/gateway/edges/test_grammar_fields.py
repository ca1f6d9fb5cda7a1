"""The fields of structured output: each becomes one grammar, and what cannot be read is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from kvasir.gateway.core.api import Submit
from kvasir.gateway.edges.openai_requests import read_chat, read_completion
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import Constraint, Grammar
from tests.edge_helpers import CALLER, FakeCore, make_preparer, make_text

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}}
TEXT = json.dumps(SCHEMA)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            TEXT,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": TEXT}}, "json_schema", TEXT),
        ({"structured_outputs": {"regex": "a|b"}}, "regex", "a|b"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"guided_json": SCHEMA}, "json_schema", TEXT),
        ({"guided_regex": "a"}, "regex", "a"),
        ({"guided_choice": ["é"]}, "choice", '["é"]'),
        ({"guided_grammar": 'root ::= "a"'}, "lark", 'root ::= "a"'),
        ({"guided_json_object": True}, "json_schema", '{"type":"object"}'),
    ],
)
def test_each_field_becomes_one_grammar(fields: dict[str, Any], kind: str, text: str) -> None:
    asked = read_chat(body(**fields))
    assert asked.requests[0].grammar == Grammar(kind, text)  # type: ignore[arg-type]
    assert asked.names["grammar"] == next(iter(fields))
    completion = json.dumps({"prompt": "x", **fields}).encode()
    assert read_completion(completion).requests[0].grammar == Grammar(kind, text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"guided_json": None},
        {"guided_regex": None},
    ],
)
def test_what_asks_for_nothing_leaves_the_answer_free(fields: dict[str, Any]) -> None:
    assert read_chat(body(**fields)).requests[0].grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"),
        ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern"),
        ({"structural_tag": "x"}, "structural_tag"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_chat(body(**fields))
    assert caught.value.param == param


def refusal(core: FakeCore, **fields: Any) -> BadRequest:
    async def main() -> None:
        [request] = read_chat(body(**fields)).requests
        await make_preparer(core).prepare(request, CALLER, lambda event: None)  # type: ignore[arg-type]

    with pytest.raises(BadRequest) as caught:
        trio.run(main)
    return caught.value


def test_a_model_whose_engine_cannot_is_named() -> None:
    core = FakeCore(lambda submit: [])
    core.infos["demo"] = type(core.infos["demo"])(
        "demo", "f" * 32, "float32", 16, 2048, 1, "vllm", frozenset({"grammars"})
    )
    error = refusal(core, response_format={"type": "json_object"})
    assert "'demo', which vllm computes, cannot be held to a grammar" in error.message


def test_ignore_eos_does_not_go_with_a_grammar() -> None:
    core = FakeCore(lambda submit: [])
    assert refusal(core, response_format={"type": "json_object"}, ignore_eos=True).param == "ignore_eos"


def test_the_grammar_of_a_model_that_reasons_holds_after_its_reasoning() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think> </think> #}"
    text = make_text(template, special=["<think>", "</think>"])
    core = FakeCore(lambda submit: [])
    [request] = read_chat(body(guided_regex="a")).requests

    class Known:
        def verdict_nowait(self, *asked: object) -> bool:
            return True

    preparer = make_preparer(core, text=text)
    preparer._grammars = Known()  # type: ignore[assignment]

    async def main() -> Submit | None:
        return preparer.prepare_nowait(request, CALLER, lambda event: None)  # type: ignore[arg-type]

    submit = trio.run(main)
    constraint = submit.sampling.constraint
    assert isinstance(constraint, Constraint)
    assert constraint.grammar == Grammar("regex", "a")
    start, end = (text._tokenizer.token_to_id(mark) for mark in ("<think>", "</think>"))
    assert (constraint.reasoning.start, constraint.reasoning.end) == (start, end)
