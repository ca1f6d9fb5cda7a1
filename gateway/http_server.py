"""A small HTTP/1.1 server on Trio streams, parsed by httptools (llhttp): connections, bounds and deadlines; no routes.

Each connection has two tasks for its whole life: a reader, which feeds the parser and notices that the client has
gone, and a responder, which answers the requests in order. A request therefore costs no task, no cancel scope and no
timer of its own: one reaper looks at all connections twice a second and ends those that are too slow.

llhttp is strict by default, so that what two parsers could read in two ways (Content-Length beside
Transfer-Encoding, differing lengths, folded headers, bare line feeds in chunks) is refused and the connection closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal

import httptools
import trio

from gateway.log import log
from protocol.errors import ConfigurationError

READ_BYTES = 64 << 10
MAX_PIPELINED = 8
_STATUS_LINE = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of what strangers can make the server hold, and for how long (seconds)."""

    max_connections: int = 1024
    max_header_bytes: int = 32 << 10  # request line and all headers
    max_headers: int = 100
    max_body_bytes: int = 8 << 20
    headers_s: float = 5.0
    body_s: float = 30.0
    idle_s: float = 75.0
    write_s: float = 15.0  # a client that takes nothing for so long is cut


@dataclass(slots=True)
class HttpRequest:
    """One request, complete. `headers` by lower-case name; a repeated header's values are joined with commas."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool
    is_http_10: bool = False
    refusal: tuple[int, str] | None = None  # set: malformed or out of bounds; to be answered and the connection closed


@dataclass(slots=True)
class HttpResponse:
    """A whole answer."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()


@dataclass(slots=True)
class HttpStatistics:
    """Counters since the start; `num_open` is a gauge. `num_cut`: connections that were too slow."""

    num_open: int = 0
    num_accepted: int = 0
    num_turned_away: int = 0
    num_requests: int = 0
    num_malformed: int = 0
    num_cut: int = 0
    by_status: dict[int, int] = field(default_factory=dict)


