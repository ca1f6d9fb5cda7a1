"""Local workers as real processes: restarts, exit codes, the ladder, and the dead gateway's children."""

# ruff: noqa: ASYNC110, ASYNC240 (other processes write the files that are watched here)
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from kvasir.gateway.config import GatewayConfig, ModelConfig
from kvasir.gateway.core.notices import Joined, Lost
from kvasir.gateway.workers.supervisor import Supervisor, visible_devices, worker_command, worker_id
from kvasir.protocol.errors import ConfigurationError
from tests.core_helpers import make_hello

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[3]

WORKER = """
import sys, os, time, signal
name, log, behaviour = sys.argv[1:4]
with open(log, "a") as f: f.write(f"{name} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\\n")
print("cannot_start", 'error="no model at /nowhere; give another path"', file=sys.stderr, flush=True)
if behaviour.startswith("exit"): sys.exit(int(behaviour[4:]))
if behaviour == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "deaf": time.sleep(60)
sys.stdin.buffer.read()
"""


class Recorder:
    """Takes the core's place."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, int | None]] = []
        self.changed = trio.Event()

    def worker_lost(self, worker_id: str, reason: str, *, pid: int | None = None) -> None:
        self.lost.append((worker_id, pid))
        self.changed.set()
        self.changed = trio.Event()


class Stand:
    """A supervisor over scripts that behave as told, and the log that they write."""

    def __init__(self, tmp_path: Path, *behaviours: str, environ: dict[str, str] | None = None) -> None:
        self.core = Recorder()
        self.log = tmp_path / "log"
        self.log.touch()
        models = tuple(ModelConfig(f"m{i}", tmp_path, 1, (behaviour,)) for i, behaviour in enumerate(behaviours))
        config = GatewayConfig(tmp_path, tmp_path, models, restart_delays_s=(0.01, 0.05))
        self.supervisor = Supervisor(config, self.core, command=self._command, environ=environ or {})

    def _command(self, config: GatewayConfig, model: ModelConfig, number: int) -> list[str]:
        name = worker_id(model, number)
        return [sys.executable, "-S", "-E", "-c", WORKER, name, str(self.log), *model.worker_args]

    def starts(self) -> list[list[str]]:
        return [line.split(" ") for line in self.log.read_text().split("\n")[:-1]]  # whole lines only

    async def wait_for_starts(self, count: int) -> list[list[str]]:
        while len(self.starts()) < count:
            await trio.sleep(0.01)
        return self.starts()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await body()

    trio.run(main)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_worker_is_reported_with_its_pid_and_started_again(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "serve")
        async with stand.supervisor.running():
            [[name, pid, _]] = await stand.wait_for_starts(1)
            changed = stand.core.changed
            os.kill(int(pid), signal.SIGKILL)
            await changed.wait()
            assert stand.core.lost == [("m0-0", int(pid))]
            await stand.wait_for_starts(2)
            assert stand.supervisor.num_restarts() == {name: 1}
            assert stand.supervisor.local_workers() == {"m0-0": "m0"}
        assert not any(is_running(int(pid)) for _, pid, _ in stand.starts())

    run(body)


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path, monkeypatch) -> None:
    """No descriptors or processes left: an `OSError` here must not end the gateway."""
    open_process, num_failures = trio.lowlevel.open_process, 0

    async def fail_twice(*args: object, **kwargs: object) -> trio.Process:
        nonlocal num_failures
        if num_failures < 2:
            num_failures += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await open_process(*args, **kwargs)

    monkeypatch.setattr(trio.lowlevel, "open_process", fail_twice)

    async def body() -> None:
        stand = Stand(tmp_path, "serve")
        async with stand.supervisor.running():
            await stand.wait_for_starts(1)
            assert stand.supervisor.num_restarts() == {"m0-0": 2}
            assert list(stand.supervisor.local_workers()) == ["m0-0"]

    run(body)


def test_a_stalled_worker_is_killed_when_the_core_says_so_and_others_are_not(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "serve", "deaf")
        async with stand.supervisor.running():
            pids = {name: int(pid) for name, pid, _ in await stand.wait_for_starts(2)}
            victim = pids["m1-0"]
            stand.supervisor.notice(Lost("m1-0", victim, "link", "cannot be reached", 0))  # may come back by itself
            stand.supervisor.notice(Lost("m1-0", victim + 1, "stalled", "an earlier process", 0))
            os.kill(victim, signal.SIGSTOP)
            changed = stand.core.changed
            stand.supervisor.notice(Lost("m1-0", victim, "stalled", "made no step", 3))
            await changed.wait()
            assert stand.core.lost == [("m1-0", victim)]
            assert is_running(pids["m0-0"])

    run(body)


def test_a_configuration_error_is_not_tried_again_and_its_words_are_kept(tmp_path, capfd) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "serve", "exit2")
        async with stand.supervisor.running():
            await stand.wait_for_starts(2)
            while len(stand.supervisor.local_workers()) > 1:
                await trio.sleep(0.01)
            assert stand.supervisor.local_workers() == {"m0-0": "m0"}

    run(body)
    lines = capfd.readouterr().err
    assert '[m1-0] cannot_start error="no model at /nowhere' in lines
    assert "worker_given_up worker=m1-0 reason='no model at /nowhere; give another path'" in lines


def test_when_no_worker_can_start_the_gateway_is_told_why(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "exit2", "exit2")
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError, match="no worker can start; m.-0: no model at")):
            async with stand.supervisor.running():
                await trio.sleep_forever()
        assert len(stand.starts()) == 2

    run(body)


def test_a_worker_that_has_been_in_once_is_tried_again_whatever_its_exit_code(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "exit2")
        stand.supervisor.notice(Joined(make_hello("m0-0")))
        async with stand.supervisor.running():
            await stand.wait_for_starts(3)

    run(body)


def test_stopping_asks_first_and_then_kills_within_a_bound(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kvasir.gateway.workers.supervisor.TERMINATE_S", 0.3)

    async def body() -> None:
        stand = Stand(tmp_path, "serve", "deaf", "exit1")
        async with stand.supervisor.running():
            await stand.wait_for_starts(5)  # the third one is in its back-off by now, or starting
            begun = trio.current_time()
        assert trio.current_time() - begun < 5.0
        assert not any(is_running(int(pid)) for _, pid, _ in stand.starts())

    run(body)


def test_cancelling_ends_the_workers_too(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "serve")
        with trio.CancelScope() as scope:
            async with stand.supervisor.running():
                await stand.wait_for_starts(1)
                scope.cancel()
                await trio.sleep_forever()
        assert not any(is_running(int(pid)) for _, pid, _ in stand.starts())

    run(body)


def test_workers_do_not_outlive_a_gateway_that_is_killed(tmp_path) -> None:
    """Their stdin ends with it. The gateway here is a script that does nothing but supervise."""
    script = textwrap.dedent(
        f"""
        import trio
        from pathlib import Path
        from tests.gateway.workers.test_supervisor import Stand
        async def main():
            async with Stand(Path({str(tmp_path)!r}), "serve").supervisor.running():
                await trio.sleep_forever()
        trio.run(main)
        """
    )
    gateway = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "log"

    async def body() -> None:
        while not (log.exists() and log.read_text().endswith("\n")):
            await trio.sleep(0.02)
        pid = int(log.read_text().split(" ")[1])
        gateway.kill()
        gateway.wait(5)
        while is_running(pid):  # reparented, and reaped by whoever is init here
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            await trio.sleep(0.02)

    try:
        run(body)
    finally:
        gateway.kill()
        gateway.wait(5)


def test_each_worker_gets_a_device_of_its_own_where_there_are_several(tmp_path) -> None:
    async def body() -> None:
        stand = Stand(tmp_path, "serve", "serve", "serve", environ={"CUDA_VISIBLE_DEVICES": "4,6"})
        async with stand.supervisor.running():
            assert {(name, device) for name, _, device in await stand.wait_for_starts(3)} == {
                ("m0-0", "4"),
                ("m1-0", "6"),
                ("m2-0", "4"),
            }

    run(body)


def test_devices_are_those_of_the_environment_or_of_the_driver(tmp_path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_devices({}, tmp_path) == ["0", "2", "10"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-aa, 1"}, tmp_path) == ["GPU-aa", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_the_worker_command_names_model_gateway_and_block_size(tmp_path) -> None:
    model = ModelConfig("demo", Path("/models/demo"), 2, ("--kv-memory", "1G"))
    config = GatewayConfig(tmp_path, tmp_path, (model,), block_size=32)
    command = worker_command(config, model, 1)
    assert command[1:8] == ["-P", "-m", "kvasir.worker", "--model", "/models/demo", "--name", "demo"]
    assert command[8:] == [
        *("--worker-id", "demo-1", "--gateway", config.worker_endpoint, "--block-size", "32"),
        *("--exit-with-stdin", "--kv-memory", "1G"),
    ]


def test_each_upstream_of_a_model_has_a_worker_that_fronts_it_and_no_device(tmp_path) -> None:
    urls = ("http://127.0.0.1:8300", "http://127.0.0.1:8301")
    model = ModelConfig("demo", Path("/models/demo"), 7, ("--max-requests", "9"), urls)
    config = GatewayConfig(tmp_path, tmp_path, (model,))
    supervisor = Supervisor(config, Recorder(), environ={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert supervisor.local_workers() == {"demo-0": "demo", "demo-1": "demo"}
    assert [worker.argv[4:10] for worker in supervisor._workers] == [
        ["--engine", "vllm", "--upstream", url, "--name", "demo"] for url in urls
    ]
    assert all(worker.argv[-2:] == ["--max-requests", "9"] for worker in supervisor._workers)
    assert all(worker.env["CUDA_VISIBLE_DEVICES"] == "0,1" for worker in supervisor._workers)
