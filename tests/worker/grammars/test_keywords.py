"""For each keyword that we claim: what `jsonschema` calls valid can be written, and what it calls invalid cannot.

Instances are as `json.dumps` writes them, their properties in the order of the schema.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import Grammar
from tests.grammar_helpers import accepts, matches

SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    10,
    1.5,
    -2.25,
    0.1,
    100,
    "",
    "a",
    "ab",
    "abc",
    "é😀",
    "A-1",
    "a\nb",
]
COMPOUND: list[Any] = [
    [],
    [1],
    [1, 2],
    [1, "a"],
    ["a", "b", "c"],
    [[1], []],
    {},
    {"a": 1},
    {"a": "x"},
    {"a": 1, "b": 2},
]
COMPOUND += [{"b": 2}, {"x-1": 1}, {"a": {"a": {"a": 1}}}, {"a": None}, [{"a": 1}, {}], {"a": 1, "b": 2, "c": 3}]
FORMATS = {
    "date": (["2024-02-29", "1999-12-31"], ["2024-13-01", "24-01-01", "x"]),
    "time": (["12:30:00Z", "23:59:59+01:00"], ["25:00:00Z", "noon"]),
    "date-time": (["2024-01-01T00:00:00Z"], ["2024-01-01", "2024-01-01 00:00:00"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", "x" * 36]),
    "email": (["a@b.org"], ["a", "@b.org"]),
    "ipv4": (["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
}
SCHEMAS: list[Any] = [
    *({"type": kind} for kind in ("null", "boolean", "integer", "number", "string", "array", "object")),
    {"type": ["integer", "string"]},
    {"const": 3},
    {"const": "a"},
    {"const": [1, 2]},
    {"const": None},
    {"enum": [1, "a", None, [1]]},
    {"enum": [{"a": 1}, True]},
    {"type": "integer", "minimum": 0},
    {"type": "integer", "maximum": 3},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 7},
    {"type": "number", "minimum": 0.1, "maximum": 1.5},
    {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 100},
    {"type": "integer", "multipleOf": 5},
    {"type": "number", "multipleOf": 0.5},
    {"type": "string", "minLength": 2},
    {"type": "string", "maxLength": 2},
    {"type": "string", "minLength": 1, "maxLength": 1},
    {"type": "string", "pattern": "^a"},
    {"type": "string", "pattern": "b"},
    {"type": "string", "pattern": "^[A-Z]-\\d$"},
    {"type": "array", "items": {"type": "integer"}},
    {"type": "array", "minItems": 2},
    {"type": "array", "maxItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}]},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False},
    {"type": "array", "items": {"type": "array"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {}}, "required": ["b"]},
    {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "minProperties": 1},
    {"type": "object", "maxProperties": 1},
    {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 1}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 1}, {"maximum": 7}]},
    {"minimum": 3},
    {"maxLength": 1},
    {"required": ["a"]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}},
    {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}},
        "additionalProperties": False,
    },
    {"type": "array", "items": {"$ref": "#"}},
    True,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_what_can_be_written_is_what_is_valid(schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    instances = [*SCALARS, *COMPOUND]
    expected = [validator.is_valid(instance) for instance in instances]
    got = [accepts(schema, instance) for instance in instances]
    assert [i for i, a, b in zip(instances, got, expected, strict=True) if a and not b] == [], "written, but invalid"
    assert [i for i, a, b in zip(instances, got, expected, strict=True) if b and not a] == [], "valid, but not written"
    assert any(expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_held_to(name: str) -> None:
    valid, invalid = FORMATS[name]
    schema = {"type": "string", "format": name}
    assert all(accepts(schema, text) for text in valid)
    assert not any(accepts(schema, text) for text in invalid)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, "uses not, which"),
        ({"type": "string", "format": "iri"}, "uses format iri, which"),
        ({"$ref": "http://example.org/schema"}, "refers to http://example.org/schema, which is not within it"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "uses oneOf with schemas that do not exclude each other"),
        ({"allOf": [True, False]}, "allows nothing at all"),
        ({"type": "object", "minProperties": 2}, "uses minProperties above 1"),
    ],
)
def test_what_cannot_be_held_to_is_named_in_our_words(schema: Any, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        accepts(schema, 1)
    assert f"the JSON schema {words}" in caught.value.message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "string", "pattern": "("}, "regex parse error: ( ^ error: unclosed group"),
        ({"properties": 3}, "properties must be an object"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said_without_the_grammar_around_it(schema: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        accepts(schema, 1)
    assert caught.value.message == message


def test_what_is_wrong_with_a_regex_is_said_without_the_grammar_around_it() -> None:
    with pytest.raises(BadRequest) as caught:
        matches(Grammar("regex", "(["), "x")
    assert (
        caught.value.message == 'invalid regex "([" (in regex): regex parse error: ([ ^ error: unclosed character class'
    )


def test_what_is_wrong_with_a_caller_s_grammar_is_said_in_the_lines_that_were_sent() -> None:
    with pytest.raises(BadRequest, match=r"^at 1\(8\): unknown name"):
        matches(Grammar("lark", "start: x\n"), "x")
