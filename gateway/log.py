"""One line per event on stderr: `12:34:56 event key=value`. Never prompts, never keys."""

from __future__ import annotations

import sys
import time


def log(event: str, **fields: object) -> None:
    """Print `event` with `fields`; values with spaces are quoted. Errors of a closed stderr are ignored."""
    parts = [f"{name}={_text(value)}" for name, value in fields.items() if value is not None]
    try:
        print(time.strftime("%H:%M:%S"), event, *parts, file=sys.stderr, flush=True)
    except OSError:
        pass


def _text(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return repr(text) if " " in text or "\n" in text or not text else text
