"""The follower over real sockets: exact again after every kind of loss, and nothing left open."""

from __future__ import annotations

import random
import socket as socket_module
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import zmq

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.link import Link, LinkClosed
from kvasir.protocol.prefix import split_hashes
from kvasir.worker.upstream import kv_follower
from kvasir.worker.upstream.hello import EventFeed
from kvasir.worker.upstream.kv_follower import KvFollower
from kvasir.worker.upstream.kv_index import UpstreamIndex
from tests.worker.upstream.block_cache_model import ROOT, Publisher

pytestmark = pytest.mark.timeout(60)

SETTLE_S = 10.0  # on an idle machine half a second is enough
TOPIC = "kv"


class Wire:
    """A publisher on sockets, as vLLM's: PUB, and a ROUTER that answers with all that is kept, whoever listens."""

    def __init__(self, context: zmq.Context, endpoints: tuple[str, str]) -> None:
        self.context, self.endpoints = context, endpoints
        self.publisher = Publisher(10_000)
        self.is_answering = True
        self.reopened = trio.Event()
        self.num_requests = 0

    def open(self) -> None:
        sockets = []
        for kind, endpoint in zip((zmq.PUB, zmq.ROUTER), self.endpoints, strict=True):
            socket = self.context.socket(kind)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 100_000)
            socket.bind(endpoint)
            sockets.append(socket)
        self.pub, self.router = (Link(socket) for socket in sockets)
        self.reopened.set()

    def close(self) -> None:
        self.reopened = trio.Event()
        self.pub.close()
        self.router.close()

    async def serve(self) -> None:
        """Answer replay requests, over restarts."""
        while True:
            router = self.router
            async with trio.open_nursery() as nursery:
                nursery.start_soon(router.run)
                while True:
                    try:
                        for frames in await router.receive():
                            self.answer(frames)
                    except LinkClosed:
                        break
            await self.reopened.wait()

    def answer(self, frames: list[bytes]) -> None:
        self.num_requests += 1
        if len(frames) != 3 or not self.is_answering:
            return
        for seq, payload in self.publisher.replay(int.from_bytes(frames[2], "big")):
            self.router.send_nowait([frames[0], b"", TOPIC.encode(), seq.to_bytes(8, "big"), payload])
        self.router.send_nowait([frames[0], b"", b"", b"\xff" * 8, b""])

    def send(self, batch: tuple[int, bytes], topic: str = TOPIC) -> None:
        self.pub.send_nowait([topic.encode(), batch[0].to_bytes(8, "big"), batch[1]])


class Site:
    def __init__(self, wire: Wire, follower: KvFollower, index: UpstreamIndex, nursery: trio.Nursery) -> None:
        self.wire, self.follower, self.index, self.nursery = wire, follower, index, nursery
        self.rng = random.Random(1)
        self.gateway: set[bytes] = set()
        self.num_changes = 0

    def on_change(self) -> None:
        """Believe what the index reports, as a gateway does."""
        self.num_changes += 1
        stored, removed = self.index.resident.take()
        self.gateway = (self.gateway | set(split_hashes(stored))) - set(split_hashes(removed))

    def publish(self, num_batches: int = 1, *, is_sent: bool = True) -> list[tuple[int, bytes]]:
        batches = [self.wire.publisher.publish(self.rng) for _ in range(num_batches)]
        for batch in batches if is_sent else []:
            self.wire.send(batch)
        return batches

    async def restart(self, num_missed: int = 0) -> None:
        self.wire.close()
        self.wire.publisher.restart()
        await trio.sleep(0.02)
        self.wire.open()
        self.publish(num_missed)

    @property
    def is_exact(self) -> bool:
        return self.follower.is_following and self.gateway == self.wire.publisher.model.resident()

    async def until(self, condition: Callable[[], bool], within_s: float = SETTLE_S) -> None:
        with trio.move_on_after(within_s):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.005)
        assert condition(), vars(self.follower.order)

    async def settle(self) -> None:
        await self.until(lambda: self.is_exact)
        self.index.check_integrity()


