"""How the command line prints: tables and colours on a terminal, plain text in a pipe, JSON with `--json`."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvasir.protocol.admin_messages import Done
from kvasir.protocol.errors import BadRequest

F = TypeVar("F", bound=Callable[..., Any])
ID_CHARS = 8  # of a request's id as shown: `kvasir explain` takes the beginning of one
PIPE_WIDTH = 160  # a pipe has no width; tables should not be folded for a width that nobody has


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on the current stdout or stderr; colours only on a terminal and without NO_COLOR.

    Its width is the terminal's; $COLUMNS comes before that, also in a pipe.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def json_option(command: F) -> F:
    """Add `--json` (argument `as_json`) to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def yes_option(command: F) -> F:
    """Add `--yes` (argument `yes`) to a command that cannot be undone."""
    return click.option("--yes", is_flag=True, help="Do not ask whether you are sure.")(command)


def confirm(yes: bool, question: str) -> None:
    """Ask the operator, unless it said `--yes`.

    Raises:
        BadRequest: nobody can be asked, since stdin is no terminal.
        click.Abort: the answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadRequest("this cannot be undone, and nobody is at a terminal to confirm it; add --yes")
    click.confirm(question, abort=True, err=True)


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


def show(reply: Any, as_json: bool, shown: RenderableType) -> None:
    """Print a reply, as JSON or as it is `shown` to people; a text as it is."""
    if as_json:
        print_json(reply)
    elif isinstance(shown, str):
        click.echo(shown)
    else:
        make_console().print(shown)


def print_done(reply: Done, as_json: bool, text: str) -> None:
    """Print that a command took effect."""
    show(reply, as_json, text + ("" if reply.changed else " (it was already)"))


class Rows:
    """A table that fits where it is printed, with nothing cut off.

    Where it is too wide, the columns in `minor` are left out and named below, the first in `minor` first. Where that is
    not enough, each row becomes a record: `column value` pairs on as many lines as they need.
    """

    def __init__(self, *columns: str, numbers: Sequence[str] = (), minor: Sequence[str] = ()) -> None:
        self._columns = columns
        self._numbers = numbers  # aligned to the right
        self._minor = minor
        self._rows: list[list[Text]] = []

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add a row of cells in rich's markup."""
        self._rows.append([Text.from_markup(cell, style=style) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = {
            name: max(cell_len(name), *[row[index].cell_len for row in self._rows], 0)
            for index, name in enumerate(self._columns)
        }
        left_out: list[str] = []
        while sum(widths.values()) + 2 * (len(widths) - 1) > options.max_width:
            if len(left_out) == len(self._minor):
                yield from self._records(options.max_width)
                return
            left_out.append(self._minor[len(left_out)])
            del widths[left_out[-1]]
        table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(widths))
        for name in widths:
            table.add_column(name, justify="right" if name in self._numbers else "left", no_wrap=True)
        for row in self._rows:
            table.add_row(*[cell for name, cell in zip(self._columns, row, strict=True) if name in widths])
        yield table
        named = ", ".join(filter(None, left_out))
        if named:
            yield Text(f"in a wider terminal, or with --json: {named}", "dim")

    def _records(self, width: int) -> RenderResult:
        for first, *others in self._rows:
            yield first
            line = Text("  ")
            for name, cell in zip(self._columns[1:], others, strict=True):
                pair = Text.assemble((f"{name} " if name else "", "dim"), cell, "   ")
                if line.cell_len + len(pair.plain.rstrip()) > width and line.plain.strip():
                    yield line
                    line = Text("  ")
                line.append_text(pair)
            yield line


def facts(pairs: Iterable[tuple[str, str]], style: str = "") -> Table:
    """Return lines of a name and what it is, folded where that is long."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold", style=style)
    for name, value in pairs:
        grid.add_row(name, plain(value))
    return grid


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


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def bar(part: float, whole: float, width: int = 10) -> str:
    """Return a bar of `width` characters, filled for `part` of `whole`."""
    filled = round(width * min(1.0, part / whole)) if whole else 0
    return "█" * filled + "░" * (width - filled)
