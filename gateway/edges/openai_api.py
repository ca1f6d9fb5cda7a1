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

from kvasir.gateway.core.api import CoreApi, Finished, ModelInfo
from kvasir.gateway.edges.answer import Answer, Piece, Waiter
from kvasir.gateway.edges.openai_requests import Asked, read_chat, read_completion
from kvasir.gateway.edges.openai_responses import CHAT, COMPLETION, Form, error_object, usage_of
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.http.connection import Exchange, HttpResponse
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.log import no_log
from kvasir.gateway.tenants.directory import Tenant, TenantDirectory
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
_ROUTES: dict[str, tuple[Callable[[bytes], Asked], Form]] = {
    "/v1/chat/completions": (read_chat, CHAT),
    "/v1/completions": (read_completion, COMPLETION),
}
QUICK_BODY_BYTES = 32_768  # larger bodies are read in a thread
MAX_READERS = 2


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
            read, form = _ROUTES[path]
            if len(request.body) <= QUICK_BODY_BYTES:
                asked = read(request.body)
            else:
                asked = await trio.to_thread.run_sync(read, request.body, limiter=self._readers, abandon_on_cancel=True)
            return await self._complete(asked, tenant, form, exchange, facts)
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
        form: Form,
        exchange: Exchange,
        facts: dict[str, object],
    ) -> HttpResponse | None:
        requests = asked.requests
        waiter = Waiter(len(requests), exchange.cut, every_event=asked.stream or bool(requests[0].stop))
        answers = [Answer(self._core, waiter.wake) for _ in requests]
        try:
            for request, answer in zip(requests, answers, strict=True):
                answer.submit = await self._preparer.prepare(request, tenant, answer)
                answer.detokenizer = self._preparer.detokenizer(request, answer.submit)
            for answer in answers:
                assert answer.submit is not None
                self._core.submit(answer.submit)
            if asked.stream:
                return await self._stream(
                    answers, waiter, form, exchange, asked.num_choices, wants_usage=asked.wants_usage
                )
            return await self._whole(answers, waiter, form, asked.num_choices)
        finally:
            first = answers[0].submit
            facts["request"] = None if first is None else first.req_id.hex()
            facts["tokens"] = sum(answer.num_tokens for answer in answers)
            for answer in answers:
                answer.cancel()

    async def _whole(self, answers: list[Answer], waiter: Waiter, form: Form, num_choices: int) -> HttpResponse:
        pieces = [Piece() for _ in answers]
        while any(piece.finished is None for piece in pieces):
            await waiter.wait()
            for piece, answer in zip(pieces, answers, strict=True):
                piece.extend(answer.take())
        ends = [_end(piece) for piece in pieces]
        for end in ends:
            if end.error is not None:
                return error_response(end.error)
        submit = answers[0].submit
        assert submit is not None
        text = self._preparer.text(submit.model)
        choices = [
            form.choice(index, piece, end.reason, text)
            for index, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        ]
        req_id = submit.req_id.hex()
        whole = self._envelope(form.id_prefix + req_id, form.whole, submit.model)
        headers = [("x-kvasir-worker", ends[0].worker_id), ("x-request-id", req_id)]
        return _json(200, {**whole, "choices": choices, "usage": usage_of(ends, num_choices)}, headers)

    async def _stream(
        self,
        answers: list[Answer],
        waiter: Waiter,
        form: Form,
        exchange: Exchange,
        num_choices: int,
        *,
        wants_usage: bool,
    ) -> HttpResponse | None:
        submit = answers[0].submit
        assert submit is not None
        req_id = submit.req_id.hex()
        text = self._preparer.text(submit.model)
        envelope = self._envelope(form.id_prefix + req_id, form.chunk, submit.model)
        more = {"usage": None} if wants_usage else {}
        ends: list[Finished | None] = [None] * len(answers)

        def chunk(choices: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
            return b"data: %b\n\n" % _encode({**envelope, "choices": choices, **usage})

        await waiter.wait()
        pieces = [answer.take() for answer in answers]
        first = next((piece.finished for piece in pieces if piece.finished and piece.finished.error), None)
        if first is not None and first.error is not None and first.num_output_tokens == 0:
            return error_response(first.error)  # refused before anything was sent: a plain status says it best
        exchange.begin(
            200, "text/event-stream; charset=utf-8", [("cache-control", "no-cache"), ("x-request-id", req_id)]
        )
        out = [chunk([form.opening(index)], more) for index in range(len(answers))] if form.opening else []
        while True:
            for index, piece in enumerate(pieces):
                if piece.text or piece.logprobs:
                    out.append(chunk([form.delta(index, piece, text)], more))
                end = piece.finished
                if end is None:
                    continue
                ends[index] = end
                if end.error is not None:
                    out.append(b"data: %b\n\n" % _encode({"error": error_object(end.error)}))
                else:
                    out.append(chunk([form.ending(index, end.reason)], more))
            if None not in ends:
                break
            await exchange.write(b"".join(out))
            out = []
            await waiter.wait()
            pieces = [answer.take() for answer in answers]
        if wants_usage:
            out.append(chunk([], {"usage": usage_of([end for end in ends if end is not None], num_choices)}))
        out.append(b"data: [DONE]\n\n")
        await exchange.end(b"".join(out))
        return None

    def _envelope(self, answer_id: str, kind: str, model: str) -> dict[str, Any]:
        return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}


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


def _end(piece: Piece) -> Finished:
    assert piece.finished is not None
    return piece.finished