@asynccontextmanager
async def open_site(endpoints: tuple[str, str], *, has_replay: bool = True, is_up: bool = True) -> AsyncIterator[Site]:
    context: zmq.Context = zmq.Context()
    wire = Wire(context, endpoints)
    index = UpstreamIndex(ROOT, 4, 8, max_blocks=1000)
    replay = endpoints[1] if has_replay else None
    try:
        if is_up:
            wire.open()
        async with trio.open_nursery() as nursery:
            site: Site
            follower = KvFollower(context, EventFeed(endpoints[0], replay, TOPIC), index, lambda: site.on_change())
            site = Site(wire, follower, index, nursery)
            nursery.start_soon(follower.run)
            if is_up:
                nursery.start_soon(wire.serve)
            yield site
            nursery.cancel_scope.cancel()
        wire.close()
        with trio.fail_after(5):  # waits for ever if the follower has left a socket open
            await trio.to_thread.run_sync(context.term, abandon_on_cancel=True)
    finally:
        context.destroy(linger=0)


@pytest.fixture
def endpoints(tmp_path: Path) -> tuple[str, str]:
    return f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r"


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(50):
            await main()

    trio.run(bounded)


async def drive(site: Site, num_batches: int) -> None:
    """Publish with losses, doubles, swaps, clears and restarts."""
    rng = site.rng
    site.wire.publisher.clear_odds = 0.02
    held_back: list[tuple[int, bytes]] = []
    for _ in range(num_batches):
        (batch,) = site.publish(is_sent=False)
        fate = rng.random()
        if fate < 0.15:
            continue
        if fate < 0.3:
            held_back.append(batch)
            continue
        site.wire.send(batch)
        if fate < 0.4:
            site.wire.send(batch)
        if held_back and rng.random() < 0.5:
            site.wire.send(held_back.pop(0))
        if rng.random() < 0.05:
            site.wire.publisher.model.clear()
        if rng.random() < 0.02:
            await site.restart(rng.randrange(20))
            held_back.clear()
        if rng.random() < 0.3:
            await trio.sleep(rng.random() * 0.02)
    site.publish(1, is_sent=rng.random() < 0.5)  # a clear is published with the step after it


@pytest.mark.parametrize("seed", range(3))
def test_after_any_chaos_the_index_is_exact_once_the_stream_settles(endpoints: tuple[str, str], seed: int) -> None:
    async def main() -> None:
        async with open_site(endpoints) as site:
            site.rng = random.Random(seed)
            await drive(site, 150)
            await site.settle()
            site.publish(10)
            await site.settle()
            assert site.follower.order.num_gaps > 0

    run(main)


def test_without_a_replay_port_it_follows_from_the_next_clear_on(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints, has_replay=False) as site:
            await site.until(lambda: site.follower.is_following)
            site.publish(20)
            site.wire.publisher.model.clear()
            site.publish(20)
            await site.settle()
            assert site.gateway
            site.publish(1, is_sent=False)
            site.publish(1)
            await site.until(lambda: site.follower.order.num_lost == 1)
            assert site.gateway <= site.wire.publisher.model.resident()
            assert site.wire.num_requests == 0

    run(main)


def test_what_is_cached_before_the_follower_comes_is_known_at_once(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints, is_up=False) as site:
            assert not site.follower.is_following
            await trio.sleep(0.1)
            assert not site.follower.is_following and site.num_changes == 0
            site.publish(2000, is_sent=False)
            site.wire.open()
            site.nursery.start_soon(site.wire.serve)
            await site.settle()
            assert site.gateway and site.follower.order.num_lost == 0

    run(main)


def test_losing_the_publisher_shows_and_its_return_heals(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints) as site:
            site.publish(20)
            await site.settle()
            site.wire.close()
            num_changes = site.num_changes
            await site.until(lambda: not site.follower.is_following)
            await trio.sleep(0.05)
            assert site.num_changes == num_changes + 1, "said once"
            site.wire.publisher.restart()
            site.publish(30, is_sent=False)
            site.wire.open()
            await site.settle()
            assert site.follower.order.num_restarts == 1

    run(main)


