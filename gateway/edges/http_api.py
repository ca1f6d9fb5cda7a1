"""The HTTP routes: bind a request to its tenant, then read its body, and have it answered."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any, TypeVar
from urllib.parse import unquote

import trio

from kvasir.gateway.core.api import CoreApi, ModelInfo
from kvasir.gateway.edges.anthropic_answers import AnthropicWriter
from kvasir.gateway.edges.anthropic_requests import MESSAGES_TYPE, read_count, read_messages
from kvasir.gateway.edges.cors import Cors
from kvasir.gateway.edges.http_call import HttpCall, json_response
from kvasir.gateway.edges.http_completions import Completions
from kvasir.gateway.edges.models import models_of, unknown_model
from kvasir.gateway.edges.openai_answers import ChatWriter, CompletionWriter
from kvasir.gateway.edges.openai_requests import CHAT_TYPE, COMPLETION_TYPE, Asked, read_chat, read_completion
from kvasir.gateway.edges.openapi import Route, openapi
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.request_fields import Place
from kvasir.gateway.edges.responses_answers import ResponsesWriter
from kvasir.gateway.edges.responses_requests import RESPONSES_TYPE, read_responses
from kvasir.gateway.edges.token_routes import DetokenizeBody, TokenizeBody, read_tokenize, tokenized
from kvasir.gateway.edges.turns import FairThreads
from kvasir.gateway.edges.writer import Writer
from kvasir.gateway.http.connection import Exchange
from kvasir.gateway.http.content_coding import read_coding, unpack
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.http.response import HttpResponse
from kvasir.gateway.log import no_log
from kvasir.gateway.tenants.directory import Caller, Tenant, TenantDirectory
from kvasir.gateway.text.json_input import read_json
from kvasir.protocol.errors import (
    AuthenticationFailed,
    KvasirError,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
)
from kvasir.protocol.tokens import TOKEN_BYTES

Reader = Callable[[bytes], Asked]
QUICK_BODY_BYTES = 32_768  # larger bodies are read in a thread
MAX_READERS = 2
T = TypeVar("T")

_UNLOGGED = ("/health", "/metrics")  # asked every few seconds, and telling nothing

_NOT_SERVED = {  # routes of other servers, by how they begin
    "/v1/embeddings": "models generate text here, and embed none",
    "/v1/images": "models generate text here, and no images",
    "/v1/audio": "models generate text here, and no sound",
    "/v1/moderations": "nothing is moderated here",
    "/v1/rerank": "models generate text here, and rank none",
    "/v1/score": "models generate text here, and rank none",
    "/v1/batches": "requests are answered as they come",
    "/v1/messages/batches": "requests are answered as they come",
    "/v1/responses/": "answers are not stored",
    "/v1/files": "no files are kept here",
    "/v1/fine_tuning": "models are served here, not trained",
}


class HttpApi:
    """Handler of an `HttpServer`.

    `metrics` renders the text of `/metrics` for a client that sends `metrics_token`; without a token it is off.
    `access` is called once per request with what is known of it.
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
        cors: Cors | None = None,
        version: str = "unknown",
    ) -> None:
        self._core = core
        self._preparer = preparer
        self._completions = Completions(core, preparer)
        self._directory = directory
        self._metrics = metrics
        self._readers = FairThreads(MAX_READERS)
        self._metrics_token = metrics_token
        self._access = access
        self._created = int(time.time())
        self._cors = cors or Cors(())
        self._version = version
        self._routes = self._make_routes()

    async def __call__(self, request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        """Answer one request; every `KvasirError` becomes an error object of its dialect, with its status."""
        began = trio.current_time()
        response = None
        call = HttpCall(request, exchange, {}, self._cors.headers(request))
        try:
            response = await self._route(call)
        except KvasirError as error:
            more = [("allow", ", ".join(error.methods))] if isinstance(error, _WrongMethod) else []
            response = call.error(error.info(), more)
        except (trio.Cancelled, trio.BrokenResourceError):
            call.facts["cut"] = True
            raise
        finally:
            status = response.status if response else 200 if exchange.has_begun else None
            ms = round((trio.current_time() - began) * 1000)
            method, path = request.method, request.path[:120]
            if status != 200 or path not in _UNLOGGED:
                self._access("request", edge="http", method=method, path=path, status=status, **call.facts, ms=ms)
        if response is not None:
            response.headers = [*response.headers, *call.id_headers(), *call.headers]
        return response

    async def _route(self, call: HttpCall) -> HttpResponse | None:
        request, path = call.request, call.request.path
        if request.method == "OPTIONS" and (preflight := self._cors.preflight(request)) is not None:
            return preflight
        route = self._routes.get(path) or self._routes.get(path.rstrip("/"))
        if route is None and path.startswith("/v1/models/"):
            route = self._routes["/v1/models/{model}"]
        if route is None:
            raise self._not_found(path[:120])
        methods = ("POST",) if route.method == "POST" else ("GET", "HEAD")
        if request.method not in methods:
            raise _WrongMethod(request, methods)
        return await route.answer(call)

    def _make_routes(self) -> dict[str, Route]:
        def post(summary: str, read: Reader, writer_of: type[Writer], body: type, place: Place) -> Route:
            return Route("POST", summary, partial(self._complete, read, writer_of), body, place)

        count = "Count the tokens of a message's prompt"
        return {
            "/v1/chat/completions": post("Answer a chat", read_chat, ChatWriter, CHAT_TYPE, "chat"),
            "/v1/completions": post(
                "Complete texts", read_completion, CompletionWriter, COMPLETION_TYPE, "completions"
            ),
            "/v1/responses": post("Make a response", read_responses, ResponsesWriter, RESPONSES_TYPE, "responses"),
            "/v1/messages": post("Make a message", read_messages, AnthropicWriter, MESSAGES_TYPE, "anthropic"),
            "/v1/messages/count_tokens": Route("POST", count, self._count, MESSAGES_TYPE, "anthropic"),
            "/tokenize": Route("POST", "Turn a text or a chat into token ids", self._tokenize, TokenizeBody),
            "/detokenize": Route("POST", "Turn token ids into text", self._detokenize, DetokenizeBody),
            "/v1/models": Route("GET", "List the models that the key may use", self._models),
            "/v1/models/{model}": Route("GET", "Show one model", self._model),
            "/version": Route("GET", "Show the gateway's version", self._show_version),
            "/health": Route("GET", "Say whether there are workers; needs no key", self._health),
            "/metrics": Route("GET", "Show metrics for Prometheus; needs a token of its own", self._show_metrics),
            "/openapi.json": Route("GET", "Show this document; needs no key", self._show_api),
        }

    def _not_found(self, path: str) -> NotFound:
        refused = next((what for start, what in _NOT_SERVED.items() if path.startswith(start)), None)
        if refused is not None:
            return NotFound(f"{path!r} is not supported: {refused}")
        near = get_close_matches(path, self._routes, 1)
        hint = f"did you mean {near[0]!r}?" if near else "see /v1/models and docs/api.md"
        return NotFound(f"there is nothing at {path!r}: {hint}")

    async def _complete(self, read: Reader, writer_of: type[Writer], call: HttpCall) -> HttpResponse | None:
        caller = self._authenticate(call)
        return await self._completions.answer(await self._read(read, call, caller.tenant), caller, writer_of, call)

    async def _read(self, read: Callable[[bytes], T], call: HttpCall, tenant: Tenant) -> T:
        """Return what `read` makes of the body, a large one in a thread, and so one that may become large.

        The caller is known by now: whoever has no key is not waited for."""
        is_packed = read_coding(call.request.headers)
        body = await call.stream.body(tenant.id)
        try:
            if not is_packed and len(body) <= QUICK_BODY_BYTES:
                return read(body)
            return await self._readers.run(tenant.id, lambda: read(unpack(body) if is_packed else body))
        finally:
            call.stream.drop_body()

    def _authenticate(self, call: HttpCall) -> Caller:
        caller = self._directory.authenticate(call.api_key)
        call.facts["tenant"] = caller.tenant.id
        return caller

    async def _models(self, call: HttpCall) -> HttpResponse:
        return json_response(200, {"object": "list", "data": [self._card(*each) for each in self._mine(call).items()]})

    async def _model(self, call: HttpCall) -> HttpResponse:
        name = unquote(call.request.path.removeprefix("/v1/models/"))
        mine = self._mine(call)
        if name not in mine:
            raise unknown_model(name, mine)
        return json_response(200, self._card(name, mine[name]))

    def _mine(self, call: HttpCall) -> dict[str, ModelInfo]:
        return models_of(self._authenticate(call).tenant, self._core.models())

    def _card(self, name: str, info: ModelInfo) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "kvasir"}
        return {**card, "max_model_len": info.max_context}

    async def _show_version(self, call: HttpCall) -> HttpResponse:
        self._authenticate(call)
        return json_response(200, {"version": self._version})

    async def _health(self, call: HttpCall) -> HttpResponse:
        models = {info.name: info.num_workers for info in self._core.models().values()}
        if any(models.values()):
            return json_response(200, {"status": "ok", "workers": models})
        return json_response(503, {"status": "no workers", "workers": models}, [("retry-after", "2")])

    async def _show_metrics(self, call: HttpCall) -> HttpResponse:
        if not self._metrics_token:
            raise PermissionDenied("metrics are off; start the gateway with --metrics-token-file")
        if not hmac.compare_digest(call.api_key.encode(), self._metrics_token.encode()):
            raise AuthenticationFailed("metrics need the token of --metrics-token-file; send `Bearer TOKEN`")
        return HttpResponse(200, self._metrics(), "text/plain; version=0.0.4; charset=utf-8")

    async def _show_api(self, call: HttpCall) -> HttpResponse:
        return HttpResponse(200, self._document)

    @cached_property
    def _document(self) -> bytes:
        return openapi(self._version, self._routes)

    async def _tokenize(self, call: HttpCall) -> HttpResponse:
        tenant = self._authenticate(call).tenant
        wanted, wants_texts = await self._read(read_tokenize, call, tenant)
        info, packed = await self._preparer.tokenize(wanted, tenant)
        return json_response(200, tokenized(packed, info, self._preparer.text(info.name), wants_texts=wants_texts))

    async def _detokenize(self, call: HttpCall) -> HttpResponse:
        tenant = self._authenticate(call).tenant
        body: DetokenizeBody = await self._read(partial(read_json, kind=DetokenizeBody), call, tenant)
        return json_response(200, {"prompt": self._preparer.detokenize(body.model, body.tokens, tenant)})

    async def _count(self, call: HttpCall) -> HttpResponse:
        tenant = self._authenticate(call).tenant
        asked = await self._read(read_count, call, tenant)
        _, packed = await self._preparer.tokenize(asked.requests[0], tenant)
        return json_response(200, {"input_tokens": len(packed) // TOKEN_BYTES})


class _WrongMethod(MethodNotAllowed):
    def __init__(self, request: HttpRequest, methods: Sequence[str]) -> None:
        super().__init__(f"{request.path} takes {' or '.join(methods)}, not {request.method}")
        self.methods = methods
