"""What follows from the facts of a server: what the worker says of itself, and where the server's events come from."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.messages import Hello, Lack, Limits
from kvasir.worker.dial import check_hello
from kvasir.worker.upstream.options import Options, UpstreamOptions, check_endpoint
from kvasir.worker.upstream.server import Facts

LACKS: tuple[Lack, ...] = (
    *("public_zone", "owners", "pins", "retention", "no_store"),  # of the cache
    *("resumed_penalties", "resumed_draws", "resumed_grammars", "bad_words", "max_reasoning_tokens"),  # of drawing
    "order",
)
DEFAULT_MAX_REQUESTS = 128
DEFAULT_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class EventFeed:
    """Where a server's block events are published, and where missed ones are asked for, if anywhere."""

    endpoint: str
    replay: str | None = None
    topic: str = ""


def make_hello(options: Options, worker_id: str, facts: Facts) -> Hello:
    """Return what the worker says of itself.

    Raises:
        ConfigurationError: the upstream's blocks are no whole number of the gateway's, or its figures make no sense.
    """
    metrics, model = facts.metrics, facts.model
    ratio, rest = divmod(metrics.block_size, options.block_size)
    if rest or not 1 <= ratio <= 1024:
        raise ConfigurationError(
            f"the upstream has blocks of {metrics.block_size} tokens, which is no multiple of the gateway's "
            f"{options.block_size}; start one of them with another --block-size."
        )
    limits, default = facts.limits, DEFAULT_MAX_REQUESTS
    lacks = [*LACKS]
    if not facts.has_generate:
        lacks.append("logprobs")
    if not facts.has_grammars:
        lacks.append("grammars")
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id=worker_id,
        incarnation=secrets.token_bytes(16),
        model=options.name,
        fingerprint=(options.fingerprint or f"vllm:{model.root}{f':{model.lora}' if model.lora else ''}")[:256],
        dtype="vllm",
        block_size=options.block_size,
        num_blocks=metrics.num_blocks * ratio,
        limits=Limits(
            max_requests=min(options.max_requests or limits.max_num_seqs or default, 1 << 16),
            max_context=model.max_context,
            max_step_tokens=limits.max_num_batched_tokens or DEFAULT_STEP_TOKENS,
        ),
        device="upstream",
        pid=os.getpid(),
        engine=f"vllm {facts.version}"[:256],
        hit_blocks=ratio,
        lacks=lacks,
    )
    check_hello(hello)
    return hello


def event_feed(options: Options, upstream: UpstreamOptions, facts: Facts) -> EventFeed | None:
    """Return where to follow the server's events: as we were told, else as it tells. None: they are off.

    Raises:
        ConfigurationError: it tells an address that is not private, and not `--insecure`.
    """
    source = facts.events
    if upstream.events == "off" or (upstream.events is None and source is None):
        return None
    if upstream.events is not None or source is None:
        return EventFeed(upstream.events or "", upstream.replay)
    host = upstream.address.host

    def dialled(endpoint: str) -> str:
        for wildcard in ("*", "0.0.0.0", "[::]"):
            endpoint = endpoint.replace(f"tcp://{wildcard}:", f"tcp://{f'[{host}]' if ':' in host else host}:")
        if not options.insecure:
            check_endpoint(f"--kv-events {endpoint}, told by the upstream,", endpoint)
        return endpoint

    replay = source.replay_endpoint
    return EventFeed(dialled(source.endpoint), None if replay is None else dialled(replay), source.topic)
