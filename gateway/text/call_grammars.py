"""Holds calls of tools to their schemas: a request's tools as the grammar of its answer, as its model writes calls.

A call is held if its tool is `strict`; where calls are forced, or beside structured content, also if it does not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from kvasir.gateway.text.json_input import read_json
from kvasir.gateway.text.tool_calls import CallStyle, ToolParser
from kvasir.protocol.call_grammar import CallableTool, CallGrammar, Piece
from kvasir.protocol.client_messages import ChatOptions
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import MAX_GRAMMAR_CHARS, Grammar

_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}  # keywords whose values are schemas by name
_DATA = {"const", "enum"}
_NOTES = {"title", "description", "default", "examples", "$comment"}  # hold an answer to nothing


def is_strict(tools: list[dict[str, Any]]) -> bool:
    """Return whether some calls have to be held to their schemas."""
    return any(tool["function"].get("strict") for tool in tools)


def call_grammar(
    parser: type[ToolParser],
    tools: list[dict[str, Any]],
    options: ChatOptions,
    content: Grammar | None,
    special_ids: Mapping[str, int],
) -> Grammar | None:
    """Return the grammar of an answer that may call `tools`; None: it is free. `content`: of one that calls none.

    `special_ids`: those of the parser's marks that are special tokens.

    Raises:
        BadRequest: `content` is no JSON schema, or does not go with calls of this model's; or all is too large.
    """
    is_forced = options.tool_choice == "required"
    strictness = [tool["function"].get("strict") for tool in tools]
    if not (content or any(strictness) or (is_forced and None in strictness)):
        return None
    functions = [tool["function"] for tool in tools if options.tool_name in ("", tool["function"]["name"])]
    if not functions:
        return None  # rendering says so
    style = parser.style
    if content and not is_forced and not style.trigger:
        raise BadRequest("this model's calls cannot be told from content that is JSON; leave tools out", param="tools")
    in_prompt = parser.opening(options.tool_name) if is_forced else "" if content else style.trigger
    made = CallGrammar(
        [
            CallableTool(
                function["name"],
                _pieces(parser.opening(function["name"]).removeprefix(in_prompt), special_ids),
                _pieces(style.joint + parser.opening(function["name"]).removeprefix(style.opened), special_ids),
                _schema(function, style, is_held=function.get("strict", is_forced or content is not None)),
            )
            for function in functions
        ],
        _pieces(style.ending, special_ids),
        _pieces(style.closing, special_ids),
        is_one=not options.parallel_tool_calls or bool(options.tool_name),
        text="" if is_forced or content else style.text,
        trigger="" if is_forced or content else _pieces(style.trigger, special_ids)[0],
        content=None if is_forced or content is None else _content(content),
        has_tags=style.has_tags,
    )
    text = msgspec.json.encode(made).decode()
    if len(text) > MAX_GRAMMAR_CHARS:
        raise BadRequest(
            f"the tools' schemas have {len(text)} characters, calls can be held to {MAX_GRAMMAR_CHARS}; "
            "send fewer, or say strict: false",
            param="tools",
        )
    return Grammar("calls", text)


def _schema(function: dict[str, Any], style: CallStyle, *, is_held: bool | None) -> dict[str, Any]:
    schema: dict[str, Any] = function.get("parameters") or {}
    if is_held:
        try:
            bare: dict[str, Any] = _bare(schema)
        except RecursionError:
            raise BadRequest("tools are nested too deeply", param="tools") from None
        return bare
    return {"properties": {name: {} for name in schema.get("properties", {})}} if style.has_tags else {}


def _bare(schema: Any) -> Any:
    """Return `schema` without what only tells the model something, which may be long."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            found[keyword] = {name: _bare(each) for name, each in value.items()}
        elif keyword not in _NOTES:
            found[keyword] = value if keyword in _DATA else _bare(value)
    return found


def _content(content: Grammar) -> dict[str, Any]:
    if content.kind != "json_schema":
        raise BadRequest("beside tools, content can be held to a JSON schema only; leave tools out", param="tools")
    schema = read_json(content.text, Any, "grammar")
    return schema if isinstance(schema, dict) else {}


def _pieces(text: str, special_ids: Mapping[str, int]) -> list[Piece]:
    """Return `text` with its special tokens as such."""
    if not special_ids:
        return [text]
    marks = "|".join(map(re.escape, special_ids))
    return [special_ids.get(part, part) for part in re.split(f"({marks})", text) if part] or [""]
