"""A whole Kvasir on this machine, as processes, in a temporary directory: what the end-to-end and fault tests use."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from kvasir.cli.main import run

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "kvasir" / "demo_model"
START_TIMEOUT_S = 60


@dataclass
class Box:
    """A running gateway with its workers. `stderr` collects what all of them print."""

    home: Path
    process: subprocess.Popen[bytes]
    http_port: int
    stderr: Path
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def client_endpoint(self) -> str:
        return f"ipc://{self.home}/run/clients/client.sock"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def kvasir(self, *args: str, check: bool = True, **extra: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line against this box, in this process where that makes no difference."""
        environment = {"KVASIR_HOME": str(self.home), "NO_COLOR": "1"}
        if args[0] in ("gateway", "chat"):
            done = subprocess.run(
                [sys.executable, "-m", "kvasir", *args],
                cwd=ROOT,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                **extra,
            )
        else:
            out, err = io.StringIO(), io.StringIO()
            with (
                mock.patch.dict(os.environ, environment),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code = run(args)
            done = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
        assert not check or done.returncode == 0, done.stderr
        return done

    def json(self, *args: str) -> Any:
        return json.loads(self.kvasir(*args, "--json").stdout)

    def key(self, tenant: str) -> str:
        """Return an API key of `tenant`, made on first use."""
        if tenant not in self.keys:
            self.kvasir("tenant", "create", tenant)
            self.keys[tenant] = self.json("key", "create", tenant)["key"]
        return self.keys[tenant]

    def workers(self) -> list[dict[str, Any]]:
        return list(self.json("status")["workers"])

    def wait_for_workers(self, count: int, timeout_s: float = START_TIMEOUT_S, *, but: int | None = None) -> None:
        """Wait until `count` workers are ready, none of them the process `but`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway exited with {self.process.returncode}:\n{self.log()}")
            done = self.kvasir("status", "--json", check=False)
            if done.returncode == 0:
                ready = [w for w in json.loads(done.stdout)["workers"] if w["state"] == "ready" and w["pid"] != but]
                if len(ready) >= count:
                    return
            time.sleep(0.05)
        raise AssertionError(f"no {count} workers within {timeout_s} s:\n{self.log()}")

    def log(self) -> str:
        return self.stderr.read_text(errors="replace")

    def stop(self, timeout_s: float = 20) -> int:
        """SIGTERM, then wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        return int(self.process.returncode)


@contextlib.contextmanager
def open_box(
    *,
    model: str = str(DEMO_MODEL),
    name: str = "demo",
    workers: int = 2,
    worker_args: str = "",
    extra: Sequence[str] = (),
) -> Iterator[Box]:
    """Start a gateway with `workers` workers and wait until they are ready; everything is stopped at the end."""
    home = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    stderr = home / "stderr.log"
    port = free_port()
    with stderr.open("wb") as sink:
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "kvasir.gateway",
                    "--state-dir",
                    str(home / "state"),
                    "--run-dir",
                    str(home / "run"),
                ),
                *("--http", f"127.0.0.1:{port}", "--model", f"{name}={model}", "--workers", str(workers)),
                *("--restart-delays", "0.05", f"--worker-args={worker_args}", *extra),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=sink,
            stderr=sink,
        )
    box = Box(home, process, port, stderr)
    try:
        box.wait_for_workers(workers)
        yield box
    finally:
        box.stop()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
