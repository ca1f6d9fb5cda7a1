"""What the gateway costs: requests/s, latency and CPU per request of both edges, beside sglang-router, in one run.

    python scripts/bench_gateway.py [--quick] [--json OUT] [--router-python PATH]

Real gateway process, echo workers (`scripts/echo_worker.py`: no model, they answer at once), the bundled model's
tokenizer. The peer is `sglang-router` (Rust; policy cache_aware) over trivial HTTP backends that answer at once. It is
no dependency; to see its column, install it into an environment of its own and name that:

    python3 -m venv /tmp/sglang-router && /tmp/sglang-router/bin/pip install sglang-router==0.3.2
    python scripts/bench_gateway.py --router-python /tmp/sglang-router/bin/python

All HTTP columns are driven by the same generator: `wrk` (apt install wrk) if it is there, else our own over raw
sockets; the ZeroMQ columns by our own. Closed loop, `--connections` requests in flight. Rounds are interleaved, figures
are medians over rounds. CPU per request is what the gateway's process (all threads) used, from /proc/PID/stat: it is
the figure to compare, since rates depend on what generator and backends leave of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "kvasir" / "demo_model"
MODEL_NAME = "demo"
NUM_BACKENDS = 2
WRK_SCRIPT = """
local heads, tails, count = {}, {}, 0
function init(args)
  for line in io.lines(args[1]) do
    local at = line:find("@@@@@@@@", 1, true)
    heads[#heads + 1], tails[#tails + 1] = line:sub(1, at - 1), line:sub(at + 8)
  end
  math.randomseed(os.time())
  count = math.random(10000000, 90000000)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Authorization"] = "Bearer " .. args[2]
end
function request()
  count = count + 1
  local i = count % #heads + 1
  return wrk.format(nil, nil, nil, heads[i] .. string.format("%08d", count) .. tails[i])
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\\nRESULT {"requests": %d, "errors": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f}\\n',
    summary.requests, errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Sample:
    """One round of one column. `cpu_s`: what the gateway's process used."""

    requests: int
    errors: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Column:
    """One thing to measure: `drive(seconds)` makes load and reports; `pid` is the process whose CPU counts."""

    name: str
    pid: int
    drive: Callable[[float], Sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one short round of everything: does it work?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="per column and round")
    parser.add_argument("--connections", type=int, default=32, help="requests in flight")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--router-python", default=os.environ.get("SGLANG_ROUTER_PYTHON", sys.executable))
    parser.add_argument("--generator", choices=("wrk", "own"), default="wrk" if shutil.which("wrk") else "own")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.5
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb", dir="/tmp")))
        load = Load(args, work)
        columns = [*kvasir_columns(stack, work, load), *router_columns(stack, load, args.router_python)]
        samples: dict[str, list[Sample]] = {column.name: [] for column in columns}
        for column in columns:
            column.drive(min(1.0, args.seconds))  # warm up
        for round_ in range(args.rounds):
            for column in columns:
                before = cpu_seconds(column.pid)
                sample = column.drive(args.seconds)
                samples[column.name].append(Sample(**{**asdict(sample), "cpu_s": cpu_seconds(column.pid) - before}))
                print(
                    f"round {round_ + 1}/{args.rounds}  {column.name}: {sample.requests / sample.seconds:.0f}/s",
                    file=sys.stderr,
                )
    rows = [summarise(name, taken) for name, taken in samples.items()]
    print_table(rows, args)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(args), "rows": rows}, indent=1) + "\n")
    if any(row["errors"] for row in rows):
        sys.exit("some requests failed: the figures mean nothing")


# ---- the load ----------------------------------------------------------------------------------------------------


