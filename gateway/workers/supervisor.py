"""Local workers as processes: started, watched, restarted with back-off, and ended by a ladder.

A worker's stdin is a pipe that only this process holds: when the gateway dies, however it dies, its workers see the
end of it and exit. They run in sessions of their own, so that Ctrl-C in a terminal reaches the gateway alone, which
then drains in its own order.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

import kvasir
from kvasir.gateway.config import GatewayConfig, ModelConfig
from kvasir.gateway.core.notices import Broken, Joined, Lost, Notice, Rejected
from kvasir.gateway.log import log
from kvasir.protocol.errors import ConfigurationError

EXIT_CONFIGURATION = 2  # a worker's code for what trying again cannot mend
PACKAGES = str(Path(kvasir.__path__[0]).resolve().parent)  # where our own package lies
HEALTHY_S = 60.0  # a worker that ran so long starts its back-off anew
TERMINATE_S = 5.0  # from SIGTERM to SIGKILL
LAST_WORDS_S = 1.0  # for output that a dead worker's children still hold
MAX_LINE_BYTES = 1 << 14
KILL_CAUSES = frozenset({"stalled", "silent", "forgot", "protocol"})  # alive, but no use


class LossSink(Protocol):
    """What the supervisor tells the core."""

    def worker_lost(self, worker_id: str, reason: str, *, pid: int | None = None) -> None: ...


@dataclass(slots=True, eq=False)
class LocalWorker:
    """One slot: the command and the process that runs it now. `failure`: why it is not tried again."""

    worker_id: str
    model: str
    argv: list[str]
    env: dict[str, str]
    process: trio.Process | None = None
    has_joined: bool = False
    num_restarts: int = 0
    last_line: str = ""
    failure: str = ""


def worker_command(config: GatewayConfig, model: ModelConfig, number: int) -> list[str]:
    """Return the command line of a model's local worker of that number."""
    work = ["--model", str(model.path)]
    if model.upstreams:
        work = ["--engine", "vllm", "--upstream", model.upstreams[number]]
    return [
        *(sys.executable, "-P", "-m", "kvasir.worker", *work, "--name", model.name),
        *("--worker-id", worker_id(model, number), "--gateway", config.worker_endpoint),
        *("--block-size", str(config.block_size), "--exit-with-stdin", *model.worker_args),
    ]


def worker_id(model: ModelConfig, number: int) -> str:
    """Return the name of a model's local worker of that number."""
    return f"{model.name}-{number}"


