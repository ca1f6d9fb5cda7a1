"""The lab: what eviction policies make of a trace of requests, at any capacity, beside the clairvoyant optimum.

    python scripts/replay_trace.py cache --trace FILE... [--policy lru,optimum] [--capacity 1%,5%,10%,25%,50%]
                                         [--jobs N] [--json OUT] [--plot OUT.png]

A trace is JSON Lines, gzipped or not, one request per line: `t_ms`, `in_len`, `out_len` and `hash_ids`, the ids of the
prompt's blocks, of which each stands for its block and all before it. It is replayed through the product's own cache
(`scripts/replay_cache.py` says how). Hit rates are shares of all blocks, or tokens, of all prompts; capacities are
shares of the trace's distinct blocks, or numbers of blocks; the CPU time is that of the calls into the cache.

Policies are those of `cache.policies`; `optimum`, which knows the future; and any policy with `+hints` after its name:
then clients say honestly of every request whether the conversation goes on. `all`: every policy and the optimum.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from replay_cache import Trace, honest_hints, load_trace, replay, replay_optimum

from kvasir.cache.policies import POLICIES

OPTIMUM = "optimum"
HINTED = "+hints"


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the table. Rates from 0 to 1; `cpu_us_per_request` is None for the optimum, which runs no cache."""

    trace: str
    policy: str
    capacity_blocks: int
    capacity_share: float
    block_hit_rate: float
    token_hit_rate: float
    cpu_us_per_request: float | None


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    rows: list[Row] = []
    try:
        for path in args.trace:
            trace = load_trace(path)
            print(f"{trace.name}: {len(trace.requests):,} requests, {trace.num_distinct:,} distinct blocks", flush=True)
            of_trace = measure_all(trace, args.policy, args.capacity, args.jobs)
            print(render(of_trace), flush=True)
            rows += of_trace
    except (OSError, ValueError) as error:
        sys.exit(f"replay_trace: {error}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


def measure_all(
    trace: Trace, policies: Sequence[str], capacities: Sequence[float | int], num_jobs: int = 1
) -> list[Row]:
    """Measure every policy at every capacity, in `num_jobs` processes."""
    cells = [(policy, capacity) for policy in policies for capacity in capacities]
    num_jobs = min(num_jobs, len(cells))
    if num_jobs == 1:
        return [measure(trace, *cell) for cell in cells]
    fork = multiprocessing.get_context("fork")  # the trace is there then, and need not be sent
    with ProcessPoolExecutor(num_jobs, fork, _traces.append, (trace,)) as pool:
        return list(pool.map(_measure_cell, cells))


_traces: list[Trace] = []  # in a process of `measure_all`: the one that it works on, at the end


def _measure_cell(cell: tuple[str, float | int]) -> Row:
    return measure(_traces[-1], *cell)


def measure(trace: Trace, policy: str, capacity: float | int) -> Row:
    """Replay `trace` under `policy`. `capacity`: a share of its distinct blocks, or, an int, blocks."""
    num_blocks = capacity if isinstance(capacity, int) else max(1, int(capacity * trace.num_distinct + 1e-9))
    if policy == OPTIMUM:
        result = replay_optimum(trace, num_blocks)
    elif policy.endswith(HINTED):
        result = replay(trace, policy.removesuffix(HINTED), num_blocks, hints=honest_hints(trace))
    else:
        result = replay(trace, policy, num_blocks)
    return Row(
        trace=trace.name,
        policy=policy,
        capacity_blocks=num_blocks,
        capacity_share=num_blocks / trace.num_distinct,
        block_hit_rate=result.num_hits / max(1, trace.num_blocks),
        token_hit_rate=result.num_hit_tokens / max(1, sum(request.num_tokens for request in trace.requests)),
        cpu_us_per_request=None if policy == OPTIMUM else result.cpu_s * 1e6 / len(trace.requests),
    )


def render(rows: Sequence[Row]) -> str:
    """Return the table of one trace: block hit rates in percent, policy x capacity.

    With LRU and the optimum among the policies also which share of the gap between the two each of the others closes.
    """
    cells = {(row.policy, row.capacity_blocks): row for row in rows}
    policies, capacities = list(dict.fromkeys(p for p, _ in cells)), list(dict.fromkeys(c for _, c in cells))
    width = max(len(policy) for policy in policies) + 2
    shares = {row.capacity_blocks: f"{round(100 * row.capacity_share, 2):g}%" for row in rows}
    lines = ["block hit rate, %".ljust(width + 20), " " * width]
    lines[1] += "".join(shares[c].rjust(8) for c in capacities) + "   us/request"
    for policy in policies:
        rates = "".join(f"{100 * cells[policy, c].block_hit_rate:8.1f}" for c in capacities)
        times = [us for c in capacities if (us := cells[policy, c].cpu_us_per_request) is not None]
        lines.append(policy.ljust(width) + rates + (f"{sum(times) / len(times):13.0f}" if times else f"{'-':>13}"))
    others = [policy for policy in policies if policy not in ("lru", OPTIMUM)]
    if others and {"lru", OPTIMUM} <= set(policies):
        lines.append("share of the gap between lru and the optimum that is closed, %")
        for policy in others:
            lines.append(policy.ljust(width))
            for c in capacities:
                low, high = cells["lru", c].block_hit_rate, cells[OPTIMUM, c].block_hit_rate
                gained = cells[policy, c].block_hit_rate - low
                lines[-1] += f"{100 * gained / (high - low):8.0f}" if high > low else f"{'-':>8}"
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw block hit rate over capacity, one panel per trace, one line per policy, into the image `path`."""
    pyplot = _pyplot()
    traces = list(dict.fromkeys(row.trace for row in rows))
    figure, panels = pyplot.subplots(1, len(traces), figsize=(5.5 * len(traces), 4.2), squeeze=False, sharey=True)
    for panel, trace in zip(panels[0], traces, strict=True):
        for policy in dict.fromkeys(row.policy for row in rows):
            line = sorted(
                (100 * row.capacity_share, 100 * row.block_hit_rate)
                for row in rows
                if (row.trace, row.policy) == (trace, policy)
            )
            style = "--" if policy == OPTIMUM else "-"
            panel.plot([x for x, _ in line], [y for _, y in line], style, marker="o", markersize=3, label=policy)
        panel.set(title=trace, xscale="log", xlabel="capacity, % of the distinct blocks")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("block hit rate, %")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _pyplot() -> Any:
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        sys.exit("replay_trace: --plot needs matplotlib; pip install matplotlib, or leave --plot out")
    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    return pyplot


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replay_trace.py", description="Replay traces of requests.")
    command = parser.add_subparsers(dest="command", required=True).add_parser("cache", help="eviction policies")
    add = command.add_argument
    add("--trace", nargs="+", type=Path, required=True, metavar="FILE")
    add("--policy", type=_policies, default=_policies("all"), metavar="NAME,...", help=f"all, or of {_names()}")
    add("--capacity", type=_capacities, default=_capacities("1%,5%,10%,25%,50%"), metavar="SHARE,...", help="5%%, 4096")
    add("--jobs", type=_jobs, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    add("--json", type=Path, metavar="OUT", help="write the rows as a JSON list")
    add("--plot", type=Path, metavar="OUT.png", help="draw them (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot:
        _pyplot()  # before the work, not after it
    return args


def _names() -> str:
    return ", ".join([*POLICIES, OPTIMUM])


def _policies(text: str) -> list[str]:
    if text == "all":
        return [*POLICIES, OPTIMUM]
    names = text.split(",")
    for name in names:
        if name != OPTIMUM and name.removesuffix(HINTED) not in POLICIES:
            raise argparse.ArgumentTypeError(f"there is no policy {name!r}; choose of {_names()}")
    return names


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes; give 1 or more")
    return int(text)


def _capacities(text: str) -> list[float | int]:
    capacities: list[float | int] = []
    for item in text.split(","):
        try:
            capacity = float(item[:-1]) / 100 if item.endswith("%") else int(item)
        except ValueError:
            capacity = 0
        if not (0 < capacity <= 1 if item.endswith("%") else capacity >= 1):
            raise argparse.ArgumentTypeError(f"{item!r} is no capacity; give 5% of the distinct blocks, or 4096 blocks")
        capacities.append(capacity)
    return capacities


if __name__ == "__main__":
    main()
