"""What the edges and the core say to each other: `Submit` and `Cancel` in, `Delta` and `Finished` out.

An edge (HTTP, ZeroMQ) knows tenants' keys, text and clients; the core knows workers, queues and attempts. They share
nothing but these values, so that an edge can become a process of its own. All times are `trio.current_time()` seconds.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import MAX_TOKEN_ID, CacheHint, RetentionHint, Sampling, TokenLogprobs


class Submit(msgspec.Struct, frozen=True):
    """A checked request, ready for the queue.

    `token_ids` packed; `prefix_hashes` packed, one per full block, hashed with `root`, the public zone of
    `num_public_tokens` and then `namespace`. `tenant_id` owns its blocks and its place in the queue. `deadline`:
    absolute time or None. `sink` gets every event of this request. `vocab_size`: its answer's token ids must be below.
    """

    req_id: bytes
    tenant_id: str
    model: str
    token_ids: bytes
    num_prompt_tokens: int
    root: bytes
    prefix_hashes: bytes
    num_public_tokens: int
    namespace: bytes
    max_tokens: int
    sampling: Sampling
    sink: Sink
    arrived: float
    deadline: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_hint: CacheHint | None = None
    retention: tuple[RetentionHint, ...] = ()
    vocab_size: int = MAX_TOKEN_ID + 1


class Cancel(msgspec.Struct, frozen=True):
    """Stop a request. The sink still gets its `Finished`, with `reason` ("abort", or "stop" after a stop string).

    `num_output_tokens`: how many of the delivered tokens the client gets; None: all of them.
    """

    req_id: bytes
    reason: str = "abort"
    num_output_tokens: int | None = None


class Delta(msgspec.Struct, frozen=True):
    """New tokens of a request, packed, in order, exactly once."""

    req_id: bytes
    token_ids: bytes
    logprobs: list[TokenLogprobs] = []


class Finished(msgspec.Struct, frozen=True):
    """The one terminal event. `reason` in stop | length | abort | deadline | error; `error` is set with the last two.

    The numbers are those that the tenant's usage counts: `num_prompt_tokens` is 0 if, as far as reports show, no worker
    has begun to compute the prompt. `num_cached_tokens` of them the first attempt found in the cache. `ttft_s`: from
    arrival to first token.
    """

    req_id: bytes
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    worker_id: str = ""
    num_attempts: int = 0
    ttft_s: float = 0.0
    error: ErrorInfo | None = None


Event = Delta | Finished


class Sink(Protocol):
    """Where an edge wants its events. `put` must not block and must not raise; called from the core, in order."""

    def put(self, event: Event) -> None: ...


class ModelInfo(msgspec.Struct, frozen=True):
    """What edges need to know of a served model. None of its workers being alive leaves it known, with 0 workers.

    `max_context`: what the largest of its workers takes. `engine` computes it, and `lacks` what `messages.Lack` lists.
    """

    name: str
    fingerprint: str
    dtype: str
    block_size: int
    max_context: int
    num_workers: int
    engine: str = "kvasir"
    lacks: frozenset[str] = frozenset()


class CoreApi(Protocol):
    """The core as edges see it. All calls are synchronous and cheap, from any task of the gateway's Trio thread."""

    def submit(self, submit: Submit) -> None:
        """Queue a request. Refusals (queue full, no such model) arrive as `Finished` with an error, never raised."""

    def cancel(self, cancel: Cancel) -> None:
        """Stop a request; unknown or finished ids are ignored."""

    def models(self) -> dict[str, ModelInfo]:
        """Return the models that are served or configured, by name."""
