"""The `kvasir` command: groups of commands, one module each, and what happens when one fails.

Whatever goes wrong in an expected way is one line on stderr and exit code 2; Ctrl-C is exit code 130. Anything else is
a bug and shows its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

try:
    import click
    import rich  # noqa: F401
except ModuleNotFoundError as missing:  # the SDK alone installs neither
    print(f"kvasir: {missing.name} is not installed; run: pip install 'kvasir-gateway[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from kvasir.cli.cache import cache
from kvasir.cli.chat import chat
from kvasir.cli.demo import demo
from kvasir.cli.explain import explain
from kvasir.cli.keys import key
from kvasir.cli.output import example, harmless
from kvasir.cli.prefixes import prefix
from kvasir.cli.processes import gateway, worker
from kvasir.cli.status import models, status
from kvasir.cli.tenants import tenant
from kvasir.cli.up import down, up
from kvasir.cli.usage import audit, backup, price, usage
from kvasir.protocol.errors import KvasirError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class InOrder(click.Group):
    """Lists commands in the order of a newcomer's day."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _version() -> str:
    try:
        return version("kvasir-gateway")
    except PackageNotFoundError:
        return "from a source tree"


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="kvasir")
@example("kvasir up --demo          # everything on this machine\nkvasir chat               # in a second terminal")
def cli() -> None:
    """LLM serving on boxes you own: tenants, prefix-routed workers, a paged KV cache."""


money = (usage, price, audit, backup)
for command in (up, down, chat, demo, status, models, tenant, key, prefix, cache, explain, *money, gateway, worker):
    cli.add_command(command)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (default: the process's) and return the exit code."""
    if sys.stdout is None:  # closed by the shell: `kvasir status >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = cli.main(args=args, prog_name="kvasir", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "kvasir"
        return _fail(f"{where}: {error.format_message().rstrip('.')}; see `{where} --help`")
    except click.ClickException as error:
        return _fail(f"kvasir: {error.format_message()}")
    except KvasirError as error:
        return _fail(f"kvasir: {error.message}")
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `kvasir status | head`: nobody reads on, and nothing may be flushed at exit
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        where = error.filename or "what this command prints; what it was to change is changed"
        return _fail(f"kvasir: cannot write {where}: {error.strerror}")
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run())


def _drop_output() -> None:
    """Let nothing that is still buffered fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str) -> int:
    click.echo(harmless(" ".join(text.split())), err=True)
    return EXIT_ERROR
