"""Tenants, API keys and published prefixes: frozen records, and the directory that every request is checked against.

The directory lives in the Trio thread and answers from memory. It changes only through `apply`, which the admin actor
calls after the store has committed the same change: what is not on disk is not in force.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from kvasir.protocol.errors import AuthenticationFailed, BadRequest, Conflict, NotFound
from kvasir.protocol.sampling import CacheHint
from kvasir.protocol.terms import NO_TERMS, Price, Terms

Status = Literal["active", "disabled"]
SECRET_BYTES = 32
MAX_KEY_CHARS = 256
_FREE = Price()

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_UNKNOWN = "this API key is unknown or revoked; ask the operator for a new one (`kvasir key create TENANT`)"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of this deployment. `id` is random and never changes; `name` is what people type.

    `sharing`: "private", or "group:<name>" to share cached blocks with the other tenants of that group.
    `allowed_models` None: all. `created_at`: seconds since the epoch. `kv_floor` and `kv_cap`: of every worker's KV
    pool, in blocks ("512") or as a share ("20%"); "" is none. `cache_hint`: of requests that bring none of their own.
    `terms`: its limits and budgets, over all its keys.
    """

    id: str
    name: str
    status: Status = "active"
    sharing: str = "private"
    allowed_models: frozenset[str] | None = None
    created_at: float = 0.0
    kv_floor: str = ""
    kv_cap: str = ""
    cache_hint: CacheHint | None = None
    terms: Terms = NO_TERMS

    @property
    def scope(self) -> tuple[str, str]:
        """The sharing scope that the tenant's namespace is derived from (`protocol.prefix.derive_namespace`)."""
        if self.sharing.startswith("group:"):
            return "group", self.sharing.removeprefix("group:")
        return "tenant", self.id

    def may_use(self, model: str) -> bool:
        return self.allowed_models is None or model in self.allowed_models


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept: a keyed digest of the secret, never the secret. `id` is public and names the key.

    `expires_at`: it stops working then; None: never. `terms`: its own limits and budgets, beside the
    tenant's. `old_digest`: of the secret before the present one, which works until `old_until`.
    """

    id: str
    tenant_id: str
    digest: bytes
    label: str = ""
    created_at: float = 0.0
    revoked_at: float | None = None
    expires_at: float | None = None
    terms: Terms = NO_TERMS
    old_digest: bytes = b""
    old_until: float | None = None

    def is_live(self, wall_s: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or wall_s < self.expires_at)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the tenant, and the key it came with."""

    tenant: Tenant
    key_id: str


@dataclass(frozen=True, slots=True)
class PublishedPrefix:
    """A text that an operator publishes: its cached blocks are shared by `tenant_ids` (None: every tenant).

    `pinned`: workers keep its blocks, those in `pinned_on` (None: all of them).
    """

    name: str
    text: str
    tenant_ids: frozenset[str] | None = None
    created_at: float = 0.0
    pinned: bool = False
    pinned_on: frozenset[str] | None = None

    def is_pinned_on(self, worker_id: str) -> bool:
        return self.pinned and (self.pinned_on is None or worker_id in self.pinned_on)


@dataclass(frozen=True, slots=True)
class RemovePrefix:
    """The change that takes a published prefix away."""

    name: str


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """What a model's tokens cost; None: nothing."""

    model: str
    price: Price | None


@dataclass(frozen=True, slots=True)
class RemoveTenant:
    """The change that takes a tenant and its keys away. Its id and name are remembered: its usage is."""

    id: str
    name: str
    deleted_at: float


