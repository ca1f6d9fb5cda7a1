"""A worker that fronts one upstream: what the gateway sees of a vLLM server, from its being found to its death.

    looking  -- found, one token drawn -->  joining  -- Welcome -->  serving  -- Drain, SIGTERM -->  Bye, the end
       ^------- the upstream died (Bye), or the gateway does not know us (Identify) ----'

Every time round is a new incarnation, with nothing of the one before. The gateway judges whether the engine makes
steps; whoever it has given up comes back through `find`, which draws a token first.
"""

from __future__ import annotations

import trio

from kvasir.protocol.errors import InvalidMessage
from kvasir.protocol.link import LinkClosed
from kvasir.protocol.messages import COMMANDS
from kvasir.worker.log import log
from kvasir.worker.upstream import hello
from kvasir.worker.upstream.incarnation import BYE_TIMEOUT_S, Front, Incarnation
from kvasir.worker.upstream.server import wait_until_up


class UpstreamWorker:
    """See the module. It owns the link of its `front`. `run` returns the exit code."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._incarnation: Incarnation | None = None
        self._drain_s: float | None = None
        self._looking = trio.CancelScope()
        self._was_up = False

    async def run(self) -> int:
        """Serve until drained or refused. Cancellation leaves nothing running; the gateway sees the link close."""
        code: int | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._front.link.run)
                nursery.start_soon(self._receive)
                while code is None:
                    found = await self._find()
                    code = 0 if found is None else await self._serve(found)
                nursery.cancel_scope.cancel()
        finally:
            self._front.link.close(linger_ms=int(1000 * BYE_TIMEOUT_S))
        return code

    def drain(self, deadline_s: float) -> None:
        """Take nothing new, finish what runs within `deadline_s`, leave. A second call may only shorten that."""
        self._drain_s = deadline_s if self._drain_s is None else min(deadline_s, self._drain_s)
        self._looking.cancel()
        if self._incarnation is not None:
            self._incarnation.drain(self._drain_s)

    async def _find(self) -> Incarnation | None:
        """Wait until the upstream serves and return the worker before it, None if we are to leave meanwhile.

        Raises:
            ConfigurationError: what waiting cannot mend, of an upstream that was never found before.
        """
        with trio.CancelScope() as self._looking:
            if self._drain_s is None:
                return await wait_until_up(self._front.server, self._look, was_up=self._was_up)
        return None

    async def _look(self) -> Incarnation:
        front = self._front
        facts = await front.server.find()
        # In a thread: it may look up names, and a slow name server must not hold up the other workers of this process.
        feed = await trio.to_thread.run_sync(hello.event_feed, front.options, front.upstream, facts)
        incarnation = Incarnation(front, facts, feed)
        self._was_up = True
        return incarnation

    async def _serve(self, incarnation: Incarnation) -> int | None:
        """Be one incarnation; return the exit code if it was the last one."""
        front = self._front
        self._incarnation = incarnation
        if self._drain_s is not None:
            incarnation.drain(self._drain_s)
        end = await incarnation.run()
        self._incarnation = None
        log("left", worker=front.worker_id, upstream=front.server.name, reason=end.reason)
        if end.bye is not None:
            await incarnation.say(end.bye, BYE_TIMEOUT_S)
        return end.exit_code

    async def _receive(self) -> None:
        while True:
            try:
                messages = await self._front.link.receive()
            except LinkClosed:
                return
            for frame in [frame for frames in messages for frame in frames]:
                try:
                    command = COMMANDS.decode(frame)
                except InvalidMessage as error:
                    log("invalid_command", num_bytes=len(frame), error=error.message)
                    if self._incarnation is not None:
                        self._incarnation.refuse(frame, error)
                    continue
                if self._incarnation is not None:
                    self._incarnation.take(command)
