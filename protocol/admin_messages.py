"""Command line <-> gateway, over a DEALER and the admin socket (a ROUTER on `ipc://`, file mode 0600).

One frame per message; every command gets exactly one reply, an `AdminFailed` if it was refused. Whoever may open the
socket is the operator: there is no further authentication. Replies are what `--json` prints, so their fields are an
interface; unlike other messages they carry their defaults.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from kvasir.protocol.client_messages import Text
from kvasir.protocol.codec import Decoder, Message
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import CacheHint, Name, Seconds
from kvasir.protocol.terms import Price, Terms, TermsChange

MAX_ADMIN_FRAME_BYTES = 8 << 20
Label = Annotated[str, Meta(max_length=256)]
Names = Annotated[list[Name], Meta(max_length=1024)]


# ---- commands ----------------------------------------------------------------------------------------------------


class AdminCommand(Message, tag_field="type"):
    """Something the operator asks for. `actor`: who the command line says it is, kept in the audit trail."""

    actor: Label = ""


class TenantCreate(AdminCommand, tag="tenant_create", kw_only=True):
    """Make a tenant. `group` None: its cache is private. `allowed_models` None: all."""

    name: Name
    group: Name | None = None
    allowed_models: Names | None = None


class TenantList(AdminCommand, tag="tenant_list"):
    """All tenants."""


class TenantShow(AdminCommand, tag="tenant_show", kw_only=True):
    """One tenant, its keys and what it has used since the gateway started."""

    name: Name


class TenantSetStatus(AdminCommand, tag="tenant_set_status", kw_only=True):
    """Disable a tenant (its keys stop working at once) or enable it again."""

    name: Name
    active: bool


class TenantRename(AdminCommand, tag="tenant_rename", kw_only=True):
    """Give a tenant another name; its keys, cache and usage stay."""

    name: Name
    new_name: Name


class TenantDelete(AdminCommand, tag="tenant_delete", kw_only=True):
    """Delete a tenant and its keys for good, end what it runs and drop what is cached of it. Its usage stays."""

    name: Name


class TenantSet(AdminCommand, tag="tenant_set", kw_only=True):
    """Change a tenant's settings; None leaves one as it is, "none" lifts it.

    `kv_floor`, `kv_cap`: "512" is blocks, "20%" a share. `cache_hint`: of requests that bring none of their own.
    `terms`: limits and budgets over all its keys.
    """

    name: Name
    kv_floor: Label | None = None
    kv_cap: Label | None = None
    cache_hint: CacheHint | Literal["none"] | None = None
    terms: TermsChange = TermsChange()


class CacheQuery(AdminCommand, tag="cache"):
    """Who holds the workers' KV blocks and what it came to."""


class CacheClear(AdminCommand, tag="cache_clear", kw_only=True):
    """Drop what is cached of a tenant on all workers and not in use."""

    tenant: Name


class KeyCreate(AdminCommand, tag="key_create", kw_only=True):
    """Make an API key for a tenant. `valid_s`: it expires after so many seconds; None: never.

    `terms`: its own limits and budgets, beside the tenant's.
    """

    tenant: Name
    label: Label = ""
    valid_s: Seconds | None = None
    terms: TermsChange = TermsChange()


class KeySet(AdminCommand, tag="key_set", kw_only=True):
    """Change a key's own limits and budgets, or when it expires: `valid_s` from now, "none" for never."""

    key_id: Name
    valid_s: Seconds | Literal["none"] | None = None
    terms: TermsChange = TermsChange()


class KeyList(AdminCommand, tag="key_list"):
    """Keys of one tenant, or of all."""

    tenant: Name | None = None


class KeyRotate(AdminCommand, tag="key_rotate", kw_only=True):
    """Give a key another secret; the old one works for `overlap_s` more. Its id, terms and usage stay."""

    key_id: Name
    overlap_s: Seconds = 0.0


class KeyRevoke(AdminCommand, tag="key_revoke", kw_only=True):
    """Stop a key for good and end what it runs."""

    key_id: Name


class PriceSet(AdminCommand, tag="price_set", kw_only=True):
    """Set what a model's tokens cost from now on; None: nothing."""

    model: Name
    price: Price | None


class PriceList(AdminCommand, tag="price_list"):
    """All prices."""


class UsageQuery(AdminCommand, tag="usage", kw_only=True):
    """What was used, per tenant and `by` something. Days are numbers since 1 January 1970, UTC, both included.

    `first_day` None: 30 days ago. `last_day` None: today.
    """

    by: Literal["tenant", "key", "model", "day"] = "tenant"
    tenant: Name | None = None
    key: Name | None = None
    first_day: int | None = None
    last_day: int | None = None


class AuditQuery(AdminCommand, tag="audit_log", kw_only=True):
    """The last rows of the audit trail."""

    last: Annotated[int, Meta(ge=1, le=10_000)] = 100


class AuditVerify(AdminCommand, tag="audit_verify"):
    """Check that no row of the audit trail was changed, inserted or taken out."""


class Backup(AdminCommand, tag="backup", kw_only=True):
    """Copy databases and secret into a new folder on the gateway's machine."""

    folder: Annotated[str, Meta(min_length=1, max_length=4096)]


class PrefixPublish(AdminCommand, tag="prefix_publish", kw_only=True):
    """Publish a text under a name. `tenants` None: for all. Another text under a name in use needs `replace`."""

    name: Name
    text: Text
    tenants: Names | None = None
    replace: bool = False


class PrefixList(AdminCommand, tag="prefix_list"):
    """All published prefixes."""


