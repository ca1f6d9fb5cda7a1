"""Kill a real gateway under load, again and again, and compare its ledger with what clients have got.

    python scripts/ledger_crash.py [--kills 100] [--seed 1] [--database postgresql://...]

A gateway with the bundled model's text, one worker whose tokens cost no computing, streams and whole answers over HTTP
and ZeroMQ. SIGKILL at a random moment, start again, then: every row is settled, none twice; what a client was told is
there; nobody is billed for a token that did not arrive; and of a stream that was cut, what is not billed is told in
milliseconds. Prints one JSON line per kill and one at the end; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir import Client
from kvasir.errors import KvasirError
from kvasir.gateway.ledger.database import LEDGER_NAME, Database, Row
from kvasir.gateway.sql.places import open_reader

ROOT = Path(__file__).resolve().parent.parent
STEP_MS = 10  # per token
ORACLE = f"oracle:step_ms={STEP_MS},vocab=3000"
DEMO_MODEL = ROOT / "kvasir" / "demo_model"
MAX_TOKENS = {"stream": 120, "whole": 12, "sdk": 120}
KINDS = ("stream", "stream", "stream", "whole", "whole", "sdk", "sdk")


@dataclass
class Answer:
    """What a client got of one request. `ended`: all of it, by the gateway's word."""

    num_tokens: int = 0
    ended: bool = False
    first_at: float = 0.0


@dataclass
class Report:
    """What one kill came to."""

    num_rows: int = 0
    num_finished: int = 0
    num_lost: int = 0
    worst_unbilled_ms: float = 0.0
    ready_s: float = 0.0
    faults: list[str] = field(default_factory=list)


