"""The README's day of an operator, run as printed on a real gateway, with clients at work in between."""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.ledger_crash import House, open_house
from tests.readme import README

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[1]


def operator_lines() -> list[str]:
    found = re.search(r"<!-- operator:.*?-->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, "the README has lost its operator's day"
    return found[1].splitlines()


def ask(house: House, key: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
    """Ask for a whole answer; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", house.port, timeout=20)
    body = {"model": "demo", "prompt": "x", "ignore_eos": True, "max_tokens": 20, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"authorization": f"Bearer {key}"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, answer


class Stream(threading.Thread):
    """A long answer; `ended_at` and the last event tell how it ended."""

    def __init__(self, house: House, key: str) -> None:
        super().__init__(daemon=True)
        self._house, self._key = house, key
        self.begun = threading.Event()
        self.last = b""
        self.ended_at = 0.0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._house.port, timeout=30)
        body = {"model": "demo", "prompt": "x", "stream": True, "max_tokens": 1500, "ignore_eos": True, "logprobs": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"authorization": f"Bearer {self._key}"})
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data: {"):
                self.last = line
                self.begun.set()
        self.ended_at = time.monotonic()
        connection.close()


def test_the_operator_s_day_in_the_readme(tmp_path: Path) -> None:
    with open_house() as house:
        (tmp_path / "bin").mkdir()
        shim = tmp_path / "bin" / "kvasir"
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvasir "$@"\n')
        shim.chmod(0o755)
        environment = {**os.environ, "KVASIR_HOME": str(house.home), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"

        def sh(line: str) -> str:
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            return done.stdout

        stream: Stream | None = None
        shown = {}
        for line in operator_lines():
            if line.startswith("kvasir tenant show"):
                work(house, (tmp_path / "team.key").read_text().strip(), (tmp_path / "intern.key").read_text().strip())
                wait_for(lambda: counted(sh("kvasir usage --tenant research --json")) == (5, 2))
            if line.startswith("kvasir tenant delete"):
                stream = Stream(house, (tmp_path / "new-team.key").read_text().strip())
                stream.start()
                assert stream.begun.wait(20)
            shown[line.split("#")[0].strip()] = sh(line)
            deleted_at = time.monotonic()
        stream.join(20)
        assert stream.ended_at - deleted_at < 1.0, "a live stream outlived its tenant"
        assert b"was deleted" in stream.last
        tenant = shown["kvasir tenant show research"]
        assert (
            "600 requests per minute" in tenant and "250.00 per month" in tenant and "100000 tokens per day" in tenant
        )
        bill = shown["kvasir usage --tenant research --by model"]
        assert re.search(r"research +demo +5 +2 ", bill), bill
        [row] = csv.DictReader((tmp_path / "bill.csv").read_text().splitlines())
        assert int(row["output_tokens"]) == 5 * 20 and float(row["money"]) > 0
        assert "the audit trail is whole" in shown["kvasir audit verify"]
        assert {path.name for path in (tmp_path / "kvasir-backup").iterdir()} == {"kvasir.db", "ledger.db", "secret"}
        wait_for(lambda: counted(sh("kvasir usage --tenant research --json")) == (6, 2))  # the one cut off, too
        assert ask(house, (tmp_path / "team.key").read_text().strip())[0] == 401


def counted(usage: str) -> tuple[int, int]:
    """Return requests and refusals in what `kvasir usage --json` printed."""
    rows = json.loads(usage)["rows"]
    return sum(row["num_requests"] for row in rows), sum(row["num_refused"] for row in rows)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until what was settled a moment ago is written: rows are, some times a second."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the bill is not complete"
        time.sleep(0.1)


def work(house: House, team: str, intern: str) -> None:
    """Have five requests answered, and two refused that ask for more than the intern's day."""
    for key in (team, team, team, intern, intern):
        status, headers, answer = ask(house, key)
        assert status == 200, answer
        assert int(headers["x-ratelimit-limit-requests"]) == 600
    for _ in range(2):
        status, headers, answer = ask(house, intern, prompt=["x"] * 8, n=8, max_tokens=1_900)
        assert (status, answer["error"]["code"]) == (429, "insufficient_quota"), answer
        assert headers["x-should-retry"] == "false"
