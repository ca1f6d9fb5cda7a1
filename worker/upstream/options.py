"""The command line of a worker that fronts a vLLM server, checked."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.arguments import Parser, positive
from kvasir.worker.upstream.http_client import Address, parse_url

MAX_UPSTREAMS = 64


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """One server. `events` and `replay`: ZeroMQ endpoints; None: as the server tells, "off" for none."""

    address: Address
    events: str | None
    replay: str | None


@dataclass(frozen=True, slots=True)
class Options:
    """What the process was told. None means: as the upstream says."""

    gateway: str
    name: str
    worker_id: str
    upstreams: tuple[UpstreamOptions, ...]
    upstream_model: str | None
    fingerprint: str | None
    api_key: str | None
    block_size: int
    max_requests: int | None
    drain_s: float
    exit_with_stdin: bool
    insecure: bool


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options in `argv`, which holds `--engine vllm`. Prints and exits with 0 for --help.

    Raises:
        ConfigurationError: an unknown, missing or senseless argument.
    """
    parser = Parser("python -m kvasir.worker --engine vllm", "Serve the model of a vLLM server to a gateway.")
    add = parser.add_argument
    add("--engine", choices=("vllm",), required=True, help=argparse.SUPPRESS)
    add("--upstream", action="append", required=True, metavar="URL", help="http://HOST:PORT; repeatable")
    add("--kv-events", action="append", default=[], metavar="ENDPOINT", help="tcp://HOST:PORT, or `off`; one per URL")
    add("--kv-events-replay", action="append", default=[], metavar="ENDPOINT", help="for missed events; one per URL")
    add("--name", required=True, metavar="MODEL", help="name under which the gateway serves the model")
    add("--upstream-model", metavar="NAME", help="the upstream's name for it (default: its only one); a LoRA's too")
    add("--fingerprint", metavar="TEXT", help="what all workers of the model must share (default: its root upstream)")
    add("--api-key-file", type=Path, metavar="FILE", help="the key that the upstream asks for")
    add("--max-requests", type=positive, metavar="N", help="requests sent at a time (default: max_num_seqs, or 128)")
    add("--insecure", action="store_true", help="allow upstreams and events in the clear beyond private addresses")
    args = parser.read(argv)
    if len(args.upstream) > MAX_UPSTREAMS:
        raise ConfigurationError(f"{len(args.upstream)} upstreams; one process fronts {MAX_UPSTREAMS} at most.")
    for option, given in (("--kv-events", args.kv_events), ("--kv-events-replay", args.kv_events_replay)):
        if given and len(given) != len(args.upstream):
            raise ConfigurationError(f"{option} is given {len(given)} times for {len(args.upstream)} upstreams.")
    if args.kv_events_replay and not args.kv_events:
        raise ConfigurationError("--kv-events-replay belongs to --kv-events; give both or neither.")
    upstreams = []
    for number, url in enumerate(args.upstream):
        address = parse_url(url)
        events = args.kv_events[number] if args.kv_events else None
        replay = args.kv_events_replay[number] if args.kv_events_replay else None
        if not args.insecure:
            if not address.is_tls:
                check_private(f"--upstream {url}", address.host)
            for option, endpoint in (("--kv-events", events), ("--kv-events-replay", replay)):
                if endpoint not in (None, "off"):
                    check_endpoint(f"{option} {endpoint}", endpoint)
        upstreams.append(UpstreamOptions(address, events, replay))
    args.upstreams = tuple(upstreams)
    args.api_key = None if args.api_key_file is None else _read_key(args.api_key_file)
    return Options(**{field.name: getattr(args, field.name) for field in fields(Options)})


def check_endpoint(what: str, endpoint: str) -> None:
    """Refuse an event endpoint that carries tenants' tokens and salts beyond a private network.

    Raises:
        ConfigurationError: it is not ipc, nor tcp on a loopback or private address; `what` names it.
    """
    kind, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if kind not in ("ipc", "tcp") or not rest or (kind == "tcp" and not (port.isdecimal() and int(port) < 1 << 16)):
        raise ConfigurationError(f"{what}: give tcp://HOST:PORT or ipc://PATH.")
    if kind == "tcp":
        check_private(what, host.strip("[]"))


def check_private(what: str, host: str) -> None:
    """Refuse a host with an address that is neither this machine's nor of a private network.

    Raises:
        ConfigurationError: as said, or the name is unknown; `what` names it.
    """
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ConfigurationError(f"{what}: the host {host!r} is not known here: {error}.") from None
    public = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_private]
    if public:
        raise ConfigurationError(
            f"{what} would carry prompts in the clear to {public[0]}, which is no private address; "
            "use https or a private network, or give --insecure."
        )


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--api-key-file {path}: {error}.") from None
    if not key or not key.isprintable():
        raise ConfigurationError(f"--api-key-file {path} holds no key.")
    return key
