"""The async client on asyncio and on Trio, against a scripted gateway over real sockets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from kvasir import AsyncClient, errors
from kvasir.protocol.client_messages import CancelRequest, CompletionRequest, ModelCard
from tests.fake_gateway import API_KEY, FakeGateway, echo, endless, silent

pytestmark = pytest.mark.timeout(30)
Main = Callable[[], Awaitable[None]]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[FakeGateway]:
    with FakeGateway(tmp_path) as gateway:
        yield gateway


class OnAsyncio:
    """What the tests need of a library: run, sleep, run together, cancel from outside."""

    def run(self, main: Main) -> None:
        asyncio.run(asyncio.wait_for(main(), 20))

    async def together(self, *mains: Main) -> None:
        async with asyncio.TaskGroup() as group:
            for main in mains:
                group.create_task(main())

    async def cancelled_when(self, main: Main, ready: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(main())
        await ready()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def in_thread(self, function, *args):
        return await asyncio.to_thread(function, *args)


class OnTrio:
    def run(self, main: Main) -> None:
        async def bounded() -> None:
            with trio.fail_after(20):
                await main()

        trio.run(bounded)

    async def together(self, *mains: Main) -> None:
        async with trio.open_nursery() as nursery:
            for main in mains:
                nursery.start_soon(main)

    async def cancelled_when(self, main: Main, ready: Callable[[], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(main)
            await ready()
            nursery.cancel_scope.cancel()

    async def in_thread(self, function, *args):
        return await trio.to_thread.run_sync(function, *args)


@pytest.fixture(params=[OnAsyncio, OnTrio])
def library(request: pytest.FixtureRequest):
    return request.param()


def test_generate_chat_and_models_are_awaited(library, gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            assert (await client.generate([1, 2, 3], max_tokens=2)).token_ids == [1, 2]
            assert (await client.chat([{"role": "user", "content": "hi"}])).text == "user:hi;"
            assert await client.models() == [ModelCard("demo", 2048, 2)]

    library.run(main)


def test_a_stream_is_iterated_and_then_has_a_result(library, gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            async with client.generate("a b c", stream=True) as stream:
                assert [chunk.text async for chunk in stream] == ["a", "b", "c"]
            assert stream.result.text == "abc"
            assert [chunk async for chunk in stream] == []

    library.run(main)


def test_many_calls_share_one_connection(library, gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:

            def call(i: int) -> Main:
                async def one() -> None:
                    assert (await client.generate([i, 2 * i, 3])).token_ids == [i, 2 * i, 3]

                return one

            await library.together(*[call(i) for i in range(200)])

    library.run(main)


def test_cancelling_one_call_cancels_its_request_and_loses_nothing_else(library, gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            gateway.script = endless
            other = client.generate("other", stream=True)
            assert (await anext(other)).text == "first "
            assert gateway.wait_for(CompletionRequest).text == "other"

            async def doomed() -> None:
                await client.generate("doomed")

            async def ready() -> None:
                await library.in_thread(gateway.wait_for, CompletionRequest)

            await library.cancelled_when(doomed, ready)
            cancelled = await library.in_thread(gateway.wait_for, CancelRequest)
            assert cancelled.id not in other._call_ids
            gateway.script = echo
            assert (await client.generate("z")).text == "z"
            gateway.assert_nothing_more(CancelRequest)

    library.run(main)


def test_leaving_a_stream_early_cancels_it(library, gateway: FakeGateway) -> None:
    gateway.script = endless

    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            async with client.generate("x", stream=True) as stream:
                await anext(stream)
            gateway.wait_for(CancelRequest)
            async for _ in client.generate("x", stream=True):
                break
            gc.collect()
            gateway.wait_for(CancelRequest)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    library.run(main)


def test_silence_ends_a_call_after_its_timeout(library, gateway: FakeGateway) -> None:
    gateway.script = silent

    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=0.1) as client:
            with pytest.raises(errors.DeadlineExceeded, match=r"0\.1 s"):
                await client.generate("x")
            gateway.wait_for(CancelRequest)

    library.run(main)


def test_errors_keep_their_class_and_a_lost_gateway_is_survived(library, gateway: FakeGateway) -> None:
    async def main() -> None:
        async with AsyncClient(gateway.endpoint, "kv_wrong", timeout_s=10) as stranger:
            with pytest.raises(errors.AuthenticationFailed):
                await stranger.generate("x")
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            gateway.script = endless
            stream = client.generate("x", stream=True)
            await anext(stream)
            await library.in_thread(gateway.stop)
            with pytest.raises(errors.ConnectionLost):
                await anext(stream)
            gateway.script = echo
            gateway.start()
            assert (await client.generate("back")).text == "back"

    library.run(main)


def test_closing_ends_what_is_in_flight(library, gateway: FakeGateway) -> None:
    gateway.script = endless

    async def main() -> None:
        client = AsyncClient(gateway.endpoint, API_KEY, timeout_s=10)
        stream = client.generate("x", stream=True)
        await anext(stream)
        await client.aclose()
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await anext(stream)
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await client.generate("x")

    library.run(main)


def test_answers_that_come_after_the_event_loop_has_gone_hurt_nobody(library, gateway: FakeGateway) -> None:
    gateway.script = endless
    kept: list[AsyncClient] = []

    async def main() -> None:
        client = AsyncClient(gateway.endpoint, API_KEY, timeout_s=10)
        kept.append(client)
        kept.append(client.generate("x", stream=True))  # type: ignore[arg-type]

    library.run(main)
    gateway.wait_for(CompletionRequest)
    gateway.script = echo

    async def again() -> None:
        assert (await kept[0].generate("y")).text == "y"
        await kept[0].aclose()

    library.run(again)


def test_one_client_per_library_in_one_program(gateway: FakeGateway) -> None:
    """Trio being imported, or having run before, does not mean that it runs now."""

    async def main() -> None:
        async with AsyncClient(gateway.endpoint, API_KEY, timeout_s=10) as client:
            assert (await client.generate("x")).text == "x"

    OnTrio().run(main)
    OnAsyncio().run(main)
    OnTrio().run(main)
