"""One running request as an edge sees it: the sink of its events, what they come to, and who waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from kvasir.gateway.core.api import Cancel, CoreApi, Delta, Event, Finished, Submit
from kvasir.gateway.text.answer_parser import AnswerParser
from kvasir.gateway.text.detokenizer import Detokenizer
from kvasir.protocol.client_messages import AnswerPart, TextPart
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.tokens import num_tokens, view_tokens

MAX_WAITING_EVENTS = 16_384  # about 3 MB of them


@dataclass(slots=True)
class Piece:
    """What an answer has gained since the last time: final text, its tokens (packed), and perhaps the end.

    `start`: how many characters the answer had before. `parts`: what a parsed answer gained; `text` is its content.
    """

    text: str = ""
    token_ids: bytes = b""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None
    start: int = 0
    parts: Sequence[AnswerPart] = ()
    num_reasoning_tokens: int = 0
    stop_string: str | None = None  # that ended the answer

    def extend(self, more: Piece) -> None:
        self.text += more.text
        self.token_ids += more.token_ids
        self.logprobs += more.logprobs
        if more.parts:
            self.parts = [*self.parts, *more.parts]
        self.num_reasoning_tokens += more.num_reasoning_tokens
        self.finished = more.finished or self.finished
        self.stop_string = more.stop_string or self.stop_string


@dataclass(slots=True, eq=False)
class Answer:
    """Sink of one request. `wake` is called at an event when the answer had none yet; `take` empties it.

    `parser`: tells reasoning and calls of tools from content; an answer with calls ends with the reason "tool_calls".
    After a stop string, or the one call that was wanted, the core is told to stop and how many tokens the client gets.
    What still comes is dropped. The `Finished` that ends the answer has the core's numbers.
    """

    core: CoreApi
    wake: Callable[[Event], None]
    detokenizer: Detokenizer | None = None
    parser: AnswerParser | None = None
    submit: Submit | None = None
    num_tokens: int = 0
    num_sent: int = 0  # of them, as far as the kernel or the client's link has taken them
    num_chars: int = 0
    is_over: bool = False
    _events: list[Event] = field(default_factory=list)

    def put(self, event: Event) -> None:
        self._events.append(event)
        self.wake(event)

    def take(self) -> Piece:
        """Return what came since the last call."""
        events, self._events = self._events, []
        piece = Piece(start=self.num_chars)
        texts, packed = [], []  # joined at the end: a whole answer comes in one call, with an event per step
        detokenizer = self.detokenizer
        for event in events:
            if isinstance(event, Finished):
                piece.finished = event
                self.is_over = True
            elif detokenizer is None or not detokenizer.stopped:
                packed.append(event.token_ids)
                piece.logprobs += event.logprobs
                self.num_tokens += num_tokens(event.token_ids)
                if detokenizer is not None:
                    texts.append(self._text(detokenizer, event, piece))
        if piece.finished is not None and detokenizer is not None:
            rest = detokenizer.finish()
            texts.append(rest if self.parser is None else self._content(piece, self.parser, rest, 0))
            if detokenizer.stopped:
                piece.finished = msgspec.structs.replace(piece.finished, reason="stop", error=None)
                piece.stop_string = detokenizer.stop_string
            if self.parser is not None:
                texts.append(_add_parts(piece, self.parser.finish()))
                if self.parser.num_calls and piece.finished.reason == "stop":
                    piece.finished = msgspec.structs.replace(piece.finished, reason="tool_calls")
        piece.token_ids = b"".join(packed)
        piece.text = "".join(texts)
        self.num_chars += len(piece.text)
        return piece

    def sent(self) -> None:
        """Note that the client has been sent all that was taken, for sure."""
        if self.num_tokens > self.num_sent:
            self.posted()
            self.arrived(self.num_sent)

    def posted(self) -> None:
        """Note that all that was taken is on its way to the client, which pays for it also if it is gone."""
        self.num_sent = self.num_tokens

    def arrived(self, num_tokens: int) -> None:
        """Note that the client says to have so many tokens."""
        if self.submit is not None:
            self.core.sent(self.submit.req_id, min(num_tokens, self.num_sent))

    def close(self) -> None:
        """The client has been sent the end: tell the core. Idempotent."""
        if self.submit is not None:
            self.core.closed(self.submit.req_id)

    def cancel(self) -> None:
        """Nobody wants the rest: tell the core, unless it has ended. What was sent is paid for. Idempotent."""
        if self.submit is not None:
            if not self.is_over:
                self.is_over = True
                self.core.cancel(Cancel(self.submit.req_id, num_output_tokens=self.num_sent))
            self.core.closed(self.submit.req_id)

    def _text(self, detokenizer: Detokenizer, delta: Delta, piece: Piece) -> str:
        ids = view_tokens(delta.token_ids)
        if ids and ids[-1] in detokenizer.end_token_ids:
            ids = ids[:-1]  # the token that ends an answer is counted, not shown
        text = detokenizer.push(ids)
        if self.parser is not None:
            text = self._content(piece, self.parser, text, len(ids))
        if detokenizer.stopped and self.submit is not None:
            self.core.cancel(Cancel(self.submit.req_id, "stop", self.num_tokens))
        return text

    def _content(self, piece: Piece, parser: AnswerParser, text: str, num_tokens: int) -> str:
        """Return the content of `text`; `piece` gains all its parts."""
        was_reasoning = parser.is_reasoning
        content = _add_parts(piece, parser.push(text))
        if was_reasoning or parser.is_reasoning:
            piece.num_reasoning_tokens += num_tokens
        if parser.is_over and self.detokenizer is not None:
            self.detokenizer.stopped = True
        return content


def _add_parts(piece: Piece, parts: list[AnswerPart]) -> str:
    if not parts:
        return ""
    if isinstance(piece.parts, list):
        piece.parts += parts
    else:
        piece.parts = parts
    return "".join([part.text for part in parts if isinstance(part, TextPart)])


class Waiter:
    """Wakes one task about several answers: whenever `num_events` have come, and when all have ended.

    `overrun` is called when very many events wait: the client does not read.
    """

    def __init__(self, num_open: int, overrun: Callable[[], None], *, num_events: int) -> None:
        self.num_open = num_open
        self._overrun = overrun
        self._num_events = num_events
        self._num_waiting = 0
        self._has_news = False
        self._task: trio.lowlevel.Task | None = None

    def wake(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.num_open -= 1
        self._num_waiting += 1
        if self._num_waiting > MAX_WAITING_EVENTS:
            self._overrun()
        if self._num_waiting % self._num_events == 0 or not self.num_open:
            self._has_news = True
            if self._task is not None:
                task, self._task = self._task, None
                trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Wait for news since the last wait. A checkpoint only if there are none yet."""
        if not self._has_news:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        self._has_news = False
        self._num_waiting = 0

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
