"""What one routing decision costs the core, however long the prompt and however many the workers.

    python scripts/bench_decision.py [--tokens 1000,10000,100000] [--workers 8,64,512] [--blocks 1000000]
                                     [--tree FOLDER]... [--rounds 3]

The index holds `--blocks` blocks over all workers. Each prompt is a conversation of which one worker has nearly all and
some others a part; every decision books its reservations, and every prompt ends before the next batch. Timed is the CPU
of `Core.submit`, hashing excluded, and of the report that ends the prompt. With `--tree` other checkouts are measured
in turn with this one, round by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ.get("BENCH_TREE", str(Path(__file__).resolve().parent.parent)))

from kvasir.gateway.core.api import Event, Submit
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.messages import Command, Generate, Hello, Limits, Load, Output, Snapshot, StepReport
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens

_HERE = Path(__file__).resolve()
BLOCK_SIZE = 16
BATCH = 8
_ANSWER = pack_tokens((1,))


class NoSink:
    def put(self, event: Event) -> None: ...


def measure(num_tokens: int, num_workers: int, num_blocks: int, num_batches: int) -> list[tuple[float, float]]:
    """Return (submit, report) of each request in microseconds of CPU."""
    sent: list[tuple[bytes, Command]] = []
    core = Core(CoreConfig(b"p" * 16), lambda *pair: sent.append(pair), time.monotonic, epoch=b"bench")
    limits = Limits(64, 1 << 20, 8_192)
    prompts = [os.urandom(16 * (num_tokens // BLOCK_SIZE)) for _ in range(BATCH)]  # a chain is as good as its hashes
    steps: dict[bytes, int] = {}
    cached: dict[tuple[bytes, bytes], int] = {}  # blocks, by worker and prompt
    for i in range(num_workers):
        peer = b"%d" % i
        core.worker_hello(
            peer, Hello(PROTOCOL_VERSION, f"w{i}", peer, "demo", "f", "none", BLOCK_SIZE, 1 << 20, limits)
        )
        known = os.urandom(16 * (num_blocks // num_workers))
        for j, prompt in enumerate(prompts):
            share = 0.9 if i == j % num_workers else 0.5 if (i + j) % 4 == 0 else 0.0
            cached[peer, prompt] = int(share * len(prompt)) // 16
            known += prompt[: 16 * cached[peer, prompt]]
        core.worker_report(peer, Snapshot(0, known))
        steps[peer] = 0
    times = []
    token_ids, sink = bytes(4 * num_tokens), NoSink()
    for batch in range(num_batches):
        sent.clear()
        taken: dict[bytes, list[float]] = {}
        for i, prompt in enumerate(prompts):
            submit = _submit(b"%d/%d" % (batch, i), token_ids, num_tokens, prompt, sink)
            start = time.thread_time_ns()
            core.submit(submit)
            taken[submit.req_id] = [(time.thread_time_ns() - start) / 1_000]
        for peer, command in sent:
            if isinstance(command, Generate):
                steps[peer] += 1
                end = Output(command.req_id, 1, 0, _ANSWER, "length", cached[peer, command.prefix_hashes] * BLOCK_SIZE)
                report = StepReport(steps[peer], 0, Load(), [end])
                start = time.thread_time_ns()
                core.worker_report(peer, report)
                taken[command.req_id].append((time.thread_time_ns() - start) / 1_000)
        times += [(took[0], took[1]) for took in taken.values()]
    return times


def _submit(req_id: bytes, token_ids: bytes, num_tokens: int, prompt: bytes, sink: NoSink) -> Submit:
    return Submit(
        req_id=req_id,
        tenant_id="bench",
        model="demo",
        token_ids=token_ids,
        num_prompt_tokens=num_tokens,
        root=b"r" * 16,
        prefix_hashes=prompt,
        num_public_tokens=0,
        namespace=b"n" * 16,
        max_tokens=8,
        sampling=Sampling(),
        sink=sink,
        arrived=time.monotonic(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1000,10000,100000")
    parser.add_argument("--workers", default="8,64,512")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=40, help="of 8 prompts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout to measure in turn")
    args = parser.parse_args()
    cells = [(int(t), int(w)) for w in args.workers.split(",") for t in args.tokens.split(",")]
    if "BENCH_TREE" in os.environ:
        gc.disable()
        print(json.dumps([measure(*cell, args.blocks, args.batches) for cell in cells]))
        return
    trees = [_HERE.parent.parent, *args.tree]
    found: dict[tuple[Path, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for tree in trees:
            command = [sys.executable, str(_HERE), "--tokens", args.tokens, "--workers", args.workers]
            command += ["--blocks", str(args.blocks), "--batches", str(args.batches)]
            done = subprocess.run(command, env={**os.environ, "BENCH_TREE": str(tree)}, capture_output=True, check=True)
            for i, times in enumerate(json.loads(done.stdout)):
                found.setdefault((tree, i), []).extend(times)
    print(f"{'tokens':>8}{'workers':>9}  {'submit us: median':>18}{'p99':>9}{'per worker':>12}{'report us':>11}  tree")
    for i, (num_tokens, num_workers) in enumerate(cells):
        for tree in trees:
            times = found[tree, i]
            submits, reports = sorted(took[0] for took in times), sorted(took[1] for took in times)
            median = submits[len(submits) // 2]
            print(
                f"{num_tokens:8}{num_workers:9}  {median:18.0f}{submits[int(0.99 * len(submits))]:9.0f}"
                f"{median / num_workers:12.2f}{reports[len(reports) // 2]:11.0f}  {tree.name}",
                flush=True,
            )


if __name__ == "__main__":
    main()
