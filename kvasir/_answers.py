"""What the SDK's answers are: chunks as they come, and the whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvasir.protocol.client_messages import (
    AnswerPart,
    ChatMessage,
    CompletionChunk,
    CompletionDone,
    ReasoningPart,
    TextPart,
    ToolCall,
    ToolCallPart,
    Usage,
)
from kvasir.protocol.codec import Message
from kvasir.protocol.errors import from_info
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.tokens import unpack_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text and tokens of an answer, in order. `index`: of which of `n` answers. `parts`: reasoning and calls of
    tools too, where a model writes them; `text` is the content alone."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    index: int = 0
    parts: list[AnswerPart] = field(default_factory=list)

    @property
    def events(self) -> list[AnswerPart]:
        """What the chunk brings, in order: `TextPart`, `ReasoningPart` and `ToolCallPart`."""
        return self.parts or ([TextPart(self.text)] if self.text else [])


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `finish_reason`: "stop", "length", "tool_calls" or "abort". `ttft_s`: arrival at the gateway to
    first token. `others`: the further answers of a request with `n`.

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
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    others: list[Completion] = field(default_factory=list)

    @property
    def message(self) -> ChatMessage:
        """The answer as a message, to go on with."""
        return ChatMessage("assistant", self.text or None, reasoning=self.reasoning, tool_calls=self.tool_calls)


class Assembly:
    """Turns the messages that answer one request into chunks and, at the end, the completion."""

    def __init__(self, index: int = 0) -> None:
        self.completion: Completion | None = None
        self._index = index
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}  # id, name, arguments

    def add(self, message: CompletionChunk | CompletionDone) -> Chunk | None:
        """Take the next message; return its chunk, or None when the answer is complete (`completion` is then set).

        Raises:
            KvasirError: the request failed.
        """
        if isinstance(message, CompletionChunk):
            text = message.text + "".join([part.text for part in message.parts if isinstance(part, TextPart)])
            token_ids = unpack_tokens(message.token_ids)
            chunk = Chunk(text, token_ids, message.logprobs, self._index, message.parts)
            self._text.append(chunk.text)
            self._token_ids += chunk.token_ids
            self._logprobs += chunk.logprobs
            for part in message.parts:
                self._add_part(part)
            return chunk
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
            "".join(self._reasoning),
            [ToolCall(call_id, name, "".join(pieces)) for call_id, name, pieces in self._calls.values()],
        )
        return None

    def _add_part(self, part: AnswerPart) -> None:
        if isinstance(part, ReasoningPart):
            self._reasoning.append(part.text)
        elif isinstance(part, ToolCallPart):
            if part.name:
                self._calls[part.index] = (part.id, part.name, [])
            self._calls[part.index][2].append(part.arguments)


class Answers:
    """The answers to one prompt, each with a call of its own: messages of all of them become chunks and completions."""

    def __init__(self, call_ids: Sequence[int]) -> None:
        self._assemblies = {call_id: Assembly(index) for index, call_id in enumerate(call_ids)}
        self._num_open = len(call_ids)
        self.completion: Completion | None = None

    @property
    def is_complete(self) -> bool:
        return self._num_open == 0

    def add(self, message: Message | Exception) -> Chunk | None:
        """Take the next message; return its chunk, or None where an answer has ended (see `is_complete`).

        Raises:
            KvasirError: a request failed, or the connection did.
        """
        if isinstance(message, Exception):
            raise message
        assert isinstance(message, CompletionChunk | CompletionDone)
        chunk = self._assemblies[message.id].add(message)
        if chunk is None:
            self._num_open -= 1
            if not self._num_open:
                found = [each.completion for each in self._assemblies.values() if each.completion is not None]
                self.completion = found[0] if len(found) == 1 else replace(found[0], others=found[1:])
        return chunk
