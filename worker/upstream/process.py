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
        code = trio.run(_Process(parse_options(argv), context).run)
    except* ConfigurationError as errors:
        log("cannot_start", error=str(_first(errors)))
    finally:
        context.destroy(linger=0)
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Process:
    """The workers of all upstreams, in one task tree. `run` returns the largest of their exit codes."""

    def __init__(self, options: Options, context: zmq.Context[Any]) -> None:
        self._options = options
        self._context = context
        self._slots = trio.CapacityLimiter(_max_streams(len(options.upstreams)))
        self._workers: list[UpstreamWorker] = []
        self._codes: list[int] = []

    async def run(self) -> int:
        async with trio.open_nursery() as watching:
            if self._options.exit_with_stdin:
                watching.start_soon(_watch_stdin, watching.cancel_scope)
            async with trio.open_nursery() as running, trio.open_nursery() as waiting:
                watching.start_soon(self._watch_signals, waiting.cancel_scope)
                for number, upstream in enumerate(self._options.upstreams):
                    waiting.start_soon(self._open, running, number, upstream)
            watching.cancel_scope.cancel()
        return max(self._codes, default=0)

    async def _open(self, running: trio.Nursery, number: int, upstream: UpstreamOptions) -> None:
        """Wait for an upstream, and start a worker for each of its ranks."""
        options = self._options
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        client = HttpClient(upstream.address, headers)
        base = options.worker_id if len(options.upstreams) == 1 else f"{options.worker_id}-{number}"
        server = Server(client, options.upstream_model)
        for rank in await wait_until_up(server, server.ranks):
            link = Link(open_socket(self._context, options.gateway), max_parts=MAX_COMMANDS)
            server = Server(client, options.upstream_model, rank, slots=self._slots)
            worker_id = base if rank is None else f"{base}-rank{rank}"
            worker = UpstreamWorker(Front(options, upstream, server, worker_id, link, self._context))
            self._workers.append(worker)
            running.start_soon(self._run_worker, worker)

    async def _run_worker(self, worker: UpstreamWorker) -> None:
        self._codes.append(await worker.run())

    async def _watch_signals(self, waiting: trio.CancelScope) -> None:
        """Have all workers leave in time, and nobody wait for an upstream. A second signal means: now."""
        deadline_s = self._options.drain_s
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for number in received:
                log("signal", name=signal.Signals(number).name)
                waiting.cancel()
                for worker in self._workers:
                    worker.drain(deadline_s)
                deadline_s = 0.0


async def _watch_stdin(scope: trio.CancelScope) -> None:
    while True:
        with suppress(PermissionError):  # a file is always readable, and nothing to wait for
            await trio.lowlevel.wait_readable(STDIN_FD)
        if not os.read(STDIN_FD, 4096):
            log("stdin_closed")
            scope.cancel()
            return


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
