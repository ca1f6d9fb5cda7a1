"""A model's chat template: a conversation to text, as the `transformers` library renders it.

Templates are foreign code: they run in Jinja's immutable sandbox, and what they raise is their way to refuse.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import msgspec

from kvasir.gateway.text.json_input import read_json
from kvasir.gateway.text.tool_schemas import read_tools
from kvasir.protocol.client_messages import PLAIN_CHAT, ChatMessage, ChatOptions, ToolCall
from kvasir.protocol.errors import BadRequest

_OURS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark; a template that trims takes the space away


class ChatTemplate:
    """One model's template, compiled. Immutable; `render` may be called from any thread."""

    def __init__(self, source: str, tokens: dict[str, str], tool_source: str | None = None) -> None:
        """`tokens`: special tokens that the template may name (`bos_token`, ...). `tool_source`: of another template,
        for requests with tools.

        Raises:
            jinja2.TemplateError: the template cannot be compiled.
        """
        self.source = tool_source or source
        self._tokens = tokens
        self._compiled, self._variables = _compile(source)
        self._with_tools, variables = (
            (self._compiled, self._variables) if tool_source is None else _compile(tool_source)
        )
        self._knows_tools = "tools" in variables

    def knows(self, variable: str) -> bool:
        """Return whether the template reads `variable`."""
        return variable in self._variables

    def render(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN_CHAT) -> str:
        """Return the text of a conversation, by default with the cue for the assistant's answer.

        Raises:
            BadRequest: no messages, something that the template does not know, or the template refuses the conversation
                (with its own words).
        """
        if not messages:
            raise BadRequest("messages is empty; send at least one message", param="messages")
        turns = [_turn(message) for message in messages]
        if options.offers_tools and not self._knows_tools:
            raise BadRequest("the model's chat template knows no tools; leave them out", param="tools")
        documents = self._documents(options)
        more = self._more_variables(options)
        if not options.continue_final_message:
            return self._render(turns, documents, options, more)
        if options.add_generation_prompt:
            raise BadRequest(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
        return self._render_open_ended(turns, documents, options, more)

    def _render(self, turns: list[dict[str, Any]], documents: Any, options: ChatOptions, more: dict[str, Any]) -> str:
        tools = read_tools(options.tools) or None if options.offers_tools else None
        template = self._compiled if tools is None else self._with_tools
        try:
            return template.render(
                messages=turns,
                add_generation_prompt=options.add_generation_prompt,
                tools=tools,
                documents=documents,
                **self._tokens,
                **more,
            )
        except Exception as error:  # foreign code: whatever it raises is its way to refuse
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None

    def _render_open_ended(
        self, turns: list[dict[str, Any]], documents: Any, options: ChatOptions, more: dict[str, Any]
    ) -> str:
        """Render up to the end of the last message's content."""
        content = turns[-1]["content"]
        if not content:
            raise BadRequest("the last message has no content to continue", param="continue_final_message")
        turns[-1]["content"] = content + _OPEN_END
        text = self._render(turns, documents, options, more)
        end = text.rfind(_OPEN_END.strip())
        if end < 0 or content.strip() not in text:
            raise BadRequest(
                "the model's chat template changes the last message: it cannot be continued",
                param="continue_final_message",
            )
        return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()

    def _documents(self, options: ChatOptions) -> Any:
        if not options.documents:
            return None
        if not self.knows("documents"):
            raise BadRequest(
                "the model's chat template knows no documents; write them into a message", param="documents"
            )
        return read_json(options.documents, list[dict[str, Any]], "documents")

    def _more_variables(self, options: ChatOptions) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if options.variables:
            found = read_json(options.variables, dict[str, Any], "chat_template_kwargs")
        for name in found:
            if name in _OURS or name in self._tokens or not self.knows(name):
                known = ", ".join(sorted(self._variables - _OURS - self._tokens.keys())) or "none"
                raise BadRequest(
                    f"the model's chat template has no variable {name[:80]!r} to set; it has: {known}",
                    param="chat_template_kwargs",
                )
        effort = options.reasoning_effort
        if effort and self.knows("reasoning_effort"):
            return {"reasoning_effort": effort, **found}
        if effort and self.knows("enable_thinking"):
            return {"enable_thinking": effort != "none", **found}
        if effort and not options.is_lenient:
            raise BadRequest(
                "the model's chat template knows no reasoning_effort; leave it out", param="reasoning_effort"
            )
        return found


def _turn(message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.reasoning:
        turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning, "reasoning": message.reasoning}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    """Return a call as templates expect it: with arguments as an object, if they are one."""
    arguments: Any = call.arguments
    try:
        arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):  # what the model wrote is no JSON
        pass
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _compile(source: str) -> tuple[jinja2.Template, set[str]]:
    """Return a template, and the variables that it reads."""
    environment = _make_environment()
    variables = jinja2.meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)
    compiled = environment.from_string(source)
    compiled.globals = dict(compiled.globals)  # a ChainMap, which every rendering would walk
    return compiled, variables


def _make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return what the `transformers` library compiles in, so that a template renders the same here."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["dict"] = _make_dict
    environment.globals["namespace"] = _SafeNamespace
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        return [jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)]


class _SafeNamespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without names that could lead out of the sandbox (as in `transformers`)."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
