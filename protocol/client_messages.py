"""Client SDK <-> gateway, over a DEALER and the gateway's ROUTER: one frame per message, no routing ids in them.

Towards the client, the messages of one step may come together, as the frames of one multipart: each frame is a message
of its own, and all of them are one send and one wake-up.

Every message carries the API key or answers one that did: there is no session to lose, and a revoked key stops
working at the next request. `id` is the client's own number for a request, unique per connection. Every
`CompletionRequest` gets any number of `CompletionChunk`s and then exactly one `CompletionDone`. The client says now
and then what has arrived (`Received`): a gateway that is killed bills no more than that.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvasir.protocol.codec import MAX_TOKENS, Decoder, Message, Name, PackedTokens, Seconds, TokenId
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.sampling import CacheHint, Grammar, Priority, RetentionHint, SamplingOptions

MAX_CLIENT_FRAME_BYTES = 8 << 20
CallId = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
ApiKey = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4 << 20)]
Json = Annotated[bytes, Meta(max_length=1 << 20)]


class ToolCall(Struct, frozen=True, forbid_unknown_fields=True):
    """One call in an assistant's message. `arguments`: JSON, as the model wrote it."""

    id: Annotated[str, Meta(max_length=256)]
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: Text


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn of a conversation. `tool_call_id`: the call whose result a message of role "tool" is."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: Text | None
    name: Annotated[str, Meta(max_length=256)] = ""
    reasoning: Text = ""
    tool_calls: Annotated[list[ToolCall], Meta(max_length=256)] = []
    tool_call_id: Annotated[str, Meta(max_length=256)] = ""


class ChatOptions(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the chat template is used. `documents` and `variables` are JSON: a list of objects, and an object of what
    else the template knows.

    `add_generation_prompt` false leaves the cue for the assistant's answer out; `continue_final_message` leaves the
    last message open, so that the answer goes on with it. `reasoning_effort` "none" turns thinking off where the
    template knows only on and off.

    `tools`: JSON, a list of functions as OpenAI's chat completions have them. `tool_choice`: "none" leaves them out,
    "required" makes the answer begin with a call, of `tool_name` if that is given; without `parallel_tool_calls` it
    ends after one. Reasoning is told apart from the content with `separate_reasoning`, left out without
    `include_reasoning`, and ended after `max_reasoning_tokens`. `is_lenient`: a model that does not reason, or not so,
    is no reason to refuse `reasoning_effort` and `max_reasoning_tokens`, nor is too small a window for `max_tokens`.
    """

    tools: Json = b""
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: Annotated[str, Meta(max_length=256)] = ""
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    include_reasoning: bool = True
    max_reasoning_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    documents: Json = b""
    variables: Json = b""
    reasoning_effort: Annotated[str, Meta(max_length=32)] = ""
    is_lenient: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def offers_tools(self) -> bool:
        """Whether the model is shown tools that it may call."""
        return bool(self.tools) and self.tool_choice != "none"


PLAIN_CHAT = ChatOptions()


class Usage(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tokens of one request: `cached_tokens` of the prompt were found in the worker's KV cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class ClientMessage(Message, tag_field="type"):
    """Client -> gateway."""


class CompletionRequest(ClientMessage, tag="request"):
    """Generate from exactly one of `text`, `messages` (chat template applied) and `token_ids` (packed).

    `max_tokens` None: up to the model's window. `want_text`/`want_tokens` choose what the chunks carry; without text
    the gateway does no detokenisation at all (and `stop` strings are refused). `include_stop`: what stopped the answer
    is part of its text; `skip_special_tokens`: special tokens are not. `truncate_prompt_tokens`: keep so many tokens of
    the prompt's end, -1 as many as fit. `cache_hint` (None: the tenant's default) and `retention` say what to keep of
    it in the KV cache; with a `cache_salt` it shares the tenant's cache only with requests of the same salt. The answer
    matches `grammar`, its content if the model reasons before. `priority`: among the tenant's own rights.
    `no_store`: nothing of it stays in the KV cache.
    """

    id: CallId
    api_key: ApiKey
    model: Annotated[str, Meta(max_length=256)] = ""
    text: Text | None = None
    messages: Annotated[list[ChatMessage], Meta(max_length=4096)] | None = None
    token_ids: PackedTokens | None = None
    max_tokens: int | None = None
    sampling: SamplingOptions = SamplingOptions()
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = []
    ignore_eos: bool = False
    want_text: bool = True
    want_tokens: bool = False
    deadline_s: Seconds | None = None
    cache_hint: CacheHint | None = None
    retention: Annotated[list[RetentionHint], Meta(max_length=16)] = []
    chat: ChatOptions = PLAIN_CHAT
    include_stop: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] = ""
    grammar: Grammar | None = None
    priority: Priority | None = None
    no_store: bool = False


class CancelRequest(ClientMessage, tag="cancel"):
    """Stop request `id` of this connection. Its `CompletionDone` still comes. Unknown ids are ignored."""

    id: CallId


class Received(ClientMessage, tag="received"):
    """What has arrived: how many tokens of running answers, by request, and which requests have `ended`. Unknown ids
    are ignored."""

    tokens: Annotated[dict[CallId, Annotated[int, Meta(ge=0)]], Meta(max_length=1 << 16)] = {}
    ended: Annotated[list[CallId], Meta(max_length=1 << 16)] = []


class ModelsRequest(ClientMessage, tag="models"):
    """Which models may this key use?"""

    id: CallId
    api_key: ApiKey


class GatewayMessage(Message, tag_field="type"):
    """Gateway -> client."""


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """Text for the user."""

    text: str


class ReasoningPart(Struct, frozen=True, forbid_unknown_fields=True, tag="reasoning"):
    """Text that the model thinks aloud before it answers."""

    text: str


class ToolCallPart(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="tool_call"):
    """Call number `index` begins, with `id` and `name`, or has more `arguments`: JSON, as the model writes it."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


