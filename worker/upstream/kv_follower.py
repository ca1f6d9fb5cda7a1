"""Follows one publisher of KV events over ZeroMQ, and keeps an `UpstreamIndex` true to it.

Three tasks: one reads what is published, one watches the connection (libzmq tells of it on a monitor socket), one asks
for replays. What they hear goes to `BatchOrder`, which decides; nothing is decided here but when. News of a connection
are taken before what was published over it: a batch of the new one must not pass for one of the old.

A replay has a socket of its own, so that no answer to an earlier one is taken for one to it. Its time is bounded, its
queue is not: vLLM sends all that it has kept at once, and what finds no room is lost without a word, the end too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
import zmq
from zmq.utils.monitor import parse_monitor_message

from kvasir.protocol.errors import ConfigurationError, InvalidMessage
from kvasir.protocol.link import Link
from kvasir.protocol.profile import LinkProfile, apply_profile
from kvasir.worker.upstream.hello import EventFeed
from kvasir.worker.upstream.kv_index import UpstreamIndex
from kvasir.worker.upstream.kv_order import BatchOrder
from kvasir.worker.upstream.kv_wire import END_SEQ, make_replay_request, split_live, split_replayed

FIRST_PROBE_S, LAST_PROBE_S = 0.4, 10.0  # silence after which a replay is asked for: the last batch may be lost
REPLAY_SILENCE_S = 2.0  # without a batch, until a replay counts as failed
REPLAY_LIMIT_S = 30.0
REPLAY_PAUSE_S = 0.05  # between two replays
_PROFILE = LinkProfile(reconnect_ms=50, reconnect_max_ms=1_000)
_CONNECTION_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class KvFollower:
    """Follows the KV events of one upstream, of one data-parallel rank.

    `num_malformed`: messages that are none of KV events; what else happened `order` counts.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        feed: EventFeed,
        index: UpstreamIndex,
        on_change: Callable[[], None],
        *,
        rank: int | None = None,
    ) -> None:
        """`on_change` is called, and must not wait, after `index` has changed or `is_following` has.

        Without `feed.replay` the index begins empty, and empties itself at every gap and reconnect. `rank`: the
        data-parallel rank to follow, where several publish on one endpoint.
        """
        self._context = context
        self._feed = feed
        self._index, self._on_change = index, on_change
        self.order = BatchOrder(index, has_replay=feed.replay is not None, rank=rank)
        self._is_connected = False
        self._was_following = False
        self._probe_s, self._probe_at = FIRST_PROBE_S, 0.0
        self._wake = trio.Event()
        self._replay_scope = trio.CancelScope()  # of the replay that goes on
        self.num_malformed = 0

    @property
    def is_following(self) -> bool:
        """Whether the index holds what the upstream does: connected, nothing missing, not overflowed.

        False at first and in doubt; the follower goes on trying.
        """
        return self._is_connected and self.order.in_order and not self._index.is_overflowed

    async def run(self) -> None:
        """Follow until cancelled, which closes all sockets. Call it once.

        Raises:
            ConfigurationError: an endpoint is no address; says which. One where nobody answers is no error.
        """
        socket = self._context.socket(zmq.SUB)
        monitor = Link(socket.get_monitor_socket(_CONNECTION_EVENTS))
        live = Link(socket)
        try:
            socket.setsockopt(zmq.SUBSCRIBE, self._feed.topic.encode())
            _connect(socket, self._feed.endpoint)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(monitor.run)
                nursery.start_soon(live.run)
                nursery.start_soon(self._watch, monitor)
                nursery.start_soon(self._read, live, monitor)
                nursery.start_soon(self._replay_when_needed)
        finally:
            self._is_connected = False
            if not socket.closed:
                socket.disable_monitor()
            monitor.close()
            live.close()

    # ---- the three tasks

    async def _read(self, live: Link, monitor: Link) -> None:
        while True:
            messages = await live.receive()
            self._take_connection_news(monitor.receive_nowait())
            for frames in messages:
                try:
                    self.order.live(*split_live(frames))
                except InvalidMessage:
                    self.num_malformed += 1
            self._hear()
            self._after_news()

    async def _watch(self, monitor: Link) -> None:
        while True:
            self._take_connection_news(await monitor.receive())
            self._after_news()

    async def _replay_when_needed(self) -> None:
        while True:
            with trio.move_on_at(self._probe_at if self._is_connected else float("inf")):
                await self._wake.wait()
            self._wake = trio.Event()
            if self._feed.replay is None or not self._is_connected:
                continue
            if trio.current_time() >= self._probe_at:
                self._probe_s = min(LAST_PROBE_S, 2 * self._probe_s)
                self._probe_at = trio.current_time() + self._probe_s
                self.order.want_replay()
            while self.order.wants_replay and self._is_connected:
                await self._replay(self._feed.replay)
                self._after_news()
                await trio.sleep(REPLAY_PAUSE_S)

    # ---- what they do

    async def _replay(self, endpoint: str) -> None:
        """Ask for what is missing and take it, until its end, its time limit, or news that make it out of date."""
        socket = self._context.socket(zmq.DEALER)
        link = Link(socket)
        try:
            _connect(socket, endpoint, is_unbounded=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                with trio.move_on_after(REPLAY_LIMIT_S) as self._replay_scope:
                    await link.send(make_replay_request(self.order.begin_replay()))
                    await self._take_replay(link)
                nursery.cancel_scope.cancel()
            self.order.fail_replay()  # unless it has ended, or is out of date
        finally:
            link.close()

    async def _take_replay(self, link: Link) -> None:
        """Take what comes, until the end, a silence, or a batch which shows that the replay is out of date."""
        while True:
            with trio.move_on_after(REPLAY_SILENCE_S) as silence:
                messages = await link.receive()
            if silence.cancelled_caught:
                return
            for frames in messages:
                try:
                    seq, payload = split_replayed(frames)
                except InvalidMessage:
                    self.num_malformed += 1
                    continue
                if seq == END_SEQ:
                    self.order.end_replay()
                    return
                if not self.order.replayed(seq, payload):
                    return
            self._after_news()

    def _take_connection_news(self, messages: list[list[bytes]]) -> None:
        for frames in messages:
            self._is_connected = parse_monitor_message(frames)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._is_connected:
                self.order.connected()
                self._replay_scope.cancel()  # asked of whoever was there before
                self._hear()

    def _hear(self) -> None:
        """A message came: silence is counted from now on."""
        self._probe_s = FIRST_PROBE_S
        self._probe_at = trio.current_time() + self._probe_s

    def _after_news(self) -> None:
        if self.order.wants_replay:
            self._wake.set()
        if self._index.resident.has_changes or self._was_following != self.is_following:
            self._was_following = self.is_following
            self._on_change()


def _connect(socket: zmq.Socket[bytes], endpoint: str, *, is_unbounded: bool = False) -> None:
    """Dial `endpoint`, again and again until somebody answers.

    Raises:
        ConfigurationError: it is no address.
    """
    apply_profile(socket, _PROFILE)
    if is_unbounded:
        socket.setsockopt(zmq.RCVHWM, 0)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigurationError(
            f"cannot follow KV events at {endpoint}: {error}; give tcp://HOST:PORT or ipc://PATH"
        ) from None