class Exchange:
    """The answering side of one request, for handlers that stream: `begin`, any number of `write`s, `end`."""

    def __init__(self, connection: _Connection, request: HttpRequest) -> None:
        self._connection = connection
        self._request = request
        self.has_begun = False
        self._chunked = not request.is_http_10

    async def begin(self, status: int, content_type: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Send the status and headers of a streamed answer. Cancelled in a write: the connection is closed after it."""
        self.has_begun = True
        if not self._chunked:
            self._request.keep_alive = False
        length = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        head = _head(status, content_type, headers, length, keep_alive=self._request.keep_alive)
        await self._connection.send(status, head)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body, waiting for a client that is slow."""
        if data:
            await self._connection.send(0, b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def end(self) -> None:
        """End the body."""
        if self._chunked:
            await self._connection.send(0, b"0\r\n\r\n")


Handler = Callable[[HttpRequest, Exchange], Awaitable[HttpResponse | None]]
"""Answers a request: returns a whole response, or None after having streamed one through the exchange.

It is cancelled when the client goes away. Whatever it raises is logged and answered as a plain 500."""


class HttpServer:
    """Serves `handler` on its listeners until cancelled or drained."""

    def __init__(self, handler: Handler, limits: HttpLimits | None = None) -> None:
        self.handler = handler
        self.limits = limits or HttpLimits()
        self.statistics = HttpStatistics()
        self.draining = False
        self._connections: set[_Connection] = set()
        self._accepting = trio.CancelScope()

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve; returns after `drain`, once the last connection is closed. Cancelling cuts them all."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reap)
            async with trio.open_nursery() as connections:
                with self._accepting:
                    task_status.started()
                    await trio.serve_listeners(self._serve, list(listeners), handler_nursery=connections)
            nursery.cancel_scope.cancel()

    def drain(self) -> None:
        """Accept nothing new, close idle connections, and each other one after the answer it is giving."""
        self.draining = True
        self._accepting.cancel()
        for connection in list(self._connections):
            if connection.is_idle:
                connection.scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        if len(self._connections) >= self.limits.max_connections:
            self.statistics.num_turned_away += 1
            await _turn_away(stream)
            return
        connection = _Connection(self, stream)
        self._connections.add(connection)
        self.statistics.num_accepted += 1
        self.statistics.num_open += 1
        try:
            await connection.run()
        finally:
            self.statistics.num_open -= 1
            self._connections.discard(connection)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _reap(self) -> None:
        while True:
            await trio.sleep(0.5)
            now = trio.current_time()
            for connection in list(self._connections):
                if connection.is_late(now):
                    self.statistics.num_cut += 1
                    connection.scope.cancel()


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Return listeners on `host`:`port`.

    Raises:
        ConfigurationError: the address cannot be used; says why and what now.
    """
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"cannot serve HTTP on {host}:{port}: {reason}; choose another --http") from None


async def _turn_away(stream: trio.SocketStream) -> None:
    with trio.move_on_after(1):
        try:
            await stream.send_all(_STATUS_LINE[503] + b"retry-after: 1\r\nconnection: close\r\n\r\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
    await trio.aclose_forcefully(stream)


Phase = Literal["idle", "headers", "body", "answering"]


class _Connection:
    """One client. Also the parser's callback object, hence the `on_*` methods."""

    def __init__(self, server: HttpServer, stream: trio.SocketStream) -> None:
        self._server = server
        self._limits = server.limits
        self._stream = stream
        self.scope = trio.CancelScope()
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[HttpRequest] = deque()
        self._responder = trio.lowlevel.ParkingLot()
        self._reader = trio.lowlevel.ParkingLot()
        self._answering = False
        self._writing_since: float | None = None
        self._reading: Phase = "idle"
        self._since = trio.current_time()
        self._wants_continue = False
        self._refused = False
        self._reset()

    @property
    def is_idle(self) -> bool:
        return self._reading == "idle" and not self._answering and not self._ready

    def is_late(self, now: float) -> bool:
        """Return whether the client has been too slow in whatever it is doing."""
        limits = self._limits
        if self._writing_since is not None:
            return now - self._writing_since > limits.write_s
        if self._reading == "headers":
            return now - self._since > limits.headers_s
        if self._reading == "body":
            return now - self._since > limits.body_s
        return self.is_idle and now - self._since > limits.idle_s

    async def run(self) -> None:
        """Serve until the client or we are done with each other."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._respond, nursery.cancel_scope)
                try:
                    await self._read()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                # End of input: nobody is there to read an answer, half-closed clients are not worth a leak.
                nursery.cancel_scope.cancel()

    async def send(self, status: int, data: bytes) -> None:
        """Write `data`; a client that takes nothing is noticed by the reaper."""
        if status:
            by_status = self._server.statistics.by_status
            by_status[status] = by_status.get(status, 0) + 1
        self._writing_since = trio.current_time()
        await self._stream.send_all(data)
        self._writing_since = None

    # ---- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            data = await self._stream.receive_some(READ_BYTES)
            if not data:
                return
            if self._refused:
                continue  # read and throw away, so that the client gets to read the refusal
            if self._reading == "idle":
                self._begin("headers")
            self._num_bytes += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                # An upgrade may be ignored (RFC 9110 §7.8); the parser stops here, so that answer is the last one.
                self._refused = True
                if self._ready:
                    self._ready[-1].keep_alive = False
            except httptools.HttpParserError as error:
                if not self._refused:
                    self._refuse(400, f"malformed HTTP: {error}")
            if self._reading == "headers" and self._num_bytes > self._limits.max_header_bytes and not self._refused:
                self._refuse(431, f"the request's headers exceed {self._limits.max_header_bytes} bytes")
            if self._ready:
                self._responder.unpark()
            if self._wants_continue and not self._answering:
                self._wants_continue = False
                await self._stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(self._ready) >= MAX_PIPELINED:
                await self._reader.park()

    def _begin(self, phase: Phase) -> None:
        self._reading = phase
        self._since = trio.current_time()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._num_headers = 0
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._num_bytes = 0

    def _refuse(self, status: int, reason: str) -> None:
        """Answer `status` after what is ready already, then close; what is left of the input is not believed."""
        self._refused = True
        self._server.statistics.num_malformed += 1
        self._begin("idle")
        self._ready.append(HttpRequest("", "", {}, b"", keep_alive=False, refusal=(status, reason)))

    def on_message_begin(self) -> None:
        self._begin("headers")
        self._reset()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._num_headers > self._limits.max_headers:
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        known = self._headers.get(key)
        self._headers[key] = text if known is None else f"{known},{text}"

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        limits, headers = self._limits, self._headers
        length = headers.get("content-length", "")
        if self._num_headers > limits.max_headers:
            self._refuse(431, f"more than {limits.max_headers} headers")
        elif self._header_bytes > limits.max_header_bytes:
            self._refuse(431, f"the request's headers exceed {limits.max_header_bytes} bytes")
        elif length.isdigit() and int(length) > limits.max_body_bytes:
            self._refuse(413, f"a body of {length} bytes exceeds {limits.max_body_bytes}")
        elif "expect" in headers and headers["expect"].lower() != "100-continue":
            self._refuse(417, "only `Expect: 100-continue` is known here")
        else:
            self._wants_continue = "expect" in headers
            self._begin("body")

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse(413, f"the body exceeds {self._limits.max_body_bytes} bytes")
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._wants_continue = False
        parser = self._parser
        try:
            path = httptools.parse_url(self._url).path.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError, AttributeError):
            self._refuse(400, "the request's URL is malformed")
            return
        request = HttpRequest(
            parser.get_method().decode("ascii"),
            path,
            self._headers,
            self._body[0] if len(self._body) == 1 else b"".join(self._body),
            keep_alive=parser.should_keep_alive(),
            is_http_10=parser.get_http_version() == "1.0",
        )
        self._ready.append(request)
        self._begin("idle")
        self._reset()

    # ---- answering -----------------------------------------------------------------------------------------------

    async def _respond(self, connection_scope: trio.CancelScope) -> None:
        try:
            while True:
                while not self._ready:
                    await self._responder.park()
                request = self._ready.popleft()
                self._answering = True
                await self._answer(request)
                self._answering = False
                self._reader.unpark()
                if not request.keep_alive or self._server.draining:
                    await self._say_goodbye()
                    return
                if not self._ready:
                    self._since = trio.current_time()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            connection_scope.cancel()

    async def _answer(self, request: HttpRequest) -> None:
        if request.refusal is not None:
            status, reason = request.refusal
            body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":"bad_http"}}'
            text = reason.replace("\\", "/").replace('"', "'").encode("ascii", "replace")
            await self.send(status, _whole(HttpResponse(status, body % text), keep_alive=False))
            return
        self._server.statistics.num_requests += 1
        exchange = Exchange(self, request)
        try:
            response = await self._server.handler(request, exchange)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as error:
            log("http_handler_failed", path=request.path, error=repr(error))
            request.keep_alive = False
            if not exchange.has_begun:
                body = (
                    b'{"error":{"message":"internal error","type":"server_error","param":null,"code":"internal_error"}}'
                )
                await self.send(500, _whole(HttpResponse(500, body), keep_alive=False))
            return
        if response is not None:
            keep_alive = request.keep_alive and not self._server.draining
            data = _whole(response, keep_alive=keep_alive, has_body=request.method != "HEAD")
            await self.send(response.status, data)

    async def _say_goodbye(self) -> None:
        """Half-close and wait a moment for the client's end: closing at once could destroy what it has not read."""
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        if self._refused:
            await trio.sleep(0.2)


def _whole(response: HttpResponse, *, keep_alive: bool, has_body: bool = True) -> bytes:
    length = b"content-length: %d\r\n" % len(response.body)
    head = _head(response.status, response.content_type, response.headers, length, keep_alive=keep_alive)
    return head + response.body if has_body else head


def _head(
    status: int, content_type: str, headers: Sequence[tuple[str, str]], length: bytes, *, keep_alive: bool
) -> bytes:
    more = "".join([f"{name}: {value}\r\n" for name, value in headers])
    connection = b"" if keep_alive else b"connection: close\r\n"
    kind = f"content-type: {content_type}\r\n{more}".encode("latin-1")
    return b"%b%b%b%b\r\n" % (_STATUS_LINE[status], kind, length, connection)
