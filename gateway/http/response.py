"""Answers to HTTP requests, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from kvasir.gateway.http.parser import HttpRequest

STATUS_LINE = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass(slots=True)
class HttpResponse:
    """A whole answer. `on_sent` is called when it has been written, or the client is gone."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    on_sent: Callable[[], None] | None = None

    def head(self, request: HttpRequest, date: bytes, length: bytes) -> bytes:
        """Return the status line and the headers; `date` and `length` are lines of them."""
        more = "".join([f"{name}: {' '.join(value.split())}\r\n" for name, value in self.headers])  # no line breaks
        kind = f"content-type: {self.content_type}\r\n{more}".encode("latin-1", "replace")
        keep = b"" if request.keep_alive else b"connection: close\r\n"
        if request.is_http_10 and request.keep_alive:
            keep = b"connection: keep-alive\r\n"
        return b"%b%b%b%b%b\r\n" % (STATUS_LINE[self.status], date, kind, length, keep)


def error_response(status: int, code: str, reason: str) -> HttpResponse:
    """Return an error of the server's own, as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": reason, "type": kind, "param": None, "code": code}
    return HttpResponse(status, msgspec.json.encode({"error": error}))
