"""A gateway's core and port in front of upstream workers and stand-ins for vLLM, all in one Trio thread."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
import zmq

from kvasir.gateway.core.api import Cancel, Delta, Event, Finished, Submit
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.notices import Lost, Notice
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.gateway.workers.port import WorkerPort
from kvasir.protocol.admin_records import WorkerInfo
from kvasir.protocol.link import Link, open_router
from kvasir.protocol.prefix import hash_prompt, split_hashes
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from kvasir.worker.dial import open_socket
from kvasir.worker.upstream.http_client import HttpClient
from kvasir.worker.upstream.incarnation import Front
from kvasir.worker.upstream.options import parse_options
from kvasir.worker.upstream.process import MAX_COMMANDS
from kvasir.worker.upstream.server import Server
from kvasir.worker.upstream.worker import UpstreamWorker
from scripts.standin.engine import EngineOptions, TokenModel
from scripts.standin.engine import Sampling as StandinSampling
from scripts.vllm_standin import Standin

ROOT, PUBLIC = b"r" * 16, b"p" * 16
BLOCK_SIZE = 16
GREEDY = Sampling(temperature=0.0)


class Answer:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.deltas: list[Delta] = []
        self.finished: Finished | None = None
        self.begun = trio.Event()
        self.ended = trio.Event()

    def put(self, event: Event) -> None:
        assert self.finished is None, "nothing comes after the end"
        if isinstance(event, Delta):
            self.deltas.append(event)
            self.tokens += unpack_tokens(event.token_ids)
            self.begun.set()
        else:
            self.finished = event
            self.begun.set()
            self.ended.set()

    async def end(self) -> Finished:
        with trio.fail_after(40):
            await self.ended.wait()
        return self.finished


class Fleet:
    """`core` serves model "demo" from the workers that `front` has started."""

    def __init__(self, tmp_path: Path, nursery: trio.Nursery, context: zmq.Context[Any], **config: Any) -> None:
        self.endpoint = f"ipc://{tmp_path}/workers.sock"
        self.context = context
        self.notices: list[Notice] = []
        self.workers: list[UpstreamWorker] = []
        self.codes: list[int] = []
        self._nursery = nursery
        self._config = config
        self._scopes: list[trio.CancelScope] = []
        self.port: WorkerPort
        self.core: Core

    async def start(self) -> None:
        """Begin, or begin anew after `stop`, as a gateway that was restarted."""
        liveness = self._config.pop(
            "liveness", LivenessConfig(heartbeat_s=0.1, max_missed_heartbeats=100, stall_s=10.0)
        )
        self.port = WorkerPort(open_router(self.context, [self.endpoint]), tick_s=0.02)
        config = CoreConfig(public_namespace=PUBLIC, root=lambda *_: ROOT, liveness=liveness, **self._config)
        self.core = Core(
            config,
            self.port.send,
            trio.current_time,
            epoch=os.urandom(8),
            notify=lambda notice: self.notices.append(notice),
        )
        self._gateway = trio.CancelScope()
        await self._nursery.start(self._run_gateway)

    async def _run_gateway(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._gateway:
            await self.port.run(self.core, task_status=task_status)

    def stop(self) -> None:
        """Let the gateway go, its socket too."""
        self._gateway.cancel()
        self.port._link.close()

    def front(self, url: str, *args: str, worker_id: str | None = None) -> UpstreamWorker:
        """Start a worker before one upstream."""
        number = len(self.workers)
        options = parse_options(
            ["--engine", "vllm", "--upstream", url, "--name", "demo", "--gateway", self.endpoint, *args]
        )
        link = Link(open_socket(self.context, self.endpoint), max_parts=MAX_COMMANDS)
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        server = Server(HttpClient(options.upstreams[0].address, headers), options.upstream_model)
        front = Front(options, options.upstreams[0], server, worker_id or f"w{number}", link, self.context)
        worker = UpstreamWorker(front)
        self.workers.append(worker)
        self._nursery.start_soon(self._run_worker, worker)
        return worker

    async def _run_worker(self, worker: UpstreamWorker) -> None:
        self.codes.append(await worker.run())

    async def ready(self, num_workers: int, *, exact: bool = True) -> None:
        """Wait until so many workers are in, and their cached prefixes are told by events."""
        await self.until(lambda: len(self.core.statistics().workers) == num_workers)
        if exact:
            await self.until(lambda: all(self.is_exact(worker) for worker in self.workers if worker._incarnation))

    def is_exact(self, worker: UpstreamWorker) -> bool:
        incarnation = worker._incarnation
        return incarnation is not None and incarnation._streams is not None and incarnation._cached.is_exact

    async def settle(self, *standins: Standin) -> None:
        """Wait until all that the stand-ins have published is in the gateway's index."""
        for standin, worker in zip(standins, self.workers, strict=True):
            await self.until(partial(self._holds_what_is_cached, standin, worker))

    def _holds_what_is_cached(self, standin: Standin, worker: UpstreamWorker) -> bool:
        incarnation = worker._incarnation
        index, worker_id = incarnation._cached.followed, incarnation._hello.worker_id
        cache = standin.engines[0].cache
        if set(index._blocks) != {cache._outside(name) for name in cache._copies} or not self.is_exact(worker):
            return False
        told = self.core._fleet.by_id[worker_id].index._resident
        return told == set(split_hashes(index.resident.snapshot()))

    async def until(self, condition: Any, timeout_s: float = 15.0) -> None:
        with trio.fail_after(timeout_s):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.005)

    def submit(
        self,
        tokens: Sequence[int],
        *,
        tenant: str = "alpha",
        max_tokens: int = 8,
        sampling: Sampling = GREEDY,
        **more: Any,
    ) -> tuple[bytes, Answer]:
        """Submit a request of token ids; return its id and what becomes of it."""
        answer, req_id, packed = Answer(), os.urandom(16), pack_tokens(tokens)
        namespace = tenant.encode().ljust(16, b".")
        self.core.submit(
            Submit(
                req_id=req_id,
                tenant_id=tenant,
                model="demo",
                token_ids=packed,
                num_prompt_tokens=len(tokens),
                root=ROOT,
                prefix_hashes=hash_prompt(ROOT, PUBLIC, namespace, packed, 0, BLOCK_SIZE),
                num_public_tokens=0,
                namespace=namespace,
                max_tokens=max_tokens,
                sampling=sampling,
                sink=answer,
                arrived=trio.current_time(),
                **more,
            )
        )
        return req_id, answer

    async def ask(self, tokens: Sequence[int], **more: Any) -> tuple[list[int], Finished]:
        """Submit, wait for the end, return tokens and end."""
        _, answer = self.submit(tokens, **more)
        return answer.tokens, await answer.end()

    def cancel(self, req_id: bytes) -> None:
        self.core.cancel(Cancel(req_id))

    def info(self, worker_id: str = "w0") -> WorkerInfo:
        return next(worker for worker in self.core.statistics().workers if worker.id == worker_id)

    def losses(self) -> list[Lost]:
        return [notice for notice in self.notices if isinstance(notice, Lost)]


@asynccontextmanager
async def running_fleet(
    tmp_path: Path, *standins: Standin, args: Sequence[str] = (), **config: Any
) -> AsyncIterator[Fleet]:
    """A fleet with a worker before each stand-in, ready; everything ends with the block."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        async with trio.open_nursery() as nursery:
            fleet = Fleet(tmp_path, nursery, context, **config)
            try:
                await fleet.start()
                for standin in standins:
                    fleet.front(standin.url, *args)
                if standins:
                    await fleet.ready(len(standins), exact="off" not in args and standins[0].options.events is not None)
                yield fleet
            finally:
                nursery.cancel_scope.cancel()
                fleet.port._link.close()
    finally:
        context.destroy(linger=0)


def oracle(tokens: Sequence[int], num_tokens: int, options: EngineOptions | None = None) -> list[int]:
    """Return what a stand-in that nothing happens to would answer."""
    model = TokenModel(options or EngineOptions(), tokens, StandinSampling(num_tokens, temperature=0.0))
    return [model.draw() for _ in range(num_tokens)]
