"""The HTTP routes: bind a request to its tenant, prepare and submit it, write what comes back in the client's dialect.

A whole answer wakes its connection once, when the last choice has ended (or at every step if its text may end it,
which must be looked for as it comes). A streamed one is woken at most once per engine step, and writes all that came
meanwhile in one go. A client that goes away cancels the task that serves it, and with it its requests.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
import trio

from kvasir.gateway.core.api import CoreApi, Finished, ModelInfo, Submit
from kvasir.gateway.edges.answer import Answer, Piece, Waiter
from kvasir.gateway.edges.anthropic_answers import AnthropicWriter
from kvasir.gateway.edges.anthropic_requests import read_count, read_messages
from kvasir.gateway.edges.cache_intent import says_final, says_no_store
from kvasir.gateway.edges.cors import Cors
from kvasir.gateway.edges.limit_headers import retry_headers, standing_headers
from kvasir.gateway.edges.models import models_of
from kvasir.gateway.edges.openai_answers import ChatWriter, CompletionWriter
from kvasir.gateway.edges.openai_requests import Asked, read_chat, read_completion
from kvasir.gateway.edges.openapi import openapi
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.responses_answers import ResponsesWriter
from kvasir.gateway.edges.responses_requests import read_responses
from kvasir.gateway.edges.token_routes import read_detokenize, read_tokenize, tokenized
from kvasir.gateway.edges.writer import Writer, encode_json
from kvasir.gateway.http.connection import Exchange, HttpResponse
from kvasir.gateway.http.content_coding import unpack
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.log import no_log
from kvasir.gateway.tenants.directory import Caller, Tenant, TenantDirectory
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.errors import (
    BY_CODE,
    AuthenticationFailed,
    BadRequest,
    ErrorInfo,
    KvasirError,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
    UnknownModel,
)
from kvasir.protocol.tokens import TOKEN_BYTES

Reader = Callable[[bytes], Asked]
_ROUTES: dict[str, tuple[Reader, type[Writer]]] = {
    "/v1/chat/completions": (read_chat, ChatWriter),
    "/v1/completions": (read_completion, CompletionWriter),
    "/v1/responses": (read_responses, ResponsesWriter),
    "/v1/messages": (read_messages, AnthropicWriter),
}
_ANTHROPIC = "/v1/messages"  # and below: in its dialect, errors too
_TOKEN_ROUTES = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
QUICK_BODY_BYTES = 32_768  # larger bodies are read in a thread
MAX_READERS = 2
MAX_PREPARED = 8  # prompts of one request, before others go first
T = TypeVar("T")


@dataclass(slots=True)
class _Exchange:
    """One request on its way: `facts` gains what the access log says of it, `headers` are those of every answer."""

    request: HttpRequest
    stream: Exchange
    facts: dict[str, object]
    headers: list[tuple[str, str]]


_NOT_SERVED = {  # routes of other servers, by how they begin
    "/v1/embeddings": "models generate text here, and embed none",
    "/v1/images": "models generate text here, and no images",
    "/v1/audio": "models generate text here, and no sound",
    "/v1/moderations": "nothing is moderated here",
    "/v1/rerank": "models generate text here, and rank none",
    "/v1/score": "models generate text here, and rank none",
    "/v1/batches": "requests are answered as they come",
    "/v1/files": "no files are kept here",
    "/v1/fine_tuning": "models are served here, not trained",
}


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
        cors: Cors | None = None,
        version: str = "unknown",
    ) -> None:
        self._core = core
        self._preparer = preparer
        self._directory = directory
        self._metrics = metrics
        self._readers = trio.CapacityLimiter(MAX_READERS)
        self._metrics_token = metrics_token
        self._access = access
        self._created = int(time.time() if started_at is None else started_at)
        self._cors = cors or Cors(())
        self._version = version

    async def __call__(self, request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        """Answer one request; every `KvasirError` becomes an error object of its dialect, with its status."""
        began = trio.current_time()
        facts: dict[str, object] = {}
        response = None
        headers = self._cors.headers(request)
        try:
            response = await self._route(_Exchange(request, exchange, facts, headers))
        except KvasirError as error:
            more = [("allow", ", ".join(error.methods))] if isinstance(error, _WrongMethod) else []
            response = error_response(error.info(), request.path, _request_id(facts), more)
        except trio.Cancelled:
            facts["cut"] = True
            raise
        finally:
            status = response.status if response else 200 if exchange.has_begun else None
            ms = round((trio.current_time() - began) * 1000)
            method, path = request.method, request.path[:120]
            self._access("request", edge="http", method=method, path=path, status=status, **facts, ms=ms)
        if response is not None:
            response.headers = [*response.headers, *_id_headers(request.path, facts), *headers]
        return response

    async def _route(self, call: _Exchange) -> HttpResponse | None:
        request, path = call.request, call.request.path
        if request.method == "OPTIONS" and (preflight := self._cors.preflight(request)) is not None:
            return preflight
        if path in _ROUTES:
            _only(request, "POST")
            caller = self._authenticate(call)
            read, writer_of = _ROUTES[path]
            return await self._complete(await self._read(read, request), caller, writer_of, call)
        if path in _TOKEN_ROUTES:
            _only(request, "POST")
            return await self._tokens(self._authenticate(call).tenant, request)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _only(request, "GET", "HEAD")
            name = unquote(path.removeprefix("/v1/models").removeprefix("/"))
            return self._models(self._authenticate(call).tenant, name)
        if path == "/version":
            _only(request, "GET", "HEAD")
            self._authenticate(call)
            return _json(200, {"version": self._version})
        if path == "/health":
            _only(request, "GET", "HEAD")
            return self._health()
        if path == "/openapi.json":
            _only(request, "GET", "HEAD")
            return HttpResponse(200, openapi(self._version))
        if path == "/metrics":
            _only(request, "GET", "HEAD")
            self._check_scraper(request)
            return HttpResponse(200, self._metrics(), "text/plain; version=0.0.4; charset=utf-8")
        refused = next((what for start, what in _NOT_SERVED.items() if path.startswith(start)), None)
        if refused is not None:
            raise NotFound(f"{path[:120]!r} is not supported: {refused}")
        raise NotFound(f"there is nothing at {path[:120]!r}; see /v1/models and docs/api.md")

    async def _read(self, read: Callable[[bytes], T], request: HttpRequest) -> T:
        """Return what `read` makes of the body, a large one in a thread, and so one that may become large."""
        body, coding = request.body, request.headers.get("content-encoding", "")
        if not coding and len(body) <= QUICK_BODY_BYTES:
            return read(body)
        unpack_and_read = partial(_unpack_and_read, read, body, coding)
        return await trio.to_thread.run_sync(unpack_and_read, limiter=self._readers, abandon_on_cancel=True)

    def _check_scraper(self, request: HttpRequest) -> None:
        if not self._metrics_token:
            raise PermissionDenied("metrics are off; start the gateway with --metrics-token-file")
        if not hmac.compare_digest(_key(request).encode(), self._metrics_token.encode()):
            raise AuthenticationFailed("metrics need the token of --metrics-token-file; send `Bearer TOKEN`")

    def _authenticate(self, call: _Exchange) -> Caller:
        caller = self._directory.authenticate(_key(call.request))
        call.facts["tenant"] = caller.tenant.id
        return caller

    def _models(self, tenant: Tenant, name: str) -> HttpResponse:
        mine = models_of(tenant, self._core.models())
        if not name:
            return _json(200, {"object": "list", "data": [self._card(*item) for item in mine.items()]})
        if name in mine:
            return _json(200, self._card(name, mine[name]))
        served = ", ".join(mine) or "none"
        raise UnknownModel(f"model {name[:80]!r} is not served here; served: {served}", param="model")

    def _card(self, name: str, info: ModelInfo) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "kvasir"}
        return {**card, "max_model_len": info.max_context}

    def _health(self) -> HttpResponse:
        models = {info.name: info.num_workers for info in self._core.models().values()}
        if any(models.values()):
            return _json(200, {"status": "ok", "workers": models})
        return _json(503, {"status": "no workers", "workers": models}, [("retry-after", "2")])

    async def _tokens(self, tenant: Tenant, request: HttpRequest) -> HttpResponse:
        """Answer what asks for tokens only."""
        if request.path == "/detokenize":
            body = await self._read(read_detokenize, request)
            return _json(200, {"prompt": self._preparer.detokenize(body.model, body.tokens, tenant)})
        if request.path == "/tokenize":
            wanted, wants_texts = await self._read(read_tokenize, request)
            info, packed = await self._preparer.tokenize(wanted, tenant)
            return _json(200, tokenized(packed, info, self._preparer.text(info.name), wants_texts=wants_texts))
        asked = await self._read(read_count, request)
        _, packed = await self._preparer.tokenize(asked.requests[0], tenant)
        return _json(200, {"input_tokens": len(packed) // TOKEN_BYTES})

    async def _complete(
        self, asked: Asked, caller: Caller, writer_of: type[Writer], call: _Exchange
    ) -> HttpResponse | None:
        requests = asked.requests
        if asked.may_close and says_final(call.request.headers):
            requests = [msgspec.structs.replace(request, cache_hint="closing") for request in requests]
        if says_no_store(call.request.headers):
            requests = [msgspec.structs.replace(request, no_store=True) for request in requests]
        every_event = asked.stream or _may_end_early(requests[0])
        waiter = Waiter(len(requests), call.stream.cut, every_event=every_event)
        answers = [Answer(self._core, waiter.wake) for _ in requests]
        submits: list[Submit] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                answer.submit = submit = await self._preparer.prepare(request, caller, answer)
                answer.parser = self._preparer.parser(request, submit)
                answer.detokenizer = self._preparer.detokenizer(request, submit, answer.parser)
                if len(submits) % asked.num_choices:  # of a prompt with several choices, the first one counts it
                    answer.submit = submit = msgspec.structs.replace(submit, counts_prompt=False)
                submits.append(submit)
                if len(submits) % MAX_PREPARED == 0:
                    await trio.lowlevel.checkpoint()  # many prompts let others go first
            call.facts["request"] = submits[0].req_id.hex()
            self._core.submit(*submits)
            call.headers.extend(standing_headers(self._core.standing(caller.tenant.id, caller.key_id)))
            text, block_size = self._preparer.text(submits[0].model), self._preparer.block_size
            writer = writer_of(asked, submits, text, block_size)
            if asked.stream:
                response = await self._stream(answers, waiter, writer, call)
            else:
                response = await self._whole(answers, waiter, writer, call)
        except BadRequest as error:
            _end_all(answers)
            raise asked.renamed(error) from None
        except BaseException:
            _end_all(answers)
            raise
        finally:
            call.facts["tokens"] = sum([answer.num_tokens for answer in answers])
        if response is None:
            _end_all(answers)
        else:
            response.on_sent = partial(_end_all, answers)
        return response

    async def _whole(self, answers: list[Answer], waiter: Waiter, writer: Writer, call: _Exchange) -> HttpResponse:
        pieces = [Piece() for _ in answers]
        while any(piece.finished is None for piece in pieces):
            await waiter.wait()
            for piece, answer in zip(pieces, answers, strict=True):
                piece.extend(answer.take())
        ends = [_end(piece) for piece in pieces]
        for end in ends:
            if end.error is not None:
                return error_response(end.error, call.request.path, _request_id(call.facts))
        return _json(200, writer.whole(pieces, ends), [("x-kvasir-worker", ends[0].worker_id)])

    async def _stream(
        self, answers: list[Answer], waiter: Waiter, writer: Writer, call: _Exchange
    ) -> HttpResponse | None:
        ends: list[Finished | None] = [None] * len(answers)
        await waiter.wait()
        pieces = [answer.take() for answer in answers]
        first = next((piece.finished for piece in pieces if piece.finished and piece.finished.error), None)
        if first is not None and first.error is not None and first.num_output_tokens == 0:
            # Refused before anything was sent: a plain status says it best.
            return error_response(first.error, call.request.path, _request_id(call.facts))
        headers = [("cache-control", "no-cache"), *_id_headers(call.request.path, call.facts), *call.headers]
        call.stream.begin(200, "text/event-stream; charset=utf-8", headers)
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
            await call.stream.write(b"".join(out))
            for answer in answers:
                answer.sent()
            out = []
            await waiter.wait()
            pieces = [answer.take() for answer in answers]
        out.append(writer.closing([end for end in ends if end is not None]))
        await call.stream.end(b"".join(out))
        return None


def _unpack_and_read(read: Callable[[bytes], T], body: bytes, coding: str) -> T:
    return read(unpack(body, coding))


def _end_all(answers: list[Answer]) -> None:
    """All has been sent, or cannot be: cancel what an error has left running, and close all."""
    for answer in answers:
        answer.cancel()


def _key(request: HttpRequest) -> str:
    """Return the API key that a request brings, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if key and scheme.lower() != "bearer":
        raise AuthenticationFailed(f"authorization scheme {scheme[:20]!r} is not known; send `Bearer KEY`")
    return key.strip() or request.headers.get("x-api-key", "").strip()


