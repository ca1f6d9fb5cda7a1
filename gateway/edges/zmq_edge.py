"""The SDK's edge: one ROUTER, requests in, chunks out, no task per request.

`run` receives batches and handles each message synchronously: decode, authenticate, prepare, `core.submit`. The core
puts events into `_Call`s, which only collect them; one flusher task, woken once per batch of events, turns what each
call has collected into one chunk and sends it. Only long texts, whose tokenisation would hold up everybody, get a task
and a thread.
"""

from __future__ import annotations

import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import trio

from kvasir.gateway.core.api import Cancel, CoreApi, Event, Submit
from kvasir.gateway.edges.answer import Answer
from kvasir.gateway.edges.models import models_of
from kvasir.gateway.edges.outbox import Outbox, OutboxLimits, Peer
from kvasir.gateway.log import log, no_log
from kvasir.gateway.text.answer_parts import joined
from kvasir.protocol.client_messages import (
    CLIENT_MESSAGES,
    CallId,
    CancelRequest,
    CompletionChunk,
    CompletionDone,
    CompletionRequest,
    GatewayMessage,
    ModelCard,
    ModelList,
    ModelsRequest,
    Received,
    Usage,
)
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import BadRequest, InvalidMessage, KvasirError, Overloaded, Unavailable
from kvasir.protocol.link import Link, LinkClosed

