"""Calls of tools in the text of an answer, found while it comes, in the ways that models write them.

Each parser is a state machine over text: what it finds does not depend on how the text is cut into pieces. White space
around a call is not part of the content. What looks like a call and turns out to be none is content after all; a call
whose name is known is a call, however its arguments end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from kvasir.gateway.text.answer_parts import MAX_SPACE, overlap
from kvasir.gateway.text.call_object import CallObject, JsonValue
from kvasir.protocol.client_messages import AnswerPart, TextPart, ToolCallPart

Tools = dict[str, dict[str, Any]]
"""The functions that may be called: JSON schemas of their parameters by name."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How calls go on from `ToolParser.opening`: what a grammar holds them to. `trigger`: what begins a call inside
    `text`, a regular expression.

    A call after another begins with `joint`, in place of `opened` if its opening begins with that.
    """

    ending: str
    joint: str
    trigger: str = ""
    opened: str = ""
    closing: str = ""
    text: str = r"(.|\n)*"
    has_tags: bool = False


class ToolParser(ABC):
    """Feed it text with `push`, then `finish`. `marks`: special tokens that it must see. `req_id`: of the request that
    is answered, from which calls have their ids.

    `is_over`: a call is complete and only one was wanted (`one_call`); what follows is dropped.
    """

    style: CallStyle
    marks: tuple[str, ...] = ()
    openers: tuple[str, ...] = ()  # what begins a call in the midst of content
    closer = "</tool_call>"

    def __init__(self, tools: Tools, *, one_call: bool = False, req_id: bytes = b"") -> None:
        self.num_calls = 0
        self.is_over = False
        self._one_call = one_call
        self._req_id = req_id
        self._tools = tools
        self._buffer = ""
        self._parts: list[AnswerPart] = []
        self._given_back = ""  # what is content if no call follows
        self._ended = False
        self._after_call = False
        self._state: Callable[[], bool] = self._content

    @staticmethod
    @abstractmethod
    def opening(name: str) -> str:
        """Return how a call of `name` begins, so that the model can be made to go on with it; "": of any function."""

    @abstractmethod
    def _open(self, opener: str) -> None:
        """Set the state for what follows an opener, which is taken off the buffer."""

    @staticmethod
    def call_id(req_id: bytes, index: int) -> str:
        """Return the id of call number `index` of the answer to `req_id`."""
        return f"call_{req_id.hex()[:24]}{index}"

    def begin_with(self, text: str) -> None:
        """Take `text`, with which the prompt ends, as the beginning of the answer."""
        self._parts = self.push(text)

    def push(self, text: str) -> list[AnswerPart]:
        """Return what `text` completes."""
        self._buffer += text
        while not self.is_over and self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[AnswerPart]:
        """Return what was held back: the answer ends here."""
        self._ended = True
        return self.push("")

    # ---- states: each takes something off the buffer and says whether to go on

    def _content(self) -> bool:
        if self._after_call:
            self._buffer = self._buffer.lstrip()
        buffer = self._buffer
        found = [(at, opener) for opener in self.openers if (at := buffer.find(opener)) >= 0]
        if not found:
            num_held = 0 if self._ended else _num_held(buffer, self.openers)
            self._emit(buffer[: len(buffer) - num_held])
            self._buffer = buffer[len(buffer) - num_held :]
            return False
        at, opener = min(found)
        start = max(0, at - MAX_SPACE)
        content = buffer[:start] + buffer[start:at].rstrip()
        self._given_back = buffer[len(content) : at + len(opener)]
        self._emit(content)
        self._buffer = buffer[at + len(opener) :]
        self._open(opener)
        return True

    def _closing(self) -> bool:
        """After a call, before `closer`, which may be missing."""
        if not self._skip_space():
            return False
        closes = self._starts_with(self.closer)
        if closes is None:
            return False
        if closes or (self._ended and self.closer.startswith(self._buffer)):  # or the answer was cut in the midst of it
            self._buffer = self._buffer[len(self.closer) :]
        self._state = self._content
        return True

    def _emit(self, text: str) -> None:
        if text:
            self._after_call = False
            self._parts.append(TextPart(text))

    # ---- for the calls

    def _begin(self, name: str) -> bool:
        """Begin a call; return whether it is one."""
        self._parts.append(ToolCallPart(self.num_calls, self.call_id(self._req_id, self.num_calls), name))
        self.num_calls += 1
        return True

    def _arguments(self, text: str) -> None:
        if text:
            self._parts.append(ToolCallPart(self.num_calls - 1, arguments=text))

    def _end_call(self) -> None:
        self.is_over = self._one_call
        self._after_call = True

    def _give_back(self) -> bool:
        """What looked like a call is content."""
        self._state = self._content
        self._emit(self._given_back)
        return True

    def _skip_space(self) -> bool:
        """Take white space off the buffer; return whether anything is left."""
        rest = self._buffer.lstrip()
        self._given_back += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        return bool(rest)

    def _starts_with(self, mark: str) -> bool | None:
        """Return whether the buffer starts with `mark`, None while that is open."""
        if self._buffer.startswith(mark):
            return True
        return None if not self._ended and mark.startswith(self._buffer) else False


class ObjectParser(ToolParser):
    """What the formats share that write a call as one JSON object."""

    needs_arguments = False

    def _begin_object(self) -> None:
        self._object = CallObject(self._begin, self._arguments, needs_arguments=self.needs_arguments)
        self._state = self._in_object

    def _in_object(self) -> bool:
        piece, self._buffer = self._buffer, ""
        self._object.feed(piece)
        if not self._object.has_begun:
            self._given_back += piece
        if self._object.done:
            self._buffer = self._object.rest
            self._end_call()
            self._after_object()
        elif (self._object.failed or self._ended) and self._object.has_begun:  # a call that breaks off
            self._buffer = self._object.rest
            self._end_call()
            self._after_broken()
        elif self._object.failed or self._ended:
            self._buffer = self._object.rest
            self._given_back = self._given_back[: len(self._given_back) - len(self._buffer)]
            self._give_back()
        return self._state != self._in_object

    def _after_object(self) -> None:
        self._state = self._content

    def _after_broken(self) -> None:
        self._state = self._content


class HermesParser(ObjectParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3."""

    openers = ("<tool_call>",)
    marks = ("<tool_call>", "</tool_call>")
    style = CallStyle("}\n</tool_call>", "\n", "<tool_call>")

    @staticmethod
    def opening(name: str) -> str:
        return '<tool_call>\n{"name": "' + (f'{name}", "arguments": ' if name else "")

    def _open(self, opener: str) -> None:
        self._begin_object()

    def _after_object(self) -> None:
        self._state = self._closing

    def _after_broken(self) -> None:
        self._state = self._skipping

    def _skipping(self) -> bool:
        """Skip the rest of a call that is no JSON."""
        before, mark, after = self._buffer.partition(self.closer)
        if mark or self._ended:
            self._buffer, self._state = after, self._content
            return True
        self._buffer = before[len(before) - overlap(before, self.closer) :]
        return False


