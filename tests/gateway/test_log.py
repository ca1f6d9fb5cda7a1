"""The access log: every line comes, in order, with fewer writes than lines; the rest when it is cancelled."""

from __future__ import annotations

import sys

import pytest
import trio
from trio.testing import MockClock

from kvasir.gateway.log import AccessLog


def test_lines_of_the_access_log_are_written_together_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)

    async def main() -> None:
        access = AccessLog()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access.run)
            for number in range(3):
                access("request", number=number)
            assert writes == []
            await trio.sleep(0.15)
            assert len(writes) == 1
            access("request", number=3)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(writes) == 2
    lines = "".join(writes).splitlines()
    assert [line.split()[-1] for line in lines] == [f"number={number}" for number in range(4)]
