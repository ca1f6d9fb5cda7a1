"""What the gateway's state looks like to its operator: the records that replies on the admin socket are made of.

Their fields are what `--json` prints, so they are an interface.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from kvasir.protocol.messages import Drafts
from kvasir.protocol.sampling import CacheHint
from kvasir.protocol.terms import Price, Terms


class UsageInfo(Struct, forbid_unknown_fields=True):
    """What a tenant has asked for and got since the gateway started: tokens of finished requests, and these by reason.

    A prompt counts as soon as a worker has begun to compute it; output tokens are those that the client was told.
    """

    num_requests: int = 0
    num_refused: int = 0
    num_running: int = 0
    num_waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_finished: dict[str, int] = {}


class TenantInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant as it is shown. Times are seconds since the epoch."""

    id: str
    name: str
    status: str
    sharing: str
    allowed_models: list[str] | None
    created_at: float
    num_keys: int = 0
    usage: UsageInfo = field(default_factory=UsageInfo)
    kv_floor: str = ""
    kv_cap: str = ""
    cache_hint: CacheHint | None = None
    terms: Terms = Terms()


class KeyInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A key as it is shown: never its secret."""

    id: str
    tenant: str
    label: str
    created_at: float
    revoked_at: float | None = None
    expires_at: float | None = None
    terms: Terms = Terms()
    old_secret_until: float | None = None


class PriceInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """What a model's tokens cost, per token in `terms.MONEY_UNITS`."""

    model: str
    price: Price


class UsageRow(Struct, forbid_unknown_fields=True):
    """What was used; `key`, `model` and `day` are empty where all are summed up. `cost` in `terms.MONEY_UNITS`."""

    tenant: str
    key: str = ""
    model: str = ""
    day: str = ""
    num_requests: int = 0
    num_refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0


class AuditRow(Struct, frozen=True, forbid_unknown_fields=True):
    """Who did what to whom, and how that was before and after."""

    seq: int
    time: float
    actor: str
    command: str
    subject: str
    before: Any
    after: Any


class PrefixInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A published prefix. `public_tokens`: per served model, how many of its tokens (whole blocks) are shared.

    `pinned_on`: the workers that keep it if it is pinned; None: all.
    """

    name: str
    tenants: list[str] | None
    num_chars: int
    created_at: float
    public_tokens: dict[str, int] = {}
    pinned: bool = False
    pinned_on: list[str] | None = None


class WorkerInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """One worker. `state`: starting, ready, draining or lost. Token counters since its incarnation joined.

    `num_in_flight` requests were sent and not answered; `num_running` and `num_waiting` as the worker last said.
    `prefill_rate`: tokens/s, `decode_rate`: tokens/s of what runs now, as the router has learned them, from
    `decode_round_s` per step. `num_free_blocks` counts those whose content can be evicted; `num_cached_blocks` hold
    something findable, as the gateway's index follows it; `num_reserved_blocks` are about to be computed. Predicted:
    what the router expected to be cached; mispredicted: the sum of |predicted - cached|; drift: what the
    index of cached blocks was wrong about for no reason, a snapshot being asked for when it is much. `engine` computes,
    `lacks` is what it cannot do (`messages.Lack`), each prefix is found in whole runs of `hit_blocks` blocks.
    `drafts` are by proposer, those that have proposed.
    """

    id: str
    model: str
    state: str
    pid: int = 0
    device: str = ""
    attention: str = ""
    num_in_flight: int = 0
    num_running: int = 0
    num_waiting: int = 0
    max_requests: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_reserved_blocks: int = 0
    num_index_gaps: int = 0
    index_in_sync: bool = True
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    predicted_cached_tokens: int = 0
    mispredicted_tokens: int = 0
    drift_tokens: int = 0
    num_stale_outputs: int = 0
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    decode_round_s: float = 0.0
    num_restarts: int = 0
    engine: str = "kvasir"
    hit_blocks: int = 1
    lacks: list[str] = []
    drafts: list[Drafts] = []


class ModelStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """One served or configured model."""

    name: str
    fingerprint: str = ""
    dtype: str = ""
    max_context: int = 0
    num_workers: int = 0
    num_waiting: int = 0


class CacheTenant(Struct, frozen=True, forbid_unknown_fields=True):
    """What a tenant ("public": published prefixes) holds on one worker, and counters since that worker's boot.

    `floor`, `cap` in blocks. `block_s`, `byte_s`: blocks and bytes held times seconds. `looked_up_tokens` of prompts
    (whole blocks), `saved_tokens` of them found in the cache. Evicted blocks: `evicted_own` for itself, `suffered` for
    others; `caused`: others' blocks for it.
    """

    tenant: str
    floor: int = 0
    cap: int | None = None
    num_blocks: int = 0
    block_s: float = 0.0
    byte_s: float = 0.0
    looked_up_tokens: int = 0
    saved_tokens: int = 0
    evicted_own: int = 0
    suffered: int = 0
    caused: int = 0


class CacheWorker(Struct, frozen=True, forbid_unknown_fields=True):
    """One worker's KV pool. `num_free_blocks` counts those whose content can be evicted, `num_cached_blocks` those that
    hold something findable. An `engine` other than our own tells nothing of `tenants`."""

    id: str
    model: str
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_pinned: int = 0
    tenants: list[CacheTenant] = []
    engine: str = "kvasir"
    num_cached_blocks: int = 0


class CachePrefix(Struct, frozen=True, forbid_unknown_fields=True):
    """A published prefix: its beginning, and how many prompt tokens it has saved in how many hits since the gateway
    started. `pinned_on`: as in `PrefixInfo`."""

    name: str
    saved_tokens: int
    pinned: bool
    preview: str
    hits: int = 0
    pinned_on: list[str] | None = None


class PrivatePrefix(Struct, frozen=True, forbid_unknown_fields=True):
    """What prompts of one tenant that begin alike, in their first private block, have saved: nothing of their text."""

    tenant: str
    model: str
    saved_tokens: int
    hits: int
