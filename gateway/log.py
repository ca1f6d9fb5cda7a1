"""One line per event on stderr: `2026-01-31 12:34:56 event key=value`, local time. Never prompts, never keys."""

from __future__ import annotations

import sys
import time
from functools import lru_cache

import trio


def log(event: str, **fields: object) -> None:
    """Print `event` with `fields`, those that are None left out; what could be misread is quoted.

    Errors of a closed stderr are ignored.
    """
    _write(_line(event, fields))


MAX_STRANGERS = 10  # lines of a tenth of a second


class AccessLog:
    """One line per request, written together ten times a second: a write for each would cost a tenth of the rate.

    Of requests without a tenant only so many have a line, the rest are counted: whoever has no key cannot fill a disk.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._num_strangers = 0

    def __call__(self, event: str, **fields: object) -> None:
        """Take what `log` takes."""
        if "tenant" not in fields:
            self._num_strangers += 1
            if self._num_strangers > MAX_STRANGERS:
                return
        self._lines.append(_line(event, fields))

    async def run(self) -> None:
        """Write what comes, for ever. Cancelled, it writes the rest."""
        try:
            while True:
                await trio.sleep(0.1)
                self._flush()
        finally:
            self._flush()

    def _flush(self) -> None:
        if self._num_strangers > MAX_STRANGERS:
            self._lines.append(_line("requests_without_a_line", {"num": self._num_strangers - MAX_STRANGERS}))
        self._num_strangers = 0
        if self._lines:
            _write("".join(self._lines))
            self._lines.clear()


def _line(event: str, fields: dict[str, object]) -> str:
    parts = [event, *[f"{name}={value}" for name, value in fields.items() if value is not None]]
    line = " ".join(parts)
    # One look at the whole line, since hardly any has a value to quote: with a space, empty or unprintable.
    if line.count(" ") != len(parts) - 1 or "= " in line or line.endswith("=") or not line.isprintable():
        line = " ".join([event, *[f"{name}={_quoted(value)}" for name, value in fields.items() if value is not None]])
    return f"{_stamp(int(time.time()))} {line}\n"


def _write(lines: str) -> None:
    try:
        sys.stderr.write(lines)  # buffered by lines
    except OSError:
        pass


@lru_cache(1)
def _stamp(now: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))


def no_log(event: str, **fields: object) -> None:
    """Take what `log` takes, and print nothing."""


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
