"""One background thread owns a client's socket; callers, blocking or async, talk to it through queues.

Why a thread for all three kinds of caller: a ZeroMQ socket belongs to one thread; a cancellation must go out at once
even from a garbage collector or a cancelled task, where nobody can wait; and a gateway that dies must be noticed while
nobody happens to read. So sending and cancelling only append to a deque and write one byte, which is safe anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket as sockets
import threading
import time
import weakref
from collections import OrderedDict, deque
from math import inf
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvasir.protocol.client_messages import GATEWAY_MESSAGES, CancelRequest, CompletionChunk, Received
from kvasir.protocol.codec import Message, encode
from kvasir.protocol.errors import ConfigurationError, ConnectionLost, InvalidMessage, KvasirError
from kvasir.protocol.profile import LinkProfile, apply_profile

CONNECT_TIMEOUT_S = 5.0
RECEIPT_EVERY_S = 0.05
MAX_RECEIVED = 256  # multiparts at a time: what is to be sent must not wait until nothing comes any more
PROFILE = LinkProfile(max_frame_bytes=64 << 20, reconnect_ms=50, reconnect_max_ms=1_000)


class Mailbox(Protocol):
    """Where one call gets its messages. Called from the pump's thread: must neither block nor raise."""

    def put(self, item: Message | KvasirError) -> None: ...


