"""One line per event on stderr: `2026-01-31 12:34:56 event key=value`, local time. Never prompts, never keys."""

from __future__ import annotations

import sys
import time
from functools import lru_cache


def log(event: str, **fields: object) -> None:
    """Print `event` with `fields`; values with spaces are quoted. Errors of a closed stderr are ignored."""
    parts = [f"{name}={_text(value)}" for name, value in fields.items() if value is not None]
    try:
        sys.stderr.write(" ".join((_stamp(int(time.time())), event, *parts)) + "\n")  # buffered by lines
    except OSError:
        pass


@lru_cache(1)
def _stamp(now: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))


def no_log(event: str, **fields: object) -> None:
    """Take what `log` takes, and print nothing."""


def _text(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
