"""The Trio-ZeroMQ link: real sockets, real time, a bound on each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.link import (
    MAX_BATCH_BYTES,
    MAX_DISCARDED,
    MAX_PARTS,
    Link,
    LinkBusy,
    LinkClosed,
    PeerGone,
    open_router,
)
from kvasir.protocol.profile import LinkProfile
from tests.dealer import open_dealer

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context: zmq.Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def run(main) -> None:
    async def bounded() -> None:
        with trio.fail_after(20):
            await main()

    trio.run(bounded)


async def receive_all(link: Link, count: int) -> list[list[bytes]]:
    messages: list[list[bytes]] = []
    while len(messages) < count:
        messages += await link.receive()
    return messages


def test_many_messages_cross_in_both_directions_without_a_lost_wake_up(context, tmp_path: Path) -> None:
    """Echo under concurrent sends and receives on both sockets: each libzmq call may eat the other's edge."""
    count = 20_000
    endpoint = f"ipc://{tmp_path}/s"

    async def main() -> None:
        router = open_router(context, [endpoint])
        dealer = open_dealer(context, endpoint)

        async def echo() -> None:
            echoed = 0
            while echoed < count:
                for message in await router.receive():
                    await router.send(message)
                    echoed += 1

        async def produce() -> None:
            for i in range(count):
                await dealer.send([i.to_bytes(4, "big")])

        async with trio.open_nursery() as pumps:
            await pumps.start(router.run)
            await pumps.start(dealer.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo)
                nursery.start_soon(produce)
                replies = await receive_all(dealer, count)
            assert [int.from_bytes(frames[-1], "big") for frames in replies] == list(range(count))
            router.close()
            dealer.close()

    run(main)


def test_an_idle_link_does_not_spin_and_still_wakes_for_a_message_nobody_waited_for(context, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"

    async def main() -> None:
        router = open_router(context, [endpoint])
        dealer = open_dealer(context, endpoint)
        instrument = CountSteps()
        async with trio.open_nursery() as pumps:
            await pumps.start(router.run)
            await pumps.start(dealer.run)
            await dealer.send([b"early"])
            trio.lowlevel.add_instrument(instrument)
            await trio.sleep(0.3)
            trio.lowlevel.remove_instrument(instrument)
            assert instrument.steps < 100
            assert (await router.receive())[0][1] == b"early"
            router.close()
            dealer.close()

    run(main)


class CountSteps(trio.abc.Instrument):
    steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


def test_a_cancelled_receive_loses_nothing(context, tmp_path: Path) -> None:
    count = 400
    endpoint = f"ipc://{tmp_path}/s"

    async def main() -> None:
        router = open_router(context, [endpoint])
        dealer = open_dealer(context, endpoint)
        got: list[bytes] = []

        async def produce() -> None:
            for i in range(count):
                await dealer.send([i.to_bytes(4, "big")])
                await trio.sleep(0.0005)

        async with trio.open_nursery() as pumps:
            await pumps.start(router.run)
            await pumps.start(dealer.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(produce)
                while len(got) < count:
                    with trio.move_on_after(0.0004):
                        got += [frames[-1] for frames in await router.receive(3)]
            assert got == [i.to_bytes(4, "big") for i in range(count)]
            router.close()
            dealer.close()

    run(main)


def test_nothing_is_dropped_silently_when_a_peer_does_not_read(context, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    profile = LinkProfile(high_water=10)

    async def main() -> None:
        router = open_router(context, [endpoint], profile)
        dealer = open_dealer(context, endpoint, profile)
        async with trio.open_nursery() as pumps:
            await pumps.start(router.run)
            await pumps.start(dealer.run)
            await dealer.send([b"hello"])
            [[peer, _]] = await router.receive()
            sent = 0
            with pytest.raises(LinkBusy):
                for _ in range(5000):
                    router.send_nowait([peer, b"x" * 1000])
                    sent += 1
            assert len(await receive_all(dealer, sent)) == sent
            router.close()
            dealer.close()

    run(main)


def test_sending_to_a_peer_that_is_not_there_raises(context, tmp_path: Path) -> None:
    async def main() -> None:
        router = open_router(context, [f"ipc://{tmp_path}/s"])
        with pytest.raises(PeerGone):
            router.send_nowait([uuid.uuid4().bytes, b"x"])
        router.close()

    run(main)


def test_closing_wakes_waiting_tasks(context, tmp_path: Path) -> None:
    async def main() -> None:
        router = open_router(context, [f"ipc://{tmp_path}/s"])
        async with trio.open_nursery() as nursery:
            await nursery.start(router.run)

            async def wait() -> None:
                with pytest.raises(LinkClosed):
                    await router.receive()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            router.close()
            router.close()

    run(main)


def test_messages_of_too_many_parts_are_refused_and_counted(context, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"

    async def main() -> None:
        router = open_router(context, [endpoint])
        dealer = open_dealer(context, endpoint)
        async with trio.open_nursery() as pumps:
            await pumps.start(router.run)
            await pumps.start(dealer.run)
            await dealer.send([b"x"] * 20)
            await dealer.send([b"good"])
            assert [frames[-1] for frames in await router.receive()] == [b"good"]
            assert router.num_refused == 1
            router.close()
            dealer.close()

    run(main)


def test_an_address_that_cannot_be_bound_is_a_clear_error(context) -> None:
    with pytest.raises(ConfigurationError, match="longer than 107 bytes"):
        open_router(context, ["ipc:///tmp/" + "x" * 120])
    with pytest.raises(ConfigurationError, match="cannot listen on tcp://256"):
        open_router(context, ["tcp://256.1.1.1:1"])


def test_a_message_of_too_many_frames_is_discarded_in_turns_with_others(context) -> None:
    async def main() -> None:
        router = open_router(context, ["inproc://x"])
        with context.socket(zmq.DEALER) as peer:
            peer.connect("inproc://x")
            peer.send_multipart([b"", *[b""] * (10 * MAX_DISCARDED)])
            peer.send(b"fine")
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                [[_, frame]] = await router.receive()
                nursery.cancel_scope.cancel()
            assert frame == b"fine" and turns >= 8
            assert router.num_refused == 1
            for size in (MAX_PARTS - 1, MAX_PARTS):  # besides the routing id
                peer.send_multipart([b"x"] * size)
            peer.send(b"last")
            assert [len(frames) for frames in router.receive_nowait()] == [MAX_PARTS, 2]
        router.close()

    run(main)


def test_a_batch_is_bounded_in_bytes(context) -> None:
    async def main() -> None:
        router = open_router(context, ["inproc://x"])
        with context.socket(zmq.DEALER) as peer:
            peer.connect("inproc://x")
            for _ in range(10):
                peer.send(bytes(MAX_BATCH_BYTES // 4))
            assert [len(router.receive_nowait()) for _ in range(4)] == [4, 4, 2, 0]
        router.close()

    run(main)
