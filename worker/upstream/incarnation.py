"""One incarnation of a worker that fronts an upstream: from `Hello` to its end, with everything that runs for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import trio
import zmq

from kvasir.protocol.codec import encode
from kvasir.protocol.errors import ConfigurationError, InvalidMessage
from kvasir.protocol.link import Link, LinkClosed
from kvasir.protocol.messages import (
    Abort,
    AnyCommand,
    Bye,
    Drain,
    Generate,
    Identify,
    Refused,
    Report,
    Resync,
    Welcome,
)
from kvasir.worker.dial import request_of
from kvasir.worker.log import log
from kvasir.worker.upstream.cached import CachedBlocks
from kvasir.worker.upstream.hello import EventFeed, make_hello
from kvasir.worker.upstream.http_client import UpstreamUnreachable
from kvasir.worker.upstream.kv_follower import KvFollower
from kvasir.worker.upstream.options import Options, UpstreamOptions
from kvasir.worker.upstream.reporter import Reporter
from kvasir.worker.upstream.server import Facts, Server
from kvasir.worker.upstream.streams import Streams, first_seq

HELLO_RETRY_S = 2.0
WATCH_S = 1.0
MAX_SILENT = 3  # answers of /health or /metrics in a row that did not come
SECOND_LOOKS_S = (0.2, 0.4, 0.8)  # after a stream broke: a dying server still answers for a moment
UNFOLLOWED_S = 5.0  # without whole KV events, until cached prefixes are predicted
GATEWAY_SILENCE_S = 30.0  # a link that takes no report for so long has no gateway
BYE_TIMEOUT_S = 1.0
EXIT_REFUSED = 2


@dataclass(frozen=True, slots=True)
class Front:
    """What a worker that fronts an upstream is made of. `link`: a DEALER to the gateway."""

    options: Options
    upstream: UpstreamOptions
    server: Server
    worker_id: str
    link: Link
    context: zmq.Context[Any]


@dataclass(frozen=True, slots=True)
class End:
    """Why an incarnation is over. `bye`: what to say (None: nobody listens). `exit_code`: the worker is over, too."""

    reason: str
    bye: Bye | None = None
    exit_code: int | None = None


class Incarnation:
    """The worker from `Hello` to its end: tasks in one nursery, commands taken as they come."""

    def __init__(self, front: Front, facts: Facts, feed: EventFeed | None) -> None:
        """Raises ConfigurationError as `make_hello` does."""
        self._server, self._link, self._context = front.server, front.link, front.context
        self._facts = facts
        self._hello = make_hello(front.options, front.worker_id, facts)
        self._feed = feed
        self._is_switched_off = front.upstream.events == "off"
        self._end: End | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._epoch: bytes | None = None
        self._streams: Streams | None = None
        self._reporter: Reporter
        self._cached: CachedBlocks
        self._follower: KvFollower | None = None
        self._followed_at = 0.0  # when its index was last known to be whole
        self._heartbeat_s = 1.0
        self._waker = trio.Event()
        self._leaving = trio.Event()
        self._drain_deadline = inf

    async def run(self) -> End:
        """Join and serve; return why that ended. What the upstream was computing is cut."""
        with self._scope:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._say_hello)
                self._nursery.start_soon(self._watch)
                self._nursery.start_soon(self._leave)
        assert self._end is not None, "cancelled from outside, which does not return"
        if self._end.exit_code is not None and self._streams is not None:
            await self.say(self._reporter.take(), BYE_TIMEOUT_S)
        return self._end

    def take(self, command: AnyCommand) -> None:
        """Carry out a command of the gateway. What comes after the end is for nobody."""
        if self._end is not None:
            return
        match command:
            case Welcome():
                self._on_welcome(command)
            case Refused():
                log("refused", worker=self._hello.worker_id, reason=command.reason)
                self._finish_with(End("the gateway refuses this worker", exit_code=EXIT_REFUSED))
            case Identify():
                if self._streams is not None:
                    self._finish_with(End("the gateway does not know this worker"))
            case Generate():
                self._on_generate(command)
            case Abort():
                if self._streams is not None:
                    self._streams.abort(command.req_id, command.attempt)
            case Resync():
                self._nursery.start_soon(self._send_snapshot)
            case Drain():
                self.drain(command.deadline_s)
            case _:
                log("command_passed_over", worker=self._hello.worker_id, command=type(command).__name__)

    def refuse(self, frame: bytes, error: InvalidMessage) -> None:
        """Answer a request that is none of this protocol; pass over whatever else it is."""
        request = request_of(frame)
        if request is not None and self._streams is not None:
            self._streams.refuse(*request, "error", f"the worker cannot read this request: {error.message}"[:4096])

    def drain(self, deadline_s: float) -> None:
        """See `UpstreamWorker.drain`."""
        if not self._leaving.is_set():
            log("draining", worker=self._hello.worker_id, deadline_s=deadline_s)
        self._leaving.set()
        self._drain_deadline = min(trio.current_time() + deadline_s, self._drain_deadline)

    async def say(self, report: Report, timeout_s: float) -> bool:
        """Send a report; return whether the link took it in time."""
        with trio.move_on_after(timeout_s):
            try:
                await self._link.send([encode(report)])
            except LinkClosed:
                return False
            return True
        return False

    # ---- commands

    def _on_welcome(self, welcome: Welcome) -> None:
        if welcome.gateway_epoch == self._epoch:
            return
        if self._epoch is not None:  # a new session of the same incarnation: what ran is not expected any more
            self._finish_with(End("the gateway has begun anew"))
            return
        self._epoch = welcome.gateway_epoch
        self._heartbeat_s = max(0.01, welcome.heartbeat_s)
        hello, facts = self._hello, self._facts
        self._cached = CachedBlocks(
            welcome.root, hello.block_size, hello.hit_blocks, facts.metrics.num_blocks, facts.model.lora
        )
        self._reporter = Reporter(self._cached, hello.num_blocks, trio.current_time, self._wake)
        self._streams = Streams(self._server, facts, self._reporter, self._cached, self._nursery, fail=self._on_trouble)
        log("joined", worker=hello.worker_id, upstream=self._server.name, heartbeat_s=self._heartbeat_s)
        self._nursery.start_soon(self._report)
        self._nursery.start_soon(self._follow)

    def _on_generate(self, command: Generate) -> None:
        if self._streams is None:
            log("generate_before_welcome", req_id=command.req_id.hex())
        elif self._leaving.is_set():
            text = "this worker is draining"
            self._streams.refuse(command.req_id, command.attempt, first_seq(command), "abort", text)
        else:
            self._streams.start(command)

    def _finish_with(self, end: End) -> None:
        if self._end is None:
            self._end = end
            self._scope.cancel()

    def _wake(self) -> None:
        self._waker.set()

    # ---- tasks

    async def _say_hello(self) -> None:
        while self._epoch is None:
            await self._link.send([encode(self._hello)])
            await trio.sleep(HELLO_RETRY_S)

    async def _report(self) -> None:
        """Send what there is, at least each heartbeat. What one engine step has sent on many streams goes together."""
        await self._send_snapshot()
        while True:
            with trio.move_on_after(self._heartbeat_s):
                await self._waker.wait()
            self._waker = trio.Event()
            await trio.lowlevel.checkpoint()
            if self._choose_view():
                await self._send_snapshot()
            self._cached.followed.expire(trio.current_time())
            if not await self.say(self._reporter.take(), GATEWAY_SILENCE_S):
                self._finish_with(End("the gateway takes no reports"))

    async def _send_snapshot(self) -> None:
        if self._streams is not None:
            await self.say(self._reporter.snapshot(), GATEWAY_SILENCE_S)

    async def _watch(self) -> None:
        """See that the server lives and what its engine does, once a second."""
        num_silent = 0
        while True:
            await trio.sleep(WATCH_S)
            try:
                illness = await self._server.illness()
                if illness is not None:
                    return self._died(illness)
                metrics = await self._server.metrics()
                num_silent = 0
            except (UpstreamUnreachable, ConfigurationError) as error:
                return self._died(str(error))
            except trio.TooSlowError:
                num_silent += 1
                if num_silent == MAX_SILENT:
                    return self._died(f"it did not answer {MAX_SILENT} times in a row")
                continue
            if metrics.started_at != self._facts.metrics.started_at:
                return self._died("it was started anew")
            if self._streams is not None:
                self._reporter.observe(metrics)

    async def _follow(self) -> None:
        """Follow the upstream's block events, and say which of both views of its cache is reported."""
        feed = self._feed
        if feed is None:
            why = "switched off here" if self._is_switched_off else "the upstream publishes none"
            log("no_kv_events", worker=self._hello.worker_id, reason=why, effect="cached prefixes are predicted")
            return
        index, rank = self._cached.followed, self._server.rank
        self._follower = KvFollower(self._context, feed, index, self._wake, rank=rank)
        log("kv_events", worker=self._hello.worker_id, endpoint=feed.endpoint, replay=feed.replay or "none")
        self._followed_at = trio.current_time()
        await self._follower.run()

    def _choose_view(self) -> bool:
        """Report what the events tell while they are followed, else what was sent; return whether that has changed."""
        if self._follower is None:
            return False
        now = trio.current_time()
        is_following = self._follower.is_following
        if is_following:
            self._followed_at = now
        if is_following == self._cached.is_exact or (not is_following and now - self._followed_at < UNFOLLOWED_S):
            return False
        self._cached.is_exact = is_following
        effect = "cached prefixes are exact" if is_following else "cached prefixes are predicted"
        log("following" if is_following else "not_following", worker=self._hello.worker_id, effect=effect)
        return True

    async def _on_trouble(self, reason: str) -> None:
        """Return if the upstream lives although a stream broke; else the incarnation ends."""
        for delay_s in SECOND_LOOKS_S:
            await trio.sleep(delay_s)
            try:
                illness = await self._server.illness()
            except trio.TooSlowError:
                illness = "it does not answer"
            if illness is not None:
                self._died(f"{illness}; before that: {reason}")
                await trio.sleep_forever()

    def _died(self, reason: str) -> None:
        """End the incarnation; its requests go on elsewhere."""
        text = f"the upstream {self._server.name} died: {reason}"[:4096]
        self._finish_with(End(text, Bye(text, is_death=True)))

    async def _leave(self) -> None:
        """When told so: end what runs within the drain's deadline, hand back the rest, and leave."""
        await self._leaving.wait()
        while self._streams is not None and len(self._streams):
            if trio.current_time() >= self._drain_deadline:
                self._streams.hand_back("handed back: the worker leaves")
            await trio.sleep(0.02)
        self._finish_with(End("drained", Bye("drained") if self._streams is not None else None, exit_code=0))
