"""What decisions about commands are made of: what they may ask of the gateway, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvasir.gateway.core.savings import Saving
from kvasir.gateway.tenants.directory import Change, PublishedPrefix, Tenant
from kvasir.gateway.tenants.quotas import check_kv_quotas
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records


class Gateway(Protocol):
    """What the operator may ask of the rest of the gateway. All calls are synchronous and cheap."""

    def workers(self) -> list[records.WorkerInfo]: ...

    def models(self) -> list[records.ModelStatus]: ...

    def usage(self) -> dict[str, records.UsageInfo]:
        """Return what each tenant has used since the start, by tenant id; tenants without requests may be missing."""

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        """Return how many tokens of `prefix` are shared, per served model."""

    def cache(self) -> list[records.CacheWorker]:
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

    def private_prefixes(self) -> list[records.PrivatePrefix]:
        """Return the private beginnings of prompts that have saved most, most first."""

    def end_requests(self, payer_id: str, reason: str) -> None:
        """End what runs for a tenant or key, by its id; its clients are told `reason`."""

    def forget(self, payer_id: str) -> None:
        """Drop what is remembered of the limits and budgets of a tenant or key that is gone."""

    def bounds(self) -> dict[str, int]:
        """Return what the gateway holds at most, by name."""

    def ledger_error(self) -> str:
        """Return why rows cannot be written, empty while they can."""

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
