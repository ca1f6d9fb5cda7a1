"""Publishes block event batches on ZeroMQ as vLLM does, in a thread of its own: PUB, replay over ROUTER, CURVE.

    live:    PUB sends [topic][seq, u64 big-endian][payload]
    replay:  DEALER sends [b""][first seq wanted]; ROUTER answers [b""][topic][seq][payload] per batch, at the end with
             seq -1 and an empty payload (the array form's clients get the older frames, without the topic)

Some facts, and what follows:

- PUB never waits: what a slow subscriber cannot take is dropped for it alone. It sees the gap and asks for a replay.
- A reader that loses the *last* batch sees no gap. So an idle publisher sends empty batches: first after 0.25 s, then
  ever more rarely, down to one in 5 s.
- A publisher that starts again must not look like the old one. Numbers begin at the wall clock's nanoseconds, so that a
  restart is a gap, which ends in the replay of the new stream from its first `AllBlocksCleared`.
- A replay buffer is no snapshot. Who asks for batches that are gone while no whole announcement is in the buffer gets
  what is there, and everything is announced anew on PUB.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as socket_module
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.profile import LinkProfile, apply_profile
from kvasir.worker.events.access import ZAP_DOMAIN, Gatekeeper
from kvasir.worker.events.wire import WireForm, encode_batch
from kvasir.worker.log import log

END_SEQ = b"\xff" * 8
MAX_QUEUED = 1024  # batches between engine and thread
MAX_REPLAYS = 64  # clients served at a time
REPLAY_SLICE = 128  # batches sent to one client before others are looked after
REPLAY_PATIENCE_S = 10.0
FIRST_BEAT_S, LAST_BEAT_S = 0.25, 5.0
LAST_WORDS_S = 0.5

_BATCH, _CLEAR, _STOP, _ANNOUNCE = b"b", b"c", b"s", b"a"

Socket = zmq.Socket[bytes]


@dataclass(frozen=True, slots=True)
class PublisherOptions:
    """Where and how to publish, as `worker.options` has checked it.

    `secret_key` and `client_keys` are Z85; with a key, only those clients get in.
    """

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    replay_with_topic: bool = True
    secret_key: bytes | None = None
    client_keys: frozenset[bytes] = frozenset()
    max_buffered: int = 10_000
    max_buffered_bytes: int = 256 << 20


class KvPublisher:
    """The engine's end of the thread. `socket` becomes readable when `wants_announcement` has something to say."""

    def __init__(self, options: PublisherOptions, form: WireForm) -> None:
        """Bind everything and start the thread.

        Raises:
            ConfigurationError: an endpoint that cannot be bound.
        """
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        try:
            self.socket = _open_pair(self._context, is_engine=True)
            stream = _Stream(self._context, options, form)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=stream.run, name="kv-events", daemon=True)
        self._thread.start()

    def offer(self, payload: bytes, is_clear: bool) -> bool:
        """Hand over a batch; False, at once, when there is no room for it."""
        try:
            self.socket.send_multipart([_CLEAR if is_clear else _BATCH, payload], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wants_announcement(self) -> bool:
        """Whether some follower has asked, since the last call, for more than the replay buffer holds."""
        wanted = False
        with contextlib.suppress(zmq.Again):
            while True:
                wanted |= self.socket.recv(zmq.NOBLOCK) == _ANNOUNCE
        return wanted

    def close(self) -> None:
        """Publish what was handed over and the farewell, and end the thread, all within `LAST_WORDS_S`, or leave it."""
        if self.socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            self.socket.setsockopt(zmq.SNDTIMEO, int(1000 * LAST_WORDS_S))
            self.socket.send_multipart([_STOP, b""])
        self._thread.join(LAST_WORDS_S)
        self.socket.close(linger=0)
        if not self._thread.is_alive():
            self._context.term()


@dataclass(slots=True)
class _Replay:
    next_seq: int
    deadline: float


class _Stream:
    """The thread's side: owns the sockets, the numbers and the replay buffer."""

    def __init__(self, context: zmq.Context[Socket], options: PublisherOptions, form: WireForm) -> None:
        self._options = options
        self._form = form
        self._topic = options.topic.encode()
        self._seq = time.time_ns()
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffered_bytes = 0
        self._clear_seq = -1
        self._is_announcing = False  # asked for, not begun
        self._replays: dict[bytes, _Replay] = {}
        self._beat_s = FIRST_BEAT_S
        self._beat_at = time.monotonic() + self._beat_s
        self._pair = _open_pair(context, is_engine=False)
        self._gate = Gatekeeper(context, options.client_keys) if options.secret_key is not None else None
        self._pub = _open_server(context, zmq.PUB, "--kv-events", options.endpoint, options)
        self._pub.setsockopt(zmq.LINGER, int(1000 * LAST_WORDS_S))
        self._router: Socket | None = None
        if options.replay_endpoint is not None:
            self._router = _open_server(context, zmq.ROUTER, "--kv-events-replay", options.replay_endpoint, options)
        gate = [self._gate.socket] if self._gate is not None else []
        self._served = [self._pair, *gate, *([self._router] if self._router is not None else [])]
        self._poller = zmq.Poller()
        for socket in self._served:
            self._poller.register(socket, zmq.POLLIN)

    def run(self) -> None:
        """Serve until told to stop. A failure ends the stream, never the engine."""
        try:
            while self._serve():
                pass
            self._publish(encode_batch(time.time(), [self._form.cleared()]))
        except Exception as error:
            log("kv_events_failed", error=repr(error), hint="no block events from here on; the worker serves on")
        for socket in (self._pub, *self._served):
            socket.close()

    def _serve(self) -> bool:
        """One turn; False when told to stop. PUB comes first, replays are served in slices between."""
        timeout_s = 0.0 if self._replays else max(0.0, self._beat_at - time.monotonic())
        ready = dict(self._poller.poll(int(1000 * timeout_s) + (not self._replays)))
        if self._gate is not None and self._gate.socket in ready:
            self._each(self._gate.socket, self._gate.answer)
        if self._pair in ready and not self._take():
            return False
        if self._router is not None and self._router in ready:
            self._each(self._router, self._accept)
        progress = [self._continue(client) for client in list(self._replays)]
        if progress and not any(progress):
            time.sleep(0.005)  # every client's queue is full
        if time.monotonic() >= self._beat_at:
            self._publish(encode_batch(time.time(), []), is_beat=True)
        return True

    def _take(self) -> bool:
        """Publish what the engine has handed over; False when it says stop."""
        for _ in range(MAX_QUEUED):
            try:
                kind, payload = self._pair.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if kind == _STOP:
                return False
            if kind == _CLEAR:
                self._clear_seq, self._is_announcing = self._seq, False
            self._publish(payload)
        return True

    def _publish(self, payload: bytes, is_beat: bool = False) -> None:
        with contextlib.suppress(zmq.Again):  # PUB that dials (`connect:`) may say so; whoever misses it sees the gap
            self._pub.send_multipart([self._topic, self._seq.to_bytes(8, "big"), payload], zmq.NOBLOCK)
        self._buffer.append((self._seq, payload))
        self._buffered_bytes += len(payload)
        self._seq += 1
        while len(self._buffer) > self._options.max_buffered or self._buffered_bytes > self._options.max_buffered_bytes:
            self._buffered_bytes -= len(self._buffer.popleft()[1])
        self._beat_s = min(LAST_BEAT_S, 2 * self._beat_s) if is_beat else FIRST_BEAT_S
        self._beat_at = time.monotonic() + self._beat_s

    # ---- replay

    def _accept(self, frames: list[bytes]) -> None:
        """Begin a replay. A request of another shape is passed over, one client too many hears that all is sent."""
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        client, start = frames[0], int.from_bytes(frames[2], "big")
        oldest = self._buffer[0][0] if self._buffer else self._seq
        if start < oldest and self._clear_seq < oldest and not self._is_announcing:
            with contextlib.suppress(zmq.Again):
                self._pair.send(_ANNOUNCE, zmq.NOBLOCK)
                self._is_announcing = True
        if client in self._replays or len(self._replays) < MAX_REPLAYS:
            self._replays[client] = _Replay(start, time.monotonic() + REPLAY_PATIENCE_S)
        else:
            with contextlib.suppress(zmq.ZMQError):
                self._reply(client, b"", END_SEQ, b"")

    def _continue(self, client: bytes) -> bool:
        """Send `client` its next slice; False when it cannot take any now."""
        replay = self._replays[client]
        first = self._buffer[0][0] if self._buffer else self._seq
        sent = 0
        try:
            for index in range(max(0, replay.next_seq - first), len(self._buffer)):
                if sent == REPLAY_SLICE:
                    return True
                seq, payload = self._buffer[index]
                self._reply(client, self._topic, seq.to_bytes(8, "big"), payload)
                replay.next_seq, sent = seq + 1, sent + 1
                replay.deadline = time.monotonic() + REPLAY_PATIENCE_S
            self._reply(client, b"", END_SEQ, b"")
        except zmq.Again:
            if time.monotonic() < replay.deadline:
                return sent > 0
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        del self._replays[client]
        return True

    def _reply(self, client: bytes, topic: bytes, seq: bytes, payload: bytes) -> None:
        assert self._router is not None
        middle = [topic] if self._options.replay_with_topic else []
        self._router.send_multipart([client, b"", *middle, seq, payload], zmq.NOBLOCK)

    @staticmethod
    def _each(socket: Socket, handle: Callable[[list[bytes]], None]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_REPLAYS):
                frames = socket.recv_multipart(zmq.NOBLOCK)
                handle(frames)


def _open_pair(context: zmq.Context[Socket], *, is_engine: bool) -> Socket:
    """Two ends in one process. The engine's holds nothing back, so that `MAX_QUEUED` is all that can wait."""
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1)
    socket.setsockopt(zmq.RCVHWM, 1 if is_engine else MAX_QUEUED - 1)
    (socket.bind if is_engine else socket.connect)("inproc://kv-events")
    return socket


