"""The operator's commands about published prefixes, decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvasir.gateway.admin.verdict import Verdict, audit_record, changed, check_room, sorted_names
from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.tenants.directory import PublishedPrefix, RemovePrefix, TenantDirectory, check_name
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import BadRequest, Conflict, NotFound

PREVIEW_CHARS = 40


def decide_prefix(directory: TenantDirectory, command: am.PrefixCommand, now: float, gateway: Gateway) -> Verdict:
    """Return what a command about prefixes comes to. Changes nothing.

    Raises:
        BadRequest, NotFound, Conflict: refused; says what now.
    """
    match command:
        case am.PrefixPublish():
            return _publish_prefix(directory, command, now, gateway)
        case am.PrefixPin():
            return _pin_prefix(directory, command, gateway)
        case am.PrefixList():
            return Verdict(
                am.PrefixesReply([_prefix_info(directory, prefix, gateway) for prefix in directory.prefixes])
            )
        case am.PrefixRemove():
            prefix = _prefix(directory, command.name)
            change, record = RemovePrefix(prefix.name), audit_record(prefix)
            return Verdict(am.Done(), (change,), prefix.name, record, None, gateway.prefixes_changed)


def cache_prefix(prefix: PublishedPrefix, saving: Saving) -> records.CachePrefix:
    """Return a prefix as `kvasir cache show` lists it."""
    return records.CachePrefix(
        prefix.name,
        saving.num_tokens,
        prefix.pinned,
        prefix.text[:PREVIEW_CHARS],
        hits=saving.num_hits,
        pinned_on=sorted_names(prefix.pinned_on),
    )


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
        return Verdict(am.PrefixReply(_prefix_info(directory, before, gateway), changed=False))
    if before is not None and not command.replace:
        raise Conflict(
            f"the prefix {command.name!r} is published with another text or for other tenants; "
            "add --replace, remove it first or choose another name"
        )
    _check_pins(directory, prefix, gateway)
    reply = am.PrefixReply(_prefix_info(directory, prefix, gateway), changed=True)
    return changed(before, prefix, prefix.name, reply=reply, effect=gateway.prefixes_changed)


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
    return changed(before, after, after.name, effect=effect)


def _check_can_pin(workers: Sequence[records.WorkerInfo], wanted: frozenset[str] | None) -> None:
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
        check_room(directory.tenants(), [*others, after], gateway)


def _prefix_info(directory: TenantDirectory, prefix: PublishedPrefix, gateway: Gateway) -> records.PrefixInfo:
    ids = prefix.tenant_ids
    names = None if ids is None else [tenant.name for tenant in directory.tenants() if tenant.id in ids]
    return records.PrefixInfo(
        prefix.name,
        names,
        len(prefix.text),
        prefix.created_at,
        gateway.public_tokens(prefix),
        pinned=prefix.pinned,
        pinned_on=sorted_names(prefix.pinned_on),
    )