class Pump:
    """A connection to one gateway. It reconnects by itself; what was in flight when it broke fails.

    Thread-safe. Ends when closed, when garbage, or at exit. Not usable after a fork.

    Raises:
        ConfigurationError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        state = _State(endpoint, connect_timeout_s)
        thread = threading.Thread(target=state.run, name="kvasir-client", daemon=True)
        self._state = state
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._finalizer = weakref.finalize(self, _close, state, thread, self._pid)
        thread.start()

    def next_id(self) -> int:
        """Return a number that no other call of this connection has."""
        return next(self._ids)

    def send(self, call_id: int, frame: bytes, mailbox: Mailbox) -> None:
        """Send a request; everything that answers it goes to `mailbox`, ending with a terminal message or an error.

        If no gateway is reached within the connect timeout, that error is `ConnectionLost`.

        Raises:
            ConnectionLost: the client is closed.
            ConfigurationError: called after a fork, in the child.
        """
        if os.getpid() != self._pid:
            raise ConfigurationError("this client was made before a fork; make one in each process")
        if not self._finalizer.alive:
            raise ConnectionLost("the client is closed")
        self._state.tell((call_id, frame, mailbox))

    def cancel(self, call_id: int) -> None:
        """Stop a request and forget its mailbox; does nothing if it has ended. Safe anywhere, also in `__del__`."""
        if os.getpid() == self._pid:
            self._state.tell((call_id, None, None))

    def close(self) -> None:
        """Cancel what is in flight and disconnect. Idempotent."""
        self._finalizer()


_Command = tuple[int, bytes | None, Mailbox | None]  # a request, or with None, None a cancellation


class _State:
    """What the thread works on. Holds no reference to `Pump`, which would keep it alive for ever."""

    def __init__(self, endpoint: str, connect_timeout_s: float) -> None:
        self.endpoint = endpoint
        self.connect_timeout_s = connect_timeout_s
        self.closing = False
        self.commands: deque[_Command] = deque()
        self.calls: dict[int, Mailbox] = {}
        self.unsent: OrderedDict[int, tuple[bytes, float]] = (
            OrderedDict()
        )  # call id -> frame and when to give up; in order
        self.cancels: deque[bytes] = deque()
        self.received: dict[int, int] = {}  # tokens of running calls that the gateway has not been told of
        self.ended: list[int] = []  # calls whose end it has not been told of
        self.receipt_at = inf
        self.wake_out, self.wake_in = sockets.socketpair()
        self.wake_out.setblocking(False)
        self.wake_in.setblocking(False)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        apply_profile(self.socket, PROFILE)
        # Without IMMEDIATE a request is queued for a gateway that is not there, and "sent" would mean nothing.
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise ConfigurationError(
                f"cannot connect to {endpoint!r}: {error}; give ipc://PATH or tcp://HOST:PORT"
            ) from None

    def tell(self, command: _Command | None) -> None:
        if command is not None:
            self.commands.append(command)
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: nobody is left to tell
            self.wake_in.send(b"\0")

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.wake_out, zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)
        error = ConnectionLost("the client was closed")
        try:
            while not self.closing:
                poller.register(self.socket, zmq.POLLIN | (zmq.POLLOUT if self.unsent or self.cancels else 0))
                ready = dict(poller.poll(self._timeout_ms()))
                if self.wake_out.fileno() in ready:
                    self._drain_wake_ups()
                lost = self.monitor in ready and self._was_disconnected()
                self._receive()  # also what came in before a disconnection
                if lost:
                    self._fail_sent()
                self._take_commands()
                self._send()
                self._give_up_unsent()
        except BaseException as bug:
            error = ConnectionLost(f"the client's thread failed: {bug!r}")
            raise
        finally:
            self.closing = True
            self._take_commands()
            for mailbox in self.calls.values():
                mailbox.put(error)
            self.socket.setsockopt(zmq.LINGER, self._cancel_all())
            self._close_sockets()

    def _timeout_ms(self) -> int | None:
        first = min(next(iter(self.unsent.values()))[1] if self.unsent else inf, self.receipt_at)
        return None if first == inf else max(0, int((first - time.monotonic()) * 1e3) + 1)

    def _drain_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.wake_out.recv(4096):
                pass

    def _was_disconnected(self) -> bool:
        seen = False
        while self.monitor.poll(0):
            recv_monitor_message(self.monitor, zmq.NOBLOCK)
            seen = True
        return seen

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVED):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                messages = [GATEWAY_MESSAGES.decode(frame) for frame in frames]
            except InvalidMessage as error:
                self._fail_all(InvalidMessage(f"{self.endpoint} is no gateway of this client's version: {error}"))
                continue
            if self.receipt_at == inf:
                self.receipt_at = time.monotonic() + RECEIPT_EVERY_S
            for message in messages:
                if isinstance(message, CompletionChunk):
                    mailbox = self.calls.get(message.id)
                    self.received[message.id] = message.num_tokens
                else:
                    mailbox = self.calls.pop(message.id, None)
                    self.received.pop(message.id, None)
                    self.ended.append(message.id)
                if mailbox is not None:
                    mailbox.put(message)

    def _fail_all(self, error: KvasirError) -> None:
        for call_id in list(self.calls):
            self.calls.pop(call_id).put(error)
            if self.unsent.pop(call_id, None) is None:
                self.cancels.append(encode(CancelRequest(call_id)))

    def _fail_sent(self) -> None:
        for call_id in [call_id for call_id in self.calls if call_id not in self.unsent]:
            self.calls.pop(call_id).put(
                ConnectionLost(
                    f"the gateway at {self.endpoint} went away in mid-request; send it again when it is back"
                )
            )
        self.cancels.clear()  # the next gateway knows none of them
        self._forget_received()

    def _take_commands(self) -> None:
        while self.commands:
            call_id, frame, mailbox = self.commands.popleft()
            if frame is not None and mailbox is not None:
                self.calls[call_id] = mailbox
                self.unsent[call_id] = (frame, time.monotonic() + self.connect_timeout_s)
            elif self.calls.pop(call_id, None) is not None and self.unsent.pop(call_id, None) is None:
                self.cancels.append(encode(CancelRequest(call_id)))

    def _forget_received(self) -> None:
        self.received, self.ended, self.receipt_at = {}, [], inf

    def _send(self) -> None:
        try:
            if self.closing or time.monotonic() >= self.receipt_at:
                self.receipt_at = time.monotonic() + RECEIPT_EVERY_S  # if it cannot be sent now
                if self.received or self.ended:
                    self.socket.send(encode(Received(self.received, self.ended)), zmq.NOBLOCK)
                self._forget_received()
            while self.cancels:
                self.socket.send(self.cancels[0], zmq.NOBLOCK)
                self.cancels.popleft()
            while self.unsent:
                call_id = next(iter(self.unsent))
                self.socket.send(self.unsent[call_id][0], zmq.NOBLOCK)
                del self.unsent[call_id]
        except zmq.Again:
            pass

    def _give_up_unsent(self) -> None:
        now = time.monotonic()
        while self.unsent:
            call_id, (_, give_up) = next(iter(self.unsent.items()))
            if give_up > now:
                return
            del self.unsent[call_id]
            self.calls.pop(call_id).put(
                ConnectionLost(
                    f"no gateway at {self.endpoint} took the request within {self.connect_timeout_s:g} s; "
                    "is it running? (kvasir up)"
                )
            )

    def _cancel_all(self) -> int:
        """Send a cancellation for everything in flight; return how long the socket may linger for it, in ms."""
        sent = [call_id for call_id in self.calls if call_id not in self.unsent]
        self.unsent.clear()
        self.cancels.extend(encode(CancelRequest(call_id)) for call_id in sent)
        linger_ms = 200 if self.cancels or self.ended else 0
        self._send()
        return linger_ms

    def _close_sockets(self) -> None:
        self.wake_out.close()
        self.wake_in.close()
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()
        self.context.term()


def _close(state: _State, thread: threading.Thread, pid: int) -> None:
    if os.getpid() != pid:  # a forked child has neither the thread nor a right to the socket
        return
    state.closing = True
    state.tell(None)
    if thread is not threading.current_thread():  # garbage may be collected anywhere: wait, but not for long
        thread.join(1)
