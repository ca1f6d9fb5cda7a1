"""Gateway <-> worker: commands go to a worker, reports come from it.

A worker dials in and says `Hello`; `Welcome` or `Refused` is the answer. The gateway then sends at most
`Hello.limits.max_requests` unfinished `Generate`s (credits), several commands per ZeroMQ message where it has them, a
frame each. Every `Generate` gets exactly one `Output` with a `finish_reason`, aborted ones too. One `StepReport` per
engine step carries everything that happened in it. Token ids and hashes are packed bytes (`protocol.tokens`,
`protocol.prefix`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvasir.protocol.codec import (
    MAX_TOKENS,
    Count,
    Decoder,
    Id,
    Key16,
    Message,
    Name,
    PackedHashes,
    PackedTokens,
    Reason,
    Seconds,
    TokenId,
)
from kvasir.protocol.sampling import CacheHint, RetentionHint, Sampling

MAX_FRAME_BYTES = 64 << 20
FinishReason = Literal["stop", "length", "abort", "deadline", "error"]

Lack = Literal[
    "public_zone",
    "owners",
    "pins",
    "retention",
    "resumed_penalties",
    "resumed_draws",
    "resumed_grammars",
    "logprobs",
    "bad_words",
    "max_reasoning_tokens",
    "order",
    "grammars",
    "no_store",
]
"""What a worker that fronts another engine cannot do.

public_zone: share published prefixes between tenants; prompts are hashed in the tenant's namespace throughout.
owners: floors, caps, and clearing what one tenant has cached. pins, retention: keep chosen blocks.
resumed_penalties: go on from prompt + delivered tokens where penalties look at what was generated.
resumed_draws: go on with a sampled request and draw the tokens that the worker before would have drawn.
resumed_grammars: go on from prompt + delivered tokens where a grammar holds the answer.
logprobs, bad_words, max_reasoning_tokens: the request fields of that name.
order: compute the shortest waiting prompt first; they are computed as they come.
grammars: hold answers to a `Grammar`. no_store: leave nothing of a request in the cache.
"""


# ---- commands: gateway -> worker ---------------------------------------------------------------------------------


class Command(Message, tag_field="type"):
    """Something a worker is asked to do."""


class Identify(Command, tag="identify"):
    """The gateway does not know this peer (it has restarted): say `Hello` again."""


class Welcome(Command, tag="welcome"):
    """The worker is in. A worker that sees another `gateway_epoch` than before drops all its sequences.

    `public_namespace`: what the public zone of every request is hashed in. `heartbeat_s`: an idle worker reports at
    least this often. `root`: of every chain of the worker's model.
    """

    gateway_epoch: Id
    public_namespace: Key16
    heartbeat_s: Seconds
    root: Key16 = bytes(16)


class Refused(Command, tag="refused"):
    """The worker may not join; it prints `reason` and exits."""

    reason: Reason


class Generate(Command, tag="generate"):
    """Start generating. `token_ids` = prompt, then what earlier attempts have already delivered.

    `prefix_hashes`: 16 bytes per full block of `token_ids`; the first `num_public_tokens` (whole blocks) are hashed in
    the public namespace, the rest in `namespace`, which also extends the chain over generated tokens. `max_tokens`:
    how many more tokens may be drawn. `tenant` owns the blocks. `deadline_s`: remaining time at sending. `retention`
    is heeded for tenants with a floor or a cap, among whose own blocks it says which stay. `lead`: how many tokens more
    than fair its tenant was charged, more for a low class and less for a high one; the worker lets it wait for that.
    With `no_store` not one block of it is published: it reads what is cached, and leaves nothing.
    """

    req_id: Id
    attempt: Count
    tenant: Name
    token_ids: PackedTokens
    num_prompt_tokens: Count
    root: Key16
    prefix_hashes: PackedHashes
    num_public_tokens: Count
    namespace: Key16
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    sampling: Sampling
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = []
    ignore_eos: bool = False
    deadline_s: Seconds | None = None
    cache_hint: CacheHint | None = None
    retention: Annotated[list[RetentionHint], Meta(max_length=16)] = []
    lead: float = 0.0
    no_store: bool = False


class Abort(Command, tag="abort"):
    """Stop a request and free its blocks within one step. Unknown ids are ignored: it may just have finished."""

    req_id: Id
    attempt: Count


class Resync(Command, tag="resync"):
    """The gateway missed block events: send a `Snapshot`."""


class Drain(Command, tag="drain"):
    """Take nothing new, finish what runs within `deadline_s`, say `Bye`, exit 0."""

    deadline_s: Seconds


class Quota(Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant's floor and cap in blocks of one worker's pool. `cap` None: none."""

    floor: Count = 0
    cap: Annotated[int, Meta(ge=1, le=1 << 53)] | None = None


