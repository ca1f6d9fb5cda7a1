"""The admin actor: the operator's commands, one at a time, decided by a pure function and carried out here.

Order of every change: decide, commit to disk with its audit row, put in force in the directory, answer. A command that
is refused, or whose commit fails, has changed nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import trio
import zmq
from msgspec import structs

from kvasir.gateway.core.savings import Saving
from kvasir.gateway.log import log
from kvasir.gateway.tenants.directory import (
    ApiKey,
    Change,
    PublishedPrefix,
    RemovePrefix,
    Tenant,
    TenantDirectory,
    check_name,
    issue_key,
    new_tenant_id,
)
from kvasir.gateway.tenants.quotas import check_kv_quotas, check_kv_size
from kvasir.gateway.tenants.store import AuditEntry, Store
from kvasir.protocol import admin_messages as am
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import BadRequest, Conflict, KvasirError, NotFound
from kvasir.protocol.link import Link, LinkBusy, LinkClosed, PeerGone, open_router
from kvasir.protocol.messages import CacheHint
from kvasir.protocol.profile import LinkProfile

PREVIEW_CHARS = 40


class Gateway(Protocol):
    """What the operator may ask of the rest of the gateway. All calls are synchronous and cheap."""

    def workers(self) -> list[am.WorkerInfo]: ...

    def models(self) -> list[am.ModelStatus]: ...

    def usage(self) -> dict[str, am.UsageInfo]:
        """Return what each tenant has used since the start, by tenant id; tenants without requests may be missing."""

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        """Return how many tokens of `prefix` are shared, per served model."""

    def cache(self) -> list[am.CacheWorker]:
        """Return who holds every worker's KV blocks."""

    def pinned_blocks(self, prefixes: Sequence[PublishedPrefix]) -> dict[str, int]:
        """Return how many blocks each worker that is in keeps pinned when these prefixes are the published ones."""

    def kv_changed(self) -> None:
        """Put the tenants' KV floors and caps, as they are now, in force on all workers."""

    async def tokenise(self, text: str) -> None:
        """Tokenise a text that is to be published, in a thread, so that nothing waits for it afterwards."""

    def prefixes_changed(self, prewarm: str | None = None) -> None:
        """Have all workers pin what is to be pinned now, and compute the prefix `prewarm` if they do not have it."""

    def saved_by_prefix(self) -> dict[str, Saving]:
        """Return what every published prefix has saved since the start; those that saved nothing may be missing."""

    def private_prefixes(self) -> list[am.PrivatePrefix]:
        """Return the private beginnings of prompts that have saved most, most first."""

    def clear_kv(self, tenant_id: str) -> None:
        """Have all workers drop what is cached of a tenant."""

    def endpoints(self) -> dict[str, str]:
        """Return where clients can dial: "http", "zmq", ..."""

    def is_draining(self) -> bool: ...

    def explain(self, request: str) -> list[dict[str, Any]] | None:
        """Return the router's decisions, one per attempt, on the request of that id, as JSON values, or None."""

    def drain(self) -> None:
        """Begin the shutdown that SIGTERM begins."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a command comes to: `changes` to commit (none: nothing to do), what the audit row says, the answer.

    `effect`: what else is to be done once the changes are in force.
    """

    reply: am.AnyReply
    changes: tuple[Change, ...] = ()
    subject: str = ""
    before: Any = None
    after: Any = None
    effect: Callable[[], None] | None = None


