"""What decisions about commands come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from msgspec import to_builtins

from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.tenants.directory import ApiKey, Change, PublishedPrefix, Tenant
from kvasir.gateway.tenants.quotas import check_kv_quotas
from kvasir.protocol import admin_messages as am

_DONE = am.Done()


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


def changed(
    before: Tenant | ApiKey | PublishedPrefix | None,
    after: Tenant | ApiKey | PublishedPrefix,
    subject: str,
    *,
    reply: am.AnyReply = _DONE,
    effect: Callable[[], None] | None = None,
) -> Verdict:
    """Return what it comes to that a record is made or changed; nothing if it is as it was."""
    if before == after:
        return Verdict(am.Done(changed=False))
    return Verdict(reply, (after,), subject, before and audit_record(before), audit_record(after), effect)


def audit_record(record: Tenant | ApiKey | PublishedPrefix) -> dict[str, Any]:
    """Return what the audit trail keeps of a record: no digests of keys, of a text only what identifies it."""
    kept: dict[str, Any] = to_builtins(record, order="deterministic")
    del kept["created_at"]
    match record:
        case ApiKey():
            del kept["digest"], kept["old_digest"]
            kept["old_secret_until"] = kept.pop("old_until")
        case PublishedPrefix():
            raw = record.text.encode()
            del kept["text"], kept["name"]
            kept |= {"blake2b": blake2b(raw, digest_size=16).hexdigest(), "num_bytes": len(raw)}
    return kept


def check_room(tenants: Sequence[Tenant], prefixes: Sequence[PublishedPrefix], gateway: Gateway) -> None:
    """Check that the floors of `tenants` and the pins of `prefixes` fit every worker.

    Raises:
        BadRequest: they do not.
    """
    pools = {
        worker.id: worker.num_blocks
        for worker in gateway.workers()
        if worker.num_blocks and "owners" not in worker.lacks
    }
    check_kv_quotas(tenants, pools or {"any": 1_000_000}, gateway.pinned_blocks(prefixes))


def sorted_names(names: frozenset[str] | None) -> list[str] | None:
    """Return a set of names as a list that JSON has."""
    return None if names is None else sorted(names)
