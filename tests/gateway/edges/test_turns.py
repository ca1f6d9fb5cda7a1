"""One tenant's flood of long work is waited for by itself alone, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from kvasir.gateway.edges.turns import FairThreads

pytestmark = pytest.mark.timeout(30)


def test_a_flood_of_one_tenant_leaves_a_thread_to_others() -> None:
    async def main() -> None:
        threads, go_on, ended = FairThreads(2, 1), threading.Event(), []

        async def flood(number: int) -> None:
            await threads.run("greedy", go_on.wait)
            ended.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(flood, number)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                assert await threads.run("modest", lambda: 7) == 7
            assert not ended and len(threads._turns) == 1
            go_on.set()
        assert sorted(ended) == [0, 1, 2, 3, 4] and not threads._turns

    trio.run(main)


def test_who_is_cancelled_waits_no_longer_and_is_forgotten() -> None:
    async def main() -> None:
        threads, go_on = FairThreads(1, 1), threading.Event()
        with trio.move_on_after(0.05):
            await threads.run("a", go_on.wait)
        with trio.move_on_after(0.05):
            await threads.run("b", go_on.wait)  # behind the thread that still runs
        assert not threads._turns
        go_on.set()
        assert await threads.run("b", lambda: 7) == 7

    trio.run(main)


def test_what_a_function_raises_comes_back() -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await FairThreads(1, 1).run("a", lambda: 1 // 0)

    trio.run(main)