def _request_id(facts: dict[str, object]) -> str:
    """Return the id of a request: the one that `kvasir explain` takes, or a new one where nothing was submitted."""
    if "request" not in facts:
        facts["request"] = os.urandom(16).hex()
    return str(facts["request"])


def _id_headers(path: str, facts: dict[str, object]) -> list[tuple[str, str]]:
    request_id = _request_id(facts)
    found = [("x-request-id", request_id)]
    return [*found, ("request-id", request_id)] if path.startswith(_ANTHROPIC) else found


def error_response(
    info: ErrorInfo, path: str, request_id: str, more_headers: Sequence[tuple[str, str]] = ()
) -> HttpResponse:
    """Return an error as its HTTP status and the object that clients of `path` expect."""
    status = BY_CODE.get(info.code, KvasirError).http_status
    headers = [*more_headers, *retry_headers(info)]
    if status == 401:
        headers.append(("www-authenticate", "Bearer"))
    writer_of = AnthropicWriter if path.startswith(_ANTHROPIC) else ChatWriter
    return _json(status, writer_of.error(info, status, request_id), headers)


class _WrongMethod(MethodNotAllowed):
    def __init__(self, request: HttpRequest, methods: Sequence[str]) -> None:
        super().__init__(f"{request.path} takes {' or '.join(methods)}, not {request.method}")
        self.methods = methods


def _only(request: HttpRequest, *methods: str) -> None:
    if request.method not in methods:
        raise _WrongMethod(request, methods)


def _json(status: int, content: Any, headers: Sequence[tuple[str, str]] = ()) -> HttpResponse:
    return HttpResponse(status, encode_json(content), "application/json", headers)


def _may_end_early(request: CompletionRequest) -> bool:
    """Return whether the text of an answer can end it."""
    chat = request.chat
    return bool(request.stop) or (chat is not None and (not chat.parallel_tool_calls or bool(chat.tool_name)))


def _end(piece: Piece) -> Finished:
    assert piece.finished is not None
    return piece.finished
