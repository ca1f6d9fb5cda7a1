"""What both clients share: what a request looks like, how its chunks become a completion, which errors come out.

The blocking and the async client differ only in how they wait (`_pump.Mailbox`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from kvasir._pump import CONNECT_TIMEOUT_S, Mailbox, Pump
from kvasir.paths import client_endpoint
from kvasir.protocol.client_messages import (
    MAX_CLIENT_FRAME_BYTES,
    ChatMessage,
    CompletionChunk,
    CompletionDone,
    CompletionRequest,
    ModelCard,
    ModelList,
    Usage,
)
from kvasir.protocol.codec import Message, encode
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, TooLarge, from_info
from kvasir.protocol.messages import CacheHint, RetentionHint, SamplingOptions, TokenLogprobs
from kvasir.protocol.tokens import pack_tokens, unpack_tokens

DEFAULT_TIMEOUT_S = 60.0
Messages = Sequence[Mapping[str, str] | ChatMessage]


class Options(TypedDict, total=False):
    """How to generate; every key is optional.

    `model`: needed only where several are served. `max_tokens`: default up to the model's window. `temperature` 0
    is greedy; sampling that is left out is the model's own default. `top_k` 0, `top_p` 1, `min_p` 0 are off.
    `seed`: equal seeds draw equal tokens, default a new one per request. `logprobs` n: the drawn token's and the n
    best. `stop`: strings that end the answer and are not part of it. `want_text`/`want_tokens` (both True): what
    comes back; without text the gateway does not detokenise. `deadline_s`: the gateway ends the request with
    `DeadlineExceeded` after this long. `timeout_s`: how long to wait for the next sign of life of this request,
    default the client's.
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
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    want_text: bool
    want_tokens: bool
    deadline_s: float | None
    cache_hint: CacheHint | None
    retention: Sequence[RetentionHint]
    timeout_s: float


_SAMPLING = tuple(name for name in SamplingOptions.__struct_fields__ if name not in ("seed", "logit_bias"))


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text and tokens of an answer, in order."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `finish_reason`: "stop", "length" or "abort". `ttft_s`: arrival at the gateway to first token.

    `request_id`: what `kvasir explain` takes.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    worker: str
    ttft_s: float
    request_id: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Assembly:
    """Turns the messages that answer one request into chunks and, at the end, the completion."""

    def __init__(self) -> None:
        self.completion: Completion | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, message: Message | Exception) -> Chunk | None:
        """Take the next message; return its chunk, or None when the answer is complete (`completion` is then set).

        Raises:
            KvasirError: the request failed, or the connection did.
        """
        if isinstance(message, Exception):
            raise message
        if isinstance(message, CompletionChunk):
            chunk = Chunk(message.text, unpack_tokens(message.token_ids), message.logprobs)
            self._text.append(chunk.text)
            self._token_ids += chunk.token_ids
            self._logprobs += chunk.logprobs
            return chunk
        assert isinstance(message, CompletionDone)
        if message.error is not None:
            raise from_info(message.error)
        self.completion = Completion(
            "".join(self._text),
            self._token_ids,
            message.finish_reason,
            message.usage,
            message.worker,
            message.ttft_s,
            message.request_id,
            self._logprobs,
        )
        return None


class BaseClient:
    """A connection, and whose requests go over it."""

    def __init__(
        self,
        endpoint: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._api_key = choose_api_key(api_key)
        self._timeout_s = timeout_s
        self._pump = Pump(endpoint or client_endpoint(), connect_timeout_s=connect_timeout_s)

    def _request(
        self, prompt: str | Sequence[int] | None, messages: Messages | None, options: Options
    ) -> tuple[Pump, int, bytes, float]:
        """Return what a stream is made of: connection, call id, frame and timeout."""
        call_id = self._pump.next_id()
        frame = encode_request(make_request(call_id, self._api_key, prompt, messages, options))
        return self._pump, call_id, frame, options.get("timeout_s", self._timeout_s)


class BaseStream:
    """One request under way: sent when it is made, cancelled when it is garbage before its end."""

    def __init__(self, pump: Pump, call_id: int, frame: bytes, timeout_s: float, mailbox: Mailbox) -> None:
        self._pump = pump
        self._call_id = call_id
        self._timeout_s = timeout_s
        self._assembly = Assembly()
        self._ended = False
        pump.send(call_id, frame, mailbox)

    @property
    def result(self) -> Completion:
        """The whole answer.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if self._assembly.completion is None:
            raise RuntimeError("the stream has no result: it has not been read to its end")
        return self._assembly.completion

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._cancel()

    def _cancel(self) -> None:
        if not self._ended:
            self._ended = True
            self._pump.cancel(self._call_id)


def models_of(message: Message | Exception) -> list[ModelCard]:
    """Return the models in the answer to a `ModelsRequest`.

    Raises:
        KvasirError: the request failed, or the connection did.
    """
    if isinstance(message, Exception):
        raise message
    error = getattr(message, "error", None)
    if error is not None:
        raise from_info(error)
    assert isinstance(message, ModelList)
    return message.models


def choose_api_key(given: str | None) -> str:
    """Return the API key to use.

    Raises:
        AuthenticationFailed: there is none.
    """
    key = given or os.environ.get("KVASIR_API_KEY")
    if not key:
        raise AuthenticationFailed("no API key: pass api_key=… or set KVASIR_API_KEY (kvasir key create TENANT)")
    return key


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
        ignore_eos=options.get("ignore_eos", False),
        want_text=options.get("want_text", True),
        want_tokens=options.get("want_tokens", True),
        deadline_s=options.get("deadline_s"),
        cache_hint=options.get("cache_hint"),
        retention=list(options.get("retention", ())),
    )


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


def _chat_message(message: Mapping[str, str] | ChatMessage) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        role, content = message["role"], message["content"]
    except (KeyError, TypeError):
        raise BadRequest(f"a message is {{'role': …, 'content': …}}, not {message!r:.80}", param="messages") from None
    if len(message) > 2:
        raise BadRequest(f"a message has a role and a content, not {', '.join(message)}", param="messages")
    return ChatMessage(role, content)


def _pack(token_ids: Sequence[int]) -> bytes:
    try:
        return pack_tokens(token_ids)
    except (OverflowError, TypeError) as error:
        raise BadRequest(f"a prompt is text or a list of token ids: {error}", param="prompt") from None
