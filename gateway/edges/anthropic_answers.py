"""What `/v1/messages` answers: a message of content blocks, or the events that build it; errors in Anthropic's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvasir.gateway.core.api import Finished
from kvasir.gateway.edges.answer import Piece
from kvasir.gateway.edges.writer import Writer, named_event, parts_of
from kvasir.gateway.text.answer_parts import joined
from kvasir.protocol.client_messages import ReasoningPart, TextPart, ToolCallPart
from kvasir.protocol.errors import BY_CODE, ErrorInfo, KvasirError, PromptTooLong

_STOP = {"stop": "end_turn", "abort": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {405: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
_ERRORS |= {504: "timeout_error"}


class AnthropicWriter(Writer):
    """Content blocks come one after the other: thinking, text, uses of tools."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._num_blocks = 0
        self._kind = ""  # of the block that is open
        self._stop_string: str | None = None

    def whole(self, pieces: Sequence[Piece], ends: Sequence[Finished]) -> dict[str, Any]:
        self._stop_string = pieces[0].stop_string
        blocks: list[dict[str, Any]] = []
        for part in joined(parts_of(pieces[0])):
            match part:
                case TextPart(text):
                    blocks.append({"type": "text", "text": text})
                case ReasoningPart(text):
                    blocks.append({"type": "thinking", "thinking": text, "signature": ""})
                case ToolCallPart(_, call_id, name) if name:
                    blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                case ToolCallPart(arguments=text):
                    blocks[-1]["input"] = _input(text)
        return {**self._message(), "content": blocks, **self._stopped(ends[0]), "usage": self._usage(ends[0])}

    def opening(self) -> list[bytes]:
        usage = {"input_tokens": self.submits[0].num_prompt_tokens, "output_tokens": 0}
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [named_event("message_start", {"message": message})]

    def progress(self, index: int, piece: Piece) -> list[bytes]:
        self._stop_string = piece.stop_string
        out: list[bytes] = []
        for part in parts_of(piece):
            match part:
                case TextPart(text):
                    if self._kind != "text":
                        out += self._open("text", {"text": ""})
                    out.append(self._delta("text_delta", "text", text))
                case ReasoningPart(text):
                    if self._kind != "thinking":
                        out += self._open("thinking", {"thinking": "", "signature": ""})
                    out.append(self._delta("thinking_delta", "thinking", text))
                case ToolCallPart(_, call_id, name) if name:
                    out += self._open("tool_use", {"id": call_id, "name": name, "input": {}})
                case ToolCallPart(arguments=text):
                    out.append(self._delta("input_json_delta", "partial_json", text))
        return out

    def ending(self, index: int, end: Finished) -> bytes:
        delta = {"delta": self._stopped(end), "usage": self._usage(end)}
        return b"".join([*self._close(), named_event("message_delta", delta), named_event("message_stop", {})])

    def failure(self, error: ErrorInfo) -> bytes:
        status = BY_CODE.get(error.code, KvasirError).http_status
        return named_event("error", self.error(error, status, self.submits[0].req_id.hex()))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        return b""

    @staticmethod
    def error(info: ErrorInfo, status: int, request_id: str) -> dict[str, Any]:
        message = info.message
        if info.code == PromptTooLong.code:
            message = f"prompt is too long: {message}"  # by which clients know it
        elif info.param is not None and info.param not in message:
            message = f"{info.param}: {message}"
        error = {"type": _ERRORS.get(status, "api_error"), "message": message}
        return {"type": "error", "error": error, "request_id": request_id}

    def _message(self) -> dict[str, Any]:
        submit = self.submits[0]
        message = {"id": f"msg_{submit.req_id.hex()}", "type": "message", "role": "assistant", "model": submit.model}
        return message if self.asked.previous is None else {**message, "diagnostics": self._diagnostics()}

    def _diagnostics(self) -> dict[str, Any] | None:
        """Return why the prompt of the request that it was to be compared with could not be reused whole."""
        match self.change:
            case None:
                return None
            case "previous_not_found", _:
                return {"cache_miss_reason": {"type": "previous_message_not_found"}}
            case (("namespace_changed" | "tokens_changed"), _):
                return {"cache_miss_reason": {"type": "unavailable"}}
            case cause, num_tokens:
                return {"cache_miss_reason": {"type": cause, "cache_missed_input_tokens": num_tokens}}

    def _stopped(self, end: Finished) -> dict[str, Any]:
        if self._stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._stop_string}
        reason = _STOP.get(end.reason, end.reason)
        if end.reason == "length" and self.submits[0].max_tokens < (self.asked.requests[0].max_tokens or 0):
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self, end: Finished) -> dict[str, Any]:
        num_read, num_written = end.num_cached_tokens, self.num_written(0, end)
        return {
            "input_tokens": max(0, end.num_prompt_tokens - num_read - num_written),
            "cache_read_input_tokens": num_read,
            "cache_creation_input_tokens": num_written,
            "output_tokens": end.num_output_tokens,
        }

    def _open(self, kind: str, more: dict[str, Any]) -> list[bytes]:
        out = self._close()
        self._kind = kind
        block = {"index": self._num_blocks, "content_block": {"type": kind, **more}}
        return [*out, named_event("content_block_start", block)]

    def _close(self) -> list[bytes]:
        """End the block that is open, if one is."""
        if not self._kind:
            return []
        self._kind = ""
        self._num_blocks += 1
        return [named_event("content_block_stop", {"index": self._num_blocks - 1})]

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return named_event("content_block_delta", {"index": self._num_blocks, "delta": {"type": kind, name: text}})


def _input(text: str) -> Any:
    """Return the arguments of a call as an object; what the model wrote that is none, as one with its text."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {"text": text}
