"""The workers' port: carries commands and reports between one ROUTER and the core. Decides nothing."""

from __future__ import annotations

from typing import Protocol

import trio

from kvasir.gateway.log import log
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import InvalidMessage
from kvasir.protocol.link import Link, LinkBusy, LinkClosed, PeerGone
from kvasir.protocol.messages import REPORTS, Bye, Command, Generate, Hello, KvAccounts, Snapshot, StepReport

TICK_S = 0.1


class WorkersCore(Protocol):
    """What the port needs of the core."""

    def worker_hello(self, peer: bytes, hello: Hello) -> object: ...
    def worker_report(self, peer: bytes, report: StepReport | Snapshot | KvAccounts | Bye) -> None: ...
    def worker_violation(self, peer: bytes, reason: str) -> None: ...
    def worker_unreachable(self, peer: bytes) -> None: ...
    def tick(self) -> None: ...


class WorkerPort:
    """One ROUTER to all workers. `send` is the core's way out, `run` its way in, and its clock's tick.

    `Generate`s wait until the tasks that are running now have had their turn, and then travel together, one message of
    several frames per worker: each message costs libzmq's thread a wake-up and a system call. Everything else is sent
    at once, behind what waits for the same worker.

    A worker's outbox is libzmq's queue for its link, bounded by the link profile's high water. Credits keep it nearly
    empty, so that a full one means a dead worker: the core is told, and hands its requests to others. It is told by
    a task of its own, never out of `send`.
    """

    def __init__(self, link: Link, *, tick_s: float = TICK_S) -> None:
        self._link = link
        self._tick_s = tick_s
        self._waiting: dict[bytes, list[bytes]] = {}  # peer -> routing frame and encoded Generates
        self._lost: set[bytes] = set()  # peers that could not be sent something, to be told to the core
        self._flusher = trio.lowlevel.ParkingLot()

    def send(self, peer: bytes, command: Command) -> None:
        """Send `command` to `peer`, or note that it cannot be reached or does not keep up.

        The core gets `worker_unreachable` a moment later then; nothing of what waited for the peer was sent either.
        """
        if not isinstance(command, Generate):
            self._send([*self._waiting.pop(peer, [peer]), encode(command)])
            return
        frame = encode(command)
        if not self._waiting:
            self._flusher.unpark()
        self._waiting.setdefault(peer, [peer]).append(frame)

    def flush(self, core: WorkersCore) -> None:
        """Send the `Generate`s that wait, and tell the core of the peers that are lost."""
        while self._waiting or self._lost:
            while self._waiting:
                _, frames = self._waiting.popitem()
                self._send(frames)
            if self._lost:
                core.worker_unreachable(self._lost.pop())  # which may give its requests to others, hence the loop

    async def run(self, core: WorkersCore, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Bring what workers say to `core` and tick it, until the link is closed or the task is cancelled.

        Cancellation leaves the link open; what was received has been brought to the core. An exception out of the
        core is a bug and ends the gateway.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self._link.run)
            nursery.start_soon(self._tick, core)
            nursery.start_soon(self._flush_for_ever, core)
            task_status.started()
            try:
                while True:
                    for frames in await self._link.receive():
                        self._take(core, frames)
            except LinkClosed:
                nursery.cancel_scope.cancel()

    async def _flush_for_ever(self, core: WorkersCore) -> None:
        while True:
            if not (self._waiting or self._lost):
                await self._flusher.park()
            self.flush(core)
            await trio.lowlevel.checkpoint()

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._link.send_nowait(frames)
        except (PeerGone, LinkBusy, LinkClosed):
            self._lost.add(frames[0])
            self._flusher.unpark()

    async def _tick(self, core: WorkersCore) -> None:
        while True:
            await trio.sleep(self._tick_s)
            core.tick()

    def _take(self, core: WorkersCore, frames: list[bytes]) -> None:
        peer = frames[0]
        try:
            if len(frames) != 2:
                raise InvalidMessage(f"{len(frames) - 1} frames where one belongs")
            report = REPORTS.decode(frames[1])
        except InvalidMessage as error:
            log("invalid_report", peer=peer.hex(), reason=error.message)
            core.worker_violation(peer, f"sent something that is no report: {error.message}")
            return
        if isinstance(report, Hello):
            core.worker_hello(peer, report)
        else:
            core.worker_report(peer, report)