class Load:
    """The same prompts for every column: 64 conversations over 8 shared openings, so that prefixes repeat. Each request
    ends in a number of its own (`@@@@@@@@` stands for it), so that no whole prompt ever comes twice."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        import tokenizers

        self.args = args
        tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        source = Path(statistics.__file__).read_text()
        rng = random.Random(1)
        half = args.prompt_tokens // 2
        ids = tokenizer.encode(source, add_special_tokens=False).ids
        self.prompts: list[list[int]] = []
        self.texts: list[str] = []
        for opening in range(8):
            head = ids[opening * half : (opening + 1) * half]
            for _ in range(8):
                start = rng.randrange(len(ids) - half)
                prompt = head + ids[start : start + args.prompt_tokens - half]
                self.prompts.append(prompt)
                self.texts.append(tokenizer.decode(prompt[:-8]) + "@@@@@@@@")  # about a token per digit
        rng.shuffle(self.texts)
        self.bodies = {
            "completions": [self._body({"prompt": text}) for text in self.texts],
            "chat": [self._body({"messages": [{"role": "user", "content": text}]}) for text in self.texts],
        }
        self.files: dict[str, Path] = {}
        for api, bodies in self.bodies.items():
            self.files[api] = work / f"{api}.jsonl"
            self.files[api].write_text("\n".join(bodies) + "\n")
        self.script = work / "post.lua"
        self.script.write_text(WRK_SCRIPT)

    def _body(self, prompt: dict[str, Any]) -> str:
        return json.dumps({"model": MODEL_NAME, **prompt, "max_tokens": self.args.output_tokens, "temperature": 0})

    def http(self, port: int, api: str, key: str) -> Callable[[float], Sample]:
        """Return a driver of `POST /v1/...` on a local port."""
        path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        count = str(self.args.connections)

        def wrk(seconds: float) -> Sample:
            command = [
                "wrk",
                "-t1",
                "-c",
                count,
                "-d",
                f"{max(1, round(seconds))}s",
                "--latency",
                "-s",
                str(self.script),
            ]
            command += [f"http://127.0.0.1:{port}{path}", "--", str(self.files[api]), key]
            out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
            [line] = [line for line in out.splitlines() if line.startswith("RESULT ")]
            return Sample(**json.loads(line.removeprefix("RESULT ")))

        def own(seconds: float) -> Sample:
            return run_load("http", str(port), path, key, str(self.files[api]), count, str(seconds))

        return wrk if self.args.generator == "wrk" else own

    def zmq(self, endpoint: str, key: str, what: str, work: Path) -> Callable[[float], Sample]:
        """Return a driver of the ZeroMQ edge with "tokens" or "text" prompts; answers in the same form."""
        prompts = work / f"zmq-{what}.json"
        prompts.write_text(json.dumps(self.prompts if what == "tokens" else self.texts))
        rest = (str(self.args.connections), str(self.args.output_tokens))
        return lambda seconds: run_load("zmq", endpoint, key, str(prompts), *rest, str(seconds))


def run_load(*args: str) -> Sample:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "load_generator.py"), *args],
        capture_output=True,
        text=True,
        timeout=float(args[-1]) + 60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return Sample(**json.loads(done.stdout))


# ---- what is measured --------------------------------------------------------------------------------------------


def kvasir_columns(stack: contextlib.ExitStack, work: Path, load: Load) -> list[Column]:
    """Start a gateway and echo workers; return the columns of both edges."""
    port = free_port()
    home, run = work / "state", work / "run"
    endpoint = f"ipc://{run}/clients/client.sock"
    gateway = stack.enter_context(
        process(
            *("-m", "kvasir.gateway", "--state-dir", str(home), "--run-dir", str(run), "--http", f"127.0.0.1:{port}"),
            *("--model", f"{MODEL_NAME}={MODEL}", "--workers", "0"),
        )
    )
    wait_until(lambda: (run / "clients" / "client.sock").exists() and answers(port), "the gateway", gateway)
    for index in range(NUM_BACKENDS):
        stack.enter_context(
            process(
                "scripts/echo_worker.py",
                "--endpoint",
                f"ipc://{run}/workers/workers.sock",
                "--worker-id",
                f"echo-{index}",
                "--model",
                MODEL_NAME,
            )
        )
    key = make_key(work)
    from kvasir import Client, KvasirError

    def ready() -> bool:
        with Client(endpoint, key, timeout_s=10) as client:
            try:
                return client.models()[0].num_workers == NUM_BACKENDS and bool(client.generate([5], max_tokens=1))
            except KvasirError:
                return False

    wait_until(ready, "the echo workers", gateway)
    return [
        Column("kvasir HTTP completions", gateway.pid, load.http(port, "completions", key)),
        Column("kvasir HTTP chat", gateway.pid, load.http(port, "chat", key)),
        Column("kvasir ZeroMQ token ids", gateway.pid, load.zmq(endpoint, key, "tokens", work)),
        Column("kvasir ZeroMQ text", gateway.pid, load.zmq(endpoint, key, "text", work)),
    ]


def make_key(work: Path) -> str:
    """Create a tenant and return a key of it."""
    environment = {**os.environ, "KVASIR_HOME": str(work)}

    def kvasir(*args: str) -> str:
        command = [sys.executable, "-m", "kvasir", *args]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    kvasir("tenant", "create", "bench")
    return str(json.loads(kvasir("key", "create", "bench", "--json"))["key"])


def router_columns(stack: contextlib.ExitStack, load: Load, python: str) -> list[Column]:
    """Start sglang-router over trivial backends; return its columns, none if it is not installed."""
    if subprocess.run([python, "-c", "import sglang_router"], capture_output=True, check=False).returncode:
        print("sglang-router is not installed: its columns are left out (how to install it: --help)", file=sys.stderr)
        return []
    ports = [free_port() for _ in range(NUM_BACKENDS)]
    for port in ports:
        backend = stack.enter_context(
            process("scripts/load_generator.py", "backend", str(port), str(load.args.output_tokens))
        )
        wait_until(lambda port=port: answers(port), "a backend", backend)
    port = free_port()
    router = stack.enter_context(
        process(
            *("-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *[f"http://127.0.0.1:{backend}" for backend in ports], "--policy", "cache_aware"),
            *("--log-level", "error", "--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"),
            python=python,
        )
    )
    wait_until(lambda: posts(port, load.bodies["completions"][0]), "sglang-router", router)
    return [
        Column("sglang-router completions", router.pid, load.http(port, "completions", "none")),
        Column("sglang-router chat", router.pid, load.http(port, "chat", "none")),
    ]


# ---- processes and figures ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*args: str, python: str = sys.executable) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python *args` until the end of the block; what it printed is shown only if the block fails."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([python, *args], cwd=ROOT, stdout=output, stderr=output)
        try:
            yield child
        except Exception:
            output.seek(0)
            print(output.read()[-4000:].decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(5)


def wait_until(condition: Callable[[], bool], what: str, child: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if child.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start")
        time.sleep(0.1)


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def posts(port: int, body: str) -> bool:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body.encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summarise(name: str, samples: list[Sample]) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "name": name,
        "requests_per_s": median([sample.requests / sample.seconds for sample in samples]),
        "p50_ms": median([sample.p50_ms for sample in samples]),
        "p99_ms": median([sample.p99_ms for sample in samples]),
        "cpu_us_per_request": median([sample.cpu_s / sample.requests * 1e6 for sample in samples]),
        "errors": sum(sample.errors for sample in samples),
        "samples": [asdict(sample) for sample in samples],
    }


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line per column; ratios are to sglang-router's completions."""
    peers = [row for row in rows if row["name"] == "sglang-router completions"]
    print("  ".join(f"{key}={value}" for key, value in conditions(args).items()))
    print(f"{'':28}{'requests/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'CPU us/req':>12}{'rate ratio':>12}")
    for row in rows:
        ratio = f"{row['requests_per_s'] / peers[0]['requests_per_s']:.2f}x" if peers else "-"
        times = f"{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{row['cpu_us_per_request']:>12.0f}"
        print(f"{row['name']:28}{row['requests_per_s']:>11.0f}{times}{ratio:>12}")


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "generator": args.generator,
        "connections": args.connections,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "rounds": args.rounds,
        "seconds": args.seconds,
    }


if __name__ == "__main__":
    main()