class LlamaParser(ObjectParser):
    """`{"name": …, "parameters": {…}}` as the whole answer, several with `;` between: Llama 3.

    The object may follow `<|python_tag|>`. Other JSON is content: only the names of the given tools make a call.
    """

    marks = openers = ("<|python_tag|>",)
    style = CallStyle("}", "; ", text=r"[^{](.|\n)*")  # an answer that begins so is a call
    needs_arguments = True

    def __init__(self, tools: Tools, *, one_call: bool = False, req_id: bytes = b"") -> None:
        super().__init__(tools, one_call=one_call, req_id=req_id)
        self._state = self._beginning

    @staticmethod
    def opening(name: str) -> str:
        return '{"name": "' + (f'{name}", "parameters": ' if name else "")

    def _open(self, opener: str) -> None:
        self._state = self._beginning

    def _beginning(self) -> bool:
        """Nothing but white space has come, or a call has ended."""
        stripped = self._buffer.lstrip()
        if len(self._buffer) - len(stripped) > MAX_SPACE:
            self._state = self._content
        elif not stripped and not self._ended:
            return False
        elif stripped.startswith("{"):
            self._given_back = self._buffer[: len(self._buffer) - len(stripped)]
            self._buffer = stripped
            self._begin_object()
        elif self._after_call and stripped.startswith(";"):
            self._buffer = stripped[1:]
        else:
            self._state = self._content
        return True

    def _begin(self, name: str) -> bool:
        return name in self._tools and super()._begin(name)

    def _after_object(self) -> None:
        self._state = self._beginning


