"""The running gateway as its operator sees and steers it: the core's figures in the admin socket's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import structs

from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.edges.published import Published
from kvasir.gateway.edges.zmq_edge import EdgeLimits
from kvasir.gateway.tenants.directory import PublishedPrefix, TenantDirectory
from kvasir.gateway.tenants.quotas import kv_quotas
from kvasir.gateway.workers.supervisor import Supervisor
from kvasir.protocol.admin_records import CacheTenant, CacheWorker, ModelStatus, PrivatePrefix, UsageInfo, WorkerInfo
from kvasir.protocol.errors import AuthenticationFailed
from kvasir.protocol.messages import Quota
from kvasir.protocol.prefix import HASH_BYTES

MAX_PRIVATE_PREFIXES = 100  # shown


class Gateway:
    """What the admin actor may ask of the rest of the gateway. All calls are cheap."""

    def __init__(
        self,
        config: GatewayConfig,
        core: Core,
        published: Published,
        supervisor: Supervisor,
        directory: TenantDirectory,
        billing: Billing,
        stop: Callable[[], None],
        *,
        max_http_connections: int = 0,
    ) -> None:
        self._config = config
        self._core = core
        self._published = published
        self._supervisor = supervisor
        self._directory = directory
        self._billing = billing
        self._max_http_connections = max_http_connections
        self._stop = stop

    def workers(self) -> list[WorkerInfo]:
        """Return the workers that are in, then the local ones that are still starting or waiting for a restart."""
        restarts = self._supervisor.num_restarts()
        infos = [
            structs.replace(info, num_restarts=restarts.get(info.id, 0)) for info in self._core.statistics().workers
        ]
        present = {info.id for info in infos}
        for worker_id, model in self._supervisor.local_workers().items():
            if worker_id not in present:
                infos.append(WorkerInfo(worker_id, model, "starting", num_restarts=restarts.get(worker_id, 0)))
        return infos

    def models(self) -> list[ModelStatus]:
        queued = {model.model: model.queued for model in self._core.statistics().models}
        return [
            ModelStatus(
                name=info.name,
                fingerprint=info.fingerprint,
                dtype=info.dtype,
                max_context=info.max_context,
                num_workers=info.num_workers,
                num_waiting=queued.get(info.name, 0),
            )
            for info in self._core.models().values()
        ]

    def usage(self) -> dict[str, UsageInfo]:
        """Return what each tenant has used since the start, by tenant id; tenants without requests may be missing."""
        return self._core.statistics().tenants

    def cache(self) -> list[CacheWorker]:
        """Return who holds every worker's KV blocks."""
        found = []
        for cache in self._core.statistics().caches:
            quotas = kv_quotas(self._directory.tenants(), cache.num_blocks)
            owners = sorted(cache.tenants, key=lambda owner: -owner.num_blocks)
            found.append(structs.replace(cache, tenants=[self._shown(owner, quotas) for owner in owners]))
        return found

    def _shown(self, owner: CacheTenant, quotas: Mapping[str, Quota]) -> CacheTenant:
        quota, name = quotas.get(owner.tenant, Quota()), self._directory.name_of(owner.tenant)
        return structs.replace(owner, tenant=name, floor=quota.floor, cap=quota.cap)

    def kv_changed(self) -> None:
        """Put the tenants' KV floors and caps, as they are now, in force on all workers."""
        self._core.kv.set_quotas(lambda num_blocks: kv_quotas(self._directory.tenants(), num_blocks))

    def pinned_blocks(self, prefixes: Sequence[PublishedPrefix]) -> dict[str, int]:
        """Return how many blocks each worker that is in keeps pinned when these prefixes are the published ones."""
        return {
            worker.id: sum(
                len(pin.prefix_hashes) // HASH_BYTES for pin in self._published.pins(worker.model, worker.id, prefixes)
            )
            for worker in self._core.statistics().workers
        }

    async def tokenise(self, text: str) -> None:
        """Tokenise a text that is to be published, in a thread, so that nothing waits for it afterwards."""
        await self._published.tokenise(text)

    def prefixes_changed(self, prewarm: str | None = None) -> None:
        """Have all workers pin what is to be pinned now, and compute the prefix `prewarm` if they do not have it."""
        self._core.kv.set_pins(self._published.pins, prewarm=prewarm)

    def saved_by_prefix(self) -> dict[str, Saving]:
        """Return what every published prefix has saved since the start; those that saved nothing may be missing."""
        found: dict[str, Saving] = {}
        by_hash = {model: self._published.prefix_of_hash(model) for model in self._core.models()}
        for (model, digest), saving in self._core.savings.published.items():
            prefix = by_hash.get(model, {}).get(digest)
            if prefix is not None:
                found.setdefault(prefix.name, Saving()).add(saving.num_tokens, saving.num_hits)
        return found

    def private_prefixes(self) -> list[PrivatePrefix]:
        """Return the private beginnings of prompts that have saved most, most first."""
        return [
            PrivatePrefix(self._directory.name_of(tenant_id), model, saving.num_tokens, saving.num_hits)
            for tenant_id, model, saving in self._core.savings.top_private(MAX_PRIVATE_PREFIXES)
        ]

    def end_requests(self, payer_id: str, reason: str) -> None:
        """End what runs for a tenant or key, by its id; its clients are told `reason`."""
        self._core.end_requests(payer_id, AuthenticationFailed(reason))

    def forget(self, payer_id: str) -> None:
        """Drop what is remembered of a tenant or key that is gone."""
        self._core.forget(payer_id)

    def bounds(self) -> dict[str, int]:
        """Return what the gateway holds at most, by name."""
        queue, edge = self._core.queue_config, EdgeLimits()
        return {
            "requests waiting": queue.max_queued,
            "requests waiting per tenant": queue.max_queued_per_tenant,
            "calls per ZeroMQ client": edge.max_calls_per_client,
            "HTTP connections": self._max_http_connections,
        }

    def ledger_error(self) -> str:
        """Return why rows cannot be written, empty while they can."""
        return self._billing.ledger_error

    def clear_kv(self, tenant_id: str) -> None:
        """Have all workers drop what is cached of a tenant."""
        self._core.kv.clear(tenant_id)

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        """Return how many tokens of `prefix` are shared, per served model."""
        return self._published.public_tokens(prefix)

    def endpoints(self) -> dict[str, str]:
        """Return where clients can dial: "http", "zmq", ..."""
        found = {"zmq": self._config.client_endpoints[0], "workers": self._config.worker_endpoint}
        if self._config.http is not None:
            host, port = self._config.http
            found["http"] = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return found

    def is_draining(self) -> bool:
        return self._core.statistics().is_draining

    def explain(self, request: str) -> list[dict[str, Any]] | None:
        """Return the router's decisions, one per attempt, on the request of that id, as JSON values, or None."""
        receipts = self._core.receipts.find(request)
        return None if receipts is None else msgspec.to_builtins(receipts)

    def drain(self) -> None:
        """Begin the shutdown that SIGTERM begins."""
        self._stop()
