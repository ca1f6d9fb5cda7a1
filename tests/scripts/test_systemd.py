"""The systemd units: well-formed, as closed as the documentation says, and their command lines are ones we take."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvasir.gateway.__main__ import parse
from kvasir.worker.options import parse_options
from kvasir.worker.upstream.options import parse_options as parse_upstream_options

UNITS = Path(__file__).resolve().parents[2] / "scripts" / "systemd"
GATEWAY, WORKER, UPSTREAM = "kvasir-gateway.service", "kvasir-worker@.service", "kvasir-upstream@.service"
PYTHON = "/opt/kvasir/.venv/bin/python"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def command_of(unit: str, **values: str) -> list[str]:
    """Return the words of `ExecStart` behind "python -m MODULE", with `values` for the variables."""
    text = (UNITS / unit).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    line = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda match: values[match[1] or match[2]], line)
    words = shlex.split(line.replace("%H", "box").replace("%i", "gpu0"))
    assert words[0] == PYTHON
    return words[3:]


def test_the_gateway_takes_its_unit_s_command_line() -> None:
    words = command_of(
        GATEWAY,
        STATE_DIRECTORY="/var/lib/kvasir",
        RUNTIME_DIRECTORY="/run/kvasir",
        KVASIR_HTTP="127.0.0.1:8000",
        KVASIR_GATEWAY_ARGS="--model demo=/srv/models/demo",
    )
    config = parse(words)
    assert config.worker_endpoint == "ipc:///run/kvasir/workers/workers.sock"
    assert [(model.name, model.num_workers) for model in config.models] == [("demo", 0)]
    assert config.drain_s < seconds_to_stop(GATEWAY)


def test_a_worker_takes_its_unit_s_command_line_and_dials_the_gateway_s_socket() -> None:
    values = {"KVASIR_MODEL": "/srv/models/demo", "KVASIR_NAME": "demo", "KVASIR_WORKER_ARGS": "--kv-memory 60%"}
    options = parse_options(command_of(WORKER, **values))
    assert (options.gateway, options.worker_id) == ("ipc:///run/kvasir/workers/workers.sock", "box-gpu0")
    assert options.drain_s < seconds_to_stop(WORKER)


def test_a_worker_before_vllm_takes_its_unit_s_command_line() -> None:
    values = {"KVASIR_UPSTREAM": "http://127.0.0.1:8300", "KVASIR_NAME": "qwen", "KVASIR_UPSTREAM_ARGS": ""}
    options = parse_upstream_options(command_of(UPSTREAM, **values))
    assert (options.gateway, options.worker_id) == ("ipc:///run/kvasir/workers/workers.sock", "box-gpu0")
    assert [(one.address.host, one.address.port) for one in options.upstreams] == [("127.0.0.1", 8300)]
    assert options.drain_s < seconds_to_stop(UPSTREAM)


BECOME = """
import os, sys
def become(user, group, mask):
    os.umask(mask), os.setgroups([group]), os.setgid(group), os.setuid(user)
"""
GATEWAY_AS = (
    BECOME
    + """
import email.parser  # imported late otherwise, when Python's own folder may be out of reach
from kvasir.gateway.__main__ import main
become(64001, 64001, int(sys.argv.pop(1), 8))
main()
"""
)
PROBE_AS = (
    BECOME
    + """
import socket
become(64009, int(sys.argv[1]), 0)
with socket.socket(socket.AF_UNIX) as probe:
    probe.connect(sys.argv[2])
"""
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
def test_each_socket_of_the_unit_lets_its_own_group_in_and_no_other() -> None:
    ids = {"kvasir-gateway": "64001", "kvasir": "64002", "kvasir-worker": "64003"}
    unit = (UNITS / GATEWAY).read_text()
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        os.chown(name, 64001, 64001)
        Path(name).chmod(int(setting(unit, "RuntimeDirectoryMode"), 8))
        for line in re.findall(r"^ExecStartPre=\+(.*)$", unit, re.MULTILINE):
            words = [ids.get(word, word.replace("/run/kvasir", name)) for word in shlex.split(line)]
            subprocess.run(words, check=True, timeout=10)
        words = ["--state-dir", f"{name}/state", "--run-dir", name, "--http", "off"]
        config = parse(words)
        gateway = subprocess.Popen([sys.executable, "-c", GATEWAY_AS, setting(unit, "UMask"), *words])
        try:
            endpoints = (config.client_endpoints[0], config.worker_endpoint, config.admin_endpoint)
            sockets = [endpoint.removeprefix("ipc://") for endpoint in endpoints]
            wait_until(lambda: all(Path(path).exists() for path in sockets))

            def admits(path: str, group: str) -> bool:
                command = [sys.executable, "-c", PROBE_AS, ids[group], path]
                return subprocess.run(command, capture_output=True, timeout=10).returncode == 0

            assert [admits(path, "kvasir") for path in sockets] == [True, False, False]
            assert [admits(path, setting((UNITS / WORKER).read_text(), "Group")) for path in sockets] == [
                False,
                True,
                False,
            ]
        finally:
            gateway.terminate()
            gateway.wait(10)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def setting(unit: str, name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    return str(value)


def seconds_to_stop(unit: str) -> int:
    return int(setting((UNITS / unit).read_text(), "TimeoutStopSec"))


@needs_systemd
@pytest.mark.parametrize(("unit", "bound"), [(GATEWAY, 20), (WORKER, 45), (UPSTREAM, 20)])
def test_systemd_takes_the_units_and_finds_them_closed(unit: str, bound: int, tmp_path: Path) -> None:
    path = tmp_path / unit.replace("@.", "@gpu0.")
    path.write_text((UNITS / unit).read_text().replace(PYTHON, sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={bound}", "--no-pager", path]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
