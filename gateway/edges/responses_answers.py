"""What `/v1/responses` answers: one response object, or the events that build it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvasir.gateway.core.api import Finished
from kvasir.gateway.edges.answer import Piece
from kvasir.gateway.edges.writer import Writer, named_event, parts_of
from kvasir.protocol.client_messages import ReasoningPart, TextPart, ToolCallPart
from kvasir.protocol.errors import ErrorInfo

_TEXT = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


class ResponsesWriter(Writer):
    """Output items come one after the other: reasoning, message, function calls."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._id = self.submits[0].req_id.hex()
        self._created = int(time.time())
        self._num_events = 0
        self._items: list[dict[str, Any]] = []
        self._texts: list[str] = []  # of the last item
        self._is_open = False
        self._failed: ErrorInfo | None = None

    def whole(self, pieces: Sequence[Piece], ends: Sequence[Finished]) -> dict[str, Any]:
        self.progress(0, pieces[0])
        self.ending(0, ends[0])
        return self._response(ends[0])

    def opening(self) -> list[bytes]:
        response = {"response": self._response(None)}
        return [self._event("response.created", response), self._event("response.in_progress", response)]

    def progress(self, index: int, piece: Piece) -> list[bytes]:
        self.num_reasoning_tokens += piece.num_reasoning_tokens
        out: list[bytes] = []
        for part in parts_of(piece):
            match part:
                case TextPart(text):
                    out += self._add_text("message", text)
                case ReasoningPart(text):
                    out += self._add_text("reasoning", text)
                case ToolCallPart(_, call_id, name) if name:
                    call = {"call_id": call_id, "name": name, "arguments": ""}
                    out += self._open("function_call", call)
                case ToolCallPart(arguments=text):
                    self._texts.append(text)
                    out.append(self._event("response.function_call_arguments.delta", {**self._place(), "delta": text}))
        return out

    def ending(self, index: int, end: Finished) -> bytes:
        return b"".join(self._close("incomplete" if end.reason == "length" else "completed"))

    def failure(self, error: ErrorInfo) -> bytes:
        self._failed = error
        return b"".join(self._close("incomplete"))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        response = self._response(ends[0])
        return self._event(f"response.{response['status']}", {"response": response})

    # ---- items

    def _add_text(self, kind: str, text: str) -> list[bytes]:
        out: list[bytes] = []
        if not self._is_open or self._items[-1]["type"] != kind:
            part = _part(kind, "")
            out = self._open(
                kind, {"role": "assistant", "content": []} if kind == "message" else _SUMMARY | {"content": []}
            )
            out.append(self._event("response.content_part.added", {**self._place(), "content_index": 0, "part": part}))
        self._texts.append(text)
        delta = {**self._place(), "content_index": 0, "delta": text}
        out.append(self._event(f"{_TEXT[kind]}.delta", delta | ({"logprobs": []} if kind == "message" else {})))
        return out

    def _open(self, kind: str, more: dict[str, Any]) -> list[bytes]:
        out = self._close()
        item = {"id": f"{_PREFIX[kind]}_{self._id}{len(self._items)}", "type": kind, "status": "in_progress", **more}
        self._items.append(item)
        self._texts, self._is_open = [], True
        out.append(self._event("response.output_item.added", {"output_index": len(self._items) - 1, "item": item}))
        return out

    def _close(self, status: str = "completed") -> list[bytes]:
        """End the item that is open, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        item, text, place = self._items[-1], "".join(self._texts), self._place()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {**place, "name": item["name"], "arguments": text}
            out = [self._event("response.function_call_arguments.done", done)]
        else:
            part = _part(item["type"], text)
            item["content"] = [part]
            done = {**place, "content_index": 0, "text": text}
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            out = [
                self._event(f"{_TEXT[item['type']]}.done", done | more),
                self._event("response.content_part.done", {**place, "content_index": 0, "part": part}),
            ]
        out.append(self._event("response.output_item.done", {"output_index": len(self._items) - 1, "item": item}))
        return out

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        self._num_events += 1
        return named_event(kind, {"sequence_number": self._num_events - 1, **content})

    # ---- the response

    def _response(self, end: Finished | None) -> dict[str, Any]:
        """Return the response; `end` None: it has only begun."""
        is_cut = end is not None and end.reason == "length"
        error = self._failed
        status = "in_progress" if end is None else "incomplete" if is_cut else "completed"
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status if error is None else "failed",
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.submits[0].model,
            "output": list(self._items),
            "text": {"format": {"type": "text"}},
            **self.asked.shown,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if end is None else self._usage(end),
            **({} if self.asked.previous is None else {"prompt_cache_diagnostics": self._diagnostics()}),
        }

    def _diagnostics(self) -> dict[str, Any]:
        """Return why the prompt of the response that it was to be compared with could not be reused whole."""
        match self.change:
            case None:
                return {"type": "cache_hit"}
            case "previous_not_found", _:
                return {"type": "comparison_response_not_found"}
            case ("model_changed" | "tools_changed") as reason, num_tokens:
                return {"type": "cache_miss", "reason": reason, "cache_missed_tokens": num_tokens}
            case (("system_changed" | "messages_changed"), num_tokens):
                return {"type": "cache_miss", "reason": "input_changed", "cache_missed_tokens": num_tokens}
            case _:
                return {"type": "unavailable"}

    def _usage(self, end: Finished) -> dict[str, Any]:
        cache = {"cached_tokens": end.num_cached_tokens, "cache_write_tokens": self.num_written(0, end)}
        return {
            "input_tokens": end.num_prompt_tokens,
            "input_tokens_details": cache,
            "output_tokens": end.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": end.num_prompt_tokens + end.num_output_tokens,
        }


_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_SUMMARY: dict[str, Any] = {"summary": []}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