class Quotas(Command, tag="quotas"):
    """These floors and caps, by tenant, hold from now on in the place of all before. A tenant not named has none."""

    quotas: Annotated[dict[Name, Quota], Meta(max_length=1 << 16)]


class ClearTenant(Command, tag="clear_tenant"):
    """Drop what is cached of a tenant and not in use."""

    tenant: Name


class Pin(Command, tag="pin"):
    """Keep the blocks of a published prefix from now on, as far as they are resident or become so.

    `token_ids` are whole blocks, `prefix_hashes` in the public namespace. A name that is pinned already is replaced.
    `prewarm`: compute now what is not resident. The gateway's names are "PREFIX/NUMBER", one per form of the prefix.
    """

    name: Name
    token_ids: PackedTokens
    root: Key16
    prefix_hashes: PackedHashes
    prewarm: bool = False

    @property
    def prefix(self) -> str:
        """The published prefix that this is a form of."""
        return self.name.rpartition("/")[0]


class Unpin(Command, tag="unpin"):
    """Let a pinned prefix go. Unknown names are ignored."""

    name: Name


# ---- reports: worker -> gateway ----------------------------------------------------------------------------------


class Report(Message, tag_field="type"):
    """Something a worker says."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """`max_requests`: credits. `max_context`: longest prompt + answer in tokens. `max_step_tokens`: a step's budget."""

    max_requests: Annotated[int, Meta(ge=1, le=1 << 16)]
    max_context: Annotated[int, Meta(ge=1)]
    max_step_tokens: Annotated[int, Meta(ge=1)]


class Hello(Report, tag="hello"):
    """First message of a connection. `incarnation` is random per boot; `fingerprint` identifies the weights.

    `bytes_per_block`: of KV memory, all layers; 0 for a worker that keeps none. `engine`: what computes, our own or
    another that the worker fronts, which may lack something (`Lack`) and may find prefixes only in whole runs of
    `hit_blocks` blocks. `attention`: the path that computes it, and if that is not the best for `device`, why.
    """

    protocol_version: int
    worker_id: Name
    incarnation: Id
    model: Name
    fingerprint: Name
    dtype: Name
    block_size: Annotated[int, Meta(ge=1, le=1024)]
    num_blocks: Annotated[int, Meta(ge=1)]
    limits: Limits
    device: Name = "cpu"
    attention: Annotated[str, Meta(max_length=256)] = ""
    pid: Count = 0
    bytes_per_block: Count = 0
    engine: Name = "kvasir"
    hit_blocks: Annotated[int, Meta(ge=1, le=1024)] = 1
    lacks: Annotated[list[Lack], Meta(max_length=16)] = []


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """One drawn token's log probability and the n best candidates, most likely first."""

    logprob: float
    top: Annotated[list[tuple[int, float]], Meta(max_length=20)] = []