class PrefixRemove(AdminCommand, tag="prefix_remove", kw_only=True):
    """Stop sharing a published text. What is cached of it is found by nobody any more and ages out."""

    name: Name


class PrefixPin(AdminCommand, tag="prefix_pin", kw_only=True):
    """Keep a published prefix's blocks on `workers` and nowhere else, or (`pinned` false) let them go everywhere.

    `workers` None: on all, those that join later too. `prewarm`: compute it now where it is pinned and not there.
    """

    name: Name
    pinned: bool = True
    prewarm: bool = False
    workers: Names | None = None


class StatusQuery(AdminCommand, tag="status"):
    """How the gateway, its workers, models and tenants are doing."""


class ExplainQuery(AdminCommand, tag="explain", kw_only=True):
    """Why a request went where it went. `request`: its id, or the beginning of it."""

    request: Name


class DrainGateway(AdminCommand, tag="drain"):
    """Stop as on SIGTERM: take nothing new, finish what runs, exit 0."""


# ---- what replies are made of ------------------------------------------------------------------------------------


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
    `num_drafted` tokens that its `proposer` proposed were computed in `num_draft_runs` runs, `num_accepted` held.
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
    proposer: str = ""
    num_draft_runs: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


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


def date_of_day(day: int) -> str:
    """Return a day's date, "2026-01-31", given its number since 1 January 1970."""
    return date.fromordinal(date(1970, 1, 1).toordinal() + day).isoformat()


# ---- replies -----------------------------------------------------------------------------------------------------


class AdminReply(Message, tag_field="type", omit_defaults=False):
    """The answer to a command."""


class AdminFailed(AdminReply, tag="failed"):
    """The command was refused and changed nothing."""

    error: ErrorInfo


class Done(AdminReply, tag="done"):
    """The command took effect. `changed` false: it was so already."""

    changed: bool = True


class TenantReply(AdminReply, tag="tenant"):
    """One tenant, with its keys."""

    tenant: TenantInfo
    keys: list[KeyInfo] = []


class TenantsReply(AdminReply, tag="tenants"):
    """Tenants by name."""

    tenants: list[TenantInfo]


class KeyCreated(AdminReply, tag="key_created"):
    """The one time that a whole key is shown."""

    id: str
    key: str
    tenant: str
    label: str


class KeysReply(AdminReply, tag="keys"):
    """Keys, oldest first."""

    keys: list[KeyInfo]


class PrefixReply(AdminReply, tag="prefix"):
    """One published prefix."""

    prefix: PrefixInfo
    changed: bool


class PrefixesReply(AdminReply, tag="prefixes"):
    """Published prefixes, oldest first."""

    prefixes: list[PrefixInfo]


class CacheReply(AdminReply, tag="cache"):
    """All workers' pools; all published prefixes and the best private ones, those that saved most first."""

    workers: list[CacheWorker]
    prefixes: list[CachePrefix] = []
    private_prefixes: list[PrivatePrefix] = []


class StatusReply(AdminReply, tag="status"):
    """The whole house. `pid` and `version` are the gateway's, `endpoints` what clients can dial, `bounds` what it holds
    at most. `ledger_error`: why nothing new is admitted, empty while the ledger can be written."""

    workers: list[WorkerInfo] = []
    models: list[ModelStatus] = []
    tenants: list[TenantInfo] = []
    pid: int = 0
    version: str = ""
    uptime_s: float = 0.0
    draining: bool = False
    endpoints: dict[str, str] = {}
    bounds: dict[str, int] = {}
    ledger_error: str = ""


class PricesReply(AdminReply, tag="prices"):
    """Prices by model."""

    prices: list[PriceInfo]


class UsageReply(AdminReply, tag="usage"):
    """Usage of the days from `first_day` to `last_day`."""

    rows: list[UsageRow]
    first_day: int
    last_day: int


class AuditReply(AdminReply, tag="audit_log"):
    """Rows of the audit trail, oldest first."""

    rows: list[AuditRow]


class AuditVerified(AdminReply, tag="audit_verified"):
    """The audit trail is whole."""

    num_rows: int


class ExplainReply(AdminReply, tag="explained"):
    """A request's route: the core's own receipts, one per attempt, as JSON values."""

    request: str
    receipts: list[dict[str, Any]]


AnyCommand = (
    TenantCreate
    | TenantList
    | TenantShow
    | TenantSetStatus
    | TenantSet
    | TenantRename
    | TenantDelete
    | CacheQuery
    | CacheClear
    | KeyCreate
    | KeyList
    | KeyRevoke
    | KeySet
    | KeyRotate
    | PriceSet
    | PriceList
    | UsageQuery
    | AuditQuery
    | AuditVerify
    | Backup
    | PrefixPublish
    | PrefixList
    | PrefixRemove
    | PrefixPin
    | StatusQuery
    | ExplainQuery
    | DrainGateway
)
AnyReply = (
    AdminFailed
    | Done
    | TenantReply
    | TenantsReply
    | KeyCreated
    | KeysReply
    | PrefixReply
    | PrefixesReply
    | CacheReply
    | StatusReply
    | PricesReply
    | UsageReply
    | AuditReply
    | AuditVerified
    | ExplainReply
)
ADMIN_COMMANDS: Decoder[AnyCommand] = Decoder(AnyCommand, max_bytes=MAX_ADMIN_FRAME_BYTES)
ADMIN_REPLIES: Decoder[AnyReply] = Decoder(AnyReply, max_bytes=64 << 20)