class House:
    """A gateway that can be killed and started again, and a worker that outlives it."""

    def __init__(self, home: Path, url: str = "", engine: str = ORACLE, *, worker_args: Sequence[str] = ()) -> None:
        self.home, self.url = home, url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log = (home / "log").open("wb")
        self.gateway = self._gateway()
        worker = ["-m", "kvasir.worker", "--gateway", f"ipc://{home}/run/workers/workers.sock", "--name", "demo"]
        worker += ["--model", engine, "--kv-memory", "64M", *worker_args]
        self.worker = self._start(*worker)
        self.wait_until_ready()

    def kvasir(self, *args: str) -> Any:
        """Run the command line with --json and return what it says."""
        done = subprocess.run(
            [sys.executable, "-m", "kvasir", *args, "--json"],
            env={**os.environ, "KVASIR_HOME": str(self.home), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    def kill(self) -> None:
        """SIGKILL the gateway."""
        self.gateway.send_signal(signal.SIGKILL)
        self.gateway.wait(10)

    def restart(self) -> float:
        """Start the gateway again; return after how many seconds it answers."""
        began = time.monotonic()
        self.gateway = self._gateway()
        while not self._health():
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_until_ready(self) -> None:
        """Wait until the worker has joined."""
        deadline = time.monotonic() + 60
        while self._health() != 200:
            if time.monotonic() > deadline:
                raise TimeoutError((self.home / "log").read_text(errors="replace")[-4000:])
            time.sleep(0.05)

    def close(self) -> None:
        for process in (self.gateway, self.worker):
            process.kill()
            process.wait(10)
        self.log.close()

    def _health(self) -> int:
        """Return the status of /health, 0 while nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def _gateway(self) -> subprocess.Popen[bytes]:
        args = ["--state-dir", f"{self.home}/state", "--run-dir", f"{self.home}/run", "--workers", "0"]
        args += ["--database", self.url]
        args += ["--http", f"127.0.0.1:{self.port}", "--model", f"demo={DEMO_MODEL}"]
        return self._start("-m", "kvasir.gateway", *args)

    def _start(self, *args: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *args], env=environment, stdout=self.log, stderr=self.log)


@contextlib.contextmanager
def open_house(url: str = "", engine: str = ORACLE, *, worker_args: Sequence[str] = ()) -> Iterator[House]:
    """Start a house in a folder of its own, whose worker computes with `engine`; all of it goes at the end."""
    home = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    (home / "state").mkdir()
    house = House(home, url, engine, worker_args=worker_args)
    try:
        yield house
    finally:
        house.close()
        shutil.rmtree(home, ignore_errors=True)


class Customer(threading.Thread):
    """Asks for one answer after the other with a key of its own, until the gateway is gone."""

    def __init__(self, house: House, key: str, kind: str) -> None:
        super().__init__(daemon=True)
        self.answers: list[Answer] = []
        self._house, self._key, self._kind = house, key, kind

    def run(self) -> None:
        try:
            while True:
                answer = Answer()
                self.answers.append(answer)
                if self._kind == "sdk":
                    self._ask_sdk(answer)
                else:
                    self._ask_http(answer, is_streamed=self._kind == "stream")
        except (OSError, http.client.HTTPException, KvasirError, ValueError):
            pass

    def _ask_http(self, answer: Answer, *, is_streamed: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._house.port, timeout=10)
        body = {"model": "demo", "messages": [{"role": "user", "content": "count"}], "logprobs": True}
        body |= {"stream": is_streamed, "max_tokens": MAX_TOKENS[self._kind], "ignore_eos": True}
        try:
            headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(response.read())
            if not is_streamed:
                answer.num_tokens = json.loads(response.read())["usage"]["completion_tokens"]
                answer.ended = True
                return
            while line := response.readline():
                if line.startswith(b"data: [DONE]"):
                    answer.ended = True
                elif line.startswith(b"data: "):
                    [choice] = json.loads(line[6:])["choices"]
                    answer.num_tokens += len((choice["logprobs"] or {"content": []})["content"])
                    answer.first_at = answer.first_at or time.monotonic()
        finally:
            connection.close()

    def _ask_sdk(self, answer: Answer) -> None:
        endpoint = f"ipc://{self._house.home}/run/clients/client.sock"
        with Client(endpoint, self._key, timeout_s=3) as client:
            stream = client.generate("count", max_tokens=MAX_TOKENS["sdk"], ignore_eos=True, stream=True)
            for chunk in stream:
                answer.num_tokens += len(chunk.token_ids)
                answer.first_at = answer.first_at or time.monotonic()
            answer.ended = True


def kill_once(house: House, keys: list[dict[str, str]], seen: set[bytes], rng: random.Random) -> Report:
    """Load, kill, start again, compare. `seen`: ids of rows of kills before, extended."""
    customers = [Customer(house, key["key"], kind) for key, kind in zip(keys, KINDS, strict=True)]
    for customer in customers:
        customer.start()
    time.sleep(rng.uniform(0.2, 2.0))
    house.kill()
    for customer in customers:
        customer.join(15)
    report = Report(ready_s=house.restart())
    house.wait_until_ready()
    rows = [row for row in read_rows(house) if row.id not in seen]
    seen |= {row.id for row in rows}
    report.num_rows = len(rows)
    if len({row.id for row in rows}) != len(rows):
        report.faults.append("an id has two rows")
    report.faults += [f"row {row.id.hex()} is not settled" for row in rows if row.settled_at is None]
    for key, customer in zip(keys, customers, strict=True):
        mine = sorted((row for row in rows if row.key_id == key["id"]), key=lambda row: row.admitted_at)
        compare(customer.answers, mine, report)
    return report


def compare(answers: list[Answer], rows: list[Row], report: Report) -> None:
    """Compare what one client got with its rows, one by one in order; its last request may have none."""
    if len(rows) > len(answers) or any(answer.num_tokens for answer in answers[len(rows) :]):
        report.faults.append(f"{len(answers)} answers, {len(rows)} rows")
    for answer, row in zip(answers, rows, strict=False):
        if row.output_tokens > answer.num_tokens:
            report.faults.append(f"row {row.id.hex()}: billed {row.output_tokens} tokens, {answer.num_tokens} arrived")
        if row.reason == "lost":
            report.num_lost += 1
            unbilled_ms = (answer.num_tokens - row.output_tokens) * STEP_MS
            report.worst_unbilled_ms = max(report.worst_unbilled_ms, unbilled_ms)
        else:
            report.num_finished += 1
            if row.output_tokens != answer.num_tokens:
                report.faults.append(f"row {row.id.hex()}: {row.output_tokens} tokens, {answer.num_tokens} arrived")


def read_rows(house: House) -> list[Row]:
    """Return the ledger's rows while a gateway has it open."""
    with contextlib.closing(open_reader(house.url or house.home / "state" / LEDGER_NAME)) as sql:
        return Database(sql).rows()


def run(num_kills: int, seed: int = 1, url: str = "") -> Iterator[Report]:
    """Kill a gateway so many times; one report each. `url`: of an empty PostgreSQL database; else SQLite."""
    rng = random.Random(seed)
    seen: set[bytes] = set()
    with open_house(url) as house:
        house.kvasir("tenant", "create", "acme")
        house.kvasir("price", "set", "demo", "--prompt", "0.25", "--cached", "0.025", "--output", "1")
        keys = [house.kvasir("key", "create", "acme") for _ in KINDS]
        for _ in range(num_kills):
            yield kill_once(house, keys, seen, rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", default="", metavar="URL", help="an empty PostgreSQL database (default: SQLite)")
    args = parser.parse_args()
    reports = []
    for report in run(args.kills, args.seed, args.database):
        reports.append(report)
        print(json.dumps(report.__dict__), flush=True)
    total = {
        "kills": len(reports),
        "rows": sum(report.num_rows for report in reports),
        "finished": sum(report.num_finished for report in reports),
        "lost": sum(report.num_lost for report in reports),
        "worst_unbilled_ms": max(report.worst_unbilled_ms for report in reports),
        "worst_ready_s": max(report.ready_s for report in reports),
        "faults": sum(len(report.faults) for report in reports),
    }
    print(json.dumps(total))
    return bool(total["faults"])


if __name__ == "__main__":
    sys.exit(main())
