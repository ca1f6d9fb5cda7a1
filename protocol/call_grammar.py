"""Answers that may call tools, as a grammar: how a model writes a call, around arguments that a schema holds.

The gateway makes a `CallGrammar` of a request's tools and of the way its model writes calls, and sends it as a grammar
of kind "calls"; what compiles it asks `protocol.lark`. Knows neither models nor tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from kvasir.protocol.errors import BadRequest

Piece = str | int
"""Text, or a special token by its id."""


class CallableTool(Struct, frozen=True):
    """One function: what comes before its arguments where it is called first (without the trigger, or what the prompt
    has of it), and where after another call; the JSON schema of its arguments."""

    name: str
    first: list[Piece]
    later: list[Piece]
    schema: dict[str, Any]


class CallGrammar(Struct, frozen=True, omit_defaults=True):
    """Calls of `tools`, each with `ending` after its arguments, `closing` after all; only one if `is_one`.

    `text`: a regular expression for what the answer may be instead, or have before a call that begins with `trigger`;
    "": it has to call. `content`: a JSON schema that an answer without calls is held to, in place of `text`.
    `has_tags`: arguments are tags of Qwen3-Coder's, not JSON.
    """

    tools: list[CallableTool]
    ending: list[Piece]
    closing: list[Piece] = []
    is_one: bool = False
    text: str = ""
    trigger: Piece = ""
    content: dict[str, Any] | None = None
    has_tags: bool = False


# Every option is set, so that none can be set by the schema itself. Space between tokens is optional, one blank or a
# line and its indentation: a model that likes spaces would go on for ever.
JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\n[\x20\t]{0,32})?",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}


def calls_in_lark(grammar: CallGrammar, rule: str) -> str:
    """Return rules in the notation of llguidance, of which `rule` is `grammar`.

    Raises:
        BadRequest: a schema that cannot be written in this way; names its tool and says why.
    """
    lines: list[str] = []
    content = "" if grammar.content is None else "content"
    if grammar.content is not None:
        lines.append(f"content: {json_in_lark(grammar.content)}")
    elif grammar.text:
        content = "text"
        lines += ["text: TEXT", f"TEXT: /{grammar.text}/"]
    head = ""
    if grammar.trigger != "":
        lazy = "[lazy]" if isinstance(grammar.trigger, str) else ""
        lines.append(f"head{lazy}: TEXT {_literal(grammar.trigger)}")
        head = "head "
    firsts, laters = [], []
    for number, tool in enumerate(grammar.tools):
        lines += _arguments(f"arguments{number}", tool, has_tags=grammar.has_tags)
        rest = f"arguments{number} {_literals(grammar.ending)}"
        firsts.append(f"{_literals(tool.first)} {rest}")
        laters.append(f"{_literals(tool.later)} {rest}")
    more = "" if grammar.is_one else f" ({' | '.join(laters)})*"
    calls = f"{head}({' | '.join(firsts)}){more} {_literals(grammar.closing)}"
    lines.append(f"{rule}: {content} | {calls}" if content else f"{rule}: {calls}")
    return "\n".join(lines)


def _arguments(rule: str, tool: CallableTool, *, has_tags: bool) -> Iterator[str]:
    if has_tags:
        yield from _tags(rule, tool)
    else:
        yield f"{rule}: {json_in_lark({'type': 'object', **tool.schema})}"


def _tags(rule: str, tool: CallableTool) -> Iterator[str]:
    """Yield the rules of arguments in tags, in the order of the schema: strings as they are, all else as JSON."""
    schema = tool.schema
    odd = schema.keys() - {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    if odd:
        raise _unheld(", ".join(sorted(odd)), f"the parameters of {tool.name}")
    parts = []
    for number, (name, given) in enumerate(schema.get("properties", {}).items()):
        value, begin, end = f"{rule}_{number}", _literal(f"<parameter={name}>\n"), _literal("\n</parameter>\n")
        if parameter_kind(schema, name) != "string":
            yield f"{value}: {begin} {json_in_lark({**_definitions(schema), **given})} {end}"
        elif texts := [each for each in given.get("enum", ()) if isinstance(each, str)]:
            yield f"{value}: {begin} ({' | '.join(map(_literal, texts))}) {end}"
        elif held := {"const", "pattern", "format", "minLength", "maxLength"} & given.keys():
            raise _unheld(min(held), f"parameter {name} of {tool.name}")
        else:
            yield f"{value}: {begin} {value}_text"
            yield f"{value}_text[suffix={end}]: /(.|\\n)*/"
        parts.append(value if name in schema.get("required", ()) else f"{value}?")
    yield f"{rule}: {' '.join(parts)}" if parts else f'{rule}: ""'


def _unheld(keyword: str, where: str) -> BadRequest:
    return BadRequest(f"the JSON schema uses {keyword} in {where}, which this model's calls cannot be held to")


def parameter_kind(schema: dict[str, Any], name: str) -> str:
    """Return the JSON type of a parameter in tags; "string" if the schema does not say."""
    properties = schema.get("properties")
    entry = properties.get(name) if isinstance(properties, dict) else None
    if isinstance(entry, dict) and isinstance(entry.get("$ref"), str):
        _, _, defined = entry["$ref"].rpartition("/")
        entry = _definitions(schema, flat=True).get(defined)
    if not isinstance(entry, dict):
        return "string"
    kind = entry.get("type")
    if kind is None:
        found = [each.get("type") for each in entry.get("anyOf") or entry.get("oneOf") or () if isinstance(each, dict)]
    else:
        found = list(kind) if isinstance(kind, list) else [kind]
    kinds = [each for each in found if isinstance(each, str) and each != "null"]
    return "string" if not kinds or "string" in kinds else kinds[0]


def _definitions(schema: dict[str, Any], *, flat: bool = False) -> dict[str, Any]:
    found = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema.get(key), dict)}
    return {name: each for defined in found.values() for name, each in defined.items()} if flat else found


def json_in_lark(schema: Any) -> str:
    """Return what stands for JSON that `schema` holds, in the notation of llguidance."""
    if schema is True:
        schema = {}
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS}, ensure_ascii=False)}"


def _literals(pieces: list[Piece]) -> str:
    return " ".join(_literal(piece) for piece in pieces if piece != "")


def _literal(piece: Piece) -> str:
    return f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece, ensure_ascii=False)
