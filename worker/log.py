"""Log lines on stderr: `2026-01-31 12:34:56 event key=value key="value with spaces"`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def log(event: str, **fields: object) -> None:
    """Print one line. Ignores a closed stderr, which must not end the worker."""
    line = " ".join(
        [time.strftime("%Y-%m-%d %H:%M:%S"), event, *(f"{key}={_value(value)}" for key, value in fields.items())]
    )
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _value(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    is_plain = text and text.isprintable() and not set(text) & set(' ="')
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def progress(what: str) -> Callable[[int, int], None]:
    """Return what logs every tenth of the way, called with how many are done and of how many."""

    def report(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            log("loading", **{what: f"{done}/{total}"})

    return report