def test_a_short_break_of_the_connection_costs_nothing_that_is_held(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints) as site:
            site.publish(20)
            await site.settle()
            num_clears = site.index.num_clears
            site.wire.close()
            await site.until(lambda: not site.follower.is_following)
            site.publish(5, is_sent=False)
            site.wire.open()
            await site.settle()
            assert site.gateway and site.index.num_clears == num_clears

    run(main)


def test_a_lost_last_batch_is_found_in_the_silence_after_it(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints) as site:
            site.publish(20)
            await site.settle()
            while site.is_exact:
                site.publish(1, is_sent=False)
            await site.settle()
            # Then it asks ever more rarely.
            num_requests = site.wire.num_requests
            await trio.sleep(1.0)
            assert site.wire.num_requests - num_requests <= 2

    run(main)


def test_a_replay_port_that_stays_silent_is_given_up(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_follower, "REPLAY_SILENCE_S", 0.05)

    async def main() -> None:
        async with open_site(endpoints) as site:
            site.wire.is_answering = False
            site.publish(20)
            await site.until(lambda: site.follower.is_following)
            order = site.follower.order
            assert order.num_failed_replays >= 3 and order.num_lost == 1
            site.wire.publisher.model.clear()
            site.publish(5)
            await site.settle()
            # When it answers again, it is believed again.
            site.wire.is_answering = True
            site.publish(1, is_sent=False)
            site.publish(1)
            await site.settle()

    run(main)


def test_a_replay_that_the_restarted_publisher_never_heard_of_is_not_waited_for(
    endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_follower, "REPLAY_SILENCE_S", 30.0)

    async def main() -> None:
        async with open_site(endpoints) as site:
            site.publish(10)
            await site.settle()
            site.wire.is_answering = False
            num_requests = site.wire.num_requests
            await site.until(lambda: site.wire.num_requests > num_requests)
            site.wire.is_answering = True
            await site.restart(num_missed=20)
            await site.settle()
            assert site.gateway

    run(main)


def test_a_replay_that_never_ends_is_given_up(endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_follower, "REPLAY_LIMIT_S", 0.2)

    async def main() -> None:
        async with open_site(endpoints) as site:

            def drip(frames: list[bytes]) -> None:
                async def send() -> None:
                    for seq in range(1000):
                        site.wire.router.send_nowait([frames[0], b"", b"", seq.to_bytes(8, "big"), b"garbage"])
                        await trio.sleep(0.01)

                site.nursery.start_soon(send)

            monkeypatch.setattr(site.wire, "answer", drip)
            await site.until(lambda: site.follower.order.num_failed_replays > 0)

    run(main)


def test_other_topics_and_garbage_disturb_nothing(endpoints: tuple[str, str]) -> None:
    async def main() -> None:
        async with open_site(endpoints) as site:
            site.publish(20)
            await site.settle()
            site.wire.send((500, b"garbage"), topic="other")
            for frames in ([b"kv"], [b"kv", b"short", b""], [b"kv", bytes(8), b"", b""]):
                site.wire.pub.send_nowait(frames)
            site.wire.pub.send_nowait([b"kv", *[b""] * 20])
            await site.until(lambda: site.follower.num_malformed == 3)
            site.publish(5)
            await site.settle()
            site.wire.send((site.wire.publisher.seq + 100, b"garbage"))
            await site.until(lambda: site.follower.order.num_malformed >= 1)
            site.publish(5)
            await site.settle()

    run(main)


def test_it_follows_over_tcp_too() -> None:
    ports = []
    for _ in range(2):
        with socket_module.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])

    async def main() -> None:
        async with open_site((f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}")) as site:
            await drive(site, 60)
            await site.settle()

    run(main)


@pytest.mark.parametrize(("endpoint", "replay"), [("nonsense", None), ("tcp://127.0.0.1", None), ("http://a:1", None)])
def test_an_endpoint_that_is_no_address_is_named(endpoint: str, replay: str | None) -> None:
    context: zmq.Context = zmq.Context()
    index = UpstreamIndex(ROOT, 4, 8, max_blocks=10)
    follower = KvFollower(context, EventFeed(endpoint, replay), index, lambda: None)
    try:
        with pytest.raises(ConfigurationError, match=f"cannot follow KV events at {endpoint}"):
            trio.run(follower.run)
        context.term()
    finally:
        context.destroy(linger=0)
