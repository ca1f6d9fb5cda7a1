"""One tenant's flood of long work is waited for by itself alone, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from kvasir.gateway.edges.turns import FairThreads

pytestmark = pytest.mark.timeout(30)


def test_the_next_thread_is_not_one_that_floods_but_another_tenants() -> None:
    async def main() -> None:
        threads, gate, ended = FairThreads(2), threading.Semaphore(0), []

        async def run(name: str, function: Callable[[], object]) -> None:
            await threads.run(name, function)
            ended.append(name)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(run, "greedy", gate.acquire)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                nursery.start_soon(run, "modest", lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            assert not ended and len(threads._turns) == 2
            gate.release()
            while len(ended) < 3:  # noqa: ASYNC110 threads tell nobody
                await trio.sleep(0.001)
            assert ended[:3] == ["greedy", "modest", "modest"]
            for _ in range(19):
                gate.release()
        assert len(ended) == 23 and not threads._turns

    trio.run(main)


def test_who_is_cancelled_waits_no_longer_and_is_forgotten() -> None:
    async def main() -> None:
        threads, go_on = FairThreads(1), threading.Event()
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
            await FairThreads(1).run("a", lambda: 1 // 0)

    trio.run(main)
