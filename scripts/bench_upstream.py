"""What a worker in front of vLLM costs: the same load straight to a stand-in server, and through core and worker.

    python scripts/bench_upstream.py                                first tokens, requests/s, the worker's CPU
    python scripts/bench_upstream.py --url http://127.0.0.1:8300    the same before a real server

The stand-in (`scripts/vllm_standin.py`) and the worker are processes of their own; the core runs in this one, without
edges. Both ways alternate in one run. A stand-in draws tokens for nothing: what is measured is the way there and back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.gateway.core.api import Delta, Event, Submit
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.workers.port import WorkerPort
from kvasir.protocol.link import open_router
from kvasir.protocol.prefix import hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream.http_client import HttpClient, parse_url

ROOT = Path(__file__).resolve().parent.parent
KEY, NAMESPACE = b"r" * 16, b"n" * 16
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Sink:
    """Notes when the first token came, and wakes whoever waits for the end."""

    def __init__(self) -> None:
        self.first_at = 0.0
        self.ended = trio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.first_at = self.first_at or trio.current_time()
        else:
            assert event.error is None, event.error
            self.ended.set()


def make_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(5, 4000) for _ in range(num_tokens)]


async def ask_directly(client: HttpClient, prompt: list[int], max_tokens: int) -> float:
    """Return the seconds to the first token."""
    began, first_at = trio.current_time(), 0.0
    sampling = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    body = {"token_ids": prompt, "sampling_params": sampling, "stream": True, "stream_options": {"include_usage": True}}
    async with client.open("POST", "/inference/v1/generate", json.dumps(body).encode()) as stream:
        while (event := await stream.event()) is not None and event != b"[DONE]":
            first_at = first_at or trio.current_time()
    return first_at - began


async def ask_core(core: Core, prompt: list[int], max_tokens: int) -> float:
    """Return the seconds to the first token."""
    sink, packed, began = Sink(), pack_tokens(prompt), trio.current_time()
    core.submit(
        Submit(
            req_id=os.urandom(16),
            tenant_id="t",
            model="demo",
            token_ids=packed,
            num_prompt_tokens=len(prompt),
            root=KEY,
            prefix_hashes=hash_prompt(KEY, NAMESPACE, NAMESPACE, packed, 0, 16),
            num_public_tokens=0,
            namespace=NAMESPACE,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0),
            sink=sink,
            arrived=began,
            ignore_eos=True,
        )
    )
    with trio.fail_after(60):
        await sink.ended.wait()
    return sink.first_at - began


async def load(
    ask: Callable[[list[int], int], Awaitable[float]], args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Keep `args.connections` requests going for `args.seconds`; return what it came to."""
    firsts: list[float] = []
    began = trio.current_time()

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while trio.current_time() < began + args.seconds:
            firsts.append(await ask(make_prompt(rng, args.prompt_tokens), args.max_tokens))

    async with trio.open_nursery() as nursery:
        for number in range(args.connections):
            nursery.start_soon(client, number)
    wall_s = trio.current_time() - began
    return {
        "requests": len(firsts),
        "requests_per_s": len(firsts) / wall_s,
        "ttft_ms": 1000 * statistics.median(firsts),
    }


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        standin = worker = None
        context: zmq.Context[Any] = zmq.Context()
        try:
            url = args.url
            if url is None:
                step = ["--step-ms", str(args.step_ms), "--max-num-seqs", str(max(32, args.connections))]
                standin = start("scripts/vllm_standin.py", "--num-blocks", "20000", *step)
                assert standin.stdout is not None
                url = json.loads(standin.stdout.readline())["url"]
            endpoint = f"ipc://{folder}/w.sock"
            port = WorkerPort(open_router(context, [endpoint]))
            core = Core(
                CoreConfig(public_namespace=NAMESPACE, root=lambda *_: KEY),
                port.send,
                trio.current_time,
                epoch=b"bench",
            )
            worker = start(
                *("-m", "kvasir.worker", "--engine", "vllm", "--upstream", url, "--name", "demo", "--gateway", endpoint)
            )
            direct = HttpClient(parse_url(url))
            async with trio.open_nursery() as nursery:
                await nursery.start(port.run, core)
                with trio.fail_after(30):
                    while not core.statistics().workers:  # noqa: ASYNC110
                        await trio.sleep(0.05)
                for number in range(args.rounds):
                    before = cpu_s(worker.pid)
                    through = await load(lambda *given: ask_core(core, *given), args, 2 * number)
                    through["worker_cpu_ms"] = 1000 * (cpu_s(worker.pid) - before) / through["requests"]
                    straight = await load(lambda *given: ask_directly(direct, *given), args, 2 * number + 1)
                    rounds.append({"through": through, "direct": straight})
                nursery.cancel_scope.cancel()
        finally:
            for process in (worker, standin):
                if process is not None:
                    process.kill()
                    process.wait()
            context.destroy(linger=0)
    return {"connections": args.connections, "rounds": rounds}


def summary(result: dict[str, Any]) -> str:
    rounds = result["rounds"]

    def median(kind: str, name: str) -> float:
        return statistics.median(each[kind][name] for each in rounds)

    more_ms = statistics.median(each["through"]["ttft_ms"] - each["direct"]["ttft_ms"] for each in rounds)
    share = statistics.median(each["through"]["requests_per_s"] / each["direct"]["requests_per_s"] for each in rounds)
    cpu_ms = median("through", "worker_cpu_ms")
    return (
        f"{result['connections']:3d} connections: first token {median('direct', 'ttft_ms'):.2f} ms direct, "
        f"{more_ms:+.2f} ms through Kvasir; {median('direct', 'requests_per_s'):.0f} requests/s direct, "
        f"{share:.2f} of it through; the worker takes {cpu_ms:.2f} ms of CPU a request, "
        f"{1000 / cpu_ms:.0f} requests/s a core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="a vLLM server that is running, in the place of the stand-in")
    parser.add_argument("--connections", type=int, action="append", help="default: 1 and 16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=10.0, help="a decode step of the stand-in")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for connections in args.connections or (1, 16):
        args.connections = connections
        results.append(trio.run(measure, args))
        print(summary(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
