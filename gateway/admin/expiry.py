"""Ends what keys run that expire."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.log import log
from kvasir.gateway.tenants.directory import TenantDirectory

LOOK_EVERY_S = 0.5


async def end_expired(
    directory: TenantDirectory, gateway: Gateway, wall_clock: Callable[[], float] = time.time
) -> None:
    """End the requests of every key when it expires, until cancelled."""
    looked_at = wall_clock()
    while True:
        await trio.sleep(LOOK_EVERY_S)
        now = wall_clock()
        for key_id in directory.expired_keys(looked_at, now):
            log("key_expired", key=key_id)
            gateway.end_requests(key_id, "this API key has expired; ask the operator for a new one")
        looked_at = now
