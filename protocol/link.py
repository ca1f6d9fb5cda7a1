"""ZeroMQ sockets on Trio: one pump per socket, batches in, never a lost wake-up.

Some facts: `ZMQ_FD` is edge-triggered and says only "EVENTS went stale". Any libzmq call on the socket (a send, a
receive, reading EVENTS) may consume the edge. A socket must be used from one thread.

What follows: exactly one task may wait for the descriptor, and whoever has called libzmq must read EVENTS again and
wake those who wait for what it says, since the edge that would have woken them may be gone.

What we chose: `run()` is the pump, the only caller of `wait_readable(fd)`. `receive()` and `send()` first try, then
park in a lot; every libzmq call ends in `_refresh()`, which re-reads EVENTS and wakes both lots. Receiving is done in
batches because one Trio wake-up costs as much as ten small messages.

What nothing here bounds: libzmq (4.3.5) hands out no frame of a message before the last one has come. Its MAXMSGSIZE is
per frame and its high water counts whole messages, so that a peer which never ends a message takes as much memory as
it sends, unseen by us. Only a bound on the whole process helps (`MemoryMax` in the systemd unit); peers that are not
trusted so far belong on the HTTP edge. A message of too many frames, once whole, is read off a few at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
import zmq

from kvasir.protocol.errors import ConfigurationError, KvasirError
from kvasir.protocol.profile import LinkProfile, apply_profile

MAX_PARTS = 4
MAX_DISCARDED = 256  # frames in one turn, of messages with too many: each takes some microseconds
MAX_BATCH_BYTES = 16 << 20
# Plain ints: `|` and `&` on pyzmq's flags cost as much as a send.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)


class LinkBusy(KvasirError):
    """The peer's queue is full (EAGAIN): nothing was sent. Keep the message or cut the peer; never drop it silently."""

    code = "link_busy"


class PeerGone(KvasirError):
    """A ROUTER has no such peer (EHOSTUNREACH): nothing was sent."""

    code = "peer_gone"


class LinkClosed(KvasirError):
    """The link was closed, by us."""

    code = "link_closed"