Change = Tenant | ApiKey | PublishedPrefix | RemovePrefix | ModelPrice | RemoveTenant
"""What can be committed: a record that is new or replaces the one of its id (a prefix: its name), or a removal."""


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a tenant, group or prefix.

    Raises:
        BadRequest: empty, too long, or other characters.
    """
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{what} name {name[:80]!r} is not allowed: use 1 to 63 lower-case letters, digits and dashes, "
            "with no dash at either end",
            param="name",
        )
    return name


def new_tenant_id() -> str:
    return secrets.token_hex(8)


def issue_key(
    deployment_secret: bytes, tenant_id: str, label: str, created_at: float, *, key_id: str = ""
) -> tuple[ApiKey, str]:
    """Return a fresh key's record and its text `kv_<id>_<secret>`, which exists nowhere else: show it once.

    `key_id`: of the key that gets another secret; else a new one is drawn.
    """
    key_id, secret = key_id or secrets.token_hex(6), secrets.token_hex(SECRET_BYTES)
    record = ApiKey(key_id, tenant_id, digest_key(deployment_secret, key_id, secret), label, created_at)
    return record, f"kv_{key_id}_{secret}"


def digest_key(deployment_secret: bytes, key_id: str, secret: str) -> bytes:
    """Return what is stored of a key: 32 bytes of BLAKE2b keyed with the deployment's secret.

    A plain fast hash is enough for 256 random bits; the deployment's secret makes a stolen database worthless.
    """
    text = f"{key_id}\0{secret}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=32, key=deployment_secret, person=b"kvasir-key").digest()


class TenantDirectory:
    """All tenants, keys and published prefixes, by name and id, in memory."""

    def __init__(
        self,
        deployment_secret: bytes,
        records: Iterable[Change] = (),
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret = deployment_secret
        self._wall_clock = wall_clock
        self._no_digest = secrets.token_bytes(32)
        self._tenants: dict[str, Tenant] = {}
        self._tenant_ids: dict[str, str] = {}
        self._keys: dict[str, ApiKey] = {}
        self._prefixes: tuple[PublishedPrefix, ...] = ()
        self._prices: dict[str, Price] = {}
        self._former: dict[str, str] = {}
        for record in records:
            self.apply(record)

    @property
    def prefixes(self) -> tuple[PublishedPrefix, ...]:
        """The published prefixes, oldest first. Another tuple after every change: compare with `is` to notice one."""
        return self._prefixes

    @property
    def deployment_secret(self) -> bytes:
        return self._secret

    def authenticate(self, api_key: str | None) -> Caller:
        """Return the active tenant that `api_key` belongs to, and the key's id. Synchronous, a few microseconds.

        Unknown, revoked and wrong keys cost the same and are answered alike; that a key has expired or its tenant is
        disabled is said only to whoever holds it.

        Raises:
            AuthenticationFailed: no key, no Kvasir key, unknown, revoked, expired, or its tenant is disabled.
        """
        if not api_key:
            raise AuthenticationFailed("no API key was given; send one made with `kvasir key create TENANT`")
        kind, _, rest = api_key[: MAX_KEY_CHARS + 1].partition("_")
        key_id, _, secret = rest.partition("_")
        if kind != "kv" or not key_id or not secret or len(api_key) > MAX_KEY_CHARS:
            raise AuthenticationFailed("this is no Kvasir API key (they look like kv_<id>_<secret>); check for typos")
        key = self._keys.get(key_id)
        known = key.digest if key is not None and key.revoked_at is None else self._no_digest
        digest = digest_key(self._secret, key_id, secret)
        is_right = hmac.compare_digest(digest, known)
        if not is_right and key is not None and key.old_until is not None and self._wall_clock() < key.old_until:
            is_right = hmac.compare_digest(digest, key.old_digest)
        if not is_right or key is None:
            raise AuthenticationFailed(_UNKNOWN)
        if key.expires_at is not None and not key.is_live(self._wall_clock()):
            raise AuthenticationFailed("this API key has expired; ask the operator for a new one")
        tenant = self._tenants[key.tenant_id]
        if tenant.status != "active":
            raise AuthenticationFailed(f"tenant {tenant.name} is disabled; ask the operator to enable it")
        return Caller(tenant, key_id)

    def terms(self, payer_id: str) -> Terms:
        """Return what a payer, a tenant or key by its id, is granted; nothing special if it is not known."""
        payer = self._tenants.get(payer_id) or self._keys.get(payer_id)
        return NO_TERMS if payer is None else payer.terms

    @property
    def prices(self) -> dict[str, Price]:
        """By model; those that are not named cost nothing."""
        return self._prices

    def price(self, model: str) -> Price:
        """Return what a model's tokens cost."""
        return self._prices.get(model, _FREE)

    @property
    def former_tenants(self) -> dict[str, str]:
        """Names of deleted tenants, by id."""
        return self._former

    def expired_keys(self, after: float, until: float) -> list[str]:
        """Return the ids of the keys that expired after one time and until another. O(keys)."""
        keys = self._keys.values()
        return [key.id for key in keys if key.expires_at is not None and after < key.expires_at <= until]

    def tenant(self, name: str) -> Tenant:
        """Return the tenant called `name`.

        Raises:
            NotFound: there is none.
        """
        tenant_id = self._tenant_ids.get(name)
        if tenant_id is None:
            raise NotFound(f"no tenant is called {name[:80]!r}; `kvasir tenant list` shows those there are")
        return self._tenants[tenant_id]

    def name_of(self, tenant_id: str) -> str:
        """Return a tenant's name, or that which a deleted one had; an id that is none is its own name."""
        tenant = self._tenants.get(tenant_id)
        return self._former.get(tenant_id, tenant_id) if tenant is None else tenant.name

    def tenants(self) -> list[Tenant]:
        """Return all tenants by name."""
        return [self._tenants[tenant_id] for _, tenant_id in sorted(self._tenant_ids.items())]

    def keys_of(self, tenant_id: str) -> list[ApiKey]:
        """Return a tenant's keys, revoked ones too, oldest first."""
        return sorted((key for key in self._keys.values() if key.tenant_id == tenant_id), key=lambda k: k.created_at)

    def key(self, key_id: str) -> ApiKey:
        """Return a key's record. A whole key is taken for its id.

        Raises:
            NotFound: there is none.
        """
        wanted = key_id.split("_")[1] if key_id.startswith("kv_") else key_id
        key = self._keys.get(wanted)
        if key is None:
            raise NotFound(f"no key has the id {wanted[:80]!r}; `kvasir key list` shows those there are")
        return key

    def prefix(self, name: str) -> PublishedPrefix | None:
        return next((prefix for prefix in self._prefixes if prefix.name == name), None)

    def apply(self, change: Change) -> None:
        """Put a committed change in force.

        Raises:
            Conflict: another tenant has that name (the store refuses it too).
        """
        match change:
            case Tenant():
                if self._tenant_ids.get(change.name, change.id) != change.id:
                    raise Conflict(f"there is another tenant called {change.name!r} already")
                before = self._tenants.get(change.id)
                if before is not None:
                    del self._tenant_ids[before.name]
                self._tenants[change.id] = change
                self._tenant_ids[change.name] = change.id
            case ApiKey():
                self._keys[change.id] = change
            case PublishedPrefix():
                others = [prefix for prefix in self._prefixes if prefix.name != change.name]
                self._prefixes = (*others, change)
            case RemovePrefix():
                self._prefixes = tuple(prefix for prefix in self._prefixes if prefix.name != change.name)
            case RemoveTenant():
                if self._tenants.pop(change.id, None) is not None:
                    del self._tenant_ids[change.name]
                self._keys = {key.id: key for key in self._keys.values() if key.tenant_id != change.id}
                self._former[change.id] = change.name
            case ModelPrice():
                self._prices.pop(change.model, None)
                if change.price is not None:
                    self._prices[change.model] = change.price
