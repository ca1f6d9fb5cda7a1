"""The OpenAI-compatible routes: bind a request to its tenant, prepare and submit it, write what comes back.

A whole answer wakes its connection once, when the last choice has ended (or at every step if it has stop strings,
which must be looked for as the text comes). A streamed one is woken at most once per engine step, and writes all that
came meanwhile in one go. A client that goes away cancels the task that serves it, and with it its requests.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

from kvasir.gateway.core.api import CoreApi, Finished, ModelInfo, Submit
from kvasir.gateway.edges.answer import Answer, Piece, Waiter
from kvasir.gateway.edges.openai_answers import ChatWriter, CompletionWriter, Writer, error_object
from kvasir.gateway.edges.openai_requests import Asked, read_chat, read_completion
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.http.connection import Exchange, HttpResponse
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.log import no_log
from kvasir.gateway.tenants.directory import Tenant, TenantDirectory
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.errors import (
    BY_CODE,
    AuthenticationFailed,
    ErrorInfo,
    KvasirError,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
)

_encode = msgspec.json.Encoder().encode
_ROUTES: dict[str, tuple[Callable[[bytes], Asked], type[Writer]]] = {
    "/v1/chat/completions": (read_chat, ChatWriter),
    "/v1/completions": (read_completion, CompletionWriter),
}
QUICK_BODY_BYTES = 32_768  # larger bodies are read in a thread
MAX_READERS = 2
MAX_PREPARED = 8  # prompts of one request, before others go first


class HttpApi:
    """Handler of an `HttpServer`.

    `metrics` renders the text of `/metrics`, for those who send `metrics_token`; without a token nobody may see it.
    `access` is called once per request with what is known of it. `started_at` is wall-clock seconds.
    """

    def __init__(
        self,
        core: CoreApi,
        preparer: Preparer,
        directory: TenantDirectory,
        metrics: Callable[[], bytes],
        *,
        metrics_token: str = "",
        access: Callable[..., None] = no_log,
        started_at: float | None = None,
    ) -> None:
        self._core = core
        self._preparer = preparer
        self._directory = directory
        self._metrics = metrics
        self._readers = trio.CapacityLimiter(MAX_READERS)
        self._metrics_token = metrics_token
        self._access = access
        self._created = int(time.time() if started_at is None else started_at)

    async def __call__(self, request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        """Answer one request; every `KvasirError` becomes an OpenAI-style error object with its status."""
        began = trio.current_time()
        facts: dict[str, object] = {}
        response = None
        try:
            response = await self._route(request, exchange, facts)
        except _WrongMethod as error:
            response = error_response(error.info(), [("allow", ", ".join(error.methods))])
        except KvasirError as error:
            response = error_response(error.info())
        except trio.Cancelled:
            facts["cut"] = True
            raise
        finally:
            status = response.status if response else 200 if exchange.has_begun else None
            ms = round((trio.current_time() - began) * 1000)
            method, path = request.method, request.path[:120]
            self._access("request", edge="http", method=method, path=path, status=status, **facts, ms=ms)
        return response

    async def _route(self, request: HttpRequest, exchange: Exchange, facts: dict[str, object]) -> HttpResponse | None:
        """Answer one request; `facts` gains what the access log says of it."""
        path = request.path
        if path in _ROUTES:
            _only(request, "POST")
            tenant = self._authenticate(request, facts)
            read, writer_of = _ROUTES[path]
            if len(request.body) <= QUICK_BODY_BYTES:
                asked = read(request.body)
            else:
                asked = await trio.to_thread.run_sync(read, request.body, limiter=self._readers, abandon_on_cancel=True)
            return await self._complete(asked, tenant, writer_of, exchange, facts)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _only(request, "GET", "HEAD")
            return self._models(
                self._authenticate(request, facts), unquote(path.removeprefix("/v1/models").removeprefix("/"))
            )
        if path == "/health":
            _only(request, "GET", "HEAD")
            return self._health()
        if path == "/metrics":
            _only(request, "GET", "HEAD")
            self._check_scraper(request)
            return HttpResponse(200, self._metrics(), "text/plain; version=0.0.4; charset=utf-8")
        raise NotFound(f"there is nothing at {path[:120]!r}; see /v1/models, /v1/chat/completions, /v1/completions")

    def _check_scraper(self, request: HttpRequest) -> None:
        if not self._metrics_token:
            raise PermissionDenied("metrics are off; start the gateway with --metrics-token-file")
        if not hmac.compare_digest(_bearer(request).encode(), self._metrics_token.encode()):
            raise AuthenticationFailed("metrics need the token of --metrics-token-file; send `Bearer TOKEN`")

    def _authenticate(self, request: HttpRequest, facts: dict[str, object]) -> Tenant:
        tenant = self._directory.authenticate(_bearer(request))
        facts["tenant"] = tenant.id
        return tenant

    def _models(self, tenant: Tenant, name: str) -> HttpResponse:
        mine = [info for info in self._core.models().values() if tenant.may_use(info.name)]
        if not name:
            return _json(200, {"object": "list", "data": [self._card(info) for info in mine]})
        for info in mine:
            if info.name == name:
                return _json(200, self._card(info))
        served = ", ".join(info.name for info in mine) or "none"
        info_ = ErrorInfo("model_not_found", f"model {name[:80]!r} is not served here; served: {served}", "model")
        return error_response(info_)

    def _card(self, info: ModelInfo) -> dict[str, Any]:
        card = {"id": info.name, "object": "model", "created": self._created, "owned_by": "kvasir"}
        return {**card, "max_model_len": info.max_context}

    def _health(self) -> HttpResponse:
        models = {info.name: info.num_workers for info in self._core.models().values()}
        if any(models.values()):
            return _json(200, {"status": "ok", "workers": models})
        return _json(503, {"status": "no workers", "workers": models}, [("retry-after", "2")])

    async def _complete(
        self,
        asked: Asked,
        tenant: Tenant,
        writer_of: type[Writer],
        exchange: Exchange,
        facts: dict[str, object],
    ) -> HttpResponse | None:
        requests = asked.requests
        waiter = Waiter(len(requests), exchange.cut, every_event=asked.stream or _may_end_early(requests[0]))
        answers = [Answer(self._core, waiter.wake) for _ in requests]
        submits: list[Submit] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                answer.submit = submit = await self._preparer.prepare(request, tenant, answer)
                answer.parser = self._preparer.parser(request, submit)
                answer.detokenizer = self._preparer.detokenizer(request, submit, answer.parser)
                submits.append(submit)
                if len(submits) % MAX_PREPARED == 0:
                    await trio.lowlevel.checkpoint()  # many prompts let others go first
            for submit in submits:
                self._core.submit(submit)
            writer = writer_of(asked, submits, self._preparer.text(submits[0].model))
            if asked.stream:
                return await self._stream(answers, waiter, writer, exchange)
            return await self._whole(answers, waiter, writer)
        finally:
            facts["request"] = submits[0].req_id.hex() if submits else None
            facts["tokens"] = sum(answer.num_tokens for answer in answers)
            for answer in answers:
                answer.cancel()

    async def _whole(self, answers: list[Answer], waiter: Waiter, writer: Writer) -> HttpResponse:
        pieces = [Piece() for _ in answers]
        while any(piece.finished is None for piece in pieces):
            await waiter.wait()
            for piece, answer in zip(pieces, answers, strict=True):
                piece.extend(answer.take())
        ends = [_end(piece) for piece in pieces]
        for end in ends:
            if end.error is not None:
                return error_response(end.error)
        headers = [("x-kvasir-worker", ends[0].worker_id), ("x-request-id", writer.submits[0].req_id.hex())]
        return _json(200, writer.whole(pieces, ends), headers)

    async def _stream(
        self, answers: list[Answer], waiter: Waiter, writer: Writer, exchange: Exchange
    ) -> HttpResponse | None:
        ends: list[Finished | None] = [None] * len(answers)
        await waiter.wait()
        pieces = [answer.take() for answer in answers]
        first = next((piece.finished for piece in pieces if piece.finished and piece.finished.error), None)
        if first is not None and first.error is not None and first.num_output_tokens == 0:
            return error_response(first.error)  # refused before anything was sent: a plain status says it best
        headers = [("cache-control", "no-cache"), ("x-request-id", writer.submits[0].req_id.hex())]
        exchange.begin(200, "text/event-stream; charset=utf-8", headers)
        out = writer.opening()
        while True:
            for index, piece in enumerate(pieces):
                out += writer.progress(index, piece)
                end = piece.finished
                if end is not None:
                    ends[index] = end
                    out.append(writer.ending(index, end) if end.error is None else writer.failure(end.error))
            if None not in ends:
                break
            await exchange.write(b"".join(out))
            out = []
            await waiter.wait()
            pieces = [answer.take() for answer in answers]
        out.append(writer.closing([end for end in ends if end is not None]))
        await exchange.end(b"".join(out))
        return None


def _bearer(request: HttpRequest) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if key and scheme.lower() != "bearer":
        raise AuthenticationFailed(f"authorization scheme {scheme[:20]!r} is not known; send `Bearer KEY`")
    return key.strip()


def error_response(info: ErrorInfo, more_headers: Sequence[tuple[str, str]] = ()) -> HttpResponse:
    """Return an error as its HTTP status and OpenAI-style object."""
    status = BY_CODE.get(info.code, KvasirError).http_status
    headers = list(more_headers)
    if info.retry_after_s is not None:
        headers.append(("retry-after", str(max(1, round(info.retry_after_s)))))
    if status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return _json(status, {"error": error_object(info)}, headers)


class _WrongMethod(MethodNotAllowed):
    def __init__(self, request: HttpRequest, methods: Sequence[str]) -> None:
        super().__init__(f"{request.path} takes {' or '.join(methods)}, not {request.method}")
        self.methods = methods


def _only(request: HttpRequest, *methods: str) -> None:
    if request.method not in methods:
        raise _WrongMethod(request, methods)


def _json(status: int, content: Any, headers: Sequence[tuple[str, str]] = ()) -> HttpResponse:
    return HttpResponse(status, _encode(content), "application/json", headers)


def _may_end_early(request: CompletionRequest) -> bool:
    """Return whether the text of an answer can end it."""
    chat = request.chat
    return bool(request.stop) or (chat is not None and (not chat.parallel_tool_calls or bool(chat.tool_name)))


def _end(piece: Piece) -> Finished:
    assert piece.finished is not None
    return piece.finished
