"""The systemd units: well-formed, as closed as the documentation says, and their command lines are ones we take."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvasir.gateway.__main__ import parse
from kvasir.worker.options import parse_options

UNITS = Path(__file__).resolve().parents[2] / "scripts" / "systemd"
GATEWAY, WORKER = "kvasir-gateway.service", "kvasir-worker@.service"
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
    assert config.worker_endpoint == "ipc:///run/kvasir/workers.sock"
    assert [(model.name, model.num_workers) for model in config.models] == [("demo", 0)]
    assert config.drain_s < seconds_to_stop(GATEWAY)


def test_a_worker_takes_its_unit_s_command_line_and_dials_the_gateway_s_socket() -> None:
    values = {"KVASIR_MODEL": "/srv/models/demo", "KVASIR_NAME": "demo", "KVASIR_WORKER_ARGS": "--kv-memory 60%"}
    options = parse_options(command_of(WORKER, **values))
    assert (options.gateway, options.worker_id) == ("ipc:///run/kvasir/workers.sock", "box-gpu0")
    assert options.drain_s < seconds_to_stop(WORKER)


def seconds_to_stop(unit: str) -> int:
    (value,) = re.findall(r"^TimeoutStopSec=(\d+)$", (UNITS / unit).read_text(), re.MULTILINE)
    return int(value)


@needs_systemd
@pytest.mark.parametrize(("unit", "bound"), [(GATEWAY, 20), (WORKER, 45)])
def test_systemd_takes_the_units_and_finds_them_closed(unit: str, bound: int, tmp_path: Path) -> None:
    path = tmp_path / unit.replace("@.", "@gpu0.")
    path.write_text((UNITS / unit).read_text().replace(PYTHON, sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={bound}", "--no-pager", path]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
