"""The stand-in's event port: PUB and replay ROUTER in vLLM's wire, and the faults a follower must survive.

    live:    [topic] [seq, u64 big-endian, from 0 at every start] [msgpack: ts, events, rank]
    replay:  [b""] [first seq] -> per batch [b""] [topic] [seq] [payload], then [b""] [b""] [ff x 8] [b""]

Only the last `buffer_steps` batches can be had again. The array form is that of older servers: events are arrays that
begin with their type, and replay answers come without the topic.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import trio
import zmq

from kvasir.protocol.link import Link
from scripts.standin.cache import Event

EventForm = Literal["map", "array"]
END_SEQ = b"\xff" * 8
BIND_PATIENCE_S = 5.0


@dataclass(slots=True)
class EventFaults:
    """What goes wrong on the way to subscribers. The replay buffer has every batch as it should be."""

    drop: int = 0  # the next batches that are not sent
    duplicate: int = 0  # the next batches that are sent twice
    swap: int = 0  # the next batches that are each sent after the one that follows


@dataclass(frozen=True, slots=True)
class EventOptions:
    """Where and how one rank publishes. A port of `*` in an endpoint is chosen by the system."""

    endpoint: str = "tcp://127.0.0.1:*"
    replay_endpoint: str | None = "tcp://127.0.0.1:*"
    topic: str = "kv"
    buffer_steps: int = 10_000
    form: EventForm = "map"


class EventPublisher:
    """One rank's sockets. `run` serves them; `publish` may be called before, and never waits."""

    def __init__(self, options: EventOptions, faults: EventFaults, rank: int = 0) -> None:
        self._options = options
        self._faults = faults
        self._rank = rank
        self._topic = options.topic.encode()
        self._next_seq = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=options.buffer_steps)
        self._swapped: tuple[int, bytes] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(100_000)
        self._replay: Link | None = None

    @property
    def options(self) -> EventOptions:
        """With the ports that were chosen, once bound."""
        return self._options

    @property
    def config(self) -> dict[str, Any]:
        """What `/kv_event_sources` says of this rank."""
        replay = self._options.replay_endpoint
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._options.endpoint.replace("127.0.0.1", "*"),
            "replay_endpoint": replay and replay.replace("127.0.0.1", "*"),
            "buffer_steps": self._options.buffer_steps,
            "hwm": 100_000,
            "max_queue_size": 100_000,
            "topic": self._options.topic,
        }

    async def bind(self) -> None:
        """Bind both sockets. A predecessor's port may need a moment to be free."""
        endpoint, replay = await _bind(self._pub, self._options.endpoint), self._options.replay_endpoint
        if replay is not None:
            router = self._context.socket(zmq.ROUTER)  # as in vLLM not MANDATORY: what a slow client misses is lost
            replay = await _bind(router, replay)
            self._replay = Link(router)
        self._options = replace(self._options, endpoint=endpoint, replay_endpoint=replay)

    async def run(self) -> None:
        """Send and answer until cancelled, then close. `bind` comes first."""
        try:
            async with trio.open_nursery() as nursery:
                if self._replay is not None:
                    nursery.start_soon(self._replay.run)
                    nursery.start_soon(self._answer_replays, self._replay)
        finally:
            self.close()

    def close(self) -> None:
        if self._replay is not None:
            self._replay.close()
        self._context.destroy(linger=0)

    def publish(self, events: list[Event]) -> None:
        """Number a batch, keep it for replay, and send it unless a fault says otherwise."""
        if self._options.form == "array":
            listed: list[Any] = [list(event.values()) for event in events]
        else:
            listed = list(events)
        payload = msgspec.msgpack.encode([time.time(), listed, self._rank])
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        self._buffer.append((seq, payload))
        faults = self._faults
        if faults.drop:
            faults.drop -= 1
        elif faults.swap and self._swapped is None:
            faults.swap -= 1
            self._swapped = (seq, payload)
        else:
            self._send(seq, payload)
            if faults.duplicate:
                faults.duplicate -= 1
                self._send(seq, payload)
            if self._swapped is not None:
                self._send(*self._swapped)
                self._swapped = None

    def _send(self, seq: int, payload: bytes) -> None:
        self._pub.send_multipart((self._topic, seq.to_bytes(8, "big"), payload), zmq.NOBLOCK)

    async def _answer_replays(self, link: Link) -> None:
        while True:
            for frames in await link.receive():
                if len(frames) != 3:
                    continue
                client, _, start = frames
                first = int.from_bytes(start, "big")
                topic = [] if self._options.form == "array" else [self._topic]
                for seq, payload in list(self._buffer):
                    if seq >= first:
                        link.send_nowait([client, b"", *topic, seq.to_bytes(8, "big"), payload])
                link.send_nowait([client, b"", *[b"" for _ in topic], END_SEQ, b""])


async def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    deadline = trio.current_time() + BIND_PATIENCE_S
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or trio.current_time() > deadline:
                raise
            await trio.sleep(0.02)
        else:
            return socket.getsockopt_string(zmq.LAST_ENDPOINT)
