"""CPU microseconds of the core per request, in process: submit, route, encode nothing, take in the report, finish.

`python scripts/bench_core.py` prints one line per number of workers; `--profile` prints where the time goes. `--ledger`
runs without and with limits, budgets and a ledger on disk, in turn: a batch of 32 is one commit, whose CPU is counted.
`--database postgresql://...` adds a ledger there (an empty database); what its server spends is not counted.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.gateway.core.api import Event, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.ledger.database import open_ledger
from kvasir.gateway.ledger.writer import LedgerWriter
from kvasir.protocol import PROTOCOL_VERSION, terms
from kvasir.protocol.messages import Command, Generate, Hello, Limits, Load, Output, StepReport
from kvasir.protocol.prefix import hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens

BATCH = 32


class CountingSink:
    """Counts events."""

    def __init__(self) -> None:
        self.num_events = 0

    def put(self, event: Event) -> None:
        self.num_events += 1


def run(
    num_workers: int, num_requests: int, num_tokens: int, ledger_dir: Path | None = None, url: str = ""
) -> tuple[float, float]:
    """Return (median, 5th percentile) of the CPU microseconds per request over batches of 32.

    Every batch is submitted at once and answered in one report per worker. Half of each prompt is common to all. The
    percentile is what an undisturbed core needs; other processes and the collector only add to it.
    """
    outbox: list[tuple[bytes, Command]] = []

    def send(peer: bytes, command: Command) -> None:
        outbox.append((peer, command))

    billing, ledger = None, None
    if ledger_dir is not None:
        limits, budget = terms.Limits(10**9, 10**12, 10**12, 10**6), terms.Budget("money", "month", 10**15)
        granted = terms.Terms(limits, (budget,))
        database = open_ledger(ledger_dir, url)
        ledger = LedgerWriter(database, lambda bills, error: core.reserved(bills, error))
        billing = Billing(lambda payer_id: granted, lambda model: terms.Price(2_500, 250, 10_000), ledger)
    core = Core(CoreConfig(b"p" * 16), send, time.monotonic, epoch=b"bench", billing=billing)
    for i in range(num_workers):
        core.worker_hello(b"%d" % i, _hello(i))
    sink, answer = CountingSink(), pack_tokens(range(8))
    steps = dict.fromkeys((b"%d" % i for i in range(num_workers)), 0)
    batch_s = []
    for start in range(0, num_requests, BATCH):
        submits = [_submit(start + i, num_tokens, sink) for i in range(BATCH)]
        outbox.clear()
        begun = time.thread_time()
        for submit in submits:
            core.submit(submit)
        if ledger is not None:
            ledger.commit()
        took_s = time.thread_time() - begun
        outputs: dict[bytes, list[Output]] = {}
        for peer, command in outbox:
            if isinstance(command, Generate):
                outputs.setdefault(peer, []).append(Output(command.req_id, 1, 0, answer, "length", 0))
        reports = []
        for peer, batch in outputs.items():
            steps[peer] += 1
            stored = b"".join(os.urandom(16) for _ in batch)
            reports.append((peer, StepReport(steps[peer], steps[peer], Load(), batch, stored)))
        begun = time.thread_time()
        for peer, report in reports:
            core.worker_report(peer, report)
        if ledger is not None:
            for submit in submits:
                core.sent(submit.req_id, 8)
                core.closed(submit.req_id)
        batch_s.append(took_s + time.thread_time() - begun)
    assert sink.num_events == 2 * num_requests and core.num_unfinished == 0
    if ledger is not None:
        database.close()
    batch_s.sort()
    return batch_s[len(batch_s) // 2] / BATCH * 1e6, batch_s[len(batch_s) // 20] / BATCH * 1e6


def _hello(number: int) -> Hello:
    limits = Limits(max_requests=64, max_context=4096, max_step_tokens=512)
    return Hello(PROTOCOL_VERSION, f"w{number}", b"%d" % number, "demo", "f", "none", 16, 100_000, limits)


def _submit(number: int, num_tokens: int, sink: CountingSink) -> Submit:
    tokens = pack_tokens([*range(num_tokens // 2), *range(number, number + num_tokens - num_tokens // 2)])
    hashes = hash_prompt(b"r" * 16, b"p" * 16, b"n" * 16, tokens, 0, 16)
    return Submit(
        req_id=number.to_bytes(16, "little"),
        tenant_id="bench",
        model="demo",
        token_ids=tokens,
        num_prompt_tokens=num_tokens,
        root=b"r" * 16,
        prefix_hashes=hashes,
        num_public_tokens=0,
        namespace=b"n" * 16,
        max_tokens=8,
        sampling=Sampling(),
        sink=sink,
        key_id="key",
        arrived=time.monotonic(),
        deadline=time.monotonic() + 600.0,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000 // BATCH * BATCH)
    parser.add_argument("--tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--ledger", action="store_true", help="with and without limits, budgets and ledger, in turn")
    parser.add_argument("--database", default="", metavar="URL", help="with --ledger: PostgreSQL beside SQLite")
    parser.add_argument("--rounds", type=int, default=5, help="with --ledger")
    parser.add_argument("--profile", action="store_true", help="profile one run")
    parser.add_argument("--workers", type=int, default=2, help="of the profiled run")
    args = parser.parse_args()
    if args.profile:
        with cProfile.Profile() as profile:
            run(args.workers, args.requests, args.tokens)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    if args.ledger:
        for round_ in range(args.rounds):
            with tempfile.TemporaryDirectory(prefix="kvb") as folder:
                taken = {"without": run(args.workers, args.requests, args.tokens)}
                taken["SQLite"] = run(args.workers, args.requests, args.tokens, Path(folder))
                if args.database:
                    taken["PostgreSQL"] = run(args.workers, args.requests, args.tokens, Path(folder), args.database)
            lines = (f"{name} {median:.1f} (at best {low:.1f})" for name, (median, low) in taken.items())
            print(f"round {round_ + 1}, us per request: {', '.join(lines)}", flush=True)
        return
    for num_workers in (1, 2, 4, 8):
        median, low = run(num_workers, args.requests, args.tokens)
        print(f"{num_workers} workers, {args.tokens} tokens per prompt: {median:.1f} us per request, at best {low:.1f}")


if __name__ == "__main__":
    main()
