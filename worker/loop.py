"""The loop of a worker: a ZeroMQ DEALER to the gateway around an engine.

One thread and no event loop: take the commands that are there, run a step, send its report. It blocks only when there
is nothing to compute, and never on a send: reports that the gateway cannot take wait in a bounded backlog. If that
overflows, what it held is lost, so the worker gives up its sequences and joins anew under another incarnation, as if
it had been restarted, but with its cache.

    joining  -- Welcome -->  serving  -- Drain, SIGTERM -->  draining  -- nothing left -->  Bye, exit 0
       ^------ Identify, backlog overflow ----'
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from kvasir.protocol.codec import encode
from kvasir.protocol.errors import BadRequest, InvalidMessage
from kvasir.protocol.messages import (
    COMMANDS,
    Abort,
    Bye,
    ClearTenant,
    Drain,
    Generate,
    Hello,
    Identify,
    KvAccounts,
    Pin,
    Quotas,
    Refused,
    Report,
    Resync,
    Unpin,
    Welcome,
)
from kvasir.protocol.tokens import num_tokens
from kvasir.worker.dial import request_of
from kvasir.worker.engine.engine import Engine
from kvasir.worker.events.kv_events import KvEvents
from kvasir.worker.log import log

MAX_COMMANDS_PER_STEP = 256
PREPARING_S = 0.001  # how often to see whether a grammar is compiled, while there is nothing else to do
HELLO_RETRY_S = 2.0
ACCOUNTS_EVERY_S = 1.0
SILENCE_S = 10.0  # how often to complain that no gateway answers
BYE_TIMEOUT_S = 1.0
EXIT_SICK = 1
EXIT_REFUSED = 2
MAX_NOT_FINITE = 3


class Worker:
    """The loop. `run` owns the socket and returns the process's exit code."""

    def __init__(
        self,
        engine: Engine,
        hello: Hello,
        socket: zmq.Socket[bytes],
        *,
        signal_fd: int | None = None,
        stdin_fd: int | None = None,
        drain_s: float = 20.0,
        max_backlog: int = 4096,
        clock: Callable[[], float] = time.monotonic,
        events: KvEvents | None = None,
    ) -> None:
        self._engine = engine
        self._events = events
        self._hello = hello
        self._socket = socket
        self._signal_fd, self._stdin_fd = signal_fd, stdin_fd
        self._drain_s = drain_s
        self._max_backlog = max_backlog
        self._clock = clock
        self._poller = zmq.Poller()
        self._backlog: deque[bytes] = deque()
        self._gateway_epoch: bytes | None = None
        self._is_joined = False
        self._heartbeat_s = 1.0
        self._hello_at = clock()  # when to say Hello (again) while not joined
        self._complain_at = clock() + SILENCE_S
        self._accounts: KvAccounts | None = None  # as last reported
        self._accounts_at = 0.0
        self._report_at = 0.0  # when an idle worker reports again
        self._drain_deadline: float | None = None
        self._drain_code = 0
        self._has_told_memory = False
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve until drained, refused or left alone; return the exit code."""
        while True:
            self._receive()
            if self._events is not None:
                self._events.pump()
            self._keep_joined()
            if self._drain_deadline is not None:
                self._drain()
            if self._exit_code is not None:
                return self._exit_code
            if self._is_joined and (self._engine.has_work or self._clock() >= self._report_at):
                self._send(self._engine.step())
                self._report_at = self._clock() + self._heartbeat_s
                self._send_accounts()
                self._check_health()
            self._flush()

    # ---- in

    def _receive(self) -> None:
        """Take what has arrived, waiting for something only when there is nothing to compute."""
        for fd in self._wait():
            if fd == self._signal_fd:
                for number in os.read(fd, 64):
                    self._on_signal(number)
            elif fd == self._stdin_fd and not os.read(fd, 4096):
                log("stdin_closed", worker=self._hello.worker_id)
                self._exit_code = 0
        for _ in range(MAX_COMMANDS_PER_STEP):
            if self._exit_code is not None:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:  # the gateway packs what it has for us into one message
                self._take(frame)

    def _wait(self) -> list[int]:
        """Poll; return the file descriptors, other than the socket, that are readable."""
        wants_out = bool(self._backlog) or (not self._is_joined and self._clock() >= self._hello_at)
        self._poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if wants_out else 0))
        if self._events is not None:
            self._poller.register(
                self._events.outlet.socket, zmq.POLLIN | (zmq.POLLOUT if self._events.has_work else 0)
            )
        for fd in (self._signal_fd, self._stdin_fd):
            if fd is not None:
                self._poller.register(fd, zmq.POLLIN | zmq.POLLERR)
        idle_s = self._idle_s()
        ready = self._poller.poll(int(1000 * idle_s) + 1 if idle_s > 0 else 0)
        return [item for item, _ in ready if isinstance(item, int)]

    def _idle_s(self) -> float:
        """How long nothing has to be done unless something arrives."""
        if self._is_joined and self._engine.has_work:
            return 0.0
        moments = [self._report_at if self._is_joined else self._complain_at]
        if not self._is_joined and self._hello_at > self._clock():
            moments.append(self._hello_at)
        if self._drain_deadline is not None:
            moments.append(self._drain_deadline)
        if self._engine.is_preparing:
            moments.append(self._clock() + PREPARING_S)
        return max(0.0, min(moments) - self._clock())

    def _take(self, frame: bytes) -> None:
        """Carry out one command. Whatever is no command is logged and passed over."""
        try:
            command = COMMANDS.decode(frame)
        except InvalidMessage as error:
            self._on_invalid(frame, error)
            return
        match command:
            case Identify():
                if self._is_joined:  # it has restarted or given us up, and with us all that we run
                    self._rejoin("the gateway does not know this worker")
            case Welcome():
                self._on_welcome(command)
            case Refused():
                log("refused", worker=self._hello.worker_id, reason=command.reason)
                self._exit_code = EXIT_REFUSED
            case Generate():
                self._on_generate(command)
            case Abort():
                self._engine.abort(command.req_id, command.attempt)
            case Resync():
                self._send(self._engine.snapshot())
            case Quotas():
                self._on_quotas(command)
            case ClearTenant():
                num_blocks = self._engine.clear_tenant(command.tenant)
                log("tenant_cleared", tenant=command.tenant, num_blocks=num_blocks)
            case Pin():
                self._on_pin(command)
            case Unpin():
                self._engine.unpin(command.name)
            case Drain():
                self._start_drain(command.deadline_s, "the gateway asked for it")

    def _on_invalid(self, frame: bytes, error: InvalidMessage) -> None:
        log("invalid_command", num_bytes=len(frame), error=error.message)
        request = request_of(frame)
        if request is not None:
            self._engine.refuse(*request, "error", f"the worker cannot read this request: {error.message}"[:4096])

    def _on_welcome(self, welcome: Welcome) -> None:
        if welcome.gateway_epoch != self._gateway_epoch:
            self._engine.drop_all()
            self._backlog.clear()
        self._gateway_epoch = welcome.gateway_epoch
        self._accounts = None
        self._engine.public_namespace = welcome.public_namespace
        self._heartbeat_s = max(0.01, welcome.heartbeat_s)
        if not self._is_joined:
            log("joined", worker=self._hello.worker_id, heartbeat_s=self._heartbeat_s)
        self._is_joined = True
        self._report_at = self._clock()
        self._send(self._engine.snapshot())

    def _on_generate(self, command: Generate) -> None:
        if not self._is_joined:
            log("generate_before_welcome", req_id=command.req_id.hex())
        elif self._drain_deadline is not None:
            seq = max(0, num_tokens(command.token_ids) - command.num_prompt_tokens)
            self._engine.refuse(command.req_id, command.attempt, seq, "abort", "this worker is draining")
        else:
            self._engine.submit(command)

    def _on_quotas(self, command: Quotas) -> None:
        try:
            self._engine.set_quotas(command)
        except BadRequest as error:  # the gateway has checked them against what it knew of this pool
            log("quotas_refused", error=error.message)

    def _on_pin(self, command: Pin) -> None:
        try:
            log("pinned", prefix=command.name, num_blocks=self._engine.pin(command))
        except BadRequest as error:
            log("pin_refused", error=error.message)

    # ---- joining and leaving

    def _keep_joined(self) -> None:
        """While not joined: say Hello, and log when no gateway answers."""
        if self._is_joined or self._exit_code is not None:
            return
        now = self._clock()
        if now >= self._hello_at and self._try_send(encode(self._hello)):
            self._hello_at = now + HELLO_RETRY_S
        if now >= self._complain_at:
            endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            log("no_gateway", endpoint=endpoint, waited_s=SILENCE_S, hint="still trying; is a gateway bound there?")
            self._complain_at = now + SILENCE_S

    def _rejoin(self, reason: str) -> None:
        log("rejoining", worker=self._hello.worker_id, reason=reason)
        self._engine.drop_all()
        self._backlog.clear()
        self._is_joined = False
        self._hello_at = self._clock()
        self._complain_at = self._clock() + SILENCE_S

    def _check_health(self) -> None:
        """Say once that a step ran out of memory; leave when the model gave no finite logits several times in a row.

        Weights, device or cached blocks are damaged then. Requests are handed back, and whoever supervises the process
        starts a fresh one.
        """
        if self._engine.num_out_of_memory and not self._has_told_memory:
            self._has_told_memory = True
            log("out_of_memory", effect="smaller steps", hint="less --max-step-tokens, --max-requests or --kv-memory")
        if self._engine.num_not_finite >= MAX_NOT_FINITE and self._drain_code == 0:
            self._drain_code = EXIT_SICK
            self._start_drain(0.0, f"no finite logits {MAX_NOT_FINITE} times in a row")

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            # The second one means: now.
            deadline_s = self._drain_s if self._drain_deadline is None else 0.0
            self._start_drain(deadline_s, signal.Signals(number).name)

    def _start_drain(self, deadline_s: float, reason: str) -> None:
        deadline = self._clock() + deadline_s
        log("draining", worker=self._hello.worker_id, deadline_s=deadline_s, reason=reason)
        self._drain_deadline = deadline if self._drain_deadline is None else min(deadline, self._drain_deadline)

    def _drain(self) -> None:
        """Hand back what is unfinished at the deadline; say Bye when nothing is left."""
        assert self._drain_deadline is not None
        if self._is_joined and self._clock() >= self._drain_deadline:
            self._engine.abort_all("handed back: the worker leaves")
            if self._engine.has_work:
                self._send(self._engine.step())
        if self._is_joined and (self._engine.has_work or self._engine.is_preparing):
            return
        if self._is_joined:
            self._send(Bye("drained"))
            deadline = self._clock() + BYE_TIMEOUT_S
            while self._backlog and self._clock() < deadline:
                self._socket.poll(50, zmq.POLLOUT)
                self._flush()
        log("drained", worker=self._hello.worker_id)
        self._exit_code = self._drain_code

    # ---- out

    def _send_accounts(self) -> None:
        """Report the accounts if they have changed, not too often."""
        now = self._clock()
        if now < self._accounts_at:
            return
        self._accounts_at = now + ACCOUNTS_EVERY_S
        accounts = self._engine.kv_accounts()
        if accounts != self._accounts:
            self._accounts = accounts
            self._send(accounts)

    def _send(self, report: Report) -> None:
        """Queue a report behind those that wait; when there are too many, start over."""
        self._backlog.append(encode(report))
        self._flush()
        if len(self._backlog) > self._max_backlog:
            self._hello = msgspec.structs.replace(self._hello, incarnation=secrets.token_bytes(16))
            self._rejoin(f"the gateway has not taken {self._max_backlog} reports")

    def _flush(self) -> None:
        while self._backlog and self._try_send(self._backlog[0]):
            self._backlog.popleft()

    def _try_send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
