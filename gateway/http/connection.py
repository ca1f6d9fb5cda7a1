"""One HTTP connection: a task that reads requests, has them answered in order, and writes whole or streamed answers.

The socket is read and written without waiting first; the task waits only for what is not there yet. `notice` tells it
of input, and cancels it when the client has gone while its request is being answered.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate

import trio

from kvasir.gateway.http.limits import BodyRoom, Held, HttpLimits, HttpStatistics
from kvasir.gateway.http.parser import HttpRequest, Refusal, RequestParser
from kvasir.gateway.http.response import HttpResponse, error_response
from kvasir.gateway.log import log
from kvasir.protocol.errors import BadRequest, KvasirError, Overloaded, TooLarge, Unavailable

READ_BYTES = 16 << 10  # bounds what pipelined requests come to before they are answered
QUICK_DROPS = 128  # of what a refused client goes on sending
_DROPPED = bytearray(1 << 20)  # nothing is written there: with MSG_TRUNC the kernel discards what TCP has received
_BODY_ERRORS: dict[int, type[KvasirError]] = {413: TooLarge, 429: Overloaded, 503: Unavailable}


class Exchange:
    """One request under way: `body` is what may still have to come of it. To stream an answer `begin`, any number of
    `write`s, `end`."""

    def __init__(self, connection: Connection, request: HttpRequest) -> None:
        self._connection = connection
        self._request = request
        self._chunked = not request.is_http_10
        self._head = b""
        self.has_begun = False

    async def body(self, owner: str = "") -> bytes:
        """Return the body, waiting for it where it has not come yet: until then nothing of it is asked for.

        `owner`: who is charged with what it takes, until `drop_body`.

        Raises:
            BadRequest, TooLarge, Unavailable, Overloaded: it is malformed, too large, or there is no room for it now,
                or for so much of one owner's. Whatever the answer says, the connection is closed after it.
            trio.BrokenResourceError: the client is gone.
        """
        return await self._connection.read_body(self._request, owner)

    def drop_body(self) -> None:
        """Let go of the body, which is not needed for the rest of the answer."""
        self._request.body = b""
        self._connection.recount()

    def begin(self, status: int, content_type: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Set the status and headers of a streamed answer; they leave with the first piece of its body."""
        self.has_begun = True
        if not self._chunked:
            self._request.keep_alive = False
        length = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._head = self._connection.head(self._request, HttpResponse(status, b"", content_type, headers), length)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body. Waits, and is a checkpoint, only for a client that is slow.

        Cancelled, or the client gone: what was sent is unknown; the connection is closed.

        Raises:
            trio.BrokenResourceError: the client is gone.
        """
        if data:
            head, self._head = self._head, b""
            await self._connection.send(head + (b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data))

    def cut(self) -> None:
        """Give the client up: cancel what serves it and close the connection."""
        self._connection.cut()

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body and end it. As `write` otherwise."""
        head, self._head = self._head, b""
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        await self._connection.send(head + data)


Handler = Callable[[HttpRequest, Exchange], Awaitable[HttpResponse | None]]
"""Answers a request: returns a whole response, or None after having streamed one through the exchange.

It is called when the request's headers are there. Who needs the body asks the exchange for it; after an answer to a
request whose body was not read the connection is closed. What is wrong with a body it has to answer. It is cancelled
when the client goes away. Whatever it raises is logged and answered as a plain 500."""


@dataclass(slots=True)
class ServerState:
    """What all connections of a server have in common."""

    handler: Handler
    limits: HttpLimits
    statistics: HttpStatistics = field(default_factory=HttpStatistics)
    draining: bool = False
    room: BodyRoom = field(init=False)
    _date: bytes = b""

    def __post_init__(self) -> None:
        self.room = BodyRoom(self.limits.max_total_body_bytes)

    @property
    def date(self) -> bytes:
        """The Date header, as of the last `tick`."""
        if not self._date:
            self._date = f"date: {formatdate(usegmt=True)}\r\n".encode()
        return self._date

    def tick(self) -> None:
        """Have the Date header made anew for the next answer."""
        self._date = b""


