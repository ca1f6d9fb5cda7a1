"""The worker's command line, checked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kvasir.cache.policies import DEFAULT_POLICY, POLICIES
from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.arguments import Parser, positive
from kvasir.worker.events.access import check_endpoint, read_client_keys, read_secret_key
from kvasir.worker.events.publisher import PublisherOptions
from kvasir.worker.events.wire import WireForm
from kvasir.worker.model.oracle_model import PREFIX

MAX_THREADS = 1024  # many more, and the machine has none left
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
    device: str
    dtype: str
    kv_memory: MemorySize | None
    block_size: int
    eviction_policy: str
    max_requests: int | None
    max_step_tokens: int | None
    max_context: int | None
    threads: int
    speculate: str
    draft_model: str
    graphs: str
    drain_s: float
    exit_with_stdin: bool
    check: bool
    kv_events: PublisherOptions | None
    kv_form: WireForm


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Return the options in `argv`. Prints and exits with 0 for --help.

    Raises:
        ConfigurationError: an unknown, missing or senseless argument.
    """
    parser = Parser("python -m kvasir.worker", "Serve one model to a gateway.")
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a Hugging Face checkpoint, or oracle: for tests")
    add("--name", default="", help="name under which the gateway serves the model (default: the folder's name)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16", "float64"), default="auto")
    add("--deterministic", action="store_true", help="float64 on the CPU: the same tokens in any batch, slower")
    add(
        "--kv-memory",
        type=_memory_size,
        metavar="SIZE",
        help="of the KV cache: 512M, 4G, or 60%% of free memory at most",
    )
    policy_help = f"which blocks go (default {DEFAULT_POLICY})"
    add("--eviction-policy", choices=POLICIES, default=DEFAULT_POLICY, help=policy_help)
    add("--max-requests", type=positive, metavar="N", help="requests taken at a time")
    add("--max-step-tokens", type=positive, metavar="N", help="token budget of one engine step")
    add("--max-context", type=positive, metavar="TOKENS", help="longest prompt + answer (default: the model's window)")
    speculate_help = "drafts from what was said before; auto: lookup on a CPU, off on CUDA (unproven there)"
    add("--speculate", choices=("auto", "lookup", "off"), default="auto", help=speculate_help)
    draft_help = "folder of a smaller model with the same tokenizer, which drafts where nothing was said before"
    add("--draft-model", default="", metavar="PATH", help=draft_help)
    graphs_help = (
        "CUDA graphs of decode steps; auto: where they capture and prove right at start (unproven on a device)"
    )
    add("--graphs", choices=("auto", "off"), default="auto", help=graphs_help)
    add("--threads", type=positive, default=1, help="torch threads (default 1)")
    add("--check", action="store_true", help="verify the cache's bookkeeping whenever idle (for tests)")
    _add_event_options(parser)
    args = parser.read(argv)
    if args.deterministic and (args.device == "cuda" or args.dtype not in ("auto", "float64")):
        raise ConfigurationError("--deterministic computes in float64 on the CPU; leave out --device and --dtype.")
    if args.deterministic:
        args.device, args.dtype = "cpu", "float64"
    if args.draft_model and (args.speculate == "off" or args.model.startswith(PREFIX)):
        raise ConfigurationError("--draft-model drafts for a real model, and not with --speculate off; leave one out.")
    if args.threads > MAX_THREADS:
        raise ConfigurationError(
            f"--threads {args.threads} is more than {MAX_THREADS}; give as many as there are cores."
        )
    if not args.name:
        args.name = "oracle" if args.model.startswith(PREFIX) else Path(args.model).resolve().name
    args.kv_form = WireForm(args.kv_events_form, args.kv_events_hashes, args.publish_token_ids)
    args.kv_events = _event_options(args, args.worker_id)
    return Options(**{field.name: getattr(args, field.name) for field in fields(Options)})


def _add_event_options(parser: argparse.ArgumentParser) -> None:
    title = "block events, as vLLM publishes them (docs/kv-events.md); {worker} stands for the worker's id"
    group = parser.add_argument_group(title)
    add = group.add_argument
    add("--kv-events", metavar="ENDPOINT", help="publish on ipc://PATH or tcp://HOST:PORT; connect:ENDPOINT dials")
    add("--kv-events-replay", metavar="ENDPOINT", help="answer requests for missed batches here")
    add("--kv-events-topic", default="", metavar="TEXT", help="first frame of every message (default: empty)")
    add("--kv-events-form", choices=("map", "array"), default="map", help="array: as before June 2026 (default map)")
    add("--kv-events-hashes", choices=("bytes", "int"), default="bytes", help="int: the low 64 bits (default bytes)")
    add("--publish-token-ids", action="store_true", help="every reader of the events can then read the prompts")
    add("--kv-events-key", type=Path, metavar="FILE", help="CURVE secret key of both sockets, Z85")
    add("--kv-events-clients", type=Path, metavar="FILE", help="CURVE public keys that may connect, one per line")
    add("--insecure-events", action="store_true", help="allow tcp beyond this machine without CURVE")


def _event_options(args: argparse.Namespace, worker_id: str) -> PublisherOptions | None:
    """Return where to publish, with the worker's id in the place of {worker}.

    None without --kv-events, and then none of its options may be given.
    """
    if args.kv_events is None:
        for name in ("kv_events_replay", "kv_events_topic", "publish_token_ids", "kv_events_key", "kv_events_clients"):
            if getattr(args, name):
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} says how to publish; give --kv-events ENDPOINT too."
                )
        return None
    if (args.kv_events_key is None) != (args.kv_events_clients is None):
        raise ConfigurationError("--kv-events-key and --kv-events-clients belong together; give both or neither.")
    has_key = args.kv_events_key is not None
    endpoint = args.kv_events.replace("{worker}", worker_id)
    replay_endpoint = args.kv_events_replay and args.kv_events_replay.replace("{worker}", worker_id)
    for option, text in (("--kv-events", endpoint), ("--kv-events-replay", replay_endpoint)):
        if text is not None:
            check_endpoint(option, text, has_key=has_key, insecure=args.insecure_events)
    return PublisherOptions(
        endpoint=endpoint,
        replay_endpoint=replay_endpoint,
        topic=args.kv_events_topic.replace("{worker}", worker_id),
        replay_with_topic=args.kv_events_form == "map",
        secret_key=read_secret_key(args.kv_events_key) if has_key else None,
        client_keys=read_client_keys(args.kv_events_clients) if has_key else frozenset(),
    )


def _memory_size(text: str) -> MemorySize:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT]?)(?:i?B)?|(%))", text.strip(), re.IGNORECASE)
    value = float(match[1]) if match is not None else 0.0
    if match is None or not 0 < value < 1e15 or (match[3] and value > 95):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 512M, 4G, or a share of up to 95%")
    if match[3]:
        return MemorySize(share=value / 100)
    return MemorySize(size_bytes=int(value * _UNITS[match[2].upper()]))
