"""One call of a tool written as a JSON object, `{"name": …, "arguments": {…}}`, while it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OPEN_STRING = re.compile(r'"(?:[^"\\]|\\.)*\\?', re.DOTALL)
_SPACE = " \t\r\n"
_NEXT = re.compile(r'["{}\[\]]')
_NEXT_IN_STRING = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,}\]\s]")
MAX_KEY_CHARS = 256  # a longer one makes no call: it would be looked at again with every token
ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Finds the end of a JSON value that comes in pieces. Brackets must match in number; no more is checked."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._is_scalar: bool | None = None  # None: nothing of it has come

    def feed(self, text: str) -> int:
        """Return how many characters of `text`, the next piece, belong to the value."""
        if self._is_scalar is None and text:
            self._is_scalar = text[0] not in '"{['
        if self._is_scalar:
            end = _SCALAR_END.search(text)
            self.done = end is not None
            return len(text) if end is None else end.start()
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_NEXT_IN_STRING if self._in_string else _NEXT).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            self._take(found[0])
            if not self._depth and not self._in_string and not self._is_escaped:
                self.done = True
                return at
        return at

    def _take(self, char: str) -> None:
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if char in "{[" else -1


class CallObject:
    """Feed it the text of one object. `on_begin` is told the name once the arguments begin, and says whether that is a
    call; `on_arguments` is told their text.

    `done`: the object is complete; `rest` is what came after it. `failed`: it is no call, or none any more; `rest` is
    what was not read. A call without arguments has `{}` if `needs_arguments` is false, else it is no call.
    """

    def __init__(
        self, on_begin: Callable[[str], bool], on_arguments: Callable[[str], None], *, needs_arguments: bool
    ) -> None:
        self.done = self.failed = self.has_begun = False
        self.rest = ""
        self._on_begin, self._on_arguments = on_begin, on_arguments
        self._needs_arguments = needs_arguments
        self._state = self._open
        self._key = ""
        self._value = JsonValue()
        self._collected: list[str] = []
        self._name: str | None = None
        self._arguments: str | None = None  # that came before the name, or that have to be decoded

    def feed(self, text: str) -> None:
        self.rest += text
        while self.rest and not self.done and not self.failed and self._state():
            pass

    # ---- the states: each takes something off `rest` and says whether to go on

    def _open(self) -> bool:
        return self._skip_space() and self._expect("{", self._read_key)

    def _read_key(self) -> bool:
        if not self._skip_space():
            return False
        if self.rest[0] == "}":
            return self._close()
        found = _STRING.match(self.rest, 0, MAX_KEY_CHARS)
        if found is None:
            self.failed = len(self.rest) >= MAX_KEY_CHARS or not _OPEN_STRING.fullmatch(self.rest)
            return False
        self._key = _decode_string(found[0]) or ""
        self.rest = self.rest[found.end() :]
        self._state = self._read_colon
        return True

    def _read_colon(self) -> bool:
        return self._skip_space() and self._expect(":", self._begin_value)

    def _begin_value(self) -> bool:
        if not self._skip_space():
            return False
        self._value, self._collected = JsonValue(), []
        self._state = self._read_value
        if self._key in ARGUMENTS and self._name is not None and self.rest[0] == "{" and not self.has_begun:
            self._begin(self._name)
            self._state = self._read_arguments
        return True

    def _read_value(self) -> bool:
        self._collected.append(self._take_value())
        if not self._value.done:
            return False
        collected, self._collected = "".join(self._collected), []
        if self._key == "name":
            self._name = _decode_string(collected)
            self.failed = not self._name
        elif self._key in ARGUMENTS:
            # Some models write the arguments as a string of JSON.
            self._arguments = _decode_string(collected) or collected
        if self._name and self._arguments is not None and not self.has_begun:
            self._begin(self._name)
            if self.has_begun:
                self._on_arguments("{}" if self._arguments == "null" else self._arguments)
        self._state = self._read_comma
        return True

    def _read_arguments(self) -> bool:
        self._on_arguments(self._take_value())
        if self._value.done:
            self._state = self._read_comma
        return self._value.done

    def _read_comma(self) -> bool:
        if not self._skip_space():
            return False
        if self.rest[0] == "}":
            return self._close()
        return self._expect(",", self._read_key)

    # ---- helpers

    def _close(self) -> bool:
        self.rest = self.rest[1:]
        if not self.has_begun and self._name and not self._needs_arguments:
            self._begin(self._name)
            self._on_arguments("{}" if self.has_begun else "")
        self.done = self.has_begun
        self.failed = not self.has_begun
        return False

    def _begin(self, name: str) -> None:
        self.has_begun = self._on_begin(name)
        self.failed = not self.has_begun

    def _take_value(self) -> str:
        end = self._value.feed(self.rest)
        taken, self.rest = self.rest[:end], self.rest[end:]
        return taken

    def _skip_space(self) -> bool:
        self.rest = self.rest.lstrip(_SPACE)
        return bool(self.rest)

    def _expect(self, char: str, state: Callable[[], bool]) -> bool:
        if self.rest[0] != char:
            self.failed = True
            return False
        self.rest = self.rest[1:]
        self._state = state
        return True


def _decode_string(raw: str) -> str | None:
    """Return the text of a JSON string, None if it is none."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
