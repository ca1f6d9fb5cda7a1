"""HTTP/1.1 to an upstream server, as little as we need of it: ask and get an answer, or read an event stream.

Every request has a connection of its own. Servers close idle ones after seconds without a word, so that keeping them
would cost a retry path; and a refused connect is how the death of a server shows first. Parsing is httptools'.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools
import trio

from kvasir.protocol.errors import ConfigurationError

CONNECT_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 16 << 20
MAX_EVENT_BYTES = 8 << 20
_CHUNK_BYTES = 65_536


class UpstreamUnreachable(Exception):
    """The server refused, reset or ended a connection before its answer was whole, or sent what is no HTTP."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. `base`: what every path begins with."""

    host: str
    port: int
    is_tls: bool
    base: str


def parse_url(text: str) -> Address:
    """Return the address in a URL such as http://10.0.0.5:8000.

    Raises:
        ConfigurationError: no http(s) URL, or one with a user, query or fragment.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"--upstream {text!r}: {error}; give http://HOST:PORT.") from None
    has_more = parts.username or parts.query or parts.fragment or " " in text or not text.isascii()
    if parts.scheme not in ("http", "https") or not parts.hostname or has_more:
        raise ConfigurationError(f"--upstream {text!r} is no URL of a server; give http://HOST:PORT.")
    is_tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if is_tls else 80), is_tls, parts.path.rstrip("/"))


class _Answer:
    """What httptools calls while it parses. Holds no parser, so that both are freed at once."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.has_head = self.is_complete = False

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.is_complete = True


class HttpStream:
    """One answer that is being read. `status` is known from the start."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._answer = _Answer()
        self._parser = httptools.HttpResponseParser(self._answer)
        self._rest = bytearray()
        self.status = 0

    async def start(self, request: bytes) -> None:
        """Send `request` and read until the status is known."""
        try:
            await self._stream.send_all(request)
        except (trio.BrokenResourceError, OSError) as error:
            raise UpstreamUnreachable(f"the connection broke while the request was sent: {error}") from None
        while not self._answer.has_head:
            await self._read()
        self.status = self._parser.get_status_code()

    async def receive(self) -> bytes | None:
        """Return the next bytes of the body, None after the last. Cancelled, it has taken nothing.

        Raises:
            UpstreamUnreachable: the connection ended before the answer did.
        """
        while not self._answer.body:
            if self._answer.is_complete:
                return None
            await self._read()
        body, self._answer.body = self._answer.body, []
        return b"".join(body)

    async def event(self) -> bytes | None:
        """Return the data of the next server-sent event, None at the end. Comments and other fields are passed over.

        Raises:
            UpstreamUnreachable: as `receive`, or an event above its bound.
        """
        num_searched = 0
        while True:
            end = self._rest.find(b"\n\n", num_searched)
            if end >= 0:
                event = bytes(self._rest[:end])
                del self._rest[: end + 2]
                num_searched = 0
                lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
                if lines:
                    return b"\n".join(lines)
                continue
            if len(self._rest) > MAX_EVENT_BYTES:
                raise UpstreamUnreachable(f"an event of more than {MAX_EVENT_BYTES} bytes")
            num_searched = max(0, len(self._rest) - 1)
            data = await self.receive()
            if data is None:
                return None
            self._rest += data

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some(_CHUNK_BYTES)
            if not data:
                raise UpstreamUnreachable("the connection ended before the answer was whole")
            self._parser.feed_data(data)
        except (trio.BrokenResourceError, OSError) as error:
            raise UpstreamUnreachable(f"the connection broke: {error}") from None
        except httptools.HttpParserError as error:
            raise UpstreamUnreachable(f"what came is no HTTP: {error}") from None


class HttpClient:
    """Asks one server. `headers` go with every request; `timeout_s` bounds an `ask`, not a stream."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self.address = address
        self.headers = dict(headers or {})
        self._tls = ssl.create_default_context() if address.is_tls else None  # reads all roots: 20 ms, so once

    async def ask(self, method: str, path: str, body: bytes = b"", *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Return status and body of an answer.

        Raises:
            UpstreamUnreachable: no whole answer, or a larger one than 16 MiB.
            trio.TooSlowError: none within `timeout_s`.
        """
        with trio.fail_after(timeout_s):
            async with self.open(method, path, body) as stream:
                parts = []
                num_bytes = 0
                while (data := await stream.receive()) is not None:
                    parts.append(data)
                    num_bytes += len(data)
                    if num_bytes > MAX_ANSWER_BYTES:
                        raise UpstreamUnreachable(f"{path} answers with more than {MAX_ANSWER_BYTES} bytes")
                return stream.status, b"".join(parts)

    @asynccontextmanager
    async def open(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[HttpStream]:
        """Send a request and give its answer to read; leaving the block closes the connection.

        The answer's status is there when the block begins, for which the caller sets a deadline.

        Raises:
            UpstreamUnreachable: refused, or broken off before the status came.
        """
        stream = await self._connect()
        try:
            answer = HttpStream(stream)
            await answer.start(self._request(method, path, body))
            yield answer
        finally:
            await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.abc.Stream:
        address = self.address
        with trio.move_on_after(CONNECT_TIMEOUT_S):
            try:
                stream = await trio.open_tcp_stream(address.host, address.port)
                return stream if self._tls is None else await self._secure(stream, self._tls)
            except (OSError, trio.BrokenResourceError, ssl.SSLError) as error:
                reason: BaseException = error.__cause__ or error  # Trio wraps what TLS says, and the kernel
                while isinstance(reason, BaseExceptionGroup):
                    reason = reason.exceptions[0]
                raise UpstreamUnreachable(f"{address.host}:{address.port} cannot be reached: {reason}") from None
        raise UpstreamUnreachable(f"{address.host}:{address.port} takes no connection within {CONNECT_TIMEOUT_S} s")

    async def _secure(self, stream: trio.SocketStream, context: ssl.SSLContext) -> trio.abc.Stream:
        secure = trio.SSLStream(stream, context, server_hostname=self.address.host, https_compatible=True)
        try:
            await secure.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secure)
            raise
        return secure

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        address = self.address
        host = f"[{address.host}]" if ":" in address.host else address.host
        fields = {"Host": f"{host}:{address.port}", "Connection": "close", **self.headers}
        if body:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{method} {address.base}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
