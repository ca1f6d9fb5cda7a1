"""What workers are told about whose their blocks are: floors and caps, pins, clearing. Not those that lack it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvasir.gateway.core.fleet import Fleet
from kvasir.gateway.core.worker import Worker
from kvasir.protocol.messages import ClearTenant, Command, Pin, Quota, Quotas, Unpin
from kvasir.protocol.prefix import HASH_BYTES


class KvOrders:
    """Orders hold for all workers of `fleet`, those that join later too (`greet`)."""

    def __init__(self, fleet: Fleet, send: Callable[[bytes, Command], None]) -> None:
        self._fleet = fleet
        self._send = send
        self._quotas: Callable[[int], dict[str, Quota]] | None = None
        self._pins: Callable[[str, str], list[Pin]] | None = None

    def set_quotas(self, quotas: Callable[[int], dict[str, Quota]]) -> None:
        """Put floors and caps in force. `quotas(num_blocks)` returns them for a pool of that size."""
        self._quotas = quotas
        for worker in self._fleet.by_id.values():
            if "owners" not in worker.hello.lacks:
                self._send(worker.peer, Quotas(quotas(worker.hello.num_blocks)))

    def set_pins(self, pins: Callable[[str, str], list[Pin]], *, prewarm: str | None = None) -> None:
        """Have every worker keep what `pins(model, worker_id)` returns for it.

        `prewarm`: the prefix among them that is computed at once by whoever does not have it.
        """
        self._pins = pins
        for worker in self._fleet.by_id.values():
            self._send_pins(worker, prewarm)

    def clear(self, tenant_id: str) -> None:
        """Have all workers drop what is cached of a tenant and not in use."""
        for worker in self._fleet.by_id.values():
            if "owners" not in worker.hello.lacks:
                self._send(worker.peer, ClearTenant(tenant_id))

    def greet(self, worker: Worker) -> None:
        """Tell a worker that has just been welcomed what is in force."""
        if self._quotas is not None and "owners" not in worker.hello.lacks:
            quotas = self._quotas(worker.hello.num_blocks)
            if quotas:
                self._send(worker.peer, Quotas(quotas))
        self._send_pins(worker)

    def _send_pins(self, worker: Worker, prewarm: str | None = None) -> None:
        if self._pins is None or "pins" in worker.hello.lacks:
            return
        pins = self._pins(worker.hello.model, worker.worker_id)
        for name in worker.pins.keys() - {pin.name for pin in pins}:
            self._send(worker.peer, Unpin(name))
        for pin in pins:
            if worker.pins.get(pin.name) != pin.prefix_hashes[-HASH_BYTES:] or pin.prefix == prewarm:
                self._send(worker.peer, msgspec.structs.replace(pin, prewarm=pin.prefix == prewarm))
        worker.pins = {pin.name: pin.prefix_hashes[-HASH_BYTES:] for pin in pins}
