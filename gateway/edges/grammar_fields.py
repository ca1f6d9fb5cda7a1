"""The fields by which a request asks for structured output, read into one `Grammar`: OpenAI's `response_format`,
vLLM's `structured_outputs` and its older `guided_*`."""

from __future__ import annotations

from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.gateway.text.json_input import read_json
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import MAX_GRAMMAR_CHARS, Grammar

_ANY_OBJECT = b'{"type":"object"}'
_OBJECT = Grammar("json_schema", _ANY_OBJECT.decode())
_NULL = b"null"


class GrammarFields(Protocol):
    """As bodies have them, each read only if it is given."""

    response_format: Raw
    structured_outputs: Raw
    guided_json: Raw
    guided_regex: Raw
    guided_choice: Raw
    guided_grammar: Raw
    guided_json_object: bool | None


class AskedGrammar(NamedTuple):
    """A grammar, and the field that asked for it."""

    grammar: Grammar
    field: str


class _JsonSchema(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    schema: Raw = Raw(_ANY_OBJECT)
    strict: bool | None = None  # an answer is held to the schema either way
    description: str | None = None


class _ResponseFormat(Struct, forbid_unknown_fields=True):
    type: str
    json_schema: _JsonSchema | None = None


class _TextFormat(Struct, forbid_unknown_fields=True):
    type: str
    name: str = ""
    schema: Raw = Raw(_ANY_OBJECT)
    strict: bool | None = None
    description: str | None = None


class _TextOptions(Struct, forbid_unknown_fields=True):
    format: _TextFormat | None = None


class _Structured(Struct, forbid_unknown_fields=True):
    json: Raw = Raw()
    regex: Raw = Raw()
    choice: Raw = Raw()
    grammar: Raw = Raw()
    json_object: bool | None = None


def read_grammar(body: GrammarFields) -> AskedGrammar | None:
    """Return what the answer has to match, None if it is free.

    Raises:
        BadRequest: two fields ask for something, or one cannot be read; `param` names it.
    """
    found = [
        AskedGrammar(grammar, name)
        for name, grammar in (
            ("response_format", _from_response_format(body.response_format)),
            ("structured_outputs", _from_structured(body.structured_outputs)),
            ("guided_json", _from_json(body.guided_json, "guided_json")),
            ("guided_regex", _from_text("regex", body.guided_regex, "guided_regex")),
            ("guided_choice", _from_choice(body.guided_choice, "guided_choice")),
            ("guided_grammar", _from_text("lark", body.guided_grammar, "guided_grammar")),
            ("guided_json_object", _OBJECT if body.guided_json_object else None),
        )
        if grammar is not None
    ]
    if len(found) > 1:
        raise BadRequest(f"{found[0].field} and {found[1].field} contradict each other; send one", param=found[1].field)
    return found[0] if found else None


def read_text_options(raw: Raw) -> AskedGrammar | None:
    """Return what `text` of a request for a response asks for: there a schema's name and the schema stand beside its
    type.

    Raises:
        BadRequest: as `read_grammar`.
    """
    if _is_absent(raw):
        return None
    given: _TextOptions = read_json(raw, _TextOptions, "text")
    if given.format is None:
        return None
    match _kind(given.format.type, "text.format"):
        case "json_object":
            return AskedGrammar(_OBJECT, "text.format")
        case "json_schema":
            return AskedGrammar(from_json_schema(given.format.schema, "text.format.schema"), "text.format")
    return None


def from_json_schema(raw: Raw, param: str) -> Grammar:
    """Return the grammar of answers that are valid by a JSON schema, which is an object or true.

    Raises:
        BadRequest: it is neither, or too large.
    """
    text = bytes(raw).decode()
    if not text.startswith("{") and text != "true":
        raise BadRequest(f"{param} is no JSON schema: send an object", param=param)
    return _grammar("json_schema", text, param)


def _from_response_format(raw: Raw) -> Grammar | None:
    if _is_absent(raw):
        return None
    given: _ResponseFormat = read_json(raw, _ResponseFormat, "response_format")
    kind = _kind(given.type, "response_format")
    if (kind == "json_schema") != (given.json_schema is not None):
        param = "response_format.json_schema"
        raise BadRequest(f"{param} goes with type 'json_schema'; send both or neither", param=param)
    if given.json_schema is not None:
        return from_json_schema(given.json_schema.schema, "response_format.json_schema.schema")
    return _OBJECT if kind == "json_object" else None


def _kind(kind: str, param: str) -> str:
    if kind not in ("text", "json_object", "json_schema"):
        what = f"{param} of type {kind[:80]!r} is not supported here; text, json_object and json_schema are"
        raise BadRequest(what, param=f"{param}.type")
    return kind


def _from_structured(raw: Raw) -> Grammar | None:
    if _is_absent(raw):
        return None
    where = "structured_outputs"
    given: _Structured = read_json(raw, _Structured, where)
    found = [
        grammar
        for grammar in (
            _from_json(given.json, f"{where}.json"),
            _from_text("regex", given.regex, f"{where}.regex"),
            _from_choice(given.choice, f"{where}.choice"),
            _from_text("lark", given.grammar, f"{where}.grammar"),
            _OBJECT if given.json_object else None,
        )
        if grammar is not None
    ]
    if len(found) != 1:
        raise BadRequest(
            f"{where} takes exactly one of json, regex, choice, grammar and json_object, not {len(found)}", param=where
        )
    return found[0]


def _from_json(raw: Raw, param: str) -> Grammar | None:
    if _is_absent(raw):
        return None
    if bytes(raw).startswith(b'"'):  # vLLM takes a schema as a string, too
        return _grammar("json_schema", read_json(raw, str, param), param)
    return from_json_schema(raw, param)


def _from_choice(raw: Raw, param: str) -> Grammar | None:
    if _is_absent(raw):
        return None
    choices = read_json(raw, Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)], param)
    return _grammar("choice", msgspec.json.encode(choices).decode(), param)


def _from_text(kind: str, raw: Raw, param: str) -> Grammar | None:
    return None if _is_absent(raw) else _grammar(kind, read_json(raw, str, param), param)


def _is_absent(raw: Raw) -> bool:
    return bytes(raw) in (b"", _NULL)


def _grammar(kind: str, text: str, param: str) -> Grammar:
    if not 0 < len(text) <= MAX_GRAMMAR_CHARS:
        raise BadRequest(f"{param} has {len(text)} characters, 1 to {MAX_GRAMMAR_CHARS} are allowed", param=param)
    return Grammar(kind, text)  # type: ignore[arg-type]
