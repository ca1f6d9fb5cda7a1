"""What the core's tests share: a bench with a clock that is set, a wire that is a list, and sinks that remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvasir.gateway.core.api import Delta, Event, Finished, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.notices import Notice
from kvasir.gateway.core.request import NORMAL, Request
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.messages import Command, Generate, Hello, Limits, Load, Output, StepReport
from kvasir.protocol.prefix import hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens, unpack_tokens

BLOCK_SIZE = 4
ROOT = b"r" * 16
PUBLIC = b"p" * 16
NAMESPACE = b"n" * 16


class RecordingSink:
    """Keeps events and asserts the contract: nothing after the one `Finished`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.finished: Finished | None = None

    def put(self, event: Event) -> None:
        assert self.finished is None, f"{event} came after {self.finished}"
        self.events.append(event)
        if isinstance(event, Finished):
            self.finished = event

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Delta) for token in unpack_tokens(event.token_ids)]


def make_hashes(tokens: Sequence[int], namespace: bytes = NAMESPACE) -> bytes:
    return hash_prompt(ROOT, PUBLIC, namespace, pack_tokens(tokens), 0, BLOCK_SIZE)


def make_submit(
    req_id: bytes = b"r1",
    tokens: Sequence[int] = tuple(range(10)),
    *,
    tenant: str = "alpha",
    model: str = "demo",
    max_tokens: int = 8,
    arrived: float = 0.0,
    **extra: Any,
) -> tuple[Submit, RecordingSink]:
    sink = RecordingSink()
    values: dict[str, Any] = {
        "req_id": req_id,
        "tenant_id": tenant,
        "model": model,
        "token_ids": pack_tokens(tokens),
        "num_prompt_tokens": len(tokens),
        "root": ROOT,
        "prefix_hashes": make_hashes(tokens),
        "num_public_tokens": 0,
        "namespace": NAMESPACE,
        "max_tokens": max_tokens,
        "sampling": Sampling(),
        "sink": sink,
        "arrived": arrived,
    }
    return Submit(**{**values, **extra}), sink


def make_request(submit: Submit, queued_at: float = 0.0, rank: int = NORMAL) -> Request:
    """Return `submit` as it waits, on a bill that nobody pays."""
    shares = Billing().admit([submit], queued_at)
    assert not isinstance(shares, KvasirError)
    return Request(submit, submit.token_ids, submit.prefix_hashes, queued_at, shares[0], rank=rank)


def make_hello(worker_id: str = "w1", incarnation: bytes = b"i1", **extra: Any) -> Hello:
    limits = Limits(extra.pop("max_requests", 4), extra.pop("max_context", 1000), extra.pop("max_step_tokens", 64))
    values: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "worker_id": worker_id,
        "incarnation": incarnation,
        "model": "demo",
        "fingerprint": "f1",
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "num_blocks": 500,
        "limits": limits,
    }
    return Hello(**{**values, **extra})


class Bench:
    """A core with nothing real around it. `sent` holds what was sent; peers in `dead` cannot be reached, which the core
    is told when a call of it has returned (`settle`)."""

    def __init__(self, *, billing: Billing | None = None, **config: Any) -> None:
        self.now = 100.0
        self.sent: list[tuple[bytes, Command]] = []
        self.dead: set[bytes] = set()
        self.lost: list[bytes] = []
        self.notices: list[Notice] = []
        self.steps: dict[bytes, int] = {}
        self.sinks: dict[bytes, RecordingSink] = {}
        values: dict[str, Any] = {"public_namespace": PUBLIC, "block_size": BLOCK_SIZE, **config}
        self.core = Core(
            CoreConfig(**values),
            self._send,
            lambda: self.now,
            epoch=b"epoch",
            notify=self.notices.append,
            billing=billing,
        )

    def _send(self, peer: bytes, command: Command) -> None:
        encode(command)
        if peer in self.dead:
            self.lost.append(peer)
        else:
            self.sent.append((peer, command))

    def settle(self) -> None:
        """Tell the core of the peers that could not be sent something, as the port does, and check its books.

        Not those of long simulations, where each check takes as long as what it checks.
        """
        while self.lost:
            self.core.worker_unreachable(self.lost.pop(0))
        if self.core.num_unfinished < 20:
            self.core.check_integrity()

    def join(self, worker_id: str = "w1", *, peer: bytes | None = None, **extra: Any) -> bytes:
        peer = worker_id.encode() if peer is None else peer
        self.core.worker_hello(peer, make_hello(worker_id, **extra))
        self.settle()
        return peer

    def submit(self, req_id: bytes = b"r1", tokens: Sequence[int] = tuple(range(10)), **extra: Any) -> RecordingSink:
        submit, sink = make_submit(req_id, tokens, arrived=self.now, **extra)
        self.sinks[req_id] = sink
        self.core.submit(submit)
        self.settle()
        return sink

    def report(self, peer: bytes, *outputs: Output, step: int | None = None, **extra: Any) -> None:
        """Send a step report; the step counter grows by itself. `load` and block events by keyword."""
        self.steps[peer] = self.steps.get(peer, 0) + 1
        extra.setdefault("event_seq", 0)
        extra.setdefault("load", Load(num_running=1))
        self.core.worker_report(
            peer, StepReport(step=self.steps[peer] if step is None else step, outputs=list(outputs), **extra)
        )
        self.settle()

    def take(self, kind: type = Generate) -> list[tuple[bytes, Any]]:
        """Return and forget what was sent of one kind of command."""
        self.settle()
        taken = [(peer, command) for peer, command in self.sent if isinstance(command, kind)]
        self.sent = [(peer, command) for peer, command in self.sent if not isinstance(command, kind)]
        return taken

    def pass_time(self, seconds: float, *, tick_s: float = 0.1) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + tick_s)
            self.core.tick()
            self.settle()


def output(
    req_id: bytes, seq: int, tokens: Sequence[int] = (), finish_reason: Any = None, *, attempt: int = 1, **extra: Any
) -> Output:
    return Output(req_id, attempt, seq, pack_tokens(tokens), finish_reason, **extra)
