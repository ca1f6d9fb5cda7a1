"""Keys that expire while they run something."""

from __future__ import annotations

import trio
import trio.testing

from kvasir.gateway.admin.expiry import LOOK_EVERY_S, end_expired
from kvasir.gateway.tenants.directory import ApiKey, Tenant, TenantDirectory
from tests.gateway.admin.test_admin import FakeHouse


def test_what_a_key_runs_ends_when_it_expires_and_once() -> None:
    house = FakeHouse()
    directory = TenantDirectory(bytes(32), [Tenant("t", "acme"), ApiKey("never", "t", bytes(32))])
    clock = trio.testing.MockClock(autojump_threshold=0)
    start = clock.current_time()
    for key_id, seconds in (("k0", 5.0), ("k1", 50.0)):
        directory.apply(ApiKey(key_id, "t", bytes(32), expires_at=start + seconds))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_expired, directory, house, trio.current_time)
            await trio.sleep(5.0 + 2 * LOOK_EVERY_S)
            assert [key_id for key_id, _ in house.ended] == ["k0"]
            await trio.sleep(50.0)
            assert [key_id for key_id, _ in house.ended] == ["k0", "k1"]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