def open_admin_link(context: zmq.Context[Any], endpoint: str) -> Link:
    """Return a ROUTER on the admin socket, whose file only this user may open.

    A socket file that a dead gateway left is replaced; the caller holds the directory's lock (`gateway.lock`).

    Raises:
        ConfigurationError: it cannot be bound.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mask = os.umask(0o177)  # the file is never open to others, not even between bind and chmod
    try:
        link = open_router(context, [endpoint], LinkProfile(max_frame_bytes=am.MAX_ADMIN_FRAME_BYTES, high_water=100))
    finally:
        os.umask(mask)
    path.chmod(0o600)
    return link


class Admin:
    """Serves the admin socket over `link`; owns the only way in which `directory` and `store` change."""

    def __init__(
        self,
        link: Link,
        directory: TenantDirectory,
        store: Store,
        gateway: Gateway,
        *,
        version: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._directory = directory
        self._store = store
        self._gateway = gateway
        self._version = version
        self._clock = clock
        self._started = clock()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer commands until the link is closed. Cancellation: a change that has begun is finished first."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._link.run)
            task_status.started()
            try:
                while True:
                    for frames in await self._link.receive(1):
                        await self._answer(frames)
            except LinkClosed:
                nursery.cancel_scope.cancel()

    async def _answer(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise BadRequest(f"a command is one frame, not {len(frames) - 1}; use the `kvasir` command line")
            reply = await self.carry_out(am.ADMIN_COMMANDS.decode(frames[1]))
        except KvasirError as error:
            reply = am.AdminFailed(error.info())
        try:
            self._link.send_nowait([frames[0], encode(reply)])
        except (PeerGone, LinkBusy):
            log("admin_reply_undeliverable", reply=type(reply).__name__)  # the command line has given up waiting

    async def carry_out(self, command: am.AnyCommand) -> am.AnyReply:
        """Decide `command`, commit and apply its changes, return the answer.

        Raises:
            KvasirError: refused or not committed; nothing has changed.
        """
        name = str(command.__struct_config__.tag)
        if isinstance(command, am.PrefixPublish):
            await self._gateway.tokenise(command.text)
        match command:
            case am.StatusQuery():
                return self._status()
            case am.ExplainQuery():
                decisions = self._gateway.explain(command.request)
                if decisions is None:
                    raise NotFound(f"no request {command.request!r} is known; only the last ones are remembered")
                return am.ExplainReply(command.request, decisions)
            case am.CacheQuery():
                return self._cache()
            case am.CacheClear():
                tenant = self._directory.tenant(command.tenant)
                self._gateway.clear_kv(tenant.id)
                log("admin", command=name, subject=tenant.name, actor=command.actor)
                return am.Done()
            case am.DrainGateway():
                log("admin", command=name, actor=command.actor)
                self._gateway.drain()
                return am.Done()
            case _:
                verdict = decide(self._directory, command, self._clock(), self._gateway)
        if verdict.changes:
            before, after = json.dumps(verdict.before), json.dumps(verdict.after)
            entry = AuditEntry(self._clock(), command.actor, name, verdict.subject, before, after)
            await self._store.commit(verdict.changes, entry)
            for change in verdict.changes:
                self._directory.apply(change)
            log("admin", command=name, subject=verdict.subject, actor=command.actor)
        if verdict.effect is not None:
            verdict.effect()
        return self._complete(verdict.reply)

    def _complete(self, reply: am.AnyReply) -> am.AnyReply:
        """Add to a reply what only the rest of the gateway knows."""
        match reply:
            case am.TenantReply():
                return am.TenantReply(self._with_usage([reply.tenant])[0], reply.keys)
            case am.TenantsReply():
                return am.TenantsReply(self._with_usage(reply.tenants))
            case am.PrefixReply():
                return am.PrefixReply(self._with_tokens(reply.prefix), reply.changed)
            case am.PrefixesReply():
                return am.PrefixesReply([self._with_tokens(prefix) for prefix in reply.prefixes])
            case _:
                return reply

    def _with_usage(self, tenants: Iterable[am.TenantInfo]) -> list[am.TenantInfo]:
        usage = self._gateway.usage()
        return [structs.replace(tenant, usage=usage.get(tenant.id, am.UsageInfo())) for tenant in tenants]

    def _with_tokens(self, info: am.PrefixInfo) -> am.PrefixInfo:
        prefix = self._directory.prefix(info.name)
        return structs.replace(info, public_tokens=self._gateway.public_tokens(prefix)) if prefix else info

    def _cache(self) -> am.CacheReply:
        savings = self._gateway.saved_by_prefix()
        prefixes = [_cache_prefix(prefix, savings.get(prefix.name, Saving())) for prefix in self._directory.prefixes]
        most_first = sorted(prefixes, key=lambda prefix: -prefix.saved_tokens)
        return am.CacheReply(self._gateway.cache(), most_first, self._gateway.private_prefixes())

    def _status(self) -> am.StatusReply:
        return am.StatusReply(
            workers=self._gateway.workers(),
            models=self._gateway.models(),
            tenants=self._with_usage(_tenant_infos(self._directory)),
            pid=os.getpid(),
            version=self._version,
            uptime_s=self._clock() - self._started,
            draining=self._gateway.is_draining(),
            endpoints=self._gateway.endpoints(),
        )


def decide(directory: TenantDirectory, command: am.AnyCommand, now: float, gateway: Gateway) -> Verdict:
    """Return what `command` about tenants, keys or prefixes comes to. Changes nothing; draws keys and ids.

    `gateway` is asked for the workers in which floors and pins must fit.

    Raises:
        BadRequest, NotFound, Conflict: refused; says what now.
    """
    match command:
        case am.TenantCreate():
            return _create_tenant(directory, command, now)
        case am.TenantList():
            return Verdict(am.TenantsReply(_tenant_infos(directory)))
        case am.TenantShow():
            tenant = directory.tenant(command.name)
            return Verdict(am.TenantReply(_tenant_info(directory, tenant), _key_infos(directory, [tenant])))
        case am.TenantSetStatus():
            before = directory.tenant(command.name)
            after = replace(before, status="active" if command.active else "disabled")
            if before == after:
                return Verdict(am.Done(changed=False))
            return Verdict(am.Done(), (after,), after.name, _tenant_record(before), _tenant_record(after))
        case am.TenantSet():
            return _set_tenant(directory, command, gateway)
        case am.KeyCreate():
            tenant = directory.tenant(command.tenant)
            key, text = issue_key(directory.deployment_secret, tenant.id, command.label, now)
            reply = am.KeyCreated(key.id, text, tenant.name, key.label)
            return Verdict(reply, (key,), tenant.name, None, _key_record(key))
        case am.KeyList():
            tenants = directory.tenants() if command.tenant is None else [directory.tenant(command.tenant)]
            return Verdict(am.KeysReply(_key_infos(directory, tenants)))
        case am.KeyRevoke():
            key = directory.key(command.key_id)
            if key.revoked_at is not None:
                return Verdict(am.Done(changed=False))
            revoked = replace(key, revoked_at=now)
            return Verdict(am.Done(), (revoked,), _owner(directory, key), _key_record(key), _key_record(revoked))
        case am.PrefixPublish():
            return _publish_prefix(directory, command, now, gateway)
        case am.PrefixPin():
            return _pin_prefix(directory, command, gateway)
        case am.PrefixList():
            return Verdict(am.PrefixesReply([_prefix_info(directory, prefix) for prefix in directory.prefixes]))
        case am.PrefixRemove():
            prefix = _prefix(directory, command.name)
            return Verdict(
                am.Done(),
                (RemovePrefix(prefix.name),),
                prefix.name,
                _prefix_record(prefix),
                None,
                gateway.prefixes_changed,
            )
    raise BadRequest(f"{type(command).__name__} is no command about tenants, keys or prefixes")


def _create_tenant(directory: TenantDirectory, command: am.TenantCreate, now: float) -> Verdict:
    check_name(command.name, "tenant")
    if any(tenant.name == command.name for tenant in directory.tenants()):
        raise Conflict(f"a tenant called {command.name!r} exists already; choose another name or use that one")
    sharing = "private" if command.group is None else f"group:{check_name(command.group, 'group')}"
    allowed = None if command.allowed_models is None else frozenset(command.allowed_models)
    tenant = Tenant(new_tenant_id(), command.name, "active", sharing, allowed, now)
    return Verdict(
        am.TenantReply(_tenant_info(directory, tenant)), (tenant,), tenant.name, None, _tenant_record(tenant)
    )


def _set_tenant(directory: TenantDirectory, command: am.TenantSet, gateway: Gateway) -> Verdict:
    before = directory.tenant(command.name)
    after = replace(
        before,
        kv_floor=before.kv_floor if command.kv_floor is None else check_kv_size(command.kv_floor, "kv_floor"),
        kv_cap=before.kv_cap if command.kv_cap is None else check_kv_size(command.kv_cap, "kv_cap"),
        cache_hint=before.cache_hint if command.cache_hint is None else _hint(command.cache_hint),
    )
    if before == after:
        return Verdict(am.Done(changed=False))
    if (before.kv_floor, before.kv_cap) != (after.kv_floor, after.kv_cap):
        others = [tenant for tenant in directory.tenants() if tenant.id != before.id]
        _check_room([*others, after], directory.prefixes, gateway)
    records = _tenant_record(before), _tenant_record(after)
    return Verdict(am.Done(), (after,), after.name, *records, gateway.kv_changed)


def _hint(given: CacheHint | Literal["none"]) -> CacheHint | None:
    return None if given == "none" else given


def _publish_prefix(directory: TenantDirectory, command: am.PrefixPublish, now: float, gateway: Gateway) -> Verdict:
    check_name(command.name, "prefix")
    if not command.text.strip():
        raise BadRequest("the text to publish is empty; name a file with some text in it", param="text")
    allowed = None if command.tenants is None else frozenset(directory.tenant(name).id for name in command.tenants)
    before = directory.prefix(command.name)
    prefix = PublishedPrefix(command.name, command.text, allowed, now)
    if before is not None:
        prefix = replace(prefix, pinned=before.pinned, pinned_on=before.pinned_on)
    if before is not None and (before.text, before.tenant_ids) == (prefix.text, prefix.tenant_ids):
        return Verdict(am.PrefixReply(_prefix_info(directory, before), changed=False))
    if before is not None and not command.replace:
        raise Conflict(
            f"the prefix {command.name!r} is published with another text or for other tenants; "
            "add --replace, remove it first or choose another name"
        )
    _check_pins(directory, prefix, gateway)
    reply = am.PrefixReply(_prefix_info(directory, prefix), changed=True)
    record = None if before is None else _prefix_record(before)
    return Verdict(reply, (prefix,), prefix.name, record, _prefix_record(prefix), gateway.prefixes_changed)


def _pin_prefix(directory: TenantDirectory, command: am.PrefixPin, gateway: Gateway) -> Verdict:
    before = _prefix(directory, command.name)
    pinned_on = None if command.workers is None or not command.pinned else frozenset(command.workers)
    known = {worker.id for worker in gateway.workers()}
    unknown = (pinned_on or frozenset()) - known - (before.pinned_on or frozenset())
    if unknown:
        raise NotFound(
            f"no worker is called {min(unknown)[:80]!r}; those there are: {', '.join(sorted(known)) or 'none yet'}. "
            "Start it first, or pin on all workers, which includes those to come"
        )
    if command.pinned:
        _check_can_pin(gateway.workers(), pinned_on)
    after = replace(before, pinned=command.pinned, pinned_on=pinned_on)

    def effect() -> None:
        gateway.prefixes_changed(command.name if command.prewarm else None)

    if after == before:
        return Verdict(am.Done(changed=False), effect=effect)
    _check_pins(directory, after, gateway)
    return Verdict(am.Done(), (after,), after.name, _prefix_record(before), _prefix_record(after), effect)


def _check_can_pin(workers: Sequence[am.WorkerInfo], wanted: frozenset[str] | None) -> None:
    """Refuse to pin on named workers whose engine cannot, or on all of them where none can."""
    present = [worker for worker in workers if worker.num_blocks and (wanted is None or worker.id in wanted)]
    unable = [worker for worker in present if "pins" in worker.lacks]
    if unable and (wanted is not None or len(unable) == len(present)):
        raise BadRequest(
            f"worker {unable[0].id!r} fronts {unable[0].engine}, which cannot pin prefixes; pin on workers of our own"
        )


def _prefix(directory: TenantDirectory, name: str) -> PublishedPrefix:
    prefix = directory.prefix(name)
    if prefix is None:
        raise NotFound(f"no prefix is called {name[:80]!r}; `kvasir prefix list` shows those there are")
    return prefix


def _check_pins(directory: TenantDirectory, after: PublishedPrefix, gateway: Gateway) -> None:
    if after.pinned:  # to let a prefix go is never refused
        others = [prefix for prefix in directory.prefixes if prefix.name != after.name]
        _check_room(directory.tenants(), [*others, after], gateway)


def _check_room(tenants: Sequence[Tenant], prefixes: Sequence[PublishedPrefix], gateway: Gateway) -> None:
    pools = {
        worker.id: worker.num_blocks
        for worker in gateway.workers()
        if worker.num_blocks and "owners" not in worker.lacks
    }
    check_kv_quotas(tenants, pools or {"any": 1_000_000}, gateway.pinned_blocks(prefixes))


def _owner(directory: TenantDirectory, key: ApiKey) -> str:
    tenant = directory.tenant_by_id(key.tenant_id)
    return tenant.name if tenant else key.tenant_id


# What is shown.


def _tenant_infos(directory: TenantDirectory) -> list[am.TenantInfo]:
    return [_tenant_info(directory, tenant) for tenant in directory.tenants()]


def _tenant_info(directory: TenantDirectory, tenant: Tenant) -> am.TenantInfo:
    allowed = None if tenant.allowed_models is None else sorted(tenant.allowed_models)
    num_keys = sum(key.revoked_at is None for key in directory.keys_of(tenant.id))
    return am.TenantInfo(
        tenant.id,
        tenant.name,
        tenant.status,
        tenant.sharing,
        allowed,
        tenant.created_at,
        num_keys,
        kv_floor=tenant.kv_floor,
        kv_cap=tenant.kv_cap,
        cache_hint=tenant.cache_hint,
    )


def _key_infos(directory: TenantDirectory, tenants: Iterable[Tenant]) -> list[am.KeyInfo]:
    return [
        am.KeyInfo(key.id, tenant.name, key.label, key.created_at, key.revoked_at)
        for tenant in tenants
        for key in directory.keys_of(tenant.id)
    ]


def _prefix_info(directory: TenantDirectory, prefix: PublishedPrefix) -> am.PrefixInfo:
    ids = prefix.tenant_ids
    names = None if ids is None else [tenant.name for tenant in directory.tenants() if tenant.id in ids]
    return am.PrefixInfo(
        prefix.name,
        names,
        len(prefix.text),
        prefix.created_at,
        pinned=prefix.pinned,
        pinned_on=_sorted(prefix.pinned_on),
    )


def _cache_prefix(prefix: PublishedPrefix, saving: Saving) -> am.CachePrefix:
    return am.CachePrefix(
        prefix.name,
        saving.num_tokens,
        prefix.pinned,
        prefix.text[:PREVIEW_CHARS],
        hits=saving.num_hits,
        pinned_on=_sorted(prefix.pinned_on),
    )


# What the audit trail keeps: no digests of keys, of a text only what identifies it.


def _tenant_record(tenant: Tenant) -> dict[str, Any]:
    allowed = None if tenant.allowed_models is None else sorted(tenant.allowed_models)
    record = {"id": tenant.id, "status": tenant.status, "sharing": tenant.sharing, "allowed_models": allowed}
    return record | {"kv_floor": tenant.kv_floor, "kv_cap": tenant.kv_cap, "cache_hint": tenant.cache_hint}


def _key_record(key: ApiKey) -> dict[str, Any]:
    return {"id": key.id, "tenant_id": key.tenant_id, "label": key.label, "revoked_at": key.revoked_at}


def _prefix_record(prefix: PublishedPrefix) -> dict[str, Any]:
    raw = prefix.text.encode()
    record = {"blake2b": blake2b(raw, digest_size=16).hexdigest(), "num_bytes": len(raw)}
    pin = {"pinned": prefix.pinned, "pinned_on": _sorted(prefix.pinned_on)}
    return record | {"tenant_ids": _sorted(prefix.tenant_ids)} | pin


def _sorted(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)
