"""Calls of tools in the tags of Qwen3-Coder:

    <tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>

Values are plain text; the function's schema says which are numbers, booleans, lists or objects. The arguments come out
as JSON: strings while they come, other values when they have ended.
"""

from __future__ import annotations

import json
from typing import Any

from kvasir.gateway.text.answer_parts import overlap
from kvasir.gateway.text.tool_calls import CallStyle, ToolParser
from kvasir.protocol.call_grammar import parameter_kind

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_ENDS_OF_VALUE = (_PARAMETER_END, f"\n{_PARAMETER}", f"\n{_FUNCTION_END}")  # the first is sometimes left out
_LONGEST = max(map(len, _ENDS_OF_VALUE))


class QwenCoderParser(ToolParser):
    """The format above. `<tool_call>` may be missing, as these models sometimes leave it out."""

    openers = (_CALL, _FUNCTION)
    marks = (_CALL, _CALL_END)
    style = CallStyle("</function>\n</tool_call>", "\n", "<tool_call>", has_tags=True)

    @staticmethod
    def opening(name: str) -> str:
        return f"{_CALL}\n{_FUNCTION}" + (f"{name}>\n" if name else "")

    def _open(self, opener: str) -> None:
        self._state = self._before_function if opener == _CALL else self._name

    def _before_function(self) -> bool:
        if not self._skip_space():
            return self._ended and self._give_back()
        starts = self._starts_with(_FUNCTION)
        if starts:
            self._given_back += _FUNCTION
            self._buffer = self._buffer[len(_FUNCTION) :]
            self._state = self._name
        return bool(starts) or (starts is False and self._give_back())

    def _name(self) -> bool:
        name, end, rest = self._buffer.partition(">")
        if not end or not name.strip() or len(name) > 256 or "<" in name:
            is_hopeless = self._ended or end or len(name) > 256 or "<" in name
            return bool(is_hopeless) and self._give_back()
        self._begin(name.strip())
        self._schema: dict[str, Any] = self._tools.get(name.strip(), {})
        self._num_parameters = 0
        self._arguments("{")
        self._buffer = rest
        self._state = self._between
        return True

    def _between(self) -> bool:
        """In a function, outside its parameters: whatever is no tag is passed over."""
        found = [(at, mark) for mark in (_PARAMETER, _FUNCTION_END, _CALL_END) if (at := self._buffer.find(mark)) >= 0]
        if not found:
            if self._ended:
                self._end_function("")
            else:
                num_held = max(overlap(self._buffer, mark) for mark in (_PARAMETER, _FUNCTION_END, _CALL_END))
                self._buffer = self._buffer[len(self._buffer) - num_held :]
            return self._ended
        at, mark = min(found)
        self._buffer = self._buffer[at + len(mark) :]
        if mark == _PARAMETER:
            self._state = self._key
        else:
            self._arguments("}")
            self._end_function(mark)
        return True

    def _key(self) -> bool:
        key, end, rest = self._buffer.partition(">")
        if not end:
            if self._ended:
                self._end_function("")
            return self._ended
        self._kind = parameter_kind(self._schema, key.strip())
        self._arguments((", " if self._num_parameters else "") + json.dumps(key.strip(), ensure_ascii=False) + ": ")
        self._num_parameters += 1
        self._buffer = rest
        self._is_begun = False
        self._num_searched = 0
        self._state = self._value
        return True

    def _value(self) -> bool:
        start = max(0, self._num_searched - _LONGEST)
        found = [(at, mark) for mark in _ENDS_OF_VALUE if (at := self._buffer.find(mark, start)) >= 0]
        self._num_searched = len(self._buffer)
        if not found:
            if self._kind == "string":
                self._stream_string()
            if self._ended:
                self._arguments(self._rest_of_value(self._buffer))
                self._buffer = ""
                self._end_function("")
            return self._ended
        at, mark = min(found)
        self._arguments(self._rest_of_value(self._buffer[:at]))
        self._buffer = self._buffer[at + (len(mark) if mark == _PARAMETER_END else 0) :]
        self._state = self._between
        return True

    def _stream_string(self) -> None:
        """Let out what is sure to stay of a string: neither a tag nor the line feed before it."""
        num_held = max(overlap(self._buffer, mark) for mark in _ENDS_OF_VALUE)
        text = self._buffer[: len(self._buffer) - num_held].removesuffix("\n")
        rest = self._buffer[len(text) :]
        if not self._is_begun:
            text = text.removeprefix("\n")
            if not text:
                return
            self._arguments('"')
            self._is_begun = True
        self._arguments(_escaped(text))
        self._buffer, self._num_searched = rest, len(rest)

    def _rest_of_value(self, text: str) -> str:
        """Return the JSON of a value, or of the rest of a string."""
        text = text.removesuffix("\n")
        if self._is_begun:
            return _escaped(text) + '"'
        text = text.removeprefix("\n")
        if text.lower() == "null" and self._kind != "string":
            return "null"
        return _converted(text, self._kind)

    def _end_function(self, mark: str) -> None:
        self._end_call()
        self._state = self._closing if mark == _FUNCTION_END else self._content


def _converted(text: str, kind: str) -> str:
    """Return `text` as JSON of type `kind`, as a string where it is no such thing."""
    try:
        match kind:
            case "integer":
                return json.dumps(int(text))
            case "number":
                value = float(text)
                return json.dumps(int(value) if value.is_integer() else value, allow_nan=False)
            case "boolean" if text.strip().lower() in ("true", "false"):
                return text.strip().lower()
            case "array" | "object":
                return json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, OverflowError, RecursionError):
        pass
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
