"""The workers that are in: by id, by link, and what their models are served as."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from kvasir.gateway.core.api import ModelInfo
from kvasir.gateway.core.rates import Rates
from kvasir.gateway.core.worker import Worker
from kvasir.gateway.core.worker_checks import Served
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.protocol.messages import Hello

MAX_STRANGERS = 1_024


class Fleet:
    """Who is in. `epoch` is the gateway's; each session's own epoch begins with it.

    A worker drops its sequences when it is welcomed with another epoch than before. A session that was lost and
    begins anew therefore starts clean: no request of the old one takes room or speaks up.
    """

    def __init__(self, epoch: bytes, configured: Iterable[str]) -> None:
        self.by_id: dict[str, Worker] = {}
        self.by_peer: dict[bytes, Worker] = {}
        self.served: dict[str, Served] = {}
        self.infos = {name: ModelInfo(name, "", "", 0, 0, 0) for name in sorted(configured)}
        self._typical_rates: dict[str, Rates] = {}  # by model
        self._epoch = epoch
        self._num_sessions = 0
        self._strangers: dict[bytes, float] = {}  # when unknown peers were last asked who they are

    def admit(self, peer: bytes, hello: Hello, now: float) -> Worker:
        """Let a worker in; its id and `peer` must be free. It starts with the rate of its model's workers."""
        rates = Rates(self._typical_rates.setdefault(hello.model, Rates()))
        self._num_sessions += 1
        epoch = self._epoch + self._num_sessions.to_bytes(8, "little")
        worker = Worker(peer, hello, epoch, now, rates, last_report_at=now, last_step_at=now)
        self.by_id[hello.worker_id] = self.by_peer[peer] = worker
        self.served.setdefault(hello.model, Served(hello.fingerprint, hello.dtype))
        self._strangers.pop(peer, None)
        self._refresh(hello.model)
        return worker

    def remove(self, worker: Worker) -> None:
        """Forget a worker; its model stays known."""
        del self.by_id[worker.worker_id], self.by_peer[worker.peer]
        worker.is_member = False
        self._refresh(worker.hello.model)

    def index_of(self, worker_id: str) -> PrefixIndex | None:
        """Return what a worker has cached, None if it is not in."""
        worker = self.by_id.get(worker_id)
        return None if worker is None else worker.index

    def is_to_identify(self, peer: bytes, now: float, every_s: float) -> bool:
        """Return whether to ask an unknown peer who it is: once each `every_s`, for a bounded number of them."""
        asked_at = self._strangers.get(peer)
        if asked_at is not None and now - asked_at < every_s:
            return False
        if len(self._strangers) >= MAX_STRANGERS:
            self._strangers.clear()
        self._strangers[peer] = now
        return True

    def _refresh(self, model: str) -> None:
        workers = [worker for worker in self.by_id.values() if worker.hello.model == model]
        if workers:
            max_context = max(worker.max_context for worker in workers)
            hello = workers[0].hello
            lacks = frozenset(lack for worker in workers for lack in worker.hello.lacks)
            fresh = ModelInfo(
                model, hello.fingerprint, hello.dtype, hello.block_size, max_context, len(workers), hello.engine, lacks
            )
        else:
            fresh = msgspec.structs.replace(self.infos[model], num_workers=0)
        self.infos = {**self.infos, model: fresh}  # a new one: edges may hold on to the old
