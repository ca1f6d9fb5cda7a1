"""One HTTP request on its way through the routes, and what every answer has in common: ids, errors, JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.gateway.edges.anthropic_answers import AnthropicWriter
from kvasir.gateway.edges.limit_headers import retry_headers
from kvasir.gateway.edges.openai_answers import ChatWriter
from kvasir.gateway.edges.writer import encode_json
from kvasir.gateway.http.connection import Exchange
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.http.response import HttpResponse
from kvasir.protocol.errors import BY_CODE, AuthenticationFailed, ErrorInfo, KvasirError

_ANTHROPIC = "/v1/messages"  # and below: in its dialect, errors too


@dataclass(slots=True)
class HttpCall:
    """One request on its way: `facts` gains what the access log says of it, `headers` are those of every answer."""

    request: HttpRequest
    stream: Exchange
    facts: dict[str, object]
    headers: list[tuple[str, str]]

    @property
    def api_key(self) -> str:
        """The API key that the request brings, as OpenAI's or as Anthropic's clients send it."""
        headers = self.request.headers
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
        found = headers.get("x-api-key", "").strip()
        if scheme.lower() not in ("", "bearer") and not found:  # else it is a proxy's own affair
            raise AuthenticationFailed("the authorization header has another form than `Bearer KEY`; send that")
        return found

    @property
    def request_id(self) -> str:
        """The id of the request: the one that `kvasir explain` takes, or a new one where nothing was submitted."""
        if "request" not in self.facts:
            self.facts["request"] = os.urandom(16).hex()
        return str(self.facts["request"])

    def id_headers(self) -> list[tuple[str, str]]:
        names = ("x-request-id", "request-id") if self._is_anthropic else ("x-request-id",)
        return [(name, self.request_id) for name in names]

    def error(self, info: ErrorInfo, more_headers: Sequence[tuple[str, str]] = ()) -> HttpResponse:
        """Return an error as its HTTP status and the object that clients of this route expect."""
        status = BY_CODE.get(info.code, KvasirError).http_status
        headers = [*more_headers, *retry_headers(info)]
        if status == 401:
            headers.append(("www-authenticate", "Bearer"))
        writer_of = AnthropicWriter if self._is_anthropic else ChatWriter
        return json_response(status, writer_of.error(info, status, self.request_id), headers)

    @property
    def _is_anthropic(self) -> bool:
        return self.request.path.startswith(_ANTHROPIC)


def json_response(status: int, content: Any, headers: Sequence[tuple[str, str]] = ()) -> HttpResponse:
    return HttpResponse(status, encode_json(content), "application/json", headers)
