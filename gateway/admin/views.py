"""What the operator sees of the running gateway: the core's figures in the admin socket's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.edges.prepare import Intake
from kvasir.gateway.tenants.directory import PublishedPrefix, TenantDirectory
from kvasir.gateway.tenants.quotas import kv_quotas
from kvasir.gateway.workers.supervisor import Supervisor
from kvasir.protocol.admin_messages import CacheTenant, CacheWorker, ModelStatus, PrivatePrefix, UsageInfo, WorkerInfo
from kvasir.protocol.prefix import HASH_BYTES

MAX_PRIVATE_PREFIXES = 100  # shown


class GatewayHouse:
    """Answers the admin actor (`House`) from the core, the supervisor and the intake. Mutates nothing."""

    def __init__(
        self,
        config: GatewayConfig,
        core: Core,
        intake: Intake,
        supervisor: Supervisor,
        directory: TenantDirectory,
        stop: Callable[[], None],
    ) -> None:
        self._config = config
        self._core = core
        self._intake = intake
        self._supervisor = supervisor
        self._directory = directory
        self._stop = stop

    def workers(self) -> list[WorkerInfo]:
        """Return the workers that are in, then the local ones that are still starting or waiting for a restart."""
        restarts = self._supervisor.num_restarts()
        infos = [
            WorkerInfo(
                id=worker.worker_id,
                model=worker.model,
                state=worker.state,
                pid=worker.pid,
                device=worker.device,
                num_running=worker.running,
                num_waiting=worker.waiting,
                max_requests=worker.max_requests,
                num_blocks=worker.num_blocks,
                num_free_blocks=worker.num_free_blocks,
                num_cached_blocks=worker.num_index_blocks,
                prompt_tokens=worker.num_prompt_tokens,
                cached_tokens=worker.num_actual_cached_tokens,
                output_tokens=worker.num_output_tokens,
                prefill_rate=worker.prefill_tokens_per_s,
                decode_rate=worker.running / worker.decode_round_s if worker.decode_round_s else 0.0,
                num_restarts=restarts.get(worker.worker_id, 0),
            )
            for worker in self._core.statistics().workers
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
        return {
            tenant.tenant_id: UsageInfo(
                num_requests=tenant.num_requests,
                num_running=tenant.running,
                num_waiting=tenant.queued,
                prompt_tokens=tenant.num_prompt_tokens,
                cached_tokens=tenant.num_cached_tokens,
                output_tokens=tenant.num_output_tokens,
            )
            for tenant in self._core.statistics().tenants
        }

    def cache(self) -> list[CacheWorker]:
        names, size = {tenant.id: tenant for tenant in self._directory.tenants()}, self._config.block_size
        statistics = self._core.statistics()
        found = []
        for worker in statistics.workers:
            quotas = {quota.tenant: quota for quota in kv_quotas(names.values(), worker.num_blocks)}
            tenants = [
                CacheTenant(
                    tenant=names[account.tenant_id].name if account.tenant_id in names else account.tenant_id,
                    floor=quotas[account.tenant_id].floor if account.tenant_id in quotas else 0,
                    cap=quotas[account.tenant_id].cap if account.tenant_id in quotas else None,
                    num_blocks=account.num_held,
                    block_s=account.block_s,
                    byte_s=account.byte_s,
                    looked_up_tokens=account.num_looked_up * size,
                    saved_tokens=account.num_hits * size,
                    evicted_own=account.num_evicted_own,
                    suffered=account.num_suffered,
                    caused=account.num_caused,
                )
                for account in statistics.kv
                if account.worker_id == worker.worker_id
            ]
            found.append(
                CacheWorker(
                    id=worker.worker_id,
                    model=worker.model,
                    block_size=size,
                    num_blocks=worker.num_blocks,
                    num_free_blocks=worker.num_free_blocks,
                    num_pinned=worker.num_pinned_blocks,
                    tenants=sorted(tenants, key=lambda tenant: -tenant.num_blocks),
                )
            )
        return found

    def kv_changed(self) -> None:
        self._core.set_kv_quotas(lambda num_blocks: kv_quotas(self._directory.tenants(), num_blocks))

    def pinned_blocks(self, prefixes: Sequence[PublishedPrefix]) -> dict[str, int]:
        return {
            worker.worker_id: sum(
                len(pin.prefix_hashes) // HASH_BYTES
                for pin in self._intake.pins(worker.model, worker.worker_id, prefixes)
            )
            for worker in self._core.statistics().workers
        }

    async def tokenise(self, text: str) -> None:
        await self._intake.tokenise(text)

    def prefixes_changed(self, prewarm: str | None = None) -> None:
        workers = self._core.statistics().workers
        names = {pin.name for worker in workers for pin in self._intake.pins(worker.model, worker.worker_id)}
        self._core.set_pins(self._intake.pins, prewarm={name for name in names if name.rpartition("/")[0] == prewarm})

    def saved_by_prefix(self) -> dict[str, Saving]:
        found: dict[str, Saving] = {}
        by_hash = {model: self._intake.prefix_of_hash(model) for model in self._core.models()}
        for (model, digest), saving in self._core.savings.published.items():
            prefix = by_hash.get(model, {}).get(digest)
            if prefix is not None:
                found.setdefault(prefix.name, Saving()).add(saving.num_tokens, saving.num_hits)
        return found

    def private_prefixes(self) -> list[PrivatePrefix]:
        names = {tenant.id: tenant.name for tenant in self._directory.tenants()}
        return [
            PrivatePrefix(names.get(tenant_id, tenant_id), model, saving.num_tokens, saving.num_hits)
            for tenant_id, model, saving in self._core.savings.top_private(MAX_PRIVATE_PREFIXES)
        ]

    def clear_kv(self, tenant_id: str) -> None:
        self._core.clear_kv(tenant_id)

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        return self._intake.public_tokens(prefix)

    def endpoints(self) -> dict[str, str]:
        found = {"zmq": self._config.client_endpoints[0], "workers": self._config.worker_endpoint}
        if self._config.http is not None:
            host, port = self._config.http
            found["http"] = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return found

    def is_draining(self) -> bool:
        return self._core.statistics().is_draining

    def explain(self, request: str) -> list[dict[str, Any]] | None:
        decisions = self._core.find_explained(request)
        return None if decisions is None else msgspec.to_builtins(decisions)

    def drain(self) -> None:
        self._stop()