def visible_devices(environ: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """Return the CUDA devices that this process may hand out, by the names that CUDA_VISIBLE_DEVICES takes."""
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [name.strip() for name in names.split(",") if name.strip()]
    numbers = [path.name.removeprefix("nvidia") for path in dev.glob("nvidia*")]
    return sorted((number for number in numbers if number.isdecimal()), key=int)


class Supervisor:
    """Keeps the local workers of `config.models` running; where there are several devices, each gets one."""

    def __init__(
        self,
        config: GatewayConfig,
        core: LossSink,
        *,
        command: Callable[[GatewayConfig, ModelConfig, int], list[str]] = worker_command,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._core = core
        self._delays = config.restart_delays_s
        self._stopping = False
        self._workers: list[LocalWorker] = []
        devices = visible_devices(environ)
        for model in config.models:
            for number in range(len(model.upstreams) or model.num_workers):
                env = dict(environ)
                # `-P` keeps a folder called worker, wherever we were started, from being taken for ours.
                env["PYTHONPATH"] = os.pathsep.join(filter(None, (PACKAGES, environ.get("PYTHONPATH"))))
                if len(devices) > 1 and not model.upstreams:
                    env["CUDA_VISIBLE_DEVICES"] = devices[len(self._workers) % len(devices)]
                argv = command(config, model, number)
                self._workers.append(LocalWorker(worker_id(model, number), model.name, argv, env))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all workers, keep them running inside the block, end them with it: SIGTERM, a bounded wait, SIGKILL.

        Cancellation ends them too, within the same bound.

        Raises:
            ConfigurationError: none of the workers could start, and none of them ever will; in an exception group.
        """
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(self._keep, worker)
            try:
                yield
            finally:
                self._stopping = True
                with trio.CancelScope(shield=True):
                    await self._stop_all()
                nursery.cancel_scope.cancel()

    def notice(self, notice: Notice) -> None:
        """Log news of a worker; SIGKILL a local one that is alive but of no use, so that it is started anew."""
        match notice:
            case Joined(hello):
                log("worker_joined", worker=hello.worker_id, model=hello.model, device=hello.device, pid=hello.pid)
                for worker in self._workers:
                    worker.has_joined |= worker.worker_id == hello.worker_id
            case Rejected(hello, reason):
                log("worker_refused", worker=hello.worker_id, reason=reason)
            case Broken(req_id, trace):
                log("bug", where="core", request=req_id.hex(), trace=trace)
            case Lost(worker_id, pid, cause, reason, num_requests):
                log("worker_lost", worker=worker_id, cause=cause, reason=reason, handed_back=num_requests)
                for worker in self._workers:
                    process = worker.process if worker.worker_id == worker_id else None
                    if cause in KILL_CAUSES and process is not None and process.pid == pid:
                        process.kill()

    def num_restarts(self) -> dict[str, int]:
        """Return how often each local worker was started again."""
        return {worker.worker_id: worker.num_restarts for worker in self._workers}

    def local_workers(self) -> dict[str, str]:
        """Return the local workers' ids and models, but for those that are given up."""
        return {worker.worker_id: worker.model for worker in self._workers if not worker.failure}

    async def _keep(self, worker: LocalWorker) -> None:
        """Run one worker, again and again, until the supervisor stops or it cannot be mended."""
        num_failures = 0
        while not self._stopping:
            began = trio.current_time()
            code = await self._run(worker)
            if self._stopping:
                return
            if code == EXIT_CONFIGURATION and not worker.has_joined:
                self._give_up(worker)
                return
            num_failures = 0 if trio.current_time() - began >= HEALTHY_S else num_failures + 1
            delay_s = self._delays[min(max(num_failures, 1), len(self._delays)) - 1]
            log("worker_exited", worker=worker.worker_id, code=code, restart_in_s=delay_s)
            await trio.sleep(delay_s)
            worker.num_restarts += 1

    def _give_up(self, worker: LocalWorker) -> None:
        worker.failure = _reason(worker.last_line) or f"exit code {EXIT_CONFIGURATION}"
        log("worker_given_up", worker=worker.worker_id, reason=worker.failure)
        if all(other.failure for other in self._workers):
            raise ConfigurationError(f"no worker can start; {worker.worker_id}: {worker.failure}")

    async def _run(self, worker: LocalWorker) -> int | None:
        """Run one process to its end, its output forwarded; return the exit code, None if it could not be started.

        Cancellation kills it.
        """
        try:
            process = await trio.lowlevel.open_process(
                worker.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=worker.env,
            )
        except OSError as error:  # no descriptors, processes or memory left: perhaps there are some later
            worker.last_line = f"cannot be started: {error}"
            log("worker_start_failed", worker=worker.worker_id, error=str(error))
            return None
        worker.process = process
        assert process.stdin is not None and process.stdout is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_forward, worker, process.stdout)
                code = await process.wait()
                self._core.worker_lost(worker.worker_id, f"its process ended with code {code}", pid=process.pid)
                nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS_S
        finally:
            worker.process = None
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                await process.stdin.aclose()
                await process.stdout.aclose()
        return code

    async def _stop_all(self) -> None:
        """Ask all to end, wait, kill the rest. Each rung is bounded."""
        for number, wait_s in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, TERMINATE_S)):
            running = [worker.process for worker in self._workers if worker.process is not None]
            for process in running:
                process.send_signal(number)
                if process.stdin is not None:
                    await process.stdin.aclose()
            with trio.move_on_after(wait_s):
                for process in running:
                    await process.wait()
                return
            log("workers_do_not_end", signal=number.name)


async def _forward(worker: LocalWorker, stream: trio.abc.ReceiveStream) -> None:
    """Print a worker's output line by line with its id before it, and keep the last line."""
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _print_line(worker, line)
    if rest:
        _print_line(worker, rest)


def _reason(line: str) -> str:
    """Return the sentence in a worker's log line `event error="..."`, or the line if there is none."""
    found = re.search(r'\b(?:error|reason)=("(?:[^"\\]|\\.)*"|\S+)$', line)
    if found is None:
        return line
    try:
        return str(json.loads(found[1]))
    except ValueError:
        return found[1]


def _print_line(worker: LocalWorker, line: bytes) -> None:
    text = line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
    if text:
        worker.last_line = text
        try:
            print(f"[{worker.worker_id}] {text}", file=sys.stderr, flush=True)
        except OSError:
            pass
