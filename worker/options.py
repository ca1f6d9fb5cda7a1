"""The worker's command line, checked."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from protocol.errors import ConfigurationError
from worker.oracle_model import PREFIX

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class MemorySize:
    """A number of bytes, or a share of what is free: exactly one is set."""

    size_bytes: int | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """`None` means: chosen when the model and the device are known (`worker.startup`)."""

    model: str
    name: str
    worker_id: str
    gateway: str
    device: str = "auto"
    dtype: str = "auto"
    deterministic: bool = False
    kv_memory: MemorySize | None = None
    block_size: int = 16
    max_requests: int | None = None
    max_step_tokens: int | None = None
    max_context: int | None = None
    threads: int = 1
    drain_s: float = 20.0
    exit_with_stdin: bool = False
    check: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see python -m worker --help")


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Return the options in `argv`. Prints and exits with 0 for --help.

    Raises:
        ConfigurationError: an unknown, missing or senseless argument.
    """
    parser = _Parser(prog="python -m worker", description="Serve one model to a gateway.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a Hugging Face checkpoint, or oracle: for tests")
    add(
        "--gateway",
        required=True,
        metavar="ENDPOINT",
        help="the gateway's worker socket, ipc://PATH or tcp://HOST:PORT",
    )
    add("--name", default="", help="name under which the gateway serves the model (default: the folder's name)")
    add("--worker-id", default="", help="unique among the gateway's workers (default: host name and process id)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16", "float64"), default="auto")
    add("--deterministic", action="store_true", help="float64 on the CPU: the same tokens in any batch, slower")
    add("--kv-memory", type=_memory_size, metavar="SIZE", help="of the KV cache: 512M, 4G, or 60%% of free memory")
    add("--block-size", type=_positive, default=16, metavar="TOKENS", help="must be the gateway's (default 16)")
    add("--max-requests", type=_positive, metavar="N", help="requests taken at a time")
    add("--max-step-tokens", type=_positive, metavar="N", help="token budget of one engine step")
    add("--max-context", type=_positive, metavar="TOKENS", help="longest prompt + answer (default: the model's window)")
    add("--threads", type=_positive, default=1, help="torch threads (default 1)")
    add("--drain", type=_seconds, default=20.0, metavar="S", help="time to finish requests after SIGTERM (default 20)")
    add("--exit-with-stdin", action="store_true", help="exit when stdin closes, as it does when a supervisor dies")
    add("--check", action="store_true", help="verify the cache's bookkeeping whenever idle (for tests)")
    args = parser.parse_args(argv)
    if not re.match(r"(ipc|tcp)://.", args.gateway):
        raise ConfigurationError(f"--gateway {args.gateway!r} is no endpoint; give ipc://PATH or tcp://HOST:PORT.")
    if args.deterministic and (args.device == "cuda" or args.dtype not in ("auto", "float64")):
        raise ConfigurationError("--deterministic computes in float64 on the CPU; leave out --device and --dtype.")
    is_oracle = args.model.startswith(PREFIX)
    return Options(
        model=args.model,
        name=args.name or ("oracle" if is_oracle else Path(args.model).resolve().name),
        worker_id=args.worker_id or f"{socket.gethostname()}-{os.getpid()}",
        gateway=args.gateway,
        device="cpu" if args.deterministic else args.device,
        dtype="float64" if args.deterministic else args.dtype,
        deterministic=args.deterministic,
        kv_memory=args.kv_memory,
        block_size=args.block_size,
        max_requests=args.max_requests,
        max_step_tokens=args.max_step_tokens,
        max_context=args.max_context,
        threads=args.threads,
        drain_s=args.drain,
        exit_with_stdin=args.exit_with_stdin,
        check=args.check,
    )


def _memory_size(text: str) -> MemorySize:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT]?)(?:i?B)?|(%))", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0 or (match[3] and float(match[1]) > 95):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 512M, 4G, or a share of up to 95%")
    if match[3]:
        return MemorySize(share=float(match[1]) / 100)
    return MemorySize(size_bytes=int(float(match[1]) * _UNITS[match[2].upper()]))


def _positive(text: str) -> int:
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
