"""The bodies of the OpenAI-compatible routes, and what each asks for in our own words.

Fields that do not change the answer (`user`, `metadata`, `store`, ...) are ignored, as clients send many; fields that
would change it and are not supported are refused by name.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from kvasir.protocol.client_messages import ChatMessage, CompletionRequest
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import CacheHint, RetentionHint, Sampling
from kvasir.protocol.tokens import pack_tokens

MAX_CHOICES = 8
MAX_PROMPTS = 16


class StreamOptions(Struct):
    include_usage: bool = False


class Part(Struct):
    """One part of a message's content; only text is understood."""

    type: str
    text: str = ""


class Turn(Struct):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    tool_calls: Any = None  # understood only in order to be refused


class Body(Struct, kw_only=True):
    """What both routes share. `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `deadline_s`,
    `cache_hint` and `retention` are ours (most of them vLLM's names)."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    deadline_s: float | None = None
    cache_hint: CacheHint | None = None
    retention: Annotated[list[RetentionHint], Meta(max_length=16)] | None = None
    # Understood only in order to be refused.
    tools: Any = None
    functions: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None


class ChatBody(Body, kw_only=True):
    messages: Annotated[list[Turn], Meta(max_length=4096)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(Body, kw_only=True):
    prompt: str | list[str | int | list[int]]  # one text, several, token ids, or several times token ids
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


def chat_requests(body: ChatBody) -> list[CompletionRequest]:
    """Return one request per choice of a chat completion.

    Raises:
        BadRequest: something is out of range or not supported; `param` names it.
    """
    messages = [ChatMessage("system" if turn.role == "developer" else turn.role, _text(turn)) for turn in body.messages]
    num_logprobs = None
    if body.logprobs:
        num_logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _choices(body, num_logprobs, [{"messages": messages}], max_tokens)


def completion_requests(body: CompletionBody) -> list[CompletionRequest]:
    """Return one request per prompt and choice of a text completion, prompt by prompt.

    Raises:
        BadRequest: as `chat_requests`.
    """
    if body.echo:
        raise BadRequest("echo is not supported; put the prompt before the answer yourself", param="echo")
    if body.suffix:
        raise BadRequest("suffix is not supported; only the end of a text can be completed", param="suffix")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise BadRequest("best_of above n is not supported; ask for n and choose yourself", param="best_of")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this route
    return _choices(body, body.logprobs, _prompts(body.prompt), max_tokens)


def parse_body(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """Decode a request body.

    Raises:
        BadRequest: not UTF-8, not JSON, or a field of the wrong type, named by its path.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        raise BadRequest(f"{message}{f' ({param})' if param else ''}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is no valid JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _choices(
    body: Body, num_logprobs: int | None, prompts: list[dict[str, Any]], max_tokens: int | None
) -> list[CompletionRequest]:
    _refuse_unsupported(body)
    num_choices = 1 if body.n is None else body.n
    if not 1 <= num_choices <= MAX_CHOICES:
        raise BadRequest(f"n must be between 1 and {MAX_CHOICES}, not {num_choices}", param="n")
    sampling = _sampling(body, num_logprobs)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > 16 or not all(0 < len(each) <= 256 for each in stop):
        raise BadRequest("stop takes up to 16 strings of 1 to 256 characters", param="stop")
    stop_token_ids = body.stop_token_ids or []
    if len(stop_token_ids) > 256:
        raise BadRequest("stop_token_ids takes up to 256 ids", param="stop_token_ids")
    return [
        CompletionRequest(
            id=0,
            api_key="",
            model=body.model,
            max_tokens=max_tokens,
            # Choices of one request draw from seeds of their own, the first from the one that was given.
            sampling=sampling if choice == 0 else msgspec.structs.replace(sampling, seed=_mix(sampling.seed, choice)),
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(body.ignore_eos),
            deadline_s=body.deadline_s,
            cache_hint=body.cache_hint,
            retention=body.retention or [],
            **prompt,
        )
        for prompt in prompts
        for choice in range(num_choices)
    ]


def _sampling(body: Body, num_logprobs: int | None) -> Sampling:
    given: dict[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:  # vLLM's way to say off
        given["top_k"] = 0
    given["seed"] = secrets.randbits(62) if body.seed is None else body.seed & ((1 << 63) - 1)
    if body.logit_bias:
        given["logit_bias"] = body.logit_bias
    if num_logprobs is not None:
        given["logprobs"] = num_logprobs
    try:
        return msgspec.convert(given, Sampling, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        param = path.rstrip("`").removeprefix("$.").removeprefix("key in $.").split("[")[0] or None
        raise BadRequest(f"{param or 'sampling'}: {message}", param=param) from None


def _refuse_unsupported(body: Body) -> None:
    for name in ("tools", "functions", "modalities", "audio"):
        if getattr(body, name):
            raise BadRequest(f"{name} is not supported here; leave it out", param=name)
    form = body.response_format
    if form and not (isinstance(form, dict) and form.get("type") == "text"):
        raise BadRequest("response_format other than text is not supported here; leave it out", param="response_format")


def _prompts(prompt: str | list[Any]) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if not prompt:
        raise BadRequest("prompt is empty; send a string or token ids", param="prompt")
    kinds = {type(each) for each in prompt}
    if len(kinds) > 1:
        raise BadRequest("prompt mixes texts and token ids; send one kind", param="prompt")
    if kinds == {int}:
        return [{"token_ids": _pack(prompt)}]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest(f"up to {MAX_PROMPTS} prompts fit one request, not {len(prompt)}", param="prompt")
    return [{"text": each} if isinstance(each, str) else {"token_ids": _pack(each)} for each in prompt]


def _pack(token_ids: list[int]) -> bytes:
    try:
        return pack_tokens(token_ids)
    except (OverflowError, TypeError):
        raise BadRequest("prompt holds something that is no token id", param="prompt") from None


def _text(turn: Turn) -> str:
    if turn.tool_calls:
        raise BadRequest("tool_calls in messages are not supported here; send their text", param="messages")
    if isinstance(turn.content, str):
        return turn.content
    for part in turn.content or ():
        if part.type != "text":
            raise BadRequest(f"content of type {part.type!r} is not supported; send text", param="messages")
    return "".join(part.text for part in turn.content or ())


def _mix(seed: int, choice: int) -> int:
    return (seed + choice * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
