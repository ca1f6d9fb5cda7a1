"""What the command lines of all workers have in common. No torch."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from typing import NoReturn

from kvasir.protocol.errors import ConfigurationError


class Parser(argparse.ArgumentParser):
    """A parser with the options that every worker takes, whose errors are `ConfigurationError`s."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        add = self.add_argument
        add("--gateway", required=True, metavar="ENDPOINT", help="the gateway's worker socket, ipc://PATH")
        add("--worker-id", default="", help="unique among the gateway's workers (default: host name and process id)")
        add("--block-size", type=positive, default=16, metavar="TOKENS", help="must be the gateway's (default 16)")
        drain_help = "time to finish requests after SIGTERM (default 20)"
        add("--drain", dest="drain_s", type=_seconds, default=20.0, metavar="S", help=drain_help)
        add("--exit-with-stdin", action="store_true", help="exit when stdin closes, as it does when a supervisor dies")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the arguments in `argv`.

        Raises:
            ConfigurationError: an unknown, missing or senseless one.
        """
        args = self.parse_args(argv)
        if not re.match(r"ipc://.", args.gateway):
            raise ConfigurationError(
                f"--gateway {args.gateway!r} cannot be dialled: a gateway takes workers of its own machine only; "
                "give ipc://PATH."
            )
        args.worker_id = args.worker_id or f"{socket.gethostname()}-{os.getpid()}"
        return args

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value
