"""A small HTTP/1.1 server on Trio: listeners, connections, deadlines; no routes.

A connection is one task for its whole life, and a request costs no task, no cancel scope and no timer of its own:

- One epoll object, edge-triggered, watches all connections, and one task waits for it. It wakes the connections that
  have input, and cancels one whose client has gone while its request is being answered.
- One reaper looks at all connections twice a second and ends those that are too slow.

A client that closes its sending side counts as gone: half-closed connections are not worth a leak. It still gets an
answer that takes no waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Sequence

import trio

from kvasir.gateway.http.connection import Connection, Handler, ServerState
from kvasir.gateway.http.limits import BodyRoom, HttpLimits, HttpStatistics
from kvasir.gateway.http.response import STATUS_LINE
from kvasir.gateway.log import log
from kvasir.protocol.errors import ConfigurationError

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_PASSING = {errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH}
MAX_ACCEPTS = 64
SEARCH_EVERY_S = 0.1


class HttpServer:
    """Serves `handler` on its listeners until cancelled or drained."""

    def __init__(self, handler: Handler, limits: HttpLimits | None = None) -> None:
        self._state = ServerState(handler, limits or HttpLimits())
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._accepting = trio.CancelScope()
        self._spare: list[tuple[tuple[int, float], Connection]] = []  # of the last search, whoever goes first last
        self._searched_at = -SEARCH_EVERY_S

    @property
    def statistics(self) -> HttpStatistics:
        return self._state.statistics

    @property
    def room(self) -> BodyRoom:
        return self._state.room

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve; returns after `drain`, once the last connection is closed. Cancelling cuts them all."""
        with contextlib.ExitStack() as stack:
            epoll = stack.enter_context(select.epoll())
            for listener in listeners:
                stack.callback(listener.socket.close)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, epoll)
                nursery.start_soon(self._reap)
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listener in listeners:
                                acceptors.start_soon(self._accept, listener, epoll, connections)
                            task_status.started()
                    for listener in listeners:
                        listener.socket.close()
                nursery.cancel_scope.cancel()

    def drain(self) -> None:
        """Accept nothing new, close idle connections, and each other one after the answer it is giving."""
        self._state.draining = True
        self._accepting.cancel()
        for connection in self._connections.values():
            if connection.idle_since is not None:
                connection.scope.cancel()

    async def _accept(self, listener: trio.SocketListener, epoll: select.epoll, connections: trio.Nursery) -> None:
        """Accept for ever, many at a time: one per turn of the loop would keep a crowd waiting behind the requests."""
        with socket.socket(fileno=os.dup(listener.socket.fileno())) as plain:
            plain.setblocking(False)
            while True:
                await trio.lowlevel.wait_readable(plain)
                for _ in range(MAX_ACCEPTS):
                    try:
                        self._welcome(plain.accept()[0], epoll, connections)
                    except BlockingIOError:
                        break
                    except OSError as error:
                        if error.errno in _FULL:
                            log("http_accept_failed", error=error.strerror)
                            await trio.sleep(0.1)
                        elif error.errno not in _PASSING:
                            raise

    def _welcome(self, client: socket.socket, epoll: select.epoll, connections: trio.Nursery) -> None:
        if len(self._connections) >= self._state.limits.max_connections and not self._make_room():
            self.statistics.num_turned_away += 1
            _turn_away(client)
            return
        client.setblocking(False)
        with contextlib.suppress(OSError):  # it may be gone already
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(self._state, client)
        self._connections[client.fileno()] = connection
        epoll.register(client.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self.statistics.num_accepted += 1
        self.statistics.num_open += 1
        connections.start_soon(self._serve, connection, client)

    def _make_room(self) -> bool:
        """End the connection that can best be spared; return False if none can.

        A search looks at all of them and serves many, so that a crowd does not cost one each.
        """
        now = trio.current_time()
        while True:
            while self._spare:
                known, connection = self._spare.pop()
                if connection.spare_since(now) == known:
                    connection.scope.cancel()
                    return True
            if now - self._searched_at < SEARCH_EVERY_S:
                return False
            self._searched_at = now
            found = [(since, each) for each in self._connections.values() if (since := each.spare_since(now))]
            self._spare = sorted(found, key=lambda pair: pair[0], reverse=True)

    async def _serve(self, connection: Connection, plain: socket.socket) -> None:
        try:
            await connection.run()
        finally:
            del self._connections[plain.fileno()]
            self.statistics.num_open -= 1
            plain.close()

    async def _watch(self, epoll: select.epoll) -> None:
        while True:
            await trio.lowlevel.wait_readable(epoll.fileno())
            for descriptor, mask in epoll.poll(0):
                connection = self._connections.get(descriptor)
                if connection is not None:
                    connection.notice(gone=bool(mask & _GONE))

    async def _reap(self) -> None:
        while True:
            self._state.tick()
            now = trio.current_time()
            for connection in self._connections.values():
                if connection.is_late(now):
                    connection.cut()
            await trio.sleep(0.5)


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


def _turn_away(plain: socket.socket) -> None:
    with plain:
        try:
            plain.send(STATUS_LINE[503] + b"retry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        except OSError:
            pass
