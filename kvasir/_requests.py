"""What the SDK's requests say: options and messages as people give them, as messages of the wire."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from kvasir.protocol.client_messages import (
    MAX_CLIENT_FRAME_BYTES,
    PLAIN_CHAT,
    ChatMessage,
    ChatOptions,
    CompletionRequest,
    ToolCall,
)
from kvasir.protocol.codec import Message, encode
from kvasir.protocol.errors import BadRequest, TooLarge
from kvasir.protocol.sampling import CacheHint, Grammar, Priority, RetentionHint, SamplingOptions
from kvasir.protocol.tokens import pack_tokens

Messages = Sequence[Mapping[str, Any] | ChatMessage]


class Options(TypedDict, total=False):
    """How to generate; every key is optional.

    `model`: needed only where several are served. `max_tokens`: default up to the model's window. `temperature` 0
    is greedy; sampling that is left out is the model's own default. `top_k` 0, `top_p` 1, `min_p` 0 are off.
    `seed`: equal seeds draw equal tokens, default a new one per request. `n` answers to one prompt are drawn by seeds
    of their own. `logprobs` n: the drawn token's and the n best. `stop`: strings that end the answer and are not part
    of it, unless `include_stop`. `min_tokens`, `allowed_token_ids` and `bad_words` bound what is drawn.
    `want_text`/`want_tokens` (both True): what comes back; without text the gateway does not detokenise.
    `deadline_s`: the gateway ends the request with `DeadlineExceeded` after this long. `timeout_s`: how long to wait
    for the next sign of life of this request, default the client's. `cache_hint`, `retention`: what to keep in the KV
    cache; `cache_salt`: share it only with requests of the same salt. `priority`: "low", "normal" or "high".
    `no_store`: nothing of it stays in the KV cache.

    The answer matches `response_format` as OpenAI's chat completions have it (`json_object` or `json_schema`), or the
    regular expression `regex`, or is one of the texts in `choice`.

    For chats: `tools` as OpenAI's chat completions have them; `tool_choice` "auto", "none", "required" or the name of a
    tool; `variables` of the chat template; `documents` for it; `reasoning_effort`, `max_reasoning_tokens`.
    """

    model: str | None
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    seed: int | None
    n: int
    logprobs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    skip_special_tokens: bool
    truncate_prompt_tokens: int | None
    want_text: bool
    want_tokens: bool
    deadline_s: float | None
    cache_hint: CacheHint | None
    retention: Sequence[RetentionHint]
    cache_salt: str
    priority: Priority
    no_store: bool
    response_format: Mapping[str, Any]
    regex: str
    choice: Sequence[str]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    variables: Mapping[str, Any]
    documents: Sequence[Mapping[str, Any]]
    reasoning_effort: str
    max_reasoning_tokens: int | None
    include_reasoning: bool
    continue_final_message: bool
    timeout_s: float


_SAMPLING = tuple(name for name in SamplingOptions.__struct_fields__ if name not in ("seed", "logit_bias"))
_PASSED_ON = (
    "ignore_eos",
    "include_stop",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "cache_salt",
    "priority",
    "no_store",
)
_OF_CHATS = ("parallel_tool_calls", "include_reasoning", "max_reasoning_tokens", "reasoning_effort")
_CHATS_ALONE = {*_OF_CHATS, "tools", "tool_choice", "documents", "variables", "continue_final_message"}


def make_request(
    call_id: int,
    api_key: str,
    prompt: str | Sequence[int] | None,
    messages: Messages | None,
    options: Options,
) -> CompletionRequest:
    """Return the request for `prompt` (text or token ids) or for `messages`.

    Raises:
        BadRequest: an argument that cannot be sent; whatever only the gateway can judge is left to it.
        TypeError: an unknown option.
    """
    unknown = set(options) - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; there are {', '.join(Options.__annotations__)}")
    odd = _CHATS_ALONE & options.keys() if messages is None else ()
    if odd:
        raise BadRequest(f"{min(odd)} is for chats, and this is a plain prompt; use chat()", param=min(odd))
    seed = options.get("seed")
    stop = options.get("stop", ())
    sampling = {name: options[name] for name in _SAMPLING if name in options}  # type: ignore[literal-required]
    return CompletionRequest(
        id=call_id,
        api_key=api_key,
        model=options.get("model") or "",
        text=prompt if isinstance(prompt, str) else None,
        messages=None if messages is None else [_chat_message(message) for message in messages],
        token_ids=None if prompt is None or isinstance(prompt, str) else _pack(prompt),
        max_tokens=options.get("max_tokens"),
        sampling=SamplingOptions(
            seed=secrets.randbits(63) if seed is None else seed,
            logit_bias=dict(options.get("logit_bias") or {}),
            **sampling,
        ),
        stop=[stop] if isinstance(stop, str) else list(stop),
        stop_token_ids=list(options.get("stop_token_ids", ())),
        want_text=options.get("want_text", True),
        want_tokens=options.get("want_tokens", True),
        deadline_s=options.get("deadline_s"),
        cache_hint=options.get("cache_hint"),
        retention=list(options.get("retention", ())),
        chat=PLAIN_CHAT if messages is None else _chat_options(options),
        grammar=_grammar(options),
        **{name: options[name] for name in _PASSED_ON if name in options},  # type: ignore[literal-required]
    )


def _grammar(options: Options) -> Grammar | None:
    """Return what the answer has to match.

    Raises:
        BadRequest: two options say it, or a `response_format` that is none.
    """
    found: list[Grammar] = []
    given = options.get("response_format") or {"type": "text"}
    match given:
        case {"type": "text"}:
            pass
        case {"type": "json_object"}:
            found.append(Grammar("json_schema", '{"type":"object"}'))
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            found.append(Grammar("json_schema", _encode_json("response_format", schema).decode()))
        case _:
            raise BadRequest(f"response_format is as OpenAI has it, not {given!r:.80}", param="response_format")
    if "regex" in options:
        found.append(Grammar("regex", options["regex"]))
    if "choice" in options:
        found.append(Grammar("choice", _encode_json("choice", list(options["choice"])).decode()))
    if len(found) > 1:
        raise BadRequest("give one of response_format, regex and choice", param="response_format")
    return found[0] if found else None


def _chat_options(options: Options) -> ChatOptions:
    given: dict[str, Any] = {name: options[name] for name in _OF_CHATS if name in options}  # type: ignore[literal-required]
    for name in ("tools", "documents", "variables"):
        if value := options.get(name):
            given[name] = _encode_json(name, value)
    choice = options.get("tool_choice", "auto")
    if choice in ("none", "required"):
        given["tool_choice"] = choice
    elif choice != "auto":
        given |= {"tool_choice": "required", "tool_name": choice}
    if options.get("continue_final_message"):
        given |= {"continue_final_message": True, "add_generation_prompt": False}
    return ChatOptions(**given)


def _encode_json(name: str, value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"{name} cannot be sent as JSON: {error}", param=name) from None


def encode_request(message: Message) -> bytes:
    """Return `message` as a frame.

    Raises:
        BadRequest: something in it cannot be encoded at all.
        TooLarge: the gateway would cut the connection rather than read it.
    """
    try:
        frame = encode(message)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise BadRequest(f"the request cannot be sent: {error}") from None
    if len(frame) > MAX_CLIENT_FRAME_BYTES:
        raise TooLarge(
            f"the request has {len(frame)} bytes, {MAX_CLIENT_FRAME_BYTES} are allowed; send a shorter prompt"
        )
    return frame


def _chat_message(message: Mapping[str, Any] | ChatMessage) -> ChatMessage:
    """Return a message, which may be as OpenAI's chat completions have it.

    Raises:
        BadRequest: it has no role or content, or something that is not known.
    """
    if isinstance(message, ChatMessage):
        return message
    try:
        fields = dict(message)
        role, content = fields.pop("role"), fields.pop("content")
        calls = [
            ToolCall(call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
            for call in fields.pop("tool_calls", None) or ()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRequest(f"a message is {{'role': …, 'content': …}}, not {message!r:.80}", param="messages") from None
    reasoning = fields.pop("reasoning_content", None) or fields.pop("reasoning", None) or ""
    name, tool_call_id = fields.pop("name", None) or "", fields.pop("tool_call_id", None) or ""
    fields.pop("reasoning", None)
    if fields:
        raise BadRequest(f"a message has no {', '.join(fields)}", param="messages")
    return ChatMessage(role, content, name, reasoning, calls, tool_call_id)


def _pack(token_ids: Sequence[int]) -> bytes:
    try:
        if isinstance(token_ids, bytes | bytearray):
            raise TypeError("bytes are neither")
        return pack_tokens(token_ids)
    except (OverflowError, TypeError) as error:
        raise BadRequest(f"a prompt is text or a list of token ids: {error}", param="prompt") from None
