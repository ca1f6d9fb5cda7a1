"""The workers' port over real sockets: reports in, commands out, and what happens when a peer is gone."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.gateway.workers.port import WorkerPort
from kvasir.protocol.codec import encode
from kvasir.protocol.link import Link, open_router
from kvasir.protocol.messages import COMMANDS, Abort, Command, Drain, Generate, Identify, Load, StepReport, Welcome
from kvasir.protocol.profile import LinkProfile
from tests.core_helpers import PUBLIC, RecordingSink, make_hello, make_submit, output
from tests.dealer import open_dealer

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/{uuid.uuid4().hex[:8]}.sock"


class Net:
    """Opens links and closes them all at the end."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.context = context
        self.endpoint = endpoint
        self.links: list[Link] = []

    def router(self, **profile) -> Link:
        self.links.append(open_router(self.context, [self.endpoint], LinkProfile(**profile)))
        return self.links[-1]

    def dealer(self) -> Link:
        self.links.append(open_dealer(self.context, self.endpoint))
        return self.links[-1]

    def run(self, body: Callable[[Net], Awaitable[None]]) -> None:
        async def main() -> None:
            try:
                with trio.fail_after(30):
                    await body(self)
            finally:
                for link in self.links:
                    link.close()

        trio.run(main)


class Signal(RecordingSink):
    """A sink that wakes whoever waits for the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = trio.Event()

    def put(self, event) -> None:
        super().put(event)
        if self.finished is not None:
            self.ended.set()


def make_core(link: Link, block_size: int = 4, **options) -> tuple[Core, WorkerPort]:
    port = WorkerPort(link)
    config = CoreConfig(PUBLIC, block_size, liveness=LivenessConfig(heartbeat_s=0.2))
    return Core(config, port.send, trio.current_time, epoch=b"epoch", **options), port


def submit_to(core: Core, req_id: bytes, **extra) -> Signal:
    submit, _ = make_submit(req_id, arrived=trio.current_time(), **extra)
    sink = Signal()
    core.submit(type(submit)(**{**{name: getattr(submit, name) for name in submit.__slots__}, "sink": sink}))
    return sink


async def receive(link: Link, kind: type[Command]) -> Command:
    """Return the next command of `kind`, passing over probes."""
    while True:
        for [frame] in await link.receive(1):
            command = COMMANDS.decode(frame)
            if not isinstance(command, Abort):
                assert isinstance(command, kind), command
                return command


async def body_join_generate_answer(net: Net) -> None:
    core, port = make_core(net.router())
    dealer = net.dealer()
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run, core)
        await nursery.start(dealer.run)
        await dealer.send([encode(make_hello())])
        assert isinstance(await receive(dealer, Welcome), Welcome)
        sink = submit_to(core, b"r1", max_tokens=2)
        generate = await receive(dealer, Generate)
        assert isinstance(generate, Generate) and generate.max_tokens == 2
        await dealer.send([encode(StepReport(1, 0, Load(), [output(b"r1", 0, [5, 6], "length")]))])
        await sink.ended.wait()
        assert sink.tokens == [5, 6]
        nursery.cancel_scope.cancel()


async def body_strangers_and_garbage(net: Net) -> None:
    core, port = make_core(net.router())
    dealer = net.dealer()
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run, core)
        await nursery.start(dealer.run)
        await dealer.send([encode(StepReport(1, 0, Load()))])
        await receive(dealer, Identify)
        await dealer.send([encode(make_hello())])
        await receive(dealer, Welcome)
        sink = submit_to(core, b"r1")
        await receive(dealer, Generate)
        await dealer.send([b"\x80\x04garbage"])
        await receive_identify_after(dealer)
        assert core.statistics().totals.num_lost == {"protocol": 1}
        assert sink.finished is None  # it waits for another worker
        nursery.cancel_scope.cancel()


async def receive_identify_after(dealer: Link) -> None:
    """Wait until what comes from us is answered with `Identify`: we are no worker any more."""
    await dealer.send([encode(StepReport(2, 0, Load()))])
    await receive(dealer, Identify)


async def body_dead_link(net: Net) -> None:
    core, port = make_core(net.router())
    first, second = (net.dealer() for _ in range(2))
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run, core)
        for number, dealer in enumerate((first, second)):
            await nursery.start(dealer.run)
            await dealer.send([encode(make_hello(f"w{number}", b"i%d" % number))])
            await receive(dealer, Welcome)
        sink = submit_to(core, b"r1", max_tokens=1)
        await receive(first, Generate)
        first.close()  # the core hears nothing of it, and probes the link when it is quiet for a heartbeat
        generate = await receive(second, Generate)
        assert isinstance(generate, Generate) and generate.attempt == 2
        await second.send([encode(StepReport(1, 0, Load(), [output(b"r1", 0, [9], "length", attempt=2)]))])
        await sink.ended.wait()
        assert core.statistics().totals.num_lost == {"link": 1}
        nursery.cancel_scope.cancel()


async def body_full_outbox(net: Net) -> None:
    """A peer that never reads: its queue fills, the core hears of it outside of `send`, and nothing blocks."""
    unreachable: list[bytes] = []

    class Listener(Core):
        def __init__(self) -> None:
            pass

        def worker_unreachable(self, peer: bytes) -> None:
            unreachable.append(peer)

    link = net.router(high_water=4)
    port = WorkerPort(link)
    dealer = net.context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVHWM, 1)
    dealer.setsockopt(zmq.ROUTING_ID, b"peer")
    dealer.connect(net.endpoint)
    dealer.send(b"hello")
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        await link.receive()
        big = Abort(b"x" * 32, 0)
        num_sent = 0
        while not unreachable:
            port.send(b"peer", big)
            port.flush(Listener())
            num_sent += 1
            assert num_sent < 100_000, "nothing bounds the queue"
        assert num_sent > 1
        port.send(b"nobody", big)
        assert unreachable == [b"peer"]
        port.flush(Listener())
        assert unreachable == [b"peer", b"nobody"]
        nursery.cancel_scope.cancel()
    link.close()
    port.send(b"peer", big)
    port.flush(Listener())
    assert unreachable == [b"peer", b"nobody", b"peer"]
    dealer.close(linger=0)


@pytest.mark.parametrize(
    "body",
    [body_join_generate_answer, body_strangers_and_garbage, body_dead_link, body_full_outbox],
    ids=["a request travels", "strangers and garbage", "a dead link", "a full outbox"],
)
def test_the_port_carries_reports_and_commands(body, context, endpoint) -> None:
    Net(context, endpoint).run(body)


async def body_echo(net: Net) -> None:
    joined = trio.Event()
    core, port = make_core(net.router(), notify=lambda notice: joined.set())
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run, core)
        command = [sys.executable, "scripts/echo_worker.py", "--endpoint", net.endpoint, "--model", "demo"]
        command += ["--block-size", "4", "--worker-id", "echo-0", "--num-blocks", "50"]
        process = await trio.lowlevel.open_process(command, cwd=ROOT)
        try:
            await joined.wait()
            sinks = [submit_to(core, b"r%d" % i, tokens=[*range(8), i, i], max_tokens=3) for i in range(200)]
            for sink in sinks:
                await sink.ended.wait()
            assert all(sink.tokens == [0, 1, 2] for sink in sinks)
            [peer] = core._fleet.by_peer
            again = submit_to(core, b"again", tokens=[*range(8), 199, 199], max_tokens=12)
            await again.ended.wait()
            assert again.tokens == [*range(8), 199, 199, 0, 1]
            assert again.finished.num_cached_tokens == 8
            [worker] = core.statistics().workers
            assert (worker.num_cached_blocks, worker.index_in_sync) == (2, True)
            port.send(peer, Drain(1.0))
            assert await process.wait() == 0
        finally:
            process.kill()
        nursery.cancel_scope.cancel()


def test_echo_workers_answer_everything_and_their_cache_is_followed(context, endpoint) -> None:
    """The benchmark's worker, as a process."""
    Net(context, endpoint).run(body_echo)
