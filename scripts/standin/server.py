"""The stand-in's life: starting, the ways a vLLM server dies, coming back, and what tests may ask of it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import trio

from scripts.standin.calls import WireError
from scripts.standin.engine import Engine
from scripts.standin.events import EventFaults, EventOptions, EventPublisher
from scripts.standin.http import HttpConnection, HttpRequest
from scripts.standin.routes import Routes, StandinOptions

COMMANDS = ("kill_engine", "hang", "resume", "terminate", "cut", "restart", "clear", "set_faults")


class Standin:
    """One server that can die and come back. `run` serves; everything else may be called while it does."""

    def __init__(self, options: StandinOptions) -> None:
        self.options = options
        self.faults = EventFaults()
        self.engines: list[Engine] = []
        self.is_up = trio.Event()
        self.is_down = trio.Event()
        self._publishers: list[EventPublisher] = []
        self._routes: Routes | None = None
        self._wants_restart = trio.Event()
        self._incarnation = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._port = options.port
        self._endpoints: list[EventOptions] = []
        self._outer: trio.Nursery | None = None

    @property
    def url(self) -> str:
        return f"http://{self.options.host}:{self._port}"

    @property
    def event_endpoints(self) -> list[tuple[str, str | None]]:
        """PUB and replay endpoint of each rank; they stay the same over restarts."""
        return [(each.endpoint, each.replay_endpoint) for each in self._endpoints]

    async def run(self) -> None:
        """Serve, and after a death wait for `restart`. Ends when cancelled."""
        async with trio.open_nursery() as self._outer:
            while True:
                with trio.CancelScope() as self._incarnation:
                    await self._live()
                self.is_up = trio.Event()
                self.is_down.set()
                await self._wants_restart.wait()
                self._wants_restart = trio.Event()

    # ---- life and death ------------------------------------------------------------------------------------------

    def kill_engine(self, exit_after_s: float = 0.5) -> None:
        """As kill -9 of EngineCore: streams get an error, /health says 503, and the process exits."""
        assert self._routes is not None
        self._routes.is_engine_dead = True
        for engine in self.engines:
            engine.fail_all()
            engine.set_hung(True)
        self._later(exit_after_s, self.cut)

    def hang(self) -> None:
        """As SIGSTOP of EngineCore: all routes answer, no token comes, no metric moves."""
        for engine in self.engines:
            engine.set_hung(True)

    def resume(self) -> None:
        """As SIGCONT."""
        for engine in self.engines:
            engine.set_hung(False)

    def terminate(self, silent: bool = False, exit_after_s: float = 0.5) -> None:
        """As SIGTERM of the server: connects are refused. Open streams end with an abort nobody asked for, and the
        process exits; or, `silent`, they stay open and say nothing more."""
        self._accepting.cancel()
        if silent:
            self.hang()
            return
        for engine in self.engines:
            for request in list(engine.unfinished()):
                engine.abort(request, with_last_token=True)
        self._later(exit_after_s, self.cut)

    def cut(self) -> None:
        """As kill -9 of everything: connections end in mid-stream."""
        self._incarnation.cancel()

    async def restart(self) -> None:
        """End what runs, if it does, and start anew on the same ports: nothing cached, events numbered from 0."""
        self.cut()
        await self.is_down.wait()
        self._wants_restart.set()
        await self.is_up.wait()

    def clear(self) -> bool:
        """As /reset_prefix_cache: False while requests run. The event waits for the next step."""
        cleared = [engine.cache.reset() for engine in self.engines]
        return all(cleared)

    def set_faults(self, **faults: Any) -> None:
        """Set fields of `EventFaults`, for the batches that come."""
        known = {each.name for each in fields(EventFaults)}
        if unknown := faults.keys() - known:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such fault; known: {', '.join(sorted(known))}")
        for name, value in faults.items():
            setattr(self.faults, name, value)

    def state(self) -> dict[str, Any]:
        """How things are; asserts that every rank's cache is whole."""
        for engine in self.engines:
            engine.cache.check_integrity(request.table for request in engine.unfinished())
        return {
            "started_at": self._routes and self._routes.started_at,
            "ranks": [
                {"running": len(engine.running), "waiting": len(engine.waiting), **asdict(engine.counters)}
                for engine in self.engines
            ],
        }

    async def _live(self) -> None:
        options = self.options
        self._publishers = []
        if options.events is not None:
            places = self._endpoints or [_of_rank(options.events, rank) for rank in range(options.num_ranks)]
            self._publishers = [EventPublisher(place, self.faults, rank) for rank, place in enumerate(places)]
        try:
            for publisher in self._publishers:
                await publisher.bind()
            self._endpoints = [publisher.options for publisher in self._publishers]
            listeners = await _listen(options.host, self._port)
            self._port = listeners[0].socket.getsockname()[1]
            await self._serve(listeners)
        finally:
            for publisher in self._publishers:
                publisher.close()

    async def _serve(self, listeners: list[trio.SocketListener]) -> None:
        options = self.options
        self.engines = [
            Engine(options.engine, self._publishers[rank] if self._publishers else None)
            for rank in range(options.num_ranks)
        ]
        self._routes = Routes(options, self.engines, self._publishers, self._obey)
        async with trio.open_nursery() as nursery:
            for publisher in self._publishers:
                nursery.start_soon(publisher.run)
            for engine in self.engines:
                nursery.start_soon(engine.run)
            self.is_down = trio.Event()
            self.is_up.set()
            with trio.CancelScope() as self._accepting:
                await trio.serve_listeners(self._routes.converse, listeners, handler_nursery=nursery)
            await trio.sleep_forever()

    def _later(self, delay_s: float, act: Callable[[], object]) -> None:
        async def wait_and_act(incarnation: trio.CancelScope) -> None:
            await trio.sleep(delay_s)
            if incarnation is self._incarnation:
                act()

        assert self._outer is not None
        self._outer.start_soon(wait_and_act, self._incarnation)

    async def _obey(self, connection: HttpConnection, request: HttpRequest) -> bool:
        """Answer `/standin/...`; what ends this connection is done after the answer."""
        command = request.path.removeprefix("/standin").strip("/")
        if not command:
            return await connection.answer(200, json.dumps(self.state()).encode())
        if request.method != "POST" or command not in COMMANDS:
            return await connection.answer(404, b'{"detail":"Not Found"}')
        arguments = json.loads(request.body or b"{}")
        if command in ("cut", "restart"):
            goes_on = await connection.answer(200, b"{}")
            assert self._outer is not None
            if command == "cut":
                self.cut()
            else:
                self._outer.start_soon(self.restart)
            return goes_on
        try:
            result = getattr(self, command)(**arguments)
        except (TypeError, ValueError) as error:
            raise WireError(400, str(error)) from None
        return await connection.answer(200, json.dumps({"result": result}).encode())


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    """A predecessor's port may need a moment to be free."""
    with trio.fail_after(5):
        while True:
            try:
                return await trio.open_tcp_listeners(port, host=host, backlog=1024)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            await trio.sleep(0.02)


def _of_rank(events: EventOptions, rank: int) -> EventOptions:
    """vLLM's rule: each rank adds its number to the ports."""

    def moved(endpoint: str) -> str:
        address, _, port = endpoint.rpartition(":")
        return f"{address}:{int(port) + rank}" if port.isdigit() else endpoint

    replay = events.replay_endpoint
    return replace(events, endpoint=moved(events.endpoint), replay_endpoint=replay and moved(replay))
