"""What the OpenAI-compatible routes answer: choices, chunks, usage, log probabilities, error objects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from kvasir.gateway.core.api import Finished
from kvasir.gateway.edges.answer import Piece
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.errors import BY_CODE, ErrorInfo, KvasirError
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.tokens import view_tokens

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {413: "invalid_request_error", 429: "rate_limit_error"}
_FINISH = {"stop": "stop", "length": "length", "abort": "stop"}


class Form:
    """How one of the two routes writes choices and chunks."""

    id_prefix: str
    whole: str
    chunk: str
    opening: Callable[[int], dict[str, Any]] | None

    def choice(self, index: int, piece: Piece, reason: str, text: ModelText | None) -> dict[str, Any]:
        raise AssertionError

    def delta(self, index: int, piece: Piece, text: ModelText | None) -> dict[str, Any]:
        raise AssertionError

    def ending(self, index: int, reason: str) -> dict[str, Any]:
        raise AssertionError


class ChatForm(Form):
    id_prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self) -> None:
        self.opening = lambda index: {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def choice(self, index: int, piece: Piece, reason: str, text: ModelText | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        logprobs = _chat_logprobs(piece, text)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _FINISH.get(reason, reason)}

    def delta(self, index: int, piece: Piece, text: ModelText | None) -> dict[str, Any]:
        logprobs = _chat_logprobs(piece, text)
        return {"index": index, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": _FINISH.get(reason, reason)}


class CompletionForm(Form):
    id_prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"
    opening = None

    def choice(self, index: int, piece: Piece, reason: str, text: ModelText | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": _completion_logprobs(piece, text),
            "finish_reason": _FINISH.get(reason, reason),
        }

    def delta(self, index: int, piece: Piece, text: ModelText | None) -> dict[str, Any]:
        logprobs = _completion_logprobs(piece, text)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": _FINISH.get(reason, reason)}


CHAT, COMPLETION = ChatForm(), CompletionForm()


def usage_of(ends: list[Finished], num_choices: int) -> dict[str, Any]:
    """Tokens of all choices; a prompt with several choices is counted once, its cached tokens as the first had them."""
    prompts = ends[::num_choices]
    num_prompt = sum(end.num_prompt_tokens for end in prompts)
    num_output = sum(end.num_output_tokens for end in ends)
    num_cached = sum(end.num_cached_tokens for end in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def error_object(info: ErrorInfo) -> dict[str, Any]:
    status = BY_CODE.get(info.code, KvasirError).http_status
    kind = _TYPES.get(status, "server_error")
    return {"message": info.message, "type": kind, "param": info.param, "code": info.code}


def _chat_logprobs(piece: Piece, text: ModelText | None) -> dict[str, Any] | None:
    if not piece.logprobs or text is None:
        return None
    pairs = zip(view_tokens(piece.token_ids), piece.logprobs, strict=False)
    return {"content": [_chat_token(text, *pair) for pair in pairs]}


def _chat_token(text: ModelText, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    top = [_scored(text, candidate, value) for candidate, value in logprobs.top]
    return {**_scored(text, token_id, logprobs.logprob), "top_logprobs": top}


def _scored(text: ModelText, token_id: int, logprob: float) -> dict[str, Any]:
    piece = text.token_bytes(token_id)
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def _completion_logprobs(piece: Piece, text: ModelText | None) -> dict[str, Any] | None:
    if not piece.logprobs or text is None:
        return None
    tokens = [text.decode([token_id]) for token_id in view_tokens(piece.token_ids)]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in piece.logprobs],
        "top_logprobs": [
            {text.decode([candidate]): value for candidate, value in entry.top} for entry in piece.logprobs
        ],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=piece.start)),
    }
