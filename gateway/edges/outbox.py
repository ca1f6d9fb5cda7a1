"""Sending to many clients through one ROUTER without ever waiting for one of them.

A ROUTER's POLLOUT means that *some* client has room, so it cannot say when one slow client has. What a client does not
take is kept, within bounds, and tried again a little later; a client that stays stuck, or of which too much is kept,
is cut: it loses what it did not read. `flush` and `retry` return the clients that are gone or have been cut.

Messages are posted, and sent by `flush`: what a client gets in one step is one multipart, since a send that must wake
libzmq's thread costs more than everything else that is done for a message.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

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
    """A client that has calls or unsent messages: others are not remembered.

    `cut`: it lost what it did not read, which belonged to the calls `lost`; until everything after that is sent.
    """

    routing_id: bytes
    calls: dict[int, C] = field(default_factory=dict)
    posted: list[tuple[int, bytes]] = field(default_factory=list)  # (call id, frame), for the next flush
    unsent: deque[tuple[int, bytes]] = field(default_factory=deque)  # (call id, frame)
    num_unsent_bytes: int = 0
    lost: list[int] = field(default_factory=list)  # call ids
    stuck_since: float = 0.0
    cut: bool = False


class Outbox(Generic[C]):
    """Delivers frames to peers in order. The calls of a peer that it returns as lost are of no use any more."""

    def __init__(self, link: Link, limits: OutboxLimits) -> None:
        self._link = link
        self._limits = limits
        self._peers: dict[bytes, Peer[C]] = {}
        self._posted: list[Peer[C]] = []
        self._stuck: dict[bytes, Peer[C]] = {}
        self._lost: list[Peer[C]] = []
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
        if not peer.calls and not peer.posted and not peer.unsent:
            self._peers.pop(peer.routing_id, None)

    def num_peers(self) -> int:
        return len(self._peers)

    def num_waiting(self) -> int:
        """Return how many messages are kept for all peers."""
        return sum(len(peer.unsent) for peer in self._stuck.values())

    def post(self, peer: Peer[C], call_id: int, frame: bytes) -> None:
        """Have `frame`, which belongs to `call_id`, sent to `peer` at the next `flush`, after everything before it."""
        if not peer.posted:
            self._posted.append(peer)
            self._peers[peer.routing_id] = peer
        peer.posted.append((call_id, frame))

    def flush(self) -> list[Peer[C]]:
        """Send what was posted; return the peers that were lost by it. Never waits."""
        peers, self._posted = self._posted, []
        for peer in peers:
            while peer.posted:  # empty at once if the peer is found to be gone, or is cut
                batch = peer.posted[:MAX_FRAMES]
                del peer.posted[:MAX_FRAMES]
                self._send(peer, batch)
            self.release(peer)
        return self._take_lost()

    async def retry(self) -> list[Peer[C]]:
        """Wait until peers are stuck and some time has passed, try them again; return those that were lost by it."""
        if not self._stuck:
            await self._lot.park()
        await trio.sleep(self._limits.retry_s)
        for peer in list(self._stuck.values()):
            self._retry(peer)
        return self._take_lost()

    def _take_lost(self) -> list[Peer[C]]:
        lost, self._lost = self._lost, []
        return lost

    def _send(self, peer: Peer[C], posted: list[tuple[int, bytes]]) -> None:
        if not peer.unsent:
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
        peer.unsent.extend(posted)
        peer.num_unsent_bytes += sum(len(frame) for _, frame in posted)
        limits = self._limits
        if len(peer.unsent) > limits.max_messages or peer.num_unsent_bytes > limits.max_bytes:
            self._cut(peer)

    def _retry(self, peer: Peer[C]) -> None:
        try:
            while peer.unsent:
                self._link.send_nowait((peer.routing_id, peer.unsent[0][1]))
                peer.num_unsent_bytes -= len(peer.unsent.popleft()[1])
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
        if peer.cut:
            return
        peer.cut = True
        self.num_cut += 1
        peer.lost = [call_id for call_id, _ in (*peer.unsent, *peer.posted)]
        self._drop(peer)

    def _forget(self, peer: Peer[C]) -> None:
        peer.cut = False
        self.num_gone += 1
        self._stuck.pop(peer.routing_id, None)
        self._peers.pop(peer.routing_id, None)
        self._drop(peer)

    def _drop(self, peer: Peer[C]) -> None:
        """Keep nothing for `peer`, and report it as lost."""
        peer.posted.clear()
        peer.unsent.clear()
        peer.num_unsent_bytes = 0
        self._lost.append(peer)
