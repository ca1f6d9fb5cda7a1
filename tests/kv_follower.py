"""A follower of block events as an existing router has one: SUB, replay over DEALER, and nothing but the wire to go by.

It applies batches in the order of their numbers only, and may jump over a gap to an `AllBlocksCleared`.
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import Any

import msgspec
import zmq

Hash = bytes | int
RETRY_S = 0.1
END = b"\xff" * 8


class Replica:
    """The set of blocks that the events speak of; `orphans` counts runs stored under a parent that is not there."""

    def __init__(self) -> None:
        self.blocks: set[Hash] = set()
        self.orphans = 0

    def apply(self, payload: bytes) -> None:
        for event in msgspec.msgpack.decode(payload)[1]:
            kind, hashes, parent = read_event(event)
            if kind == "BlockStored":
                self.orphans += parent is not None and parent not in self.blocks
                self.blocks |= set(hashes)
            elif kind == "BlockRemoved":
                self.blocks -= set(hashes)
            else:
                assert kind == "AllBlocksCleared"
                self.blocks.clear()


def read_event(event: Any) -> tuple[str, list[Hash], Hash | None]:
    """Return (type, hashes, parent) of an event of either form."""
    if isinstance(event, dict):
        return event["type"], event.get("block_hashes", []), event.get("parent_block_hash")
    kind, *fields = event
    return kind, fields[0] if fields else [], fields[1] if kind == "BlockStored" else None


def clears(payload: bytes) -> bool:
    return any(read_event(event)[0] == "AllBlocksCleared" for event in msgspec.msgpack.decode(payload)[1])


class Follower:
    """Follows one worker. `chaos` loses and swaps what comes live; without `replay` a gap stays."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        replay: str | None,
        *,
        topic: bytes = b"",
        chaos: random.Random | None = None,
        keys: tuple[bytes, bytes, bytes] | None = None,
    ) -> None:
        """`keys`: the server's public key, and the follower's own public and secret one."""
        self.replica = Replica()
        self.chaos = chaos
        self.last = -1
        self.num_live = self.num_replays = 0
        self._waiting: dict[int, bytes] = {}
        self._held: deque[tuple[int, bytes]] = deque()
        self._asked_at = 0.0
        self._wants_replay = True
        self._sub = context.socket(zmq.SUB)
        self._dealer = context.socket(zmq.DEALER)
        for socket in (self._sub, self._dealer):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            if keys is not None:
                for option, key in zip(
                    (zmq.CURVE_SERVERKEY, zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY), keys, strict=True
                ):
                    socket.setsockopt(option, key)
        self._sub.setsockopt(zmq.SUBSCRIBE, topic)
        self._sub.connect(endpoint)
        self._has_replay = replay is not None
        if replay is not None:
            self._dealer.connect(replay)

    def close(self) -> None:
        self._sub.close()
        self._dealer.close()

    def pump(self, timeout_s: float = 0.0) -> None:
        """Take everything that has come, or comes within `timeout_s`."""
        poller = zmq.Poller()
        poller.register(self._sub, zmq.POLLIN)
        poller.register(self._dealer, zmq.POLLIN)
        ready = dict(poller.poll(int(1000 * timeout_s)))
        while self._sub in ready and self._sub.poll(0):
            _, seq, payload = self._sub.recv_multipart()
            self.num_live += 1
            self._on_live(int.from_bytes(seq, "big"), payload)
        while self._dealer in ready and self._dealer.poll(0):
            *_, seq, payload = self._dealer.recv_multipart()  # from the end: both frame forms end alike
            if seq == END:
                assert payload == b""
                self._jump()
            else:
                self._waiting[int.from_bytes(seq, "big")] = payload
        self._advance()
        self._ask()

    def _on_live(self, seq: int, payload: bytes) -> None:
        if self.chaos is not None:
            fate = self.chaos.random()
            if fate < 0.2:
                return
            if fate < 0.4:
                self._held.append((seq, payload))
                return
        self._waiting[seq] = payload
        if self._held:
            late = self._held.popleft()
            self._waiting.setdefault(*late)

    def _advance(self) -> None:
        while (payload := self._waiting.pop(self.last + 1, None)) is not None:
            self.replica.apply(payload)
            self.last += 1
        self._waiting = {seq: payload for seq, payload in self._waiting.items() if seq > self.last}
        self._wants_replay |= bool(self._waiting)

    def _jump(self) -> None:
        """All that can be had has come: where a gap stays, go on from the latest clear behind it, if there is one."""
        self._advance()
        found = [seq for seq, payload in self._waiting.items() if clears(payload)]
        if found:
            self.last = max(found) - 1
            self._advance()
        self._wants_replay = bool(self._waiting) or self.last < 0

    def _ask(self) -> None:
        now = time.monotonic()
        if self._has_replay and self._wants_replay and now >= self._asked_at + RETRY_S:
            self._asked_at = now
            self.num_replays += 1
            try:
                self._dealer.send_multipart([b"", (self.last + 1).to_bytes(8, "big")], zmq.NOBLOCK)
            except zmq.Again:
                pass
