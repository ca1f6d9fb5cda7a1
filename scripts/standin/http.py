"""A small HTTP/1.1 server end for the stand-in: one connection, requests in, whole or chunked answers out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

import httptools
import trio

KEEP_ALIVE_S = 5.0  # uvicorn's
MAX_BODY_BYTES = 64 << 20


@dataclass(slots=True)
class HttpRequest:
    method: str = ""
    path: str = ""
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = True


class HttpConnection:
    """Reads requests off a stream and writes answers to it. One request is answered before the next is read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._requests: deque[HttpRequest] = deque()
        self._incoming = HttpRequest()
        self._parser = httptools.HttpRequestParser(self)
        self._keep_alive = True

    async def next_request(self) -> HttpRequest | None:
        """Return the next request, or None once the client is gone, talks nonsense, or has been idle for too long."""
        while not self._requests:
            with trio.move_on_after(KEEP_ALIVE_S):
                if await self._read():
                    continue
            return None
        request = self._requests.popleft()
        self._keep_alive = request.keep_alive
        return request

    async def wait_gone(self) -> None:
        """Return when the client has closed its end; what it sends meanwhile is kept."""
        while await self._read():
            pass

    async def answer(self, status: int, body: bytes, content_type: str = "application/json") -> bool:
        """Send a whole answer; return whether another request may follow."""
        head = [f"content-length: {len(body)}"]
        if body or status != 200:
            head.append(f"content-type: {content_type}")
        await self._stream.send_all(self._head(status, head) + body)
        return self._keep_alive

    async def begin_stream(self) -> None:
        content = ["content-type: text/event-stream; charset=utf-8"]
        await self._stream.send_all(self._head(200, content, ["transfer-encoding: chunked"]))

    async def send_events(self, events: list[bytes]) -> None:
        """Send server-sent events, each a chunk of its own as uvicorn does it."""
        await self._stream.send_all(b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events]))

    async def end_stream(self) -> bool:
        """End a chunked answer; return whether another request may follow."""
        await self._stream.send_all(b"0\r\n\r\n")
        return self._keep_alive

    def _head(self, status: int, content: list[str], after: list[str] | None = None) -> bytes:
        phrase = HTTPStatus(status).phrase
        lines = [f"HTTP/1.1 {status} {phrase}", f"date: {formatdate(usegmt=True)}", "server: uvicorn", *content]
        lines.append("vary: Origin")
        if not self._keep_alive:
            lines.append("connection: close")
        return "\r\n".join([*lines, *(after or []), "", ""]).encode("latin-1")

    async def _read(self) -> bool:
        try:
            data = await self._stream.receive_some()
            if data:
                self._parser.feed_data(data)
        except (trio.BrokenResourceError, httptools.HttpParserError):
            return False
        return bool(data)

    # ---- called by the parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._incoming = HttpRequest()

    def on_url(self, url: bytes) -> None:
        self._incoming.path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._incoming.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._incoming.body += body
        if len(self._incoming.body) > MAX_BODY_BYTES:
            raise httptools.HttpParserError("the body is too long")

    def on_message_complete(self) -> None:
        request = self._incoming
        request.method = self._parser.get_method().decode("latin-1")
        request.path, _, request.query = request.path.partition("?")
        request.keep_alive = self._parser.should_keep_alive()
        self._requests.append(request)
