"""The turns of a chat as clients send them, and as messages of ours. Content is text; images and such are refused."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta, Struct

from kvasir.gateway.edges.cache_intent import CacheControl
from kvasir.protocol.client_messages import ChatMessage, ToolCall
from kvasir.protocol.errors import BadRequest


class Part(Struct):
    """One part of a message's content; only text is understood. The last two mark what is to be cached up to here."""

    type: str
    text: str = ""
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: Any = None


class Function(Struct):
    """What a call in an assistant's message calls. `arguments`: JSON, which some clients send as an object."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = ""


class Call(Struct):
    function: Function
    id: str = ""


class Turn(Struct, forbid_unknown_fields=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Meta(max_length=256)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class NamedFunction(Struct):
    name: str


class NamedTool(Struct):
    """`tool_choice` of one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


def message_of(turn: Turn, index: int) -> ChatMessage:
    """Return turn number `index` as a message.

    Raises:
        BadRequest: it has no content and no calls, or content that is no text.
    """
    role = "system" if turn.role == "developer" else turn.role
    content = turn.content if isinstance(turn.content, str) else _content(turn, f"messages[{index}]")
    if not (turn.name or turn.tool_calls or turn.tool_call_id or turn.reasoning or turn.reasoning_content):
        return ChatMessage(role, content)
    calls = [ToolCall(call.id[:256], call.function.name, _arguments(call.function)) for call in turn.tool_calls or ()]
    reasoning = turn.reasoning_content or turn.reasoning or ""
    return ChatMessage(role, content, (turn.name or "")[:256], reasoning, calls, (turn.tool_call_id or "")[:256])


class _Typed(Protocol):
    type: str
    text: str


def text_of(content: str | Sequence[_Typed], where: str, param: str = "", kinds: Container[str] = ("text",)) -> str:
    """Return content that is a text, or parts of `kinds`, as one text. `param`: the field to name, if not `where`.

    Raises:
        BadRequest: a part is of another kind.
    """
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in kinds:
            what = f"content of type {part.type[:40]!r} is not supported; send text"
            raise BadRequest(f"{where}: {what}", param=param or where)
    return "".join([part.text for part in content])


def _content(turn: Turn, where: str) -> str | None:
    """Return the content of parts; none is right only beside calls of tools."""
    if not turn.content:
        if turn.role == "tool" and turn.content is not None:
            return ""
        if turn.tool_calls:
            return None
        if turn.reasoning or turn.reasoning_content:
            return ""
        raise BadRequest(f"{where} has no content; send a text or leave the message out", param=f"{where}.content")
    return text_of(turn.content, where, f"{where}.content")


def _arguments(function: Function) -> str:
    if isinstance(function.arguments, str):
        return function.arguments
    return msgspec.json.encode(function.arguments).decode()