class Connection:
    """One client and the task that serves it."""

    def __init__(self, server: ServerState, plain: socket.socket) -> None:
        self.scope = trio.CancelScope()
        self._server = server
        self._limits = server.limits
        self._socket = plain
        self._parser = RequestParser(server.limits)
        self._reader: trio.lowlevel.Task | None = None  # set while it waits for input
        self._has_input = False
        self._is_drained = True  # of input, when it was last read
        self._is_gone = False
        self._answering = False
        self._lingering = False
        self._since = trio.current_time()  # when the present phase of reading began
        self._writing_since: float | None = None
        self._held = Held(server.room)

    @property
    def idle_since(self) -> float | None:
        """When the client came in or got its last answer; None if it is in the midst of something, or being ended."""
        is_busy = self._answering or self._lingering or self.scope.cancel_called
        return self._since if self._parser.phase == "idle" and not is_busy else None

    def spare_since(self, now: float) -> tuple[int, float] | None:
        """Return (0: it was refused, 1: it is idle, 2: it is in the midst of sending a request; since when it is waited
        for): who has the least is given up first where there is no room for another. None: it is not given up."""
        if self._answering or self.scope.cancel_called:
            return None
        rank = 0 if self._lingering else 1 if self._parser.phase == "idle" else 2
        return None if rank == 2 and now - self._since < self._limits.crowd_s else (rank, self._since)

    def is_late(self, now: float) -> bool:
        """Return whether the client has been too slow in whatever it is to do now."""
        limits = self._limits
        if self._writing_since is not None:
            return now - self._writing_since > limits.write_s
        if self._lingering:
            return now - self._since > limits.linger_s
        if self._answering:
            return False
        phase = self._parser.phase
        bound = limits.idle_s if phase == "idle" else limits.headers_s if phase == "headers" else limits.body_s
        return now - self._since > bound

    def cut(self) -> None:
        """The client is too slow."""
        if not self.scope.cancel_called:
            self._server.statistics.num_cut += 1
            self.scope.cancel()

    def notice(self, *, gone: bool) -> None:
        """There is input, or the client is gone. Called by the watcher."""
        self._has_input = True
        if gone:
            self._is_gone = True
            if self._answering:
                self.scope.cancel()
        if self._reader is not None:
            reader, self._reader = self._reader, None
            trio.lowlevel.reschedule(reader)

    async def run(self) -> None:
        """Serve until the client or we are done with each other."""
        with self.scope:
            try:
                await self._serve()
            except trio.BrokenResourceError:
                pass
        self._let_go()

    async def send(self, data: bytes) -> None:
        """Write `data`, without a checkpoint if the client takes it at once."""
        sent = self._send_now(data)
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        while rest:
            self._writing_since = trio.current_time()
            await trio.lowlevel.wait_writable(self._socket)
            rest = rest[self._send_now(rest) :]
        self._writing_since = None

    def head(self, request: HttpRequest, response: HttpResponse, length: bytes) -> bytes:
        """Return what stands before an answer's body, and count the answer."""
        by_status = self._server.statistics.by_status
        by_status[response.status] = by_status.get(response.status, 0) + 1
        if self._server.draining or not request.is_complete:
            request.keep_alive = False
        return response.head(request, self._server.date, length)

    # ---- the task ----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        parser = self._parser
        while True:
            while parser.requests:
                request = parser.requests[0]  # held, and counted, while it is answered
                await self._answer(request)
                if not request.is_complete:
                    await self._linger()
                    return
                if not request.keep_alive or self._server.draining:
                    return
                parser.requests.popleft()
                del request  # and its body, which would stay until the next one comes
                self._held.charge("")
                self.recount()
                if parser.requests:
                    await trio.lowlevel.checkpoint()  # pipelined ones let others go first
            if parser.refusal is not None:
                await self._refuse(parser.refusal)
                return
            if not await self._read():
                return

    async def _read(self) -> bool:
        """Have the parser take what the client sends next; False: it sends no more."""
        parser = self._parser
        phase = parser.phase
        data = await self._receive()
        if not data:
            return False
        parser.feed(data)
        if parser.phase != phase:
            self._since = trio.current_time()
        if self._held.num_bytes or parser.phase == "body" or len(parser.requests) > 1:
            self._held.resize(parser.num_held_bytes)
            parser.refusal = parser.refusal or self._server.room.refusal(self._held.owner)
        if len(data) == READ_BYTES:
            await trio.lowlevel.checkpoint()  # one that sends without a pause lets others go first
        return True

    async def read_body(self, request: HttpRequest, owner: str) -> bytes:
        """Return the body of the request that is being answered. As `Exchange.body`."""
        self._held.charge(owner)
        if request.is_complete:
            return request.body
        parser = self._parser
        self._answering = False  # the client is waited for
        try:
            while not request.is_complete:
                if parser.refusal is not None:
                    self._server.statistics.num_malformed += 1
                    raise _BODY_ERRORS.get(parser.refusal.status, BadRequest)(parser.refusal.reason)
                if parser.take_continue():
                    await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                if not await self._read():
                    raise trio.BrokenResourceError("the client is gone")
        finally:
            self._answering = True
        if self._is_gone:
            self.scope.cancel()  # as in `_answer`
        return request.body

    async def _receive(self) -> bytes:
        """Return what the client has sent, waiting for some; nothing at its end."""
        while True:
            if self._is_drained:
                await self._input()
            try:
                data = self._socket.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                if self._is_gone:
                    return b""
                self._is_drained = True
                continue
            except OSError:
                return b""
            # A short read has emptied the socket: whatever comes now is a new edge.
            self._is_drained = len(data) < READ_BYTES
            return data

    async def _input(self) -> None:
        """Wait for input since the last wait, or the client's end."""
        if not self._has_input and not self._is_gone:
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        self._has_input = False

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _answer(self, request: HttpRequest) -> None:
        self._server.statistics.num_requests += 1
        self._answering = True
        if self._is_gone:
            self.scope.cancel()  # whoever can be answered without waiting still is
        exchange = Exchange(self, request)
        try:
            response = await self._server.handler(request, exchange)
        except trio.BrokenResourceError:
            raise
        except Exception as error:
            log("http_handler_failed", path=request.path, error=repr(error))
            request.keep_alive = False
            if exchange.has_begun:
                return  # cut short: the client sees that the body has no end
            response = error_response(500, "internal_error", "internal error; the gateway's log has more")
        if response is not None:
            await self._send_whole(request, response)
        self._answering = False
        self._since = trio.current_time()

    async def _send_whole(self, request: HttpRequest, response: HttpResponse) -> None:
        head = self.head(request, response, b"content-length: %d\r\n" % len(response.body))
        try:
            await self.send(head if request.method == "HEAD" else head + response.body)
        finally:
            if response.on_sent is not None:
                response.on_sent()

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer what is no request."""
        self._server.statistics.num_malformed += 1
        nothing = HttpRequest("", "", {}, b"", keep_alive=False)
        await self._send_whole(nothing, error_response(refusal.status, "bad_http", refusal.reason))
        await self._linger()

    async def _linger(self) -> None:
        """Wait for the end of a client that was refused: to close while it sends could destroy the answer.

        What it goes on sending is dropped in the kernel: at once as far as a large body goes, then ten times a second.
        """
        self._let_go()
        self._lingering, self._since = True, trio.current_time()
        try:
            self._socket.shutdown(socket.SHUT_WR)
            for _ in range(QUICK_DROPS):
                if not self._drop():
                    return
                await self._input()
            while self._drop():  # noqa: ASYNC110 to be told of every packet is what would cost
                await trio.sleep(0.1)
        except OSError:
            return

    def _drop(self) -> bool:
        """Drop what has come; False: the client has ended."""
        try:
            return self._socket.recv_into(_DROPPED, flags=socket.MSG_TRUNC) > 0
        except (BlockingIOError, InterruptedError):
            return True

    def _send_now(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"the client is gone: {error}") from None

    def recount(self) -> None:
        """Some of what was held is not any more."""
        if self._held.num_bytes:
            self._held.resize(self._parser.num_held_bytes)

    def _let_go(self) -> None:
        self._parser.close()
        self._held.resize(0)
