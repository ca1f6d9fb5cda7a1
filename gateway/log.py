"""One line per event on stderr: `2026-01-31 12:34:56 event key=value`, local time. Never prompts, never keys."""

from __future__ import annotations

import sys
import time


def log(event: str, **fields: object) -> None:
    """Print `event` with `fields`; values with spaces are quoted. Errors of a closed stderr are ignored."""
    parts = [f"{name}={_text(value)}" for name, value in fields.items() if value is not None]
    try:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), event, *parts, file=sys.stderr, flush=True)
    except OSError:
        pass


def no_log(event: str, **fields: object) -> None:
    """Take what `log` takes, and print nothing."""


def _text(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
