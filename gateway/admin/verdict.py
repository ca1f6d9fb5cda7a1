"""What decisions about commands come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.tenants.directory import Change, PublishedPrefix, Tenant
from kvasir.gateway.tenants.quotas import check_kv_quotas
from kvasir.protocol import admin_messages as am


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
