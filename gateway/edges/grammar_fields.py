"""The fields by which a request asks for structured output, read into one `Grammar`: OpenAI's `response_format`,
vLLM's `structured_outputs` and its older `guided_*`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.gateway.edges.openai_bodies import Body
from kvasir.gateway.text.json_input import read_json
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import MAX_GRAMMAR_CHARS, Grammar

_ANY_OBJECT = b'{"type":"object"}'
_OBJECT = Grammar("json_schema", _ANY_OBJECT.decode())


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
    """Each field is also one of a body, after `guided_`."""

    json: Raw = Raw()
    regex: Raw = Raw()
    choice: Raw = Raw()
    grammar: Raw = Raw()
    json_object: Raw = Raw()


def read_grammar(body: Body) -> AskedGrammar | None:
    """Return what the answer has to match, None if it is free.

    Raises:
        BadRequest: two fields ask for something, or one cannot be read; `param` names it.
    """
    fields = {
        "response_format": _from_response_format(body.response_format),
        "structured_outputs": _from_structured(body.structured_outputs),
    }
    for kind in _Structured.__struct_fields__:
        name = f"guided_{kind}"
        fields[name] = _from_kind(kind, getattr(body, name), name)
    found = [AskedGrammar(grammar, name) for name, grammar in fields.items() if grammar is not None]
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
    kinds = _Structured.__struct_fields__
    found = [each for kind in kinds if (each := _from_kind(kind, getattr(given, kind), f"{where}.{kind}"))]
    if len(found) != 1:
        raise BadRequest(
            f"{where} takes exactly one of json, regex, choice, grammar and json_object, not {len(found)}", param=where
        )
    return found[0]


def _from_kind(kind: str, raw: Raw, param: str) -> Grammar | None:
    if _is_absent(raw):
        return None
    match kind:
        case "json_object":
            return _OBJECT if read_json(raw, bool, param) else None
        case "json" if not bytes(raw).startswith(b'"'):
            return from_json_schema(raw, param)
        case "json":  # vLLM takes a schema as a string, too
            return _grammar("json_schema", read_json(raw, str, param), param)
        case "choice":
            choices = read_json(raw, Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)], param)
            return _grammar("choice", msgspec.json.encode(choices).decode(), param)
        case "grammar":
            return _grammar("lark", read_json(raw, str, param), param)
    return _grammar(kind, read_json(raw, str, param), param)


def _is_absent(raw: Raw) -> bool:
    return bytes(raw) in (b"", b"null")


def _grammar(kind: str, text: str, param: str) -> Grammar:
    if not 0 < len(text) <= MAX_GRAMMAR_CHARS:
        raise BadRequest(f"{param} has {len(text)} characters, 1 to {MAX_GRAMMAR_CHARS} are allowed", param=param)
    return Grammar(kind, text)  # type: ignore[arg-type]
