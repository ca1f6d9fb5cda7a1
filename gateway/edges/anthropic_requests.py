"""The bodies of `/v1/messages` and `/v1/messages/count_tokens`, as Anthropic has them, and the chats they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.gateway.edges.cache_intent import CacheControl, hint_of
from kvasir.gateway.edges.chat_turns import Call, Function, NamedFunction, NamedTool, Turn, text_of
from kvasir.gateway.edges.field_check import FieldCheck, decode_body
from kvasir.gateway.edges.grammar_fields import AskedGrammar, from_json_schema
from kvasir.gateway.edges.openai_bodies import MAX_TURNS, ChatBody, CommonBody, NumTokens, StopStrings
from kvasir.gateway.edges.openai_requests import Asked, asked_of_chat
from kvasir.protocol.errors import BadRequest


class TextBlock(Struct):
    """A block of a system prompt or of a tool's result."""

    type: str
    text: str = ""
    cache_control: CacheControl | None = None


class Block(Struct):
    """One block of a message; which fields count is up to `type`."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None


class Message(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Struct):
    """A function of the client's own; `type` of others, which run on a server, is refused."""

    name: str
    input_schema: dict[str, Any] = {}
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NumTokens | None = None


class OutputFormat(Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Raw


class OutputConfig(Struct, forbid_unknown_fields=True):
    effort: str | None = None
    format: OutputFormat | None = None


class Diagnostics(Struct, forbid_unknown_fields=True):
    previous_message_id: str | None = None


class MessagesBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(max_length=MAX_TURNS)]
    max_tokens: int | None = None
    system: str | list[TextBlock] | None = None
    stop_sequences: StopStrings | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    diagnostics: Diagnostics | None = None


def read_messages(raw: bytes) -> Asked:
    """Read the body of a request for a message. Takes long for a large one: call it in a thread then.

    Raises:
        BadRequest: no valid JSON, out of range, unknown or not supported; `param` names the field.
    """
    body: MessagesBody = decode_body(_CHECK, _decoder, raw)
    if body.max_tokens is None:
        raise BadRequest("max_tokens is required", param="max_tokens")
    return _asked(body)


def read_count(raw: bytes) -> Asked:
    """Read the body of a request to count the tokens of a prompt, as `read_messages` does."""
    return _asked(decode_body(_CHECK, _decoder, raw))


def _asked(body: MessagesBody) -> Asked:
    choice = body.tool_choice or ToolChoice("auto")
    if choice.type == "tool" and not choice.name:
        raise BadRequest("tool_choice.name is missing: name the tool to call", param="tool_choice.name")
    output = body.output_config or OutputConfig()
    thinking = body.thinking
    turns = _turns(body)
    last = turns[-1] if turns else Turn("")
    chat = ChatBody(
        messages=turns,
        continue_final_message=last.role == "assistant" and bool(last.content) and not last.tool_calls,
        max_completion_tokens=body.max_tokens,
        tools=_tools(body.tools or ()),
        tool_choice=NamedTool(NamedFunction(choice.name)) if choice.type == "tool" else _CHOICES[choice.type],
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        reasoning_effort="none" if thinking is not None and thinking.type == "disabled" else output.effort,
        max_reasoning_tokens=None if thinking is None else thinking.budget_tokens,
        stop=body.stop_sequences,
        **body.common(),
    )
    structured = None
    if output.format is not None:
        grammar = from_json_schema(output.format.schema, "output_config.format.schema")
        structured = AskedGrammar(grammar, "output_config.format")
    hint = hint_of(None, None, has_breakpoint=_has_breakpoint(body))
    asked = asked_of_chat(chat, hint, structured, is_lenient=True)
    asked.names["continue_final_message"] = "messages"
    if body.diagnostics is None:
        return asked
    return msgspec.structs.replace(asked, previous=body.diagnostics.previous_message_id or "")


_CHOICES: dict[str, Any] = {"auto": None, "any": "required", "none": "none"}
_CHECK = FieldCheck("anthropic")
MESSAGES_TYPE: type = _CHECK.with_harmless(MessagesBody)
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(MESSAGES_TYPE)


def _has_breakpoint(body: MessagesBody) -> bool:
    blocks: list[TextBlock | Block | Tool] = [*(body.tools or ())]
    if body.system is not None and not isinstance(body.system, str):
        blocks += body.system
    for message in body.messages:
        if not isinstance(message.content, str):
            blocks += message.content
    return body.cache_control is not None or any(block.cache_control is not None for block in blocks)


def _turns(body: MessagesBody) -> list[Turn]:
    system = text_of(body.system or "", "system")
    turns = [Turn("system", system)] if system else []
    for index, message in enumerate(body.messages):
        if isinstance(message.content, str):
            turns.append(Turn(message.role, message.content))
        elif not message.content:
            where = f"messages[{index}].content"
            raise BadRequest(f"{where} is empty; send a text or leave the message out", param=where)
        else:
            turns += _turns_of(message.role, message.content, f"messages[{index}].content")
    return turns


def _turns_of(role: str, blocks: Sequence[Block], where: str) -> list[Turn]:
    """Return the turns in one message: results of tools come before what the user says."""
    results: list[Turn] = []
    turn = Turn(role)
    texts: list[str] = []
    for index, block in enumerate(blocks):
        match block.type:
            case "text":
                texts.append(block.text)
            case "thinking":
                turn.reasoning = (turn.reasoning or "") + block.thinking
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = msgspec.json.encode(block.input).decode()
                turn.tool_calls = [*(turn.tool_calls or ()), Call(Function(block.name, arguments), block.id)]
            case "tool_result":
                result = text_of(block.content or "", where)
                results.append(Turn("tool", result or [], tool_call_id=block.tool_use_id))
            case _:
                raise BadRequest(
                    f"{where}[{index}] is of type {block.type[:40]!r}; only text, thinking and tools are read here",
                    param=f"{where}[{index}]",
                )
    turn.content = "".join(texts) or None
    return [*results, turn] if texts or turn.tool_calls or not results else results


def _tools(tools: Sequence[Tool]) -> Raw:
    found = []
    for index, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            raise BadRequest(
                f"tools[{index}] is of type {tool.type[:40]!r}; only the client's own tools can be called",
                param=f"tools[{index}]",
            )
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema
        if tool.strict is not None:
            function["strict"] = tool.strict
        found.append({"type": "function", "function": function})
    return Raw(msgspec.json.encode(found)) if found else Raw()