class MistralParser(ObjectParser):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` once per call: Mistral."""

    openers = ("[TOOL_CALLS]",)
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    style = CallStyle("}", ", ", "[TOOL_CALLS]", opened="[TOOL_CALLS][", closing="]")
    _ends_of_name = ("[ARGS]", "[CALL_ID]", "{")

    @staticmethod
    def opening(name: str) -> str:
        return '[TOOL_CALLS][{"name": "' + (f'{name}", "arguments": ' if name else "")

    @staticmethod
    def call_id(req_id: bytes, index: int) -> str:
        """Nine letters and digits: these models' templates refuse others."""
        return f"{int.from_bytes(req_id[:4]):08x}"[-7:] + f"{index:02x}"[-2:]

    def _open(self, opener: str) -> None:
        self._state = self._choose

    def _choose(self) -> bool:
        if not self._skip_space():
            return self._ended and self._give_back()
        if self._buffer[0] == "[":
            self._given_back += "["
            self._buffer = self._buffer[1:]
            self._begin_object()
        elif self._buffer[0] == "{":
            self._begin_object()
        else:
            self._state = self._name
        return True

    def _after_object(self) -> None:
        self._state = self._between

    def _between(self) -> bool:
        """In a list, after a call."""
        if not self._skip_space():
            return False
        if self._buffer[0] == ",":
            self._given_back = ","
            self._buffer = self._buffer[1:]
            self._begin_object()
        else:
            self._buffer = self._buffer.removeprefix("]")
            self._state = self._content
        return True

    def _name(self) -> bool:
        found = [(at, mark) for mark in self._ends_of_name if (at := self._buffer.find(mark)) >= 0]
        at = min(found)[0] if found else len(self._buffer) - self._len_of_begun_end()
        name = self._buffer[:at].strip()
        if len(name) > 256 or len(name.split()) > 1 or ((found or self._ended) and not name):
            return self._give_back()
        if not found:
            return self._ended and self._give_back()
        self._begin(name)
        self._buffer = self._buffer[at:]
        self._value = JsonValue()
        self._state = self._before_value
        return True

    def _len_of_begun_end(self) -> int:
        """Return how many of the last characters may be the beginning of what ends a name."""
        if self._ended:
            return 0
        beginnings = (mark[:length] for mark in self._ends_of_name for length in range(1, len(mark)))
        return max((len(beginning) for beginning in beginnings if self._buffer.endswith(beginning)), default=0)

    def _before_value(self) -> bool:
        """Skip `[CALL_ID]…` and `[ARGS]`."""
        at = self._buffer.find("{")
        if at < 0:
            if self._ended:
                self._end_call()
                self._buffer, self._state = "", self._content
            return self._ended
        self._buffer = self._buffer[at:]
        self._state = self._in_value
        return True

    def _in_value(self) -> bool:
        end = self._value.feed(self._buffer)
        self._arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if self._value.done or self._ended:
            self._end_call()
            self._state = self._content
            return True
        return False


def _num_held(text: str, openers: Collection[str]) -> int:
    """Return how much of the end of `text` may yet not be content: a beginning of an opener, and white space before."""
    end = len(text) - max((overlap(text, opener) for opener in openers), default=0)
    start = max(0, end - MAX_SPACE)
    return len(text) - start - len(text[start:end].rstrip())
