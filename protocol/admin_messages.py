"""Command line <-> gateway, over a DEALER and the admin socket (a ROUTER on `ipc://`, file mode 0600).

One frame per message; every command gets exactly one reply, an `AdminFailed` if it was refused. Whoever may open the
socket is the operator: there is no further authentication. Replies are what `--json` prints, so their fields are an
interface; unlike other messages they carry their defaults.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from kvasir.protocol.admin_records import (
    AuditRow,
    CachePrefix,
    CacheWorker,
    KeyInfo,
    ModelStatus,
    PrefixInfo,
    PriceInfo,
    PrivatePrefix,
    TenantInfo,
    UsageRow,
    WorkerInfo,
)
from kvasir.protocol.client_messages import Text
from kvasir.protocol.codec import Decoder, Message, Name, Seconds
from kvasir.protocol.days import MAX_DAY, MIN_DAY
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.sampling import CacheHint
from kvasir.protocol.terms import Price, TermsChange

MAX_ADMIN_FRAME_BYTES = 8 << 20
Label = Annotated[str, Meta(max_length=256)]
Day = Annotated[int, Meta(ge=MIN_DAY, le=MAX_DAY)]
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
    first_day: Day | None = None
    last_day: Day | None = None


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


TenantCommand = TenantCreate | TenantList | TenantShow | TenantSetStatus | TenantSet | TenantRename | TenantDelete
KeyCommand = KeyCreate | KeyList | KeySet | KeyRotate | KeyRevoke
PriceCommand = PriceSet | PriceList
PrefixCommand = PrefixPublish | PrefixPin | PrefixList | PrefixRemove
BookCommand = UsageQuery | AuditQuery | AuditVerify | Backup
HouseCommand = StatusQuery | ExplainQuery | CacheQuery | CacheClear | DrainGateway
AnyCommand = TenantCommand | KeyCommand | PriceCommand | PrefixCommand | BookCommand | HouseCommand
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
