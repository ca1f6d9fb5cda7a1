"""The body of `/v1/responses`, and the chat that it asks for. Nothing is stored: each request brings all its items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.gateway.edges.cache_intent import PromptCacheOptions, Retention, hint_of
from kvasir.gateway.edges.chat_turns import Call, Function, NamedFunction, NamedTool, Turn, text_of
from kvasir.gateway.edges.field_check import FieldCheck, decode_body
from kvasir.gateway.edges.grammar_fields import read_text_options
from kvasir.gateway.edges.openai_bodies import MAX_TURNS, ChatBody, CommonBody, NumTokens
from kvasir.gateway.edges.openai_requests import Asked, asked_of_chat
from kvasir.gateway.text.json_input import read_json
from kvasir.protocol.errors import BadRequest


class InputPart(Struct):
    """One part of a message, of a call's output, or of reasoning."""

    type: str
    text: str = ""
    prompt_cache_breakpoint: Any = None


class InputItem(Struct):
    """One item of the input; which fields count is up to `type`."""

    type: str = "message"
    role: str = ""
    content: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[InputPart] = ""


class ReasoningOptions(Struct):
    effort: str | None = None


class ChosenTool(Struct):
    name: str
    type: Literal["function"] = "function"


class ResponsesBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    input: str | Annotated[list[InputItem], Meta(max_length=MAX_TURNS)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Raw = Raw()
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: Raw = Raw()
    max_reasoning_tokens: NumTokens | None = None
    enable_thinking: bool | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Retention | None = None
    text: Raw = Raw()


def read_responses(raw: bytes) -> Asked:
    """Read the body of a request for a response. Takes long for a large one: call it in a thread then.

    Raises:
        BadRequest: no valid JSON, out of range, unknown or not supported; `param` names the field.
    """
    body: ResponsesBody = decode_body(_CHECK, _decoder, raw)
    turns = turns_of(body.input)
    if body.instructions:
        turns.insert(0, Turn("system", body.instructions))
    choice = body.tool_choice
    tools = _tools(body.tools)
    chat = ChatBody(
        messages=turns,
        max_completion_tokens=body.max_output_tokens,
        tools=Raw(msgspec.json.encode([{"type": "function", "function": tool} for tool in tools])) if tools else Raw(),
        tool_choice=NamedTool(NamedFunction(choice.name)) if isinstance(choice, ChosenTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
        max_reasoning_tokens=body.max_reasoning_tokens,
        enable_thinking=body.enable_thinking,
        **body.common(),
    )
    shown: dict[str, Any] = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": {"type": "function", "name": choice.name}
        if isinstance(choice, ChosenTool)
        else choice or "auto",
        "tools": [{"type": "function", "strict": False, **tool} for tool in tools],
    }
    hint = hint_of(body.prompt_cache_options, body.prompt_cache_retention, has_breakpoint=_has_breakpoint(body.input))
    structured = read_text_options(body.text)
    if structured is not None:
        shown["text"] = msgspec.json.decode(body.text)
    asked = asked_of_chat(chat, hint, structured, is_lenient=True)
    asked.names.update(_NAMES)
    options = body.prompt_cache_options
    previous = None if options is None else options.comparison_response_id or None
    return msgspec.structs.replace(asked, shown=shown, previous=previous)


def turns_of(given: str | Sequence[InputItem]) -> list[Turn]:
    """Return the input as turns of a chat: neighbouring items of the assistant are one turn.

    Raises:
        BadRequest: an item of a type that cannot be read here; says which.
    """
    if isinstance(given, str):
        return [Turn("user", given)]
    turns: list[Turn] = []
    open_turn: Turn | None = None  # the assistant's last one, which may grow
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if item.type == "reasoning":
            if open_turn is None or open_turn.content or open_turn.tool_calls:
                open_turn = Turn("assistant")
                turns.append(open_turn)
            open_turn.reasoning = text_of(item.content or item.summary or "", where, kinds=_TEXT_KINDS)
        elif item.type == "message" and item.role == "assistant":
            if open_turn is None or open_turn.content or open_turn.tool_calls:
                open_turn = Turn("assistant")
                turns.append(open_turn)
            open_turn.content = text_of(item.content or "", where, kinds=_TEXT_KINDS)
        elif item.type == "function_call":
            if open_turn is None:
                open_turn = Turn("assistant")
                turns.append(open_turn)
            call = Call(Function(item.name, item.arguments), item.call_id)
            open_turn.tool_calls = [*(open_turn.tool_calls or ()), call]
        else:
            open_turn = None
            turns.append(_other_turn(item, where))
    return turns


_CHECK = FieldCheck("responses")
_TEXT_KINDS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
_NAMES = {"max_tokens": "max_output_tokens", "messages": "input"}
RESPONSES_TYPE: type = _CHECK.with_harmless(ResponsesBody)
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(RESPONSES_TYPE)


def _has_breakpoint(given: str | Sequence[InputItem]) -> bool:
    if isinstance(given, str):
        return False
    lists = [item.content for item in given if item.content is not None and not isinstance(item.content, str)]
    return any(part.prompt_cache_breakpoint is not None for parts in lists for part in parts)


def _other_turn(item: InputItem, where: str) -> Turn:
    if item.type == "message":
        if not item.role:
            raise BadRequest(f"{where} has no role", param=f"{where}.role")
        return Turn(item.role, text_of(item.content or "", where, kinds=_TEXT_KINDS))
    if item.type == "function_call_output":
        return Turn("tool", text_of(item.output, where, kinds=_TEXT_KINDS) or [], tool_call_id=item.call_id)
    raise BadRequest(
        f"{where} is of type {item.type[:40]!r}; messages, reasoning, function calls and their outputs are read here",
        param=where,
    )


def _tools(raw: Raw) -> list[dict[str, Any]]:
    """Return the functions among the tools; other kinds are refused."""
    if not raw or bytes(raw) == b"null":
        return []
    tools: list[dict[str, Any]] = read_json(raw, list[dict[str, Any]], "tools")
    for index, tool in enumerate(tools):
        if tool.pop("type", None) != "function":
            raise BadRequest(f"tools[{index}] is no function; only functions can be called", param=f"tools[{index}]")
    return tools