if TYPE_CHECKING:
    from kvasir.gateway.edges.prepare import Preparer
    from kvasir.gateway.tenants.directory import Caller, TenantDirectory


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Bounds of what clients can make the edge hold."""

    max_calls_per_client: int = 1024
    max_preparing: int = 32  # long texts that are tokenised; one tenant has up to three quarters of them
    outbox: OutboxLimits = field(default_factory=OutboxLimits)
    receipt_s: float = 5.0
    """For so long a client may take to say that an answer has arrived; then it counts as arrived."""


class _Call:
    """One request of one client. `closed`: its `CompletionDone` has been sent, or nobody wants it any more."""

    __slots__ = ("_mark", "answer", "closed", "dirty", "peer", "request")

    def __init__(
        self, peer: Peer[_Call], request: CompletionRequest, core: CoreApi, mark: Callable[[_Call], None]
    ) -> None:
        self.peer = peer
        self.request = request
        self.answer = Answer(core, self._wake)
        self.dirty = False
        self.closed = False
        self._mark = mark

    def _wake(self, event: Event) -> None:
        if not self.dirty:
            self.dirty = True
            self._mark(self)


class ZmqEdge:
    """Serves clients on `link`, a ROUTER of the SDK's protocol. `run` it in a nursery; its owner closes the link.

    `num_open`: calls under way. `num_malformed`: messages that were refused or dropped as no request; `num_dropped`: of
    clients that were cut.
    """

    def __init__(
        self,
        link: Link,
        core: CoreApi,
        preparer: Preparer,
        directory: TenantDirectory,
        limits: EdgeLimits | None = None,
        *,
        access: Callable[..., None] = no_log,
    ) -> None:
        """`access` is called once per request with what is known of it."""
        self._link = link
        self._core = core
        self._preparer = preparer
        self._directory = directory
        self._limits = limits or EdgeLimits()
        self._access = access
        self.outbox: Outbox[_Call] = Outbox(link, self._limits.outbox)
        self._dirty: list[_Call] = []
        self._ended: OrderedDict[tuple[bytes, CallId], tuple[_Call, float]] = OrderedDict()
        """Calls that are sent whole and not known to have arrived, and since when."""
        self._flusher = trio.lowlevel.ParkingLot()
        self._draining = False
        self._preparing: Counter[str] = Counter()  # long texts that are tokenised, by tenant
        self.num_open = 0
        self.num_requests = 0
        self.num_refused = 0
        self.num_malformed = 0
        self.num_dropped = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the link is closed or the task is cancelled; nothing is answered any more then. To end in good
        order `drain`, let the core finish every request, `flush`, and only then cancel."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._link.run)
                nursery.start_soon(self._retry_for_ever)
                nursery.start_soon(self._flush_for_ever)
                nursery.start_soon(self._settle_for_ever)
                task_status.started()
                while True:
                    for frames in await self._link.receive(64):
                        self._handle(frames)
                    self._send_posted()
        except* LinkClosed:  # whichever task has noticed it first
            pass
        finally:
            for call, _ in self._ended.values():  # what is on its way has a little time, when the link is closed
                call.answer.close()

    def drain(self) -> None:
        """From now on refuse new requests as `Unavailable`; what runs goes on."""
        self._draining = True

    def flush(self) -> None:
        """Send what the core has put so far."""
        dirty, self._dirty = self._dirty, []
        for call in dirty:
            self._flush_call(call)
        self._send_posted()

    # ---- client -> core ------------------------------------------------------------------------------------------

    def _handle(self, frames: list[bytes]) -> None:
        peer = self.outbox.peer(frames[0])
        if peer.cut:
            self.num_dropped += 1
            return
        try:
            if len(frames) != 2:
                raise InvalidMessage(f"a message has one frame, not {len(frames) - 1}")
            message = CLIENT_MESSAGES.decode(frames[1])
        except InvalidMessage as error:
            self.num_malformed += 1
            call_id = _recover_id(frames[-1])
            if call_id is not None:  # else nobody would know what is answered
                self.outbox.post(peer, call_id, encode(CompletionDone(call_id, "error", error=error.info())))
            return
        match message:
            case CompletionRequest():
                self._begin(peer, message)
            case CancelRequest():
                call = peer.calls.get(message.id)
                if call is not None:
                    self._cancel(call)
            case Received():
                self._note_received(peer, message)
            case ModelsRequest():
                self.outbox.post(peer, message.id, encode(self._list_models(message)))

    def _begin(self, peer: Peer[_Call], request: CompletionRequest) -> None:
        self.num_requests += 1
        try:
            caller = self._directory.authenticate(request.api_key)
            self._check_room(peer, request.id)
            call = _Call(peer, request, self._core, self._mark)
            submit = self._preparer.prepare_nowait(request, caller, call.answer)
            num_left = self._limits.max_preparing - self._preparing.total()
            if submit is None and (not num_left or self._preparing[caller.tenant.id] >= 3 * num_left):
                raise Overloaded("too many long texts are being tokenised; try again", retry_after_s=1.0)
            self._open(call)
            if submit is not None:
                self._submit(call, submit)
            else:
                self._preparing[caller.tenant.id] += 1
                self._nursery.start_soon(self._prepare, call, request, caller)
        except KvasirError as error:
            self._refuse(peer, request.id, error)
        except Exception as bug:  # one request must not end everybody else's
            if request.id in peer.calls:
                self._close(peer.calls[request.id])
            self._refuse(peer, request.id, _internal_error(bug))

    def _check_room(self, peer: Peer[_Call], call_id: int) -> None:
        if self._draining:
            raise Unavailable("this gateway is shutting down; try again in a moment", retry_after_s=1.0)
        if call_id in peer.calls:
            raise BadRequest(f"request {call_id} of this connection is still running; give each its own id", param="id")
        if len(peer.calls) >= self._limits.max_calls_per_client:
            raise Overloaded(
                f"this connection has {len(peer.calls)} requests running, as many as it may; wait for some to end",
                retry_after_s=1.0,
            )

    async def _prepare(self, call: _Call, request: CompletionRequest, caller: Caller) -> None:
        """Tokenise a long text in a thread, then submit it, unless it was cancelled meanwhile."""
        try:
            submit = await self._preparer.prepare(request, caller, call.answer)
            if not call.closed:
                self._submit(call, submit)
        except Exception as problem:
            if not call.closed:
                self._close(call)
                error = problem if isinstance(problem, KvasirError) else _internal_error(problem)
                self._refuse(call.peer, call.request.id, error)
                self._send_posted()
        finally:
            self._preparing -= Counter((caller.tenant.id,))  # keeps no zeros

    def _submit(self, call: _Call, submit: Submit) -> None:
        self._preparer.begin(call.answer, call.request, submit)
        self._core.submit(submit)

    def _note_received(self, peer: Peer[_Call], message: Received) -> None:
        for call_id, num in message.tokens.items():
            call = peer.calls.get(call_id)
            if call is not None:
                call.answer.arrived(num)
        for call_id in message.ended:
            self._settle(peer.routing_id, call_id)

    def _settle(self, routing_id: bytes, call_id: CallId) -> None:
        """Tell the core that an answer that was sent whole has arrived."""
        call, _ = self._ended.pop((routing_id, call_id), (None, 0.0))
        if call is not None:
            call.answer.close()

    def _open(self, call: _Call) -> None:
        self.num_open += 1
        call.peer.calls[call.request.id] = call
        self.outbox.remember(call.peer)

    def _close(self, call: _Call) -> None:
        """Forget a call: its end is sent next. The core is told when the end has arrived."""
        self.num_open -= 1
        call.closed = True
        routing_id, call_id = call.peer.routing_id, call.request.id
        self._settle(routing_id, call_id)  # an earlier call of the same id
        if call.answer.submit is not None:
            self._ended[routing_id, call_id] = call, trio.current_time()
        call.peer.calls.pop(call.request.id, None)
        self.outbox.release(call.peer)

    def _cancel(self, call: _Call) -> None:
        if call.answer.submit is not None:
            self._core.cancel(Cancel(call.answer.submit.req_id))  # its `Finished` is still wanted
        else:  # still being tokenised
            self._close(call)
            self._send(call, CompletionDone(call.request.id, "abort"))

    def _abandon(self, peers: list[Peer[_Call]]) -> None:
        """Cancel the calls of clients that are gone, or were cut. Those that were cut get one error per lost call
        instead: few, since calls per client are bounded; new requests are dropped until it has read them."""
        for peer in peers:
            unfinished = dict.fromkeys([*peer.lost, *peer.calls])
            for call in peer.calls.values():
                self.num_open -= 1
                call.closed = True
                call.answer.cancel()
                self._log_end(call, "cut")
            peer.calls.clear()
            if peer.cut:
                error = Overloaded(
                    "the answers were not read in time and have been dropped; read faster or ask for less"
                )
                for call_id in unfinished:
                    self.outbox.post(peer, call_id, encode(CompletionDone(call_id, "error", error=error.info())))

    def _list_models(self, request: ModelsRequest) -> ModelList:
        try:
            tenant = self._directory.authenticate(request.api_key).tenant
        except KvasirError as error:
            self.num_refused += 1
            return ModelList(request.id, error=error.info())
        mine = models_of(tenant, self._core.models()).items()
        return ModelList(request.id, [ModelCard(name, info.max_context, info.num_workers) for name, info in mine])

    def _log_end(self, call: _Call, status: str) -> None:
        submit = call.answer.submit
        if submit is not None:
            tenant, request, tokens = submit.tenant_id, submit.req_id.hex(), call.answer.num_tokens
            ms = round((trio.current_time() - submit.arrived) * 1000)
            self._access("request", edge="zmq", status=status, tenant=tenant, request=request, tokens=tokens, ms=ms)

    def _refuse(self, peer: Peer[_Call], call_id: int, error: KvasirError) -> None:
        self.num_refused += 1
        self._access("request", edge="zmq", status=error.code)
        self.outbox.post(peer, call_id, encode(CompletionDone(call_id, "error", error=error.info())))

    # ---- core -> client ------------------------------------------------------------------------------------------

    def _mark(self, call: _Call) -> None:
        """Flush `call` soon."""
        if not self._dirty:
            self._flusher.unpark()
        self._dirty.append(call)

    def _send_posted(self) -> None:
        while lost := self.outbox.flush():
            self._abandon(lost)

    async def _retry_for_ever(self) -> None:
        while True:
            self._abandon(await self.outbox.retry())
            self._send_posted()

    async def _settle_for_ever(self) -> None:
        while True:
            await trio.sleep(self._limits.receipt_s / 5)
            until = trio.current_time() - self._limits.receipt_s
            while self._ended:
                key, (_, since) = next(iter(self._ended.items()))
                if since > until:
                    break
                self._settle(*key)

    async def _flush_for_ever(self) -> None:
        while True:
            if not self._dirty:
                await self._flusher.park()
            self.flush()
            await trio.lowlevel.checkpoint()

    def _flush_call(self, call: _Call) -> None:
        """Send what `call` has collected: at most one chunk, then its end if it has ended."""
        call.dirty = False
        if call.closed:
            return
        piece = call.answer.take()
        request = call.request
        if piece.parts or piece.text or (piece.token_ids and request.want_tokens):
            packed = piece.token_ids if request.want_tokens else b""
            text, parts = ("", joined(piece.parts)) if piece.parts else (piece.text, [])
            num_tokens = call.answer.num_tokens
            self._send(call, CompletionChunk(request.id, text, packed, piece.logprobs, parts, num_tokens))
            call.answer.posted()
        end = piece.finished
        if end is not None:
            self._close(call)
            self._log_end(call, end.reason)
            usage = Usage(end.num_prompt_tokens, end.num_output_tokens, end.num_cached_tokens)
            done = CompletionDone(request.id, end.reason, usage, end.worker_id, end.ttft_s, end.error, end.req_id.hex())
            self._send(call, done)

    def _send(self, call: _Call, message: GatewayMessage) -> None:
        self.outbox.post(call.peer, call.request.id, encode(message))


def _internal_error(bug: Exception) -> KvasirError:
    log("bug", where="zmq_edge", trace="".join(traceback.format_exception(bug)))
    return KvasirError("the gateway failed on this request; its log says how")


class _WithId(msgspec.Struct):
    """Just enough of a message to answer it."""

    id: CallId


_with_id = msgspec.msgpack.Decoder(_WithId)


def _recover_id(frame: bytes) -> int | None:
    """Return the id of a message that is otherwise malformed, if it has one."""
    try:
        return _with_id.decode(frame).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
