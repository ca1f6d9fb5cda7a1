"""What a request may ask of a model: prompt, window, sampling and grammar, checked one by one.

Every function raises `BadRequest`, whose `param` names the field in the words of `CompletionRequest`.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from kvasir.gateway.core.api import ModelInfo
from kvasir.gateway.text.call_grammars import is_strict
from kvasir.gateway.text.model_text import ModelText
from kvasir.gateway.text.tool_schemas import read_tools
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.codec import MAX_SECONDS, MAX_TOKEN_ID
from kvasir.protocol.errors import BadRequest, PromptTooLong
from kvasir.protocol.tokens import TOKEN_BYTES, view_tokens


def with_grammar(request: CompletionRequest, info: ModelInfo, text: ModelText | None) -> CompletionRequest:
    """Return `request` with the grammar of its answer, which holds calls of its tools to their schemas where needed.

    Raises:
        BadRequest: `call_grammars.call_grammar` says no, or answers of this model cannot be held to one.
    """
    chat = request.chat
    if (
        text is not None
        and chat.offers_tools
        and (request.grammar is not None or chat.tool_choice == "required" or b"strict" in chat.tools)
    ):
        if "grammars" not in info.lacks:
            request = msgspec.structs.replace(request, grammar=text.answers.call_grammar(chat, request.grammar))
        elif is_strict(read_tools(chat.tools)):
            raise BadRequest(
                f"calls of model {info.name!r}, which {info.engine} computes, cannot be held to a schema; "
                "say strict: false",
                param="tools",
            )
    if request.grammar is not None and "grammars" in info.lacks:
        raise BadRequest(
            f"answers of model {info.name!r}, which {info.engine} computes, cannot be held to a grammar; "
            "leave response_format and structured_outputs out",
            param="grammar",
        )
    if request.grammar is not None and request.ignore_eos:
        raise BadRequest("with a grammar the answer ends where that does; leave ignore_eos out", param="ignore_eos")
    return request


def check_prompt(request: CompletionRequest, info: ModelInfo, text: ModelText | None, packed: bytes) -> int:
    """Return the prompt's length in tokens."""
    if not packed:
        raise BadRequest("the prompt is empty; send at least one token", param="prompt")
    if len(packed) % TOKEN_BYTES:
        raise BadRequest("token_ids is no whole number of 32-bit ids; pack them as little-endian u32")
    num_tokens = len(packed) // TOKEN_BYTES
    if num_tokens >= info.max_context:
        raise PromptTooLong(
            f"{window(info)}; the prompt has {num_tokens} tokens, which leaves none for the answer: shorten it",
            param=prompt_field(request),
        )
    if request.token_ids is not None:
        check_ids(text, (max(view_tokens(packed)),), "prompt")  # none can be negative
    return num_tokens


def check_ids(text: ModelText | None, ids: Collection[int], param: str) -> None:
    """Check that all `ids`, of the field `param`, are in the vocabulary."""
    vocab_size = MAX_TOKEN_ID + 1 if text is None else text.vocab_size
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"token id {token_id} is not in the vocabulary of {vocab_size} tokens", param=param)


def check_sampling(request: CompletionRequest, info: ModelInfo, text: ModelText | None, max_tokens: int) -> None:
    """Check how the answer of up to `max_tokens` is to be drawn and ended, and that the model's engine can do it."""
    if request.sampling.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens is {request.sampling.min_tokens}, more than the {max_tokens} that the answer may have",
            param="min_tokens",
        )
    check_ids(text, request.sampling.logit_bias, "logit_bias")
    check_ids(text, request.stop_token_ids, "stop_token_ids")
    if request.stop and (not request.want_text or text is None):
        raise BadRequest("stop strings need text; ask for text or use stop_token_ids", param="stop")
    for field in info.lacks:
        if _asks_for(request, field):
            raise BadRequest(
                f"{field} is not supported for model {info.name!r}, which {info.engine} computes; leave it out",
                param=field,
            )
    if request.sampling.allowed_token_ids:
        check_ids(text, request.sampling.allowed_token_ids, "allowed_token_ids")
    if request.no_store and request.retention:
        raise BadRequest("no_store leaves nothing that retention could keep; leave one out", param="retention")
    if request.deadline_s is not None and not 0 < request.deadline_s <= MAX_SECONDS:
        raise BadRequest("deadline_s must be a positive number of seconds, up to 1e9", param="deadline_s")


def window(info: ModelInfo) -> str:
    """Return how long a request may be, in the words by which clients know this error."""
    return f"This model's maximum context length is {info.max_context} tokens"


def prompt_field(request: CompletionRequest) -> str:
    return "prompt" if request.messages is None else "messages"


def truncate(request: CompletionRequest, info: ModelInfo, packed: bytes) -> bytes:
    """Return the end of the prompt that `truncate_prompt_tokens` asks for."""
    count = request.truncate_prompt_tokens
    assert count is not None
    if count == 0 or count < -1:
        raise BadRequest(
            f"truncate_prompt_tokens is a number of tokens or -1 (as many as fit), not {count}",
            param="truncate_prompt_tokens",
        )
    if count < 0:
        count = max(1, info.max_context - max(1, request.max_tokens or 1))
    return packed[-count * TOKEN_BYTES :]


def check_max_tokens(request: CompletionRequest, info: ModelInfo, num_tokens: int) -> int:
    """Return how many tokens the answer to a prompt of `num_tokens` may have."""
    left = info.max_context - num_tokens
    if request.max_tokens is None:
        return left
    if request.max_tokens < 1:
        raise BadRequest(f"max_tokens must be at least 1, not {request.max_tokens}", param="max_tokens")
    if request.max_tokens > left:
        if request.chat.is_lenient:
            return left
        raise PromptTooLong(
            f"{window(info)}; the prompt has {num_tokens}, max_tokens is {request.max_tokens}: ask for at most {left}",
            param="max_tokens",
        )
    return request.max_tokens


def _asks_for(request: CompletionRequest, field: str) -> bool:
    """Return whether a request uses a field that some engines lack."""
    match field:
        case "retention":
            return bool(request.retention)
        case "no_store":
            return request.no_store
        case "logprobs":
            return request.sampling.logprobs is not None
        case "bad_words":
            return bool(request.sampling.bad_words)
        case "max_reasoning_tokens":
            return request.chat.max_reasoning_tokens is not None and not request.chat.is_lenient
    return False
