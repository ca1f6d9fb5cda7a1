"""The stand-in's routes: HTTP requests to engine requests, outputs to answers. One object per life of a server."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import msgspec
import trio

from scripts.standin import about
from scripts.standin.calls import (
    Call,
    WireError,
    check_for_engine,
    engine_is_dead,
    queue_is_full,
    read_completion,
    read_generate,
    scale_out_is_off,
)
from scripts.standin.engine import Engine, EngineOptions, Output, Request, TokenModel
from scripts.standin.events import EventOptions, EventPublisher
from scripts.standin.http import HttpConnection, HttpRequest
from scripts.standin.wire import DONE, VERSION, CompletionWire, GenerateWire, error_event, usage_of

Wire = GenerateWire | CompletionWire
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


@dataclass(slots=True)
class StandinOptions:
    """What kind of server. `max_queued`, and the speed in `engine`, may be changed while it runs."""

    model: str = "demo"
    root: str = "/models/demo"
    host: str = "127.0.0.1"
    port: int = 0  # 0: chosen at the first start, the same after a restart
    engine: EngineOptions = field(default_factory=EngineOptions)
    events: EventOptions | None = field(default_factory=EventOptions)
    num_ranks: int = 1
    has_scale_out: bool = True  # without it, as by default, the tokens-in route says 403
    tells_cached_tokens: bool = True  # --enable-prompt-tokens-details
    is_dev: bool = False  # VLLM_SERVER_DEV_MODE: /server_info, /reset_prefix_cache, /abort_requests
    max_queued: int | None = None  # requests that are not finished, running ones too
    api_key: str | None = None


class Routes:
    """Answers connections. `obey` answers `/standin/...`, which is no route of vLLM's."""

    def __init__(
        self,
        options: StandinOptions,
        engines: list[Engine],
        publishers: list[EventPublisher],
        obey: Callable[[HttpConnection, HttpRequest], Awaitable[bool]],
    ) -> None:
        self.options = options
        self.started_at = time.time()  # Unix seconds; `process_start_time_seconds` tells one life from the next
        self.is_engine_dead = False
        self._engines = engines
        self._publishers = publishers
        self._obey = obey
        self._requests: dict[str, list[tuple[Engine, Request]]] = {}  # equal names run side by side

    async def converse(self, stream: trio.SocketStream) -> None:
        async with stream:
            connection = HttpConnection(stream)
            with contextlib.suppress(trio.BrokenResourceError):
                while (request := await connection.next_request()) is not None:
                    if not await self._answer(connection, request):
                        return

    async def _answer(self, connection: HttpConnection, request: HttpRequest) -> bool:
        try:
            told = request.headers.get("authorization", "").partition(" ")[2]
            if request.path.startswith(GUARDED) and self.options.api_key not in (None, told):
                return await connection.answer(401, b'{"error":"Unauthorized"}')
            if request.path.startswith("/standin"):
                return await self._obey(connection, request)
            if request.method == "GET":
                return await self._tell(connection, request)
            return await self._act(connection, request)
        except WireError as error:
            return await connection.answer(error.status, msgspec.json.encode(error.content))

    async def _tell(self, connection: HttpConnection, request: HttpRequest) -> bool:
        options = self.options
        created = int(time.time())
        match request.path:
            case "/health":
                return await connection.answer(503 if self.is_engine_dead else 200, b"")
            case "/version":
                content: Any = {"version": VERSION}
            case "/v1/models":
                content = about.models_answer(options.model, options.root, options.engine.max_model_len, created)
            case "/kv_event_sources":
                content = {str(rank): publisher.config for rank, publisher in enumerate(self._publishers)}
            case "/server_info" if options.is_dev:
                content = about.server_info(options.engine, options.model, options.root, options.num_ranks)
                if parse_qs(request.query).get("config_format") != ["json"]:
                    content["vllm_config"] = str(content["vllm_config"])
            case "/metrics":
                engines = [(engine.options, engine.counters, engine.gauges) for engine in self._engines]
                text = about.metrics_text(engines, options.model, self.started_at)
                return await connection.answer(200, text, "text/plain; version=1.0.0; charset=utf-8")
            case _:
                return await connection.answer(404, b'{"detail":"Not Found"}')
        return await connection.answer(200, msgspec.json.encode(content))

    async def _act(self, connection: HttpConnection, request: HttpRequest) -> bool:
        options = self.options
        if request.path.startswith("/inference/") and not options.has_scale_out:
            raise scale_out_is_off()
        match request.path:
            case "/inference/v1/generate":
                call = read_generate(_read_json(request), options.model, options.engine)
                return await self._generate(connection, request, call, GenerateWire)
            case "/v1/completions":
                call = read_completion(_read_json(request), options.model, options.engine)
                return await self._generate(connection, request, call, CompletionWire)
            case "/inference/v1/abort_requests":
                return await self._abort(connection, request)
            case "/abort_requests" if options.is_dev:
                return await self._abort(connection, request)
            case "/reset_prefix_cache" if options.is_dev:
                cleared = [engine.cache.reset() for engine in self._engines]
                return await connection.answer(200, msgspec.json.encode({"success": all(cleared)}))
        return await connection.answer(404, b'{"detail":"Not Found"}')

    async def _abort(self, connection: HttpConnection, request: HttpRequest) -> bool:
        try:
            names = json.loads(request.body).get("request_ids")
        except ValueError as error:
            raise WireError(400, f"JSON decode error: {error}", "Bad Request") from None
        if names is None:
            raise WireError(400, "Missing 'request_ids' in request body", "Bad Request")
        for name in names:
            for engine, sequence in self._requests.get(name, []):
                engine.abort(sequence)
        return await connection.answer(200, b"")

    async def _generate(self, connection: HttpConnection, request: HttpRequest, call: Call, kind: type[Wire]) -> bool:
        """Answer a request for tokens, streamed or whole. The client's leaving aborts it."""
        name = kind.id_prefix + (call.request_id or request.headers.get("x-request-id") or secrets.token_hex(8))
        wire = kind(call, name, self.options.model, int(time.time()), self.options.engine.vocab_size)
        if self._is_full():
            raise queue_is_full()
        if call.is_stream:
            await connection.begin_stream()
        try:
            check_for_engine(call, self.options.engine)
            engine = self._choose_engine(request)
            sequence = self._submit(engine, name + kind.engine_suffix, call, request.headers.get("x-session-id"))
        except WireError as error:
            return await self._refuse(connection, call, error)
        goes_on: bool | None = None  # None: the client has left before the end
        give = self._stream if call.is_stream else self._give_whole
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._abort_when_gone, connection, nursery.cancel_scope)
                with contextlib.suppress(trio.BrokenResourceError):
                    goes_on = await give(connection, call, wire, sequence)
                nursery.cancel_scope.cancel()
            return bool(goes_on)
        finally:
            sequence.steps.close()
            if goes_on is None:
                engine.abort(sequence)
            named = self._requests[sequence.request_id]
            named.remove((engine, sequence))
            if not named:
                del self._requests[sequence.request_id]

    async def _abort_when_gone(self, connection: HttpConnection, answering: trio.CancelScope) -> None:
        await connection.wait_gone()
        answering.cancel()

    async def _stream(self, connection: HttpConnection, call: Call, wire: Wire, sequence: Request) -> bool:
        num_drawn = 0
        num_cached: int | None = None
        while True:
            outputs = [await sequence.steps.receive()]
            with contextlib.suppress(trio.WouldBlock):
                while outputs[-1].finish_reason is None:
                    outputs.append(sequence.steps.receive_nowait())
            if num_cached is None:
                num_cached = outputs[0].num_cached_tokens
            # Steps that are there already go into one chunk, as in vLLM when a client or the server is slow.
            token_ids = [token_id for output in outputs for token_id in output.token_ids]
            num_drawn += len(token_ids)
            reason = outputs[-1].finish_reason
            if reason == "error":
                events = [wire.chunk(token_ids, None, None)] if token_ids else []
                return await self._refuse(connection, call, engine_is_dead(), events)
            events = [wire.chunk(token_ids, reason, outputs[-1].stop_reason)]
            if reason is None:
                await connection.send_events(events)
                continue
            if call.wants_usage:
                events.append(wire.last_chunk(self._usage(call, num_drawn, num_cached)))
            await connection.send_events([*events, DONE])
            return await connection.end_stream()

    async def _give_whole(self, connection: HttpConnection, call: Call, wire: Wire, sequence: Request) -> bool:
        token_ids: list[int] = []
        num_cached: int | None = None
        while True:
            output: Output = await sequence.steps.receive()
            token_ids += output.token_ids
            if num_cached is None:
                num_cached = output.num_cached_tokens
            if output.finish_reason == "error":
                return await self._refuse(connection, call, engine_is_dead())
            if output.finish_reason is not None:
                usage = self._usage(call, len(token_ids), num_cached)
                content = wire.answer(token_ids, output.finish_reason, output.stop_reason, usage)
                return await connection.answer(200, msgspec.json.encode(content))

    async def _refuse(
        self, connection: HttpConnection, call: Call, error: WireError, events: list[bytes] | None = None
    ) -> bool:
        if not call.is_stream:
            return await connection.answer(error.status, msgspec.json.encode(error.content))
        await connection.send_events([*(events or []), error_event(error), DONE])
        return await connection.end_stream()

    def _usage(self, call: Call, num_drawn: int, num_cached: int) -> dict[str, Any]:
        return usage_of(call, num_drawn, num_cached if self.options.tells_cached_tokens else None)

    def _choose_engine(self, request: HttpRequest) -> Engine:
        """The rank the caller names, else the one with the fewest requests."""
        rank = request.headers.get("x-data-parallel-rank")
        if rank is not None:
            return self._engines[int(rank) % len(self._engines)]
        return min(self._engines, key=lambda engine: len(engine.running) + len(engine.waiting))

    def _is_full(self) -> bool:
        limit = self.options.max_queued
        return limit is not None and sum(len(each.running) + len(each.waiting) for each in self._engines) >= limit

    def _submit(self, engine: Engine, name: str, call: Call, session_id: str | None) -> Request:
        if self.is_engine_dead:
            raise engine_is_dead()
        model = TokenModel(self.options.engine, call.token_ids, call.sampling)
        request = Request(name, list(call.token_ids), call.sampling, call.salt, session_id, model)
        self._requests.setdefault(name, []).append((engine, request))
        engine.submit(request)
        return request


def _read_json(request: HttpRequest) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError as error:
        where = f"body.{getattr(error, 'pos', 0)}"
        message = f"1 validation error:\n  {{'type': 'json_invalid', 'loc': '{where}', 'msg': 'JSON decode error'}}"
        raise WireError(400, message, "Bad Request", where) from None
    if not isinstance(body, dict):
        raise WireError(400, "1 validation error:\n  {'type': 'model_attributes_type'}", "Bad Request", "body")
    return body