def _open_server(
    context: zmq.Context[Socket], kind: int, option: str, endpoint: str, options: PublisherOptions
) -> Socket:
    socket = context.socket(kind)
    # Large frames only go out; what comes in are subscriptions and replay requests. A replay waits in its buffer.
    high_water = 2 * REPLAY_SLICE if kind == zmq.ROUTER else LinkProfile().high_water
    apply_profile(socket, LinkProfile(high_water=high_water, max_frame_bytes=4096))
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    if options.secret_key is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, options.secret_key)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    address = endpoint.removeprefix("connect:")
    try:
        if address == endpoint and address.startswith("ipc://"):
            _refuse_if_taken(address.removeprefix("ipc://"))
        (socket.bind if address == endpoint else socket.connect)(address)
        if address == endpoint and address.startswith("ipc://"):
            Path(address.removeprefix("ipc://")).chmod(0o660)
    except (zmq.ZMQError, OSError) as error:
        socket.close(linger=0)
        raise ConfigurationError(f"{option} {endpoint}: {error}; is it taken, or no address of this machine?") from None
    return socket


def _refuse_if_taken(path: str) -> None:
    """Raise an OSError if somebody listens at `path`: libzmq would silently take the place of whoever does."""
    with contextlib.closing(socket_module.socket(socket_module.AF_UNIX)) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