AnswerPart = TextPart | ReasoningPart | ToolCallPart


class CompletionChunk(GatewayMessage, tag="chunk"):
    """New text and/or tokens, in order, each delivered exactly once.

    `parts`: of the answer of a model that reasons or may call tools, in order; `text` is empty then. `num_tokens` of
    the answer have been sent with it.
    """

    id: CallId
    text: str = ""
    token_ids: PackedTokens = b""
    logprobs: list[TokenLogprobs] = []
    parts: list[AnswerPart] = []
    num_tokens: int = 0


class CompletionDone(GatewayMessage, tag="done"):
    """The one terminal event. `error` set: failed with it; `finish_reason` is then "error".

    `request_id`: what `kvasir explain` takes; empty where the request never reached the core.
    """

    id: CallId
    finish_reason: str
    usage: Usage = Usage()
    worker: str = ""
    ttft_s: float = 0.0
    error: ErrorInfo | None = None
    request_id: str = ""


class ModelCard(Struct, frozen=True, forbid_unknown_fields=True):
    """One served model: `max_context` tokens of prompt + answer, on `num_workers` live workers."""

    name: Name
    max_context: int
    num_workers: int


class ModelList(GatewayMessage, tag="model_list"):
    """Answer to `ModelsRequest`."""

    id: CallId
    models: list[ModelCard] = []
    error: ErrorInfo | None = None


CLIENT_MESSAGES: Decoder[CompletionRequest | CancelRequest | Received | ModelsRequest] = Decoder(
    CompletionRequest | CancelRequest | Received | ModelsRequest, max_bytes=MAX_CLIENT_FRAME_BYTES
)
GATEWAY_MESSAGES: Decoder[CompletionChunk | CompletionDone | ModelList] = Decoder(
    CompletionChunk | CompletionDone | ModelList, max_bytes=64 << 20
)
