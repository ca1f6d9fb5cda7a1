"""What the routes for chat and text completions answer: choices, chunks, usage, log probabilities, error objects."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from kvasir.gateway.core.api import Finished, Submit
from kvasir.gateway.edges.answer import Piece
from kvasir.gateway.edges.openai_requests import Asked
from kvasir.gateway.edges.writer import Writer, encode_json, error_object
from kvasir.gateway.text.answer_parts import joined
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.client_messages import ReasoningPart, TextPart, ToolCallPart
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.tokens import unpack_tokens, view_tokens

_FINISH = {"abort": "stop"}  # others are OpenAI's own words


class OpenAiWriter(Writer):
    """What chats and text completions share."""

    id_prefix: str
    object: str
    chunk_object: str
    nothing: dict[str, Any]  # gained by a choice, as its last chunk says it

    def __init__(self, asked: Asked, submits: Sequence[Submit], text: ModelText | None, block_size: int) -> None:
        super().__init__(asked, submits, text, block_size)
        self._envelope = {
            "id": self.id_prefix + submits[0].req_id.hex(),
            "object": self.chunk_object if asked.stream else self.object,
            "created": int(time.time()),
            "model": submits[0].model,
            "system_fingerprint": f"fp_{submits[0].root[:6].hex()}",  # of weights, dtype and adapter, keyed
        }
        self._more: dict[str, Any] = {"usage": None} if asked.wants_usage else {}

    def whole(self, pieces: Sequence[Piece], ends: Sequence[Finished]) -> dict[str, Any]:
        for piece in pieces:
            self.num_reasoning_tokens += piece.num_reasoning_tokens
        choices = [self._choice(i, piece, end.reason) for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))]
        return {**self._envelope, "choices": choices, "usage": self._usage(ends)}

    def failure(self, error: ErrorInfo) -> bytes:
        return b"data: %b\n\n" % encode_json({"error": error_object(error)})

    def closing(self, ends: Sequence[Finished]) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self.asked.wants_usage:
            return done
        usage = {"usage": self._usage(ends)}
        return b"data: %b\n\n%b" % (encode_json({**self._envelope, "choices": [], **usage}), done)

    def progress(self, index: int, piece: Piece) -> list[bytes]:
        self.num_reasoning_tokens += piece.num_reasoning_tokens
        wants_ids = self.asked.wants_token_ids and piece.token_ids
        if not (piece.text or piece.parts or piece.logprobs or wants_ids):
            return []
        logprobs = self._logprobs(piece) if piece.logprobs else None
        choice = {"index": index, **self._gained(index, piece), "logprobs": logprobs, "finish_reason": None}
        return [self._chunk(choice | self._token_ids(piece) if wants_ids else choice)]

    def ending(self, index: int, end: Finished) -> bytes:
        rest = {"logprobs": None, "finish_reason": _FINISH.get(end.reason, end.reason)}
        return self._chunk({"index": index, **self.nothing, **rest})

    def _choice(self, index: int, piece: Piece, reason: str) -> dict[str, Any]:
        """Return one choice of an answer that is not streamed."""
        rest = {"logprobs": self._logprobs(piece), "finish_reason": _FINISH.get(reason, reason)}
        return {"index": index, **self._all(index, piece), **rest, **self._token_ids(piece)}

    @abstractmethod
    def _gained(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what a chunk says that choice `index` has gained."""

    @abstractmethod
    def _all(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what an answer that is not streamed has as choice `index`."""

    @abstractmethod
    def _logprobs(self, piece: Piece) -> dict[str, Any] | None: ...

    def _token_ids(self, piece: Piece) -> dict[str, Any]:
        return {"token_ids": unpack_tokens(piece.token_ids)} if self.asked.wants_token_ids else {}

    def _usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """Tokens of all choices; a prompt with several choices is counted once, its cached tokens as the first had
        them."""
        num_prompt = num_output = num_cached = num_written = 0
        for index, end in enumerate(ends):
            num_output += end.num_output_tokens
            if index % self.asked.num_choices == 0:
                num_prompt += end.num_prompt_tokens
                num_cached += end.num_cached_tokens
                num_written += self.num_written(index, end)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_written},
        }
        if self.num_reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning_tokens}
        return usage

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        return b"data: %b\n\n" % encode_json({**self._envelope, "choices": [choice], **self._more, **(more or {})})

    def _prompt_ids(self, index: int) -> list[int]:
        return unpack_tokens(self.submits[index].token_ids)


class ChatWriter(OpenAiWriter):
    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    nothing = {"delta": {}}

    def whole(self, pieces: Sequence[Piece], ends: Sequence[Finished]) -> dict[str, Any]:
        body = super().whole(pieces, ends)
        return {**body, "prompt_token_ids": self._prompt_ids(0)} if self.asked.wants_token_ids else body

    def opening(self) -> list[bytes]:
        more = {"prompt_token_ids": self._prompt_ids(0)} if self.asked.wants_token_ids else None
        delta = {"role": "assistant", "content": self._echo()}
        return [
            self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, more)
            for index in range(len(self.submits))
        ]

    def _gained(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"delta": self._parsed(index, piece, streamed=True) if piece.parts else {"content": piece.text}}

    def _all(self, index: int, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._echo() + piece.text, "refusal": None}
        if piece.parts:
            message |= self._parsed(index, piece, streamed=False)
            message["content"] = self._echo() + piece.text or None
        return {"message": message}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs or self.text is None:
            return None
        pairs = zip(view_tokens(piece.token_ids), piece.logprobs, strict=False)
        return {"content": [_chat_token(self.text, *pair) for pair in pairs]}

    def _parsed(self, index: int, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        """Return the parts of a piece as a message has them; calls are numbered only where they are streamed."""
        found: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for part in joined(piece.parts):
            match part:
                case TextPart(text):
                    found["content"] = found.get("content", "") + text
                case ReasoningPart(text):
                    found["reasoning_content"] = found["reasoning"] = found.get("reasoning", "") + text
                case ToolCallPart(number, call_id, name) if name:
                    function = {"name": name, "arguments": ""}
                    calls[number] = {"id": call_id, "type": "function", "function": function}
                case ToolCallPart(number, arguments=text):
                    call = calls.setdefault(number, {"function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        if calls:
            found["tool_calls"] = [{"index": n, **call} if streamed else call for n, call in calls.items()]
        return found

    def _echo(self) -> str:
        """Return what the answer goes on with, where it is asked for: an assistant's last message."""
        messages = self.asked.requests[0].messages
        if not self.asked.echo or not messages or messages[-1].role != "assistant":
            return ""
        return messages[-1].content or ""


class CompletionWriter(OpenAiWriter):
    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"
    nothing = {"text": ""}

    def opening(self) -> list[bytes]:
        if not (self.asked.echo or self.asked.wants_token_ids):
            return []
        return [
            self._chunk(
                {"index": index, "text": self._echo(index), "logprobs": None, "finish_reason": None}
                | ({"prompt_token_ids": self._prompt_ids(index)} if self.asked.wants_token_ids else {})
            )
            for index in range(len(self.submits))
        ]

    def _gained(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _all(self, index: int, piece: Piece) -> dict[str, Any]:
        more = {"prompt_token_ids": self._prompt_ids(index)} if self.asked.wants_token_ids else {}
        return {"text": self._echo(index) + piece.text, **more}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        text = self.text
        if not piece.logprobs or text is None:
            return None
        tokens = [text.decode([token_id]) for token_id in view_tokens(piece.token_ids)]
        tops = [{text.decode([candidate]): value for candidate, value in entry.top} for entry in piece.logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in piece.logprobs],
            "top_logprobs": tops,
            "text_offset": list(accumulate(map(len, tokens[:-1]), initial=piece.start)),
        }

    def _echo(self, index: int) -> str:
        """Return the prompt, where it is asked for: as it was sent, or what its tokens say."""
        if not self.asked.echo:
            return ""
        request = self.asked.requests[index]
        if request.text is not None and request.truncate_prompt_tokens is None:
            return request.text
        return "" if self.text is None else self.text.decode(self._prompt_ids(index))


def _chat_token(text: ModelText, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    top = [_scored(text, candidate, value) for candidate, value in logprobs.top]
    return {**_scored(text, token_id, logprobs.logprob), "top_logprobs": top}


def _scored(text: ModelText, token_id: int, logprob: float) -> dict[str, Any]:
    piece = text.token_bytes(token_id)
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
