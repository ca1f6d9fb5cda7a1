"""What a dialect of the HTTP edge does with an answer: writes it whole, or as server-sent events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from kvasir.gateway.core.api import Change, Finished, Submit
from kvasir.gateway.edges.answer import Piece
from kvasir.gateway.edges.openai_requests import Asked
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.client_messages import AnswerPart, TextPart
from kvasir.protocol.errors import BY_CODE, ErrorInfo, KvasirError
from kvasir.protocol.prefix import HASH_BYTES

encode_json = msgspec.json.Encoder().encode
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class Writer(ABC):
    """Writes the answer to one request.

    A streamed one is `opening`, then of each choice any number of `progress` and one `ending` or `failure`, then
    `closing`.
    """

    def __init__(self, asked: Asked, submits: Sequence[Submit], text: ModelText | None, block_size: int) -> None:
        self.asked = asked
        self.submits = submits
        self.text = text
        self.block_size = block_size
        self.num_reasoning_tokens = 0
        self.change: tuple[Change, int] | None = None  # from the request that this one was to be compared with

    @abstractmethod
    def whole(self, pieces: Sequence[Piece], ends: Sequence[Finished]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""

    @abstractmethod
    def opening(self) -> list[bytes]:
        """Return the events before anything has come."""

    @abstractmethod
    def progress(self, index: int, piece: Piece) -> list[bytes]:
        """Return the events of what choice `index` has gained."""

    @abstractmethod
    def ending(self, index: int, end: Finished) -> bytes:
        """Return the events that end choice `index`."""

    @abstractmethod
    def failure(self, error: ErrorInfo) -> bytes:
        """Return the events that end a choice in an error."""

    @abstractmethod
    def closing(self, ends: Sequence[Finished]) -> bytes:
        """Return the last events."""

    @staticmethod
    def error(info: ErrorInfo, status: int, request_id: str) -> dict[str, Any]:
        """Return the body of an answer that is an error."""
        return {"error": error_object(info)}

    def num_written(self, index: int, end: Finished) -> int:
        """Return how many tokens of a prompt are in the cache now that were not before: those in full blocks."""
        if not end.num_prompt_tokens or self.submits[index].no_store:
            return 0
        num_full = len(self.submits[index].prefix_hashes) // HASH_BYTES * self.block_size
        return max(0, num_full - end.num_cached_tokens)


def message_id(text: str) -> bytes:
    """Return the request id in the id of an answer; empty if there is none."""
    try:
        return bytes.fromhex(text.rpartition("_")[2])
    except ValueError:
        return b""


def parts_of(piece: Piece) -> Sequence[AnswerPart]:
    """Return the parts of a piece. An answer that is not parsed has one part, its text."""
    return piece.parts or ([TextPart(piece.text)] if piece.text else [])


def error_object(info: ErrorInfo) -> dict[str, Any]:
    """Return an error as OpenAI has it."""
    status = BY_CODE.get(info.code, KvasirError).http_status
    return {"message": info.message, "type": _TYPES.get(status, "server_error"), "param": info.param, "code": info.code}


def named_event(kind: str, content: dict[str, Any]) -> bytes:
    """Return a server-sent event with a name, which its content repeats as `type`."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **content}))
