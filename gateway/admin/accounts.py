"""The operator's commands about tenants, keys and prices, decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from msgspec import to_builtins

from kvasir.gateway.admin.verdict import Verdict, audit_record, changed, check_room
from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.tenants.directory import (
    ModelPrice,
    RemoveTenant,
    Tenant,
    TenantDirectory,
    check_name,
    issue_key,
    new_tenant_id,
)
from kvasir.gateway.tenants.quotas import check_kv_size
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import Conflict, NotFound
from kvasir.protocol.sampling import CacheHint


def decide_tenant(directory: TenantDirectory, command: am.TenantCommand, now: float, gateway: Gateway) -> Verdict:
    """Return what a command about tenants comes to. Changes nothing; draws ids.

    Raises:
        BadRequest, NotFound, Conflict: refused; says what now.
    """
    match command:
        case am.TenantCreate():
            return _create_tenant(directory, command, now)
        case am.TenantList():
            return Verdict(am.TenantsReply(tenant_infos(directory, gateway)))
        case am.TenantShow():
            tenant = directory.tenant(command.name)
            info = _tenant_info(directory, tenant, gateway.usage())
            return Verdict(am.TenantReply(info, _key_infos(directory, [tenant])))
        case am.TenantSetStatus():
            return _set_status(directory, command, gateway)
        case am.TenantSet():
            return _set_tenant(directory, command, gateway)
        case am.TenantRename():
            return _rename_tenant(directory, command)
        case am.TenantDelete():
            return _delete_tenant(directory, command, now, gateway)


def decide_key(directory: TenantDirectory, command: am.KeyCommand, now: float, gateway: Gateway) -> Verdict:
    """Return what a command about keys comes to. Changes nothing; draws keys and ids.

    Raises:
        NotFound, Conflict: refused; says what now.
    """
    match command:
        case am.KeyCreate():
            tenant = directory.tenant(command.tenant)
            key, text = issue_key(directory.deployment_secret, tenant.id, command.label, now)
            expires_at = None if command.valid_s is None else now + command.valid_s
            key = replace(key, expires_at=expires_at, terms=command.terms.apply(key.terms))
            return changed(None, key, tenant.name, reply=am.KeyCreated(key.id, text, tenant.name, key.label))
        case am.KeyList():
            tenants = directory.tenants() if command.tenant is None else [directory.tenant(command.tenant)]
            return Verdict(am.KeysReply(_key_infos(directory, tenants)))
        case am.KeySet():
            return _set_key(directory, command, now)
        case am.KeyRotate():
            return _rotate_key(directory, command, now)
        case am.KeyRevoke():
            return _revoke_key(directory, command, now, gateway)


def decide_price(directory: TenantDirectory, command: am.PriceCommand) -> Verdict:
    """Return what a command about prices comes to. Changes nothing.

    Raises:
        NotFound: there is no such price to take away.
    """
    if isinstance(command, am.PriceList):
        prices = [records.PriceInfo(model, price) for model, price in sorted(directory.prices.items())]
        return Verdict(am.PricesReply(prices))
    before = directory.prices.get(command.model)
    if before == command.price:
        if before is None:
            raise NotFound(f"model {command.model!r} has no price; `kvasir price list` shows those there are")
        return Verdict(am.Done(changed=False))
    change = ModelPrice(command.model, command.price)
    return Verdict(am.Done(), (change,), command.model, to_builtins(before), to_builtins(command.price))


def _create_tenant(directory: TenantDirectory, command: am.TenantCreate, now: float) -> Verdict:
    check_name(command.name, "tenant")
    if any(tenant.name == command.name for tenant in directory.tenants()):
        raise Conflict(f"a tenant called {command.name!r} exists already; choose another name or use that one")
    sharing = "private" if command.group is None else f"group:{check_name(command.group, 'group')}"
    allowed = None if command.allowed_models is None else frozenset(command.allowed_models)
    tenant = Tenant(new_tenant_id(), command.name, "active", sharing, allowed, now)
    return changed(None, tenant, tenant.name, reply=am.TenantReply(_tenant_info(directory, tenant, {})))


def _set_tenant(directory: TenantDirectory, command: am.TenantSet, gateway: Gateway) -> Verdict:
    before = directory.tenant(command.name)
    after = replace(
        before,
        kv_floor=before.kv_floor if command.kv_floor is None else check_kv_size(command.kv_floor, "kv_floor"),
        kv_cap=before.kv_cap if command.kv_cap is None else check_kv_size(command.kv_cap, "kv_cap"),
        cache_hint=before.cache_hint if command.cache_hint is None else _hint(command.cache_hint),
        terms=command.terms.apply(before.terms),
    )
    if (before.kv_floor, before.kv_cap) != (after.kv_floor, after.kv_cap):
        others = [tenant for tenant in directory.tenants() if tenant.id != before.id]
        check_room([*others, after], directory.prefixes, gateway)
    return changed(before, after, after.name, effect=gateway.kv_changed)


def _set_key(directory: TenantDirectory, command: am.KeySet, now: float) -> Verdict:
    before = directory.key(command.key_id)
    if before.revoked_at is not None:
        raise Conflict(f"key {before.id} is revoked for good; make a new one with `kvasir key create`")
    after = replace(before, terms=command.terms.apply(before.terms))
    if command.valid_s is not None:
        after = replace(after, expires_at=None if command.valid_s == "none" else now + command.valid_s)
    return changed(before, after, directory.name_of(before.tenant_id))


def _set_status(directory: TenantDirectory, command: am.TenantSetStatus, gateway: Gateway) -> Verdict:
    before = directory.tenant(command.name)
    after = replace(before, status="active" if command.active else "disabled")

    def effect() -> None:
        if not command.active:
            gateway.end_requests(after.id, f"tenant {after.name} was disabled; ask the operator to enable it")

    return changed(before, after, after.name, effect=effect)


def _rename_tenant(directory: TenantDirectory, command: am.TenantRename) -> Verdict:
    before = directory.tenant(command.name)
    check_name(command.new_name, "tenant")
    if any(tenant.name == command.new_name for tenant in directory.tenants() if tenant is not before):
        raise Conflict(f"a tenant called {command.new_name!r} exists already; choose another name")
    return changed(before, replace(before, name=command.new_name), command.new_name)


def _delete_tenant(directory: TenantDirectory, command: am.TenantDelete, now: float, gateway: Gateway) -> Verdict:
    tenant = directory.tenant(command.name)
    keys = directory.keys_of(tenant.id)

    def effect() -> None:
        gateway.end_requests(tenant.id, f"tenant {tenant.name} was deleted")
        gateway.clear_kv(tenant.id)
        gateway.kv_changed()
        for payer_id in (tenant.id, *(key.id for key in keys)):
            gateway.forget(payer_id)

    change = RemoveTenant(tenant.id, tenant.name, now)
    before = audit_record(tenant) | {"keys": [key.id for key in keys]}
    return Verdict(am.Done(), (change,), tenant.name, before, None, effect)


def _revoke_key(directory: TenantDirectory, command: am.KeyRevoke, now: float, gateway: Gateway) -> Verdict:
    key = directory.key(command.key_id)
    if key.revoked_at is not None:
        return Verdict(am.Done(changed=False))
    revoked = replace(key, revoked_at=now, old_digest=b"", old_until=None)

    def effect() -> None:
        gateway.end_requests(key.id, "this API key was revoked; ask the operator for a new one")

    return changed(key, revoked, directory.name_of(key.tenant_id), effect=effect)


def _rotate_key(directory: TenantDirectory, command: am.KeyRotate, now: float) -> Verdict:
    before = directory.key(command.key_id)
    if not before.is_live(now):
        raise Conflict(f"key {before.id} is revoked or has expired; make a new one with `kvasir key create`")
    fresh, text = issue_key(directory.deployment_secret, before.tenant_id, before.label, now, key_id=before.id)
    after = replace(before, digest=fresh.digest, old_digest=before.digest, old_until=now + command.overlap_s)
    tenant = directory.name_of(before.tenant_id)
    return changed(before, after, tenant, reply=am.KeyCreated(after.id, text, tenant, after.label))


def _hint(given: CacheHint | Literal["none"]) -> CacheHint | None:
    return None if given == "none" else given


# What is shown.


def tenant_infos(directory: TenantDirectory, gateway: Gateway) -> list[records.TenantInfo]:
    """Return all tenants as they are shown."""
    usage = gateway.usage()
    return [_tenant_info(directory, tenant, usage) for tenant in directory.tenants()]


def _tenant_info(
    directory: TenantDirectory, tenant: Tenant, usage: Mapping[str, records.UsageInfo]
) -> records.TenantInfo:
    allowed = None if tenant.allowed_models is None else sorted(tenant.allowed_models)
    num_keys = sum(key.revoked_at is None for key in directory.keys_of(tenant.id))
    return records.TenantInfo(
        tenant.id,
        tenant.name,
        tenant.status,
        tenant.sharing,
        allowed,
        tenant.created_at,
        num_keys,
        usage.get(tenant.id, records.UsageInfo()),
        kv_floor=tenant.kv_floor,
        kv_cap=tenant.kv_cap,
        cache_hint=tenant.cache_hint,
        terms=tenant.terms,
    )


def _key_infos(directory: TenantDirectory, tenants: Iterable[Tenant]) -> list[records.KeyInfo]:
    return [
        records.KeyInfo(
            key.id, tenant.name, key.label, key.created_at, key.revoked_at, key.expires_at, key.terms, key.old_until
        )
        for tenant in tenants
        for key in directory.keys_of(tenant.id)
    ]
