"""HTTP/1.1 requests out of bytes, parsed by httptools (llhttp); bounds, but no I/O and no clock.

llhttp is strict by default, so that what two parsers could read in two ways (Content-Length beside Transfer-Encoding,
differing lengths, folded headers, bare line feeds in chunks) is refused. What it leaves to its user is checked here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import httptools

Phase = Literal["idle", "headers", "body"]
MAX_BODY_BYTES = 8 << 20
REQUEST_BYTES = 1 << 10  # about what a request takes besides its body: pipelined ones can be many
_CLOSED = httptools.HttpRequestParser(object())


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """Bounds of one request. The request line and all headers, trailers too, count as header bytes."""

    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_body_bytes: int = MAX_BODY_BYTES


@dataclass(slots=True)
class HttpRequest:
    """One request, of which at least the head is here. `headers` by lower-case name; a repeated header's values are
    joined with commas.

    `path` as it was sent, percent-encoding and all. `is_complete`: `body` is all of it; until then it is empty.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool
    is_http_10: bool = False
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why what a client sends is no request. Nothing that follows it can be believed: answer it and close."""

    status: int
    reason: str


class RequestParser:
    """Feed it bytes; take `requests` from the left, of which the last may lack its body. Once `refusal` is set it must
    not be fed any more.

    `phase` is that of the request which is still incomplete. Call `close` at the end: the C parser and its callbacks
    refer to each other, so that without it everything would stay until the garbage collector comes.
    """

    def __init__(self, limits: MessageLimits) -> None:
        self.requests: deque[HttpRequest] = deque()
        self.refusal: Refusal | None = None
        self.phase: Phase = "idle"
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self._wants_continue = False
        self._clear()

    def feed(self, data: bytes) -> None:
        """Parse `data`; sets `refusal` when it is malformed or out of bounds."""
        if self.phase == "idle":
            self.phase = "headers"
        while True:
            self._num_fed += len(data)
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as stopped:
                data = self._head_without_upgrade() + data[stopped.args[0] :]
            except httptools.HttpParserError as error:
                if self.refusal is None:
                    self.refusal = Refusal(400, f"malformed HTTP: {error}")
                return
        limits = self._limits
        if self.phase == "headers" and self._num_fed > limits.max_header_bytes:
            self.refusal = Refusal(431, f"the request's headers exceed {limits.max_header_bytes} bytes")
        elif self.phase == "body" and self._num_fed > limits.max_header_bytes + 2 * limits.max_body_bytes:
            self.refusal = Refusal(413, "the body's chunks are much larger than what is in them")

    def take_continue(self) -> bool:
        """Return, once, whether the client waits for `100 Continue` before it sends the body."""
        wants, self._wants_continue = self._wants_continue, False
        return wants and self.phase == "body" and not self._body

    @property
    def num_held_bytes(self) -> int:
        """Bytes of all bodies that are here, and what the complete requests take besides."""
        return len(self._body) + sum([len(each.body) + REQUEST_BYTES for each in self.requests if each.is_complete])

    def close(self) -> None:
        """Let go of everything. Idempotent; `feed` must not be called any more."""
        self.requests.clear()
        self._clear()
        self._parser = _CLOSED

    def _clear(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._num_headers = 0
        self._num_header_bytes = 0
        self._num_fed = 0
        self._request: HttpRequest | None = None  # whose body is coming
        self._body = bytearray()  # not a list: thousands of tiny chunks would take twenty times their length

    def _refuse(self, status: int, reason: str) -> None:
        self.refusal = Refusal(status, reason)
        raise ValueError(reason)  # makes the parser stop

    # ---- called by the parser, in this order -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.phase = "headers"

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.max_headers:
            self._refuse(431, f"more than {self._limits.max_headers} headers")
        self._count_header_bytes(len(name) + len(value) + 4)
        if self.phase == "body":
            return  # a trailer: nobody has asked for one, and it must not pass for a header
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        known = self._headers.get(key)
        if known is not None:
            if key == "host":
                self._refuse(400, "more than one Host header")
            text = f"{known},{text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        headers, limit = self._headers, self._limits.max_body_bytes
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        version = self._parser.get_http_version()
        if "host" not in headers and version != "1.0":
            self._refuse(400, "no Host header")
        if coding is not None and (version == "1.0" or coding.strip().lower() != "chunked"):
            self._refuse(501, f"transfer coding {coding[:40]!r} is not known here; use chunked, over HTTP/1.1")
        expected = headers.get("expect")
        if expected is not None and expected.lower() != "100-continue":
            self._refuse(417, "only `Expect: 100-continue` is known here")
        self._wants_continue = expected is not None and version != "1.0"
        self.phase = "body"
        parser = self._parser
        if parser.should_upgrade() and "upgrade" in headers:
            return
        self._request = HttpRequest(
            parser.get_method().decode("ascii"),
            self._path(),
            headers,
            b"",
            parser.should_keep_alive(),
            version == "1.0",
            is_complete=False,
        )
        self.requests.append(self._request)
        if length is not None and int(length) > limit:
            self._refuse(413, f"a body of {length} bytes exceeds the bound of {limit} bytes; send less at a time")

    def on_body(self, body: bytes) -> None:
        if len(self._body) + len(body) > self._limits.max_body_bytes:
            self._refuse(413, f"the body exceeds the bound of {self._limits.max_body_bytes} bytes; send less at a time")
        self._body += body

    def on_message_complete(self) -> None:
        request = self._request
        if request is None:
            return  # of a wish for another protocol: the parser has left the body out and stops; `feed` begins anew
        request.body, request.is_complete = bytes(self._body), True
        self._clear()
        self.phase = "idle"

    # ------------------------------------------------------------------------------------------------------------------

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > self._limits.max_header_bytes:
            self._refuse(431, f"the request's headers exceed {self._limits.max_header_bytes} bytes")

    def _head_without_upgrade(self) -> bytes:
        """Return the present request's head as it would be had the client not asked for another protocol, and begin
        anew: a server may ignore the wish (RFC 9110, 7.8), the C parser cannot."""
        del self._headers["upgrade"]
        start = b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._url, self._parser.get_http_version().encode())
        lines = "".join([f"{name}: {value}\r\n" for name, value in self._headers.items()])
        self._clear()
        self._parser = httptools.HttpRequestParser(self)
        return start + lines.encode("latin-1") + b"\r\n"

    def _path(self) -> str:
        url = self._url
        if not url.startswith(b"/"):  # an absolute URL, as proxies send
            try:
                url = httptools.parse_url(url).path or b""
            except httptools.HttpParserError:
                url = b""
        path = url.partition(b"?")[0]
        if not path or not path.isascii():
            self._refuse(400, "the request's URL is malformed")
        return path.decode("ascii")
