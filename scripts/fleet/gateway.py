"""A Kvasir gateway before the servers, as a process in a folder of its own, and what can be asked of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvasir.cli.admin_client import ask
from kvasir.protocol.admin_messages import (
    ExplainQuery,
    ExplainReply,
    KeyCreate,
    KeyCreated,
    StatusQuery,
    StatusReply,
    TenantCreate,
    TenantReply,
)
from kvasir.protocol.errors import KvasirError
from scripts.fleet.environment import MODEL, MODEL_NAME, ROOT, Server

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 40


class Gateway:
    """Answers on `url`; `log` holds what it and its workers print."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def __init__(self, home: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "gateway.log"
        self._admin = home / "run" / "admin" / "admin.sock"
        self._process = process

    def key(self, tenant: str) -> str:
        """Make a tenant and return an API key of it."""
        ask(TenantCreate(name=tenant), TenantReply, path=self._admin)
        return ask(KeyCreate(tenant=tenant), KeyCreated, path=self._admin).key

    def status(self) -> StatusReply:
        return ask(StatusQuery(), StatusReply, path=self._admin)

    def predicted(self, request: str) -> tuple[int, int]:
        """Return how many cached tokens the router expected for a request's last attempt, and how many attempts it
        took."""
        receipts = ask(ExplainQuery(request=request), ExplainReply, path=self._admin).receipts
        return int(receipts[-1]["decision"]["chosen"]["num_cached_tokens"]), len(receipts)

    def wait_ready(self, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until `count` workers are ready."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the gateway exited with {self._process.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            with contextlib.suppress(KvasirError):
                if sum(worker.state == "ready" for worker in self.status().workers) == count:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"no {count} workers within {timeout_s} s:\n{self.log.read_text()[-4000:]}")


@contextlib.contextmanager
def running_gateway(
    servers: Sequence[Server], port: int, model: Path = MODEL, worker_args: str = ""
) -> Iterator[Gateway]:
    """A gateway with a worker before each server, or with one of our own; ready inside the block, stopped after it."""
    home = Path(tempfile.mkdtemp(prefix="fleet"))  # short: the paths of sockets are bounded
    command = [
        sys.executable,
        "-m",
        "kvasir.gateway",
        "--state-dir",
        str(home / "state"),
        "--run-dir",
        str(home / "run"),
    ]
    command += ["--http", f"127.0.0.1:{port}", "--model", f"{MODEL_NAME}={model}"]
    command += [f"--worker-args={worker_args}"] if worker_args else []
    for server in servers:
        command += ["--upstream", f"{MODEL_NAME}={server.url}"]
    with (home / "gateway.log").open("wb") as sink:
        # In a session of its own, as the servers are: a kernel may share its cores between sessions, not processes.
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(os.environ), stdout=sink, stderr=sink, start_new_session=True
        )
    gateway = Gateway(home, port, process)
    try:
        gateway.wait_ready(len(servers) or 1)
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)
