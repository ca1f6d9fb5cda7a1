"""What the edges and the core say to each other: `Submit` and `Cancel` in, `Delta` and `Finished` out.

An edge (HTTP, ZeroMQ) knows tenants' keys, text and clients; the core knows workers, queues and attempts. They share
nothing but these values, so that an edge can become a process of its own. All times are `trio.current_time()` seconds.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from kvasir.protocol.codec import MAX_TOKEN_ID
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.sampling import CacheHint, Priority, RetentionHint, Sampling


class PromptParts(msgspec.Struct, frozen=True):
    """What a conversation's prompt was made of, as digests: all system messages, the tools, and every other message."""

    system: bytes
    tools: bytes
    messages: tuple[bytes, ...]


class Submit(msgspec.Struct, frozen=True):
    """A checked request, ready for the queue.

    `req_id`: random, no two alike. `token_ids` packed; `prefix_hashes` packed, one per full block, hashed with `root`,
    the public zone of `num_public_tokens` and then `namespace`. `tenant_id` owns its blocks and its place in the queue;
    it pays for it, and so does `key_id`, the key it came with. `deadline`: absolute time or None. `sink` gets every
    event of this request. `vocab_size`: its answer's token ids must be below. `is_open_ended`: nobody asked for the
    `max_tokens`, which are what the model's window allows. `counts_prompt` is false for all choices of a prompt but the
    first. `parts`: of a conversation. `priority`: the class it asks for; None, or a higher one than it may have: that
    of its tenant and key. `no_store`: see `Generate`.
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
    key_id: str = ""
    is_open_ended: bool = False
    counts_prompt: bool = True
    parts: PromptParts | None = None
    priority: Priority | None = None
    no_store: bool = False


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


class Allowance(msgspec.Struct, frozen=True):
    """How much of a limit per minute is left, and in how many seconds all of it is."""

    limit: int
    remaining: int
    reset_s: float


class Standing(msgspec.Struct, frozen=True):
    """What a caller may still ask for: the nearest of its limits of requests, and of tokens; None: no such limit."""

    requests: Allowance | None
    tokens: Allowance | None


Changed = Literal[
    "model_changed", "namespace_changed", "system_changed", "tools_changed", "messages_changed", "tokens_changed"
]
Change = Literal["previous_not_found", Changed]
"""The first thing that is not as it was in a tenant's earlier prompt; see `misses.Cause`."""


class CoreApi(Protocol):
    """The core as edges see it. All calls are synchronous and cheap, from any task of the gateway's Trio thread."""

    def submit(self, *submits: Submit) -> None:
        """Queue what one API request asks for: a request per prompt and choice, paid for together.

        Refusals (queue full, a limit, no such model) arrive as `Finished` with an error, never raised.
        """

    def cancel(self, cancel: Cancel) -> None:
        """Stop a request; unknown or finished ids are ignored."""

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        """Note how many tokens of an answer its client has been sent for sure: all that a gateway that is killed now
        will have billed. Unknown ids are ignored."""

    def closed(self, req_id: bytes) -> None:
        """Note that the client of a request has been sent its end, or wants none. Every request that was submitted must
        be closed, after its `Finished` or a `Cancel`; unknown ids are ignored."""

    def models(self) -> dict[str, ModelInfo]:
        """Return the models that are served or configured, by name."""

    def standing(self, tenant_id: str, key_id: str) -> Standing | None:
        """Return what is left of a caller's limits; None: it has none."""

    def change(self, submit: Submit, previous_id: bytes) -> tuple[Change, int] | None:
        """Return why `submit` cannot reuse the prompt of an earlier request of the same tenant, and how many tokens of
        that; None: it begins with all of it. Long forgotten and very short prompts are not found."""