class Link:
    """One ZeroMQ socket, owned by the Trio thread that made it.

    Any number of tasks may send, one at a time should receive. Messages are lists of frames; a ROUTER's first frame is
    the routing id. Messages of more than `max_parts` frames are no protocol of ours: they are discarded and
    counted in `num_refused`.
    """

    def __init__(self, socket: zmq.Socket[bytes], *, max_parts: int = MAX_PARTS) -> None:
        self._socket = socket
        self._max_parts = max_parts
        descriptor = socket.getsockopt(zmq.FD)
        assert isinstance(descriptor, int)
        self._descriptor = descriptor
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._closed = False
        self._discarding = False  # what is left of a message with too many frames
        self.num_refused = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pump: wake waiters whenever libzmq signals. Start it in a nursery before the first `receive` or `send`.

        Returns when the link is closed. Cancelling it stops wake-ups and leaves the socket open.
        """
        task_status.started()
        while not self._closed:
            # Reading EVENTS is what resets the descriptor: without it the next wait would return at once, for ever.
            self._wake(self._events())
            try:
                await trio.lowlevel.wait_readable(self._descriptor)
            except trio.ClosedResourceError:
                return

    async def receive(self, max_messages: int = 256) -> list[list[bytes]]:
        """Wait for at least one message, then return up to `max_messages` that are there.

        A checkpoint. Cancellation takes nothing off the socket.

        Raises:
            LinkClosed: the link was closed before or during the wait.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            messages = self.receive_nowait(max_messages)
            if messages:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return messages
            if self._discarding:
                await trio.lowlevel.checkpoint()
            else:
                await self._readers.park()

    def receive_nowait(self, max_messages: int = 256) -> list[list[bytes]]:
        """Return up to `max_messages` messages that are there now, possibly none; about `MAX_BATCH_BYTES` at most.

        Raises:
            LinkClosed: the link was closed.
        """
        self._check_open()
        messages: list[list[bytes]] = []
        num_bytes = 0
        try:
            self._discard()
            while len(messages) < max_messages and num_bytes < MAX_BATCH_BYTES and not self._discarding:
                part = self._socket.recv(_NOBLOCK, copy=False)  # which knows `more`, else a call of its own
                frames = [part.bytes]
                while part.more:
                    if len(frames) == self._max_parts:
                        self.num_refused += 1
                        self._discarding = True
                        break
                    part = self._socket.recv(_NOBLOCK, copy=False)
                    frames.append(part.bytes)
                else:
                    messages.append(frames)
                    num_bytes += len(frames[-1])
                if self._discarding:
                    self._discard()
        except zmq.Again:
            pass
        self._refresh()
        return messages

    def send_nowait(self, frames: Sequence[bytes]) -> None:
        """Hand one message to libzmq.

        Raises:
            LinkBusy: the peer's queue is full; nothing was sent.
            PeerGone: a ROUTER without such a peer; nothing was sent.
            LinkClosed: the link was closed.
        """
        self._check_open()
        try:
            for frame in frames[:-1]:  # only the first can be refused; send_multipart takes five times as long
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], _NOBLOCK)
        except zmq.Again:
            raise LinkBusy("the peer does not keep up: its queue is full") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone("the peer is gone") from None
            raise
        finally:
            self._refresh()

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send one message, waiting for room. Meant for DEALERs: a ROUTER's POLLOUT means *some* peer has room.

        A checkpoint. Cancellation: sent whole or not at all (not at all if it raises `Cancelled`).

        Raises:
            PeerGone, LinkClosed: as `send_nowait`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                self.send_nowait(frames)
            except LinkBusy:
                await self._writers.park()
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; waiting tasks get `LinkClosed`. Idempotent.

        What libzmq has not yet written it may go on writing for `linger_ms`, for which the context's end waits.
        """
        if self._closed:
            return
        self._closed = True
        trio.lowlevel.notify_closing(self._descriptor)
        self._socket.close(linger=linger_ms)
        self._readers.unpark_all()
        self._writers.unpark_all()

    def _discard(self) -> None:
        """Read off some of what is left of a refused message."""
        for _ in range(MAX_DISCARDED):
            if not self._discarding:
                return
            self._discarding = self._socket.recv(_NOBLOCK, copy=False).more

    def _check_open(self) -> None:
        if self._closed:
            raise LinkClosed("the link is closed")

    def _refresh(self) -> None:
        """Re-read EVENTS, since the call just made may have eaten the edge that would have woken a waiter."""
        if (self._readers or self._writers) and not self._closed:
            self._wake(self._events())

    def _events(self) -> int:
        events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return events

    def _wake(self, events: int) -> None:
        if events & _POLLIN:
            self._readers.unpark_all()
        if events & _POLLOUT:
            self._writers.unpark_all()


def open_router(context: zmq.Context[Any], endpoints: Sequence[str], profile: LinkProfile | None = None) -> Link:
    """Return a link over a ROUTER bound to `endpoints`, with MANDATORY set: an undeliverable message is an error.

    For `ipc://` endpoints the directory is made with mode 0750 if it is missing, and a stale socket file is replaced;
    making sure that no live process still uses it is the caller's task (a lock file).

    Raises:
        ConfigurationError: an endpoint cannot be bound; says which and why.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    apply_profile(socket, profile or LinkProfile())
    for endpoint in endpoints:
        try:
            if endpoint.startswith("ipc://"):
                _prepare_ipc(Path(endpoint.removeprefix("ipc://")))
            socket.bind(endpoint)
        except (zmq.ZMQError, OSError) as error:
            socket.close(linger=0)
            raise ConfigurationError(f"cannot listen on {endpoint}: {error}; choose another address") from None
        except ConfigurationError:
            socket.close(linger=0)
            raise
    return Link(socket)


def _prepare_ipc(path: Path) -> None:
    # sockaddr_un holds 108 bytes; libzmq's own message for a longer path is "File name too long".
    if len(os.fsencode(path)) > 107:
        raise ConfigurationError(f"the socket path {path} is longer than 107 bytes; choose a shorter directory")
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
