"""A worker process in front of vLLM servers: `python -m kvasir.worker --engine vllm`. No torch.

One worker per upstream and data-parallel rank, each with a link of its own to the gateway; one task tree for all.
Exit codes as those of our own workers: 0 drained or left alone, 2 not able to start.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio
import zmq

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.link import Link
from kvasir.worker.dial import open_socket
from kvasir.worker.log import log
from kvasir.worker.upstream.http_client import HttpClient
from kvasir.worker.upstream.incarnation import EXIT_REFUSED, Front
from kvasir.worker.upstream.options import Options, UpstreamOptions, parse_options
from kvasir.worker.upstream.server import Server, wait_until_up
from kvasir.worker.upstream.worker import UpstreamWorker

STDIN_FD = 0
DESCRIPTORS, DESCRIPTORS_PER_UPSTREAM = 32, 16  # kept for what is no stream: links, events, questions
MAX_COMMANDS = 1 << 16  # in one message of the gateway's, which packs all that it has for us: credits bound it


def main(argv: Sequence[str]) -> int:
    """Run the process; return its exit code."""
    context: zmq.Context[Any] = zmq.Context()
    code = EXIT_REFUSED
    try:
        code = trio.run(_run, parse_options(argv), context)
    except* ConfigurationError as errors:
        log("cannot_start", error=str(_first(errors)))
    finally:
        context.destroy(linger=0)
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _run(options: Options, context: zmq.Context[Any]) -> int:
    slots = trio.CapacityLimiter(_max_streams(len(options.upstreams)))
    servers = [_Ranks(options, upstream, number, context, slots) for number, upstream in enumerate(options.upstreams)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, servers, options.drain_s)
        if options.exit_with_stdin:
            nursery.start_soon(_watch_stdin, nursery.cancel_scope)
        async with trio.open_nursery() as running:
            for ranks in servers:
                running.start_soon(ranks.run)
        nursery.cancel_scope.cancel()
    return max(code for ranks in servers for code in ranks.codes or [0])


def _max_streams(num_upstreams: int) -> int:
    """Raise the bound of open descriptors as far as we may; return how many of them streams may take.

    Without that bound a process that has none left would take its servers for dead.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # "unlimited" can be more than the kernel gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    return limit - min(limit // 2, DESCRIPTORS + DESCRIPTORS_PER_UPSTREAM * num_upstreams)


class _Ranks:
    """One upstream: waited for, then a worker for each of its ranks. `codes`: their exit codes."""

    def __init__(
        self,
        options: Options,
        upstream: UpstreamOptions,
        number: int,
        context: zmq.Context[Any],
        slots: trio.CapacityLimiter,
    ) -> None:
        self._options = options
        self._upstream = upstream
        self._number = number
        self._context = context
        self._slots = slots
        self._workers: list[UpstreamWorker] = []
        self._waiting = trio.CancelScope()
        self.codes: list[int] = []

    async def run(self) -> None:
        options = self._options
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        client = HttpClient(self._upstream.address, headers)
        base = options.worker_id if len(options.upstreams) == 1 else f"{options.worker_id}-{self._number}"
        ranks: list[int | None] = []
        with self._waiting:
            server = Server(client, options.upstream_model)
            ranks = await wait_until_up(server, server.ranks)
        async with trio.open_nursery() as nursery:
            for rank in ranks:
                link = Link(open_socket(self._context, options.gateway), max_parts=MAX_COMMANDS)
                server = Server(client, options.upstream_model, rank, slots=self._slots)
                worker_id = base if rank is None else f"{base}-rank{rank}"
                worker = UpstreamWorker(Front(options, self._upstream, server, worker_id, link, self._context))
                self._workers.append(worker)
                nursery.start_soon(self._run_worker, worker, link)

    def drain(self, deadline_s: float) -> None:
        """Have all workers leave; one that still waits for its upstream leaves at once."""
        self._waiting.cancel()
        for worker in self._workers:
            worker.drain(deadline_s)

    async def _run_worker(self, worker: UpstreamWorker, link: Link) -> None:
        try:
            self.codes.append(await worker.run())
        finally:
            link.close()


async def _watch_signals(servers: list[_Ranks], deadline_s: float) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        async for number in received:
            log("signal", name=signal.Signals(number).name)
            for ranks in servers:
                ranks.drain(deadline_s)
            deadline_s = 0.0  # the second one means: now


async def _watch_stdin(scope: trio.CancelScope) -> None:
    while True:
        await trio.lowlevel.wait_readable(STDIN_FD)
        if not os.read(STDIN_FD, 4096):
            log("stdin_closed")
            scope.cancel()
            return
