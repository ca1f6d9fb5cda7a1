"""How the command line prints: tables and colours on a terminal, plain text in a pipe, JSON with `--json`."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])
PIPE_WIDTH = 160  # a pipe has no width; tables should not be folded for a width that nobody has


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on the current stdout or stderr; colours only on a terminal and without NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def json_option(command: F) -> F:
    """Add `--json` (argument `as_json`) to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def example(text: str) -> Callable[[F], F]:
    """Put an example at the end of a command's help. Goes below `@click.command`."""

    def decorate(function: F) -> F:
        lines = "\n".join(f"  {line}" for line in text.splitlines())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n{lines}\n"
        return function

    return decorate


def print_json(value: Any) -> None:
    """Print a reply or plain values as JSON: a reply's own tag is left out, defaults are kept."""
    plain = msgspec.to_builtins(value)
    if isinstance(value, msgspec.Struct) and isinstance(plain, dict):
        plain.pop("type", None)
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def make_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns named in `numbers` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def plain(text: object) -> str:
    """Return `text` on one line as it is, with nothing in it taken for markup and no control characters."""
    return escape("".join(char if char.isprintable() else "�" for char in str(text)))


def harmless(text: str) -> str:
    """Return `text` without control characters but newline and tab: what others wrote must not steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def age(created_at: float, now: float | None = None) -> str:
    """Return how long ago a time was: "3 min", "2 d"."""
    return duration((time.time() if now is None else now) - created_at)


def duration(seconds: float) -> str:
    """Return a length of time in its largest fitting unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def count(number: float) -> str:
    """Return a number in four characters or so: 950, 12.3k, 4.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def memory(num_bytes: float) -> str:
    """Return a number of bytes in its largest fitting unit: "950 B", "1.2 GiB"."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def bar(part: float, whole: float, width: int = 10) -> str:
    """Return a bar of `width` characters, filled for `part` of `whole`."""
    filled = round(width * min(1.0, part / whole)) if whole else 0
    return "█" * filled + "░" * (width - filled)
