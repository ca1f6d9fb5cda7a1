"""`python -m kvasir.gateway`: read the settings, run the gateway until SIGINT or SIGTERM.

Exit codes: 0 after a clean stop, 2 when it cannot start (one line says why), 1 for a bug.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import trio

from kvasir.gateway.app import serve
from kvasir.gateway.config import GatewayConfig, ModelConfig
from kvasir.gateway.text.answer_parser import TOOL_PARSERS
from kvasir.protocol.address import is_private
from kvasir.protocol.errors import ConfigurationError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the options\n")


def parse(argv: list[str] | None = None) -> GatewayConfig:
    """Return the settings in `argv`; argparse prints what is wrong and exits with 2."""
    parser = _Parser(prog="kvasir gateway", description="Run a Kvasir gateway in the foreground.")
    parser.add_argument("--state-dir", type=Path, required=True, help="database and deployment secret; survives")
    parser.add_argument("--database", default="", metavar="URL", help="postgresql://... instead of SQLite in STATE_DIR")
    parser.add_argument("--run-dir", type=Path, help="sockets (default: STATE_DIR/run)")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="serve a folder; repeatable")
    parser.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a vLLM server that computes the model NAME, whose folder --model gives for its tokenizer; repeatable",
    )
    parser.add_argument("--upstream-args", default="", metavar="ARGS", help="passed to what fronts the upstreams")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="local workers per model; 0: they dial in")
    parser.add_argument("--worker-args", default="", metavar="ARGS", help="passed to every local worker")
    parser.add_argument(
        "--tool-parser",
        action="append",
        default=[],
        metavar="[MODEL=]NAME",
        help=f"how a model calls tools: {', '.join(TOOL_PARSERS)}, none (default: auto, from its chat template)",
    )
    parser.add_argument("--http", default="127.0.0.1:8000", metavar="HOST:PORT", help="HTTP edge, or `off`")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages may call the HTTP edge, or `*`",
    )
    parser.add_argument("--zmq", action="append", default=[], metavar="ENDPOINT", help="further SDK endpoints")
    parser.add_argument("--insecure", action="store_true", help="allow --zmq beyond this machine: keys in the clear")
    parser.add_argument("--metrics-token-file", type=Path, metavar="FILE", help="serve /metrics to who sends its text")
    parser.add_argument("--no-access-log", action="store_true", help="no line per request")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV block (default: 16)")
    parser.add_argument("--stall-s", type=float, default=15.0, help="a worker that makes no step for so long is lost")
    parser.add_argument("--restart-delays", default="1,2,5,10,30", metavar="S,S,...", help="back-off of local workers")
    parser.add_argument("--drain-s", type=float, default=30.0, help="how long running requests may take at shutdown")
    args = parser.parse_args(argv)
    try:
        delays = tuple(float(part) for part in args.restart_delays.split(","))
        http = None if args.http == "off" else _address(args.http)
        metrics_token = "" if args.metrics_token_file is None else _token(args.metrics_token_file)
        tool_parsers = _tool_parsers(args.tool_parser)
        models = tuple(
            _model(text, args.workers, tuple(shlex.split(args.worker_args)), tool_parsers) for text in args.model
        )
        models = _with_upstreams(models, args.upstream, tuple(shlex.split(args.upstream_args)))
    except ValueError as error:
        parser.error(str(error))
    if len({model.name for model in models}) != len(models):
        parser.error("two models have the same name; every --model needs a name of its own")
    for endpoint in args.zmq:
        if not (args.insecure or is_private(endpoint)):
            parser.error(
                f"--zmq {endpoint!r} would carry keys and prompts in the clear to whoever listens; "
                "give ipc://PATH, an address on 127.0.0.1, or --insecure if the network is safe"
            )
    if args.block_size < 1 or args.workers < 0:
        parser.error("--block-size must be at least 1 and --workers at least 0")
    return GatewayConfig(
        state_dir=args.state_dir.resolve(),
        run_dir=(args.run_dir or args.state_dir / "run").resolve(),
        models=models,
        database=args.database,
        http=http,
        cors_origins=tuple(args.cors_origin),
        metrics_token=metrics_token,
        access_log=not args.no_access_log,
        zmq_endpoints=tuple(args.zmq),
        block_size=args.block_size,
        stall_s=args.stall_s,
        restart_delays_s=delays,
        drain_s=args.drain_s,
    )


def main() -> int:
    """Run and return the exit code."""
    config = parse()
    code = 0
    gc.set_threshold(20_000, 20, 50)  # requests are freed by reference counts; looking for cycles often costs 5 %
    try:
        trio.run(serve, config)
    except* ConfigurationError as errors:
        print(f"kvasir gateway: {_first(errors)}", file=sys.stderr)
        code = 2
    except* KeyboardInterrupt:
        code = 130
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--http {text!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--metrics-token-file {path}: {error}") from None
    if not token:
        raise ValueError(f"--metrics-token-file {path} is empty")
    return token


def _tool_parsers(given: list[str]) -> dict[str, str]:
    """Return the names of tool parsers by model; "" is every other model."""
    found = {}
    for text in given:
        model, _, name = text.rpartition("=")
        if name not in (*TOOL_PARSERS, "auto", "none"):
            raise ValueError(f"--tool-parser {text!r}: there are {', '.join(TOOL_PARSERS)}, auto and none")
        found[model] = name
    return found


def _model(text: str, num_workers: int, worker_args: tuple[str, ...], tool_parsers: dict[str, str]) -> ModelConfig:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ValueError(f"--model {text!r} is no NAME=PATH")
    tool_parser = tool_parsers.get(name, tool_parsers.get("", "auto"))
    return ModelConfig(name, Path(path).resolve(), num_workers, worker_args, tool_parser=tool_parser)


def _with_upstreams(
    models: tuple[ModelConfig, ...], given: list[str], upstream_args: tuple[str, ...]
) -> tuple[ModelConfig, ...]:
    """Return `models` with their upstreams, whose workers get `upstream_args` in the place of those of our own."""
    urls: dict[str, list[str]] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not equals or name not in {model.name for model in models}:
            raise ValueError(f"--upstream {text!r}: give NAME=URL, and --model NAME=PATH with the model's tokenizer")
        urls.setdefault(name, []).append(url)
    return tuple(
        replace(model, upstreams=tuple(urls[model.name]), worker_args=upstream_args) if model.name in urls else model
        for model in models
    )


if __name__ == "__main__":
    sys.exit(main())