class Output(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """New tokens of one request. `seq`: index of the first one among all generated tokens of the request.

    `finish_reason` ends the request; a token that stopped it (end of sequence or stop id) is the last of `token_ids`.
    `num_cached_tokens` comes once, with the first output of an attempt; an engine that tells only at the end sends
    `guessed_cached_tokens` with the first one and the true number with the last. `num_extra_tokens`: work for
    this request beside its tokens that nobody is billed for, counted in tokens of the model: drafts that did not hold,
    and what a draft model computed.
    """

    req_id: Id
    attempt: Count
    seq: Count
    token_ids: PackedTokens = b""
    finish_reason: FinishReason | None = None
    num_cached_tokens: Count | None = None
    logprobs: Annotated[list[TokenLogprobs], Meta(max_length=4096)] = []
    error: Reason = ""
    guessed_cached_tokens: Count | None = None
    num_extra_tokens: Annotated[int, Meta(ge=0, le=1 << 16)] = 0


class Drafts(Struct, frozen=True, forbid_unknown_fields=True):
    """What `proposer` proposed: in `num_runs` runs `num_drafted` tokens were computed before they were drawn, of which
    `num_accepted` held."""

    proposer: Name
    num_runs: Count
    num_drafted: Count
    num_accepted: Count


class Load(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A worker after a step. `num_free_blocks` counts blocks that no request uses; what follows describes this step
    alone. Its tokens and seconds teach the gateway the worker's rates."""

    num_running: Count = 0
    num_waiting: Count = 0
    num_free_blocks: Count = 0
    num_prefill_tokens: Count = 0
    num_decode_tokens: Count = 0
    step_s: Seconds = 0.0
    drafts: Annotated[list[Drafts], Meta(max_length=8)] = []


class StepReport(Report, tag="step"):
    """What one engine step did. An idle worker sends one each `heartbeat_s`, with nothing in it.

    `step` grows with every report: it shows that the engine, not only its socket, is alive. `stored` and `removed`
    are disjoint packed hashes, netted over the step; `event_seq` grows by one with every report that has either.
    """

    step: Count
    event_seq: Count
    load: Load
    outputs: Annotated[list[Output], Meta(max_length=1 << 16)] = []
    stored: PackedHashes = b""
    removed: PackedHashes = b""


class Snapshot(Report, tag="snapshot"):
    """All resident hashes after `event_seq`: replaces whatever the gateway believed of this worker."""

    event_seq: Count
    hashes: PackedHashes


class KvAccount(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one tenant ("public": the published prefixes) holds in a worker's pool, and counters since its boot.

    `block_s`: blocks held times seconds. `num_hits` of `num_looked_up` blocks of prompts were found. Evicted: own
    blocks for oneself, own blocks for others (`num_suffered`), others' for oneself (`num_caused`).
    """

    tenant: Name
    num_held: Count = 0
    block_s: Annotated[float, Meta(ge=0, le=1e18)] = 0.0
    num_looked_up: Count = 0
    num_hits: Count = 0
    num_evicted_own: Count = 0
    num_suffered: Count = 0
    num_caused: Count = 0


class KvAccounts(Report, tag="kv_accounts"):
    """All accounts of a worker's cache. Sent after steps in which something changed, at most once a second."""

    accounts: Annotated[list[KvAccount], Meta(max_length=1 << 16)]
    num_pinned: Count = 0


class Bye(Report, tag="bye"):
    """The worker leaves. What it still has goes on elsewhere; `is_death`: its engine has died under it."""

    reason: Reason = ""
    is_death: bool = False


AnyCommand = Identify | Welcome | Refused | Generate | Abort | Resync | Drain | Quotas | ClearTenant | Pin | Unpin
AnyReport = Hello | StepReport | Snapshot | KvAccounts | Bye
COMMANDS: Decoder[AnyCommand] = Decoder(AnyCommand, max_bytes=MAX_FRAME_BYTES)
REPORTS: Decoder[AnyReport] = Decoder(AnyReport, max_bytes=MAX_FRAME_BYTES)
