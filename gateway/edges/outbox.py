"""Sending to many clients through one ROUTER without ever waiting for one of them.

A ROUTER's POLLOUT means that *some* client has room, so it cannot say when one slow client has. What a client does not
take goes into a bounded outbox and is tried again a little later; a client that stays stuck, or whose outbox overflows,
loses what it did not read: every call of it that is not fully sent gets one error instead, and new requests of it
are dropped until it has read those.

Messages are posted, and sent by `flush`: what a client gets in one step is one multipart, since a send that must wake
libzmq's thread costs more than everything else that is done for a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from kvasir.protocol.client_messages import CompletionDone
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import Overloaded
from kvasir.protocol.link import Link, LinkBusy, PeerGone

C = TypeVar("C")
MAX_FRAMES = 64


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Bounds of what is kept for one client that does not read, and how often to try again."""

    max_messages: int = 4096
    max_bytes: int = 1 << 20
    stuck_s: float = 15.0
    retry_s: float = 0.02


@dataclass(slots=True, eq=False)
class Peer(Generic[C]):
    """A client that has calls or unsent messages: others are not remembered. `cut`: it lost what it did not read."""

    routing_id: bytes
    calls: dict[int, C] = field(default_factory=dict)
    posted: list[tuple[int, bytes]] = field(default_factory=list)  # (call id, frame), for the next flush
    outbox: deque[tuple[int, bytes]] = field(default_factory=deque)  # (call id, frame)
    num_outbox_bytes: int = 0
    stuck_since: float = 0.0
    cut: bool = False


class Courier(Generic[C]):
    """Delivers frames to peers in order, or tells `abandon` that a peer's calls are of no use any more.

    `abandon(peer)` is called when a peer is gone or has been cut; it must cancel and remove all `peer.calls`.
    """

    def __init__(self, link: Link, limits: OutboxLimits, abandon: Callable[[Peer[C]], None]) -> None:
        self._link = link
        self._limits = limits
        self._abandon = abandon
        self._peers: dict[bytes, Peer[C]] = {}
        self._posted: list[Peer[C]] = []
        self._stuck: dict[bytes, Peer[C]] = {}
        self._lot = trio.lowlevel.ParkingLot()
        self.num_gone = 0
        self.num_cut = 0

    def peer(self, routing_id: bytes) -> Peer[C]:
        """Return the peer with that routing id; a new one is not remembered before it has a call or gets a message."""
        return self._peers.get(routing_id) or Peer(routing_id)

    def remember(self, peer: Peer[C]) -> None:
        """Keep `peer`: it has a call."""
        self._peers[peer.routing_id] = peer

    def release(self, peer: Peer[C]) -> None:
        """Forget `peer` if nothing is left of it."""
        if not peer.calls and not peer.posted and not peer.outbox:
            self._peers.pop(peer.routing_id, None)

    def num_peers(self) -> int:
        return len(self._peers)

    def num_waiting(self) -> int:
        """Return how many messages wait in all outboxes."""
        return sum(len(peer.outbox) for peer in self._stuck.values())

    def post(self, peer: Peer[C], call_id: int, frame: bytes) -> None:
        """Have `frame`, which belongs to `call_id`, sent to `peer` at the next `flush`, after everything before it."""
        if not peer.posted:
            self._posted.append(peer)
            self._peers[peer.routing_id] = peer
        peer.posted.append((call_id, frame))

    def flush(self) -> None:
        """Send what was posted. Never waits."""
        peers, self._posted = self._posted, []
        for peer in peers:
            while peer.posted:  # empty at once if the peer is found to be gone, or is cut
                batch = peer.posted[:MAX_FRAMES]
                del peer.posted[:MAX_FRAMES]
                self._send(peer, batch)
            self.release(peer)

    def _send(self, peer: Peer[C], posted: list[tuple[int, bytes]]) -> None:
        if not peer.outbox:
            try:
                self._link.send_nowait([peer.routing_id, *[frame for _, frame in posted]])
                return
            except LinkBusy:
                peer.stuck_since = trio.current_time()
                self._peers[peer.routing_id] = self._stuck[peer.routing_id] = peer
                self._lot.unpark()
            except PeerGone:
                self._forget(peer)
                return
        peer.outbox.extend(posted)
        peer.num_outbox_bytes += sum(len(frame) for _, frame in posted)
        limits = self._limits
        if len(peer.outbox) > limits.max_messages or peer.num_outbox_bytes > limits.max_bytes:
            self._cut(peer)

    async def run(self) -> None:
        """Try stuck peers again, for ever. One task for all of them, asleep while there are none."""
        while True:
            if not self._stuck:
                await self._lot.park()
            await trio.sleep(self._limits.retry_s)
            for peer in list(self._stuck.values()):
                self._retry(peer)

    def _retry(self, peer: Peer[C]) -> None:
        try:
            while peer.outbox:
                self._link.send_nowait((peer.routing_id, peer.outbox[0][1]))
                peer.num_outbox_bytes -= len(peer.outbox.popleft()[1])
                peer.stuck_since = trio.current_time()
        except LinkBusy:
            if not peer.cut and trio.current_time() - peer.stuck_since > self._limits.stuck_s:
                self._cut(peer)
        except PeerGone:
            self._forget(peer)
        else:
            peer.cut = False
            del self._stuck[peer.routing_id]
            self.release(peer)

    def _cut(self, peer: Peer[C]) -> None:
        """Replace the outbox by one error per call that is not fully sent: few, since calls per client are bounded."""
        if peer.cut:
            return
        peer.cut = True
        self.num_cut += 1
        unfinished = dict.fromkeys([call_id for call_id, _ in [*peer.outbox, *peer.posted]] + list(peer.calls))
        peer.posted.clear()
        self._abandon(peer)
        error = Overloaded(
            "the answers were not read in time and have been dropped; read faster or ask for less"
        ).info()
        peer.outbox = deque((call_id, encode(CompletionDone(call_id, "error", error=error))) for call_id in unfinished)
        peer.num_outbox_bytes = sum(len(frame) for _, frame in peer.outbox)

    def _forget(self, peer: Peer[C]) -> None:
        self.num_gone += 1
        peer.outbox.clear()
        peer.posted.clear()
        self._stuck.pop(peer.routing_id, None)
        self._abandon(peer)
        self._peers.pop(peer.routing_id, None)
