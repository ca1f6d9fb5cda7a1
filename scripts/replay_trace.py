"""The lab: what eviction policies and routing rules make of traces of requests, beside what no rule can beat.

    python scripts/replay_trace.py cache --trace FILE... [--policy lru,optimum] [--capacity 1%,5%,10%,25%,50%]
                                         [--jobs N] [--json OUT]
    python scripts/replay_trace.py route --trace FILE... [--policy kvasir,sglang,dynamo] [--workers 4,8,16]
                                         [--capacity 25%] [--load 0.5] [--spread 5] [--tenants 16] [--flood]
                                         [--weights 1:2:4] [--high 2] [--jobs N] [--json OUT]

`route` is described in `scripts/replay_route.py`; the rest of this page is about `cache`.

A trace is JSON Lines, gzipped or not, one request per line: `t_ms`, `in_len`, `out_len` and `hash_ids`, the ids of the
prompt's blocks, of which each stands for its block and all before it. It is replayed through the product's own cache
(`scripts/replay_cache.py` says how). Hit rates are shares of all blocks, or tokens, of all prompts; capacities are
shares of the trace's distinct blocks, or numbers of blocks; the CPU time is that of the calls into the cache.

Policies are those of `cache.policies`; `session_lru`, SGLang's; `optimum`, which knows the future. After a name may
come `+hints`: clients say honestly of every request whether the conversation goes on; `+intent`: they say no more than
which request is the last of its session; `+session` (of `two_heaps`): nothing but which session a request belongs to.
`all`: every policy of the product and the optimum. Sessions are described in `scripts/replay_sessions.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import replay_route
from replay_cache import Trace, honest_hints, load_trace, replay, replay_optimum
from replay_sessions import SessionLru, SessionTwoHeaps, last_words, sessions_of

from kvasir.cache.policies import POLICIES

OPTIMUM = "optimum"
SAID = ("", "hints", "intent")  # what clients say, after a policy's name
LAB: dict[str, Any] = {"session_lru": SessionLru, "two_heaps+session": SessionTwoHeaps}


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
    rows: list[Any] = []
    try:
        for path in args.trace:
            trace = load_trace(path)
            print(f"{trace.name}: {len(trace.requests):,} requests, {trace.num_distinct:,} distinct blocks", flush=True)
            if args.command == "cache":
                cells = [partial(measure, trace, policy, c) for policy in args.policy for c in args.capacity]
            else:
                cells = [partial(replay_route.measure, trace, cell) for cell in _route_cells(args)]
            of_trace = run_all(cells, args.jobs)
            print((render if args.command == "cache" else replay_route.render)(of_trace), flush=True)
            rows += of_trace
    except (OSError, ValueError) as error:
        sys.exit(f"replay_trace: {error}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def run_all(cells: Sequence[Callable[[], Any]], num_jobs: int = 1) -> list[Any]:
    """Return what every cell returns, in `num_jobs` processes."""
    num_jobs = min(num_jobs, len(cells))
    if num_jobs == 1:
        return [cell() for cell in cells]
    fork = multiprocessing.get_context("fork")  # the traces are there then, and need not be sent
    with ProcessPoolExecutor(num_jobs, fork, _cells.extend, (cells,)) as pool:
        return list(pool.map(_run_cell, range(len(cells))))


_cells: list[Callable[[], Any]] = []  # in a process of `run_all`


def _run_cell(index: int) -> Any:
    return _cells[index]()


def measure(trace: Trace, policy: str, capacity: float | int) -> Row:
    """Replay `trace` under `policy`. `capacity`: a share of its distinct blocks, or, an int, blocks."""
    num_blocks = capacity if isinstance(capacity, int) else max(1, int(capacity * trace.num_distinct + 1e-9))
    if policy == OPTIMUM:
        result = replay_optimum(trace, num_blocks)
    else:
        name, said = (policy, "") if policy in LAB else policy.partition("+")[::2]
        sessions = sessions_of(trace)
        hints = {"": None, "hints": honest_hints(trace), "intent": last_words(sessions)}[said]
        result = replay(trace, LAB.get(name, name), num_blocks, hints=hints, sessions=sessions if name in LAB else None)
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replay_trace.py", description="Replay traces of requests.")
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("cache", help="eviction policies")
    route = commands.add_parser("route", help="routing rules")
    for command in (cache, route):
        command.add_argument("--trace", nargs="+", type=Path, required=True, metavar="FILE")
    add = cache.add_argument
    add("--policy", type=_policies, default=_policies("all"), metavar="NAME,...", help=f"all, or of {_names()}")
    add("--capacity", type=_capacities, default=_capacities("1%,5%,10%,25%,50%"), metavar="SHARE,...", help="5%%, 4096")
    add = route.add_argument
    names, default = ", ".join(replay_route.POLICIES), ",".join(replay_route.DEFAULT_POLICIES)
    add("--policy", type=_routing_policies, default=_routing_policies(default), metavar="NAME,...", help=f"of {names}")
    add("--workers", type=_counts, default=[8], metavar="N,...")
    add("--capacity", type=_capacities, default=_capacities("25%"), metavar="SHARE,...", help="of all workers together")
    add("--load", type=_loads, default=_loads("0.5"), metavar="LOAD,...", help="0.5, native (the recorded times)")
    add("--spread", type=_count, default=1, metavar="N", help="run each load at N points within 5%% of it")
    add("--tenants", type=_count, default=1, metavar="N", help="conversations belong to so many tenants")
    add(
        "--weights", type=_weights, default=(1,), metavar="W:W:...", help="of the tenants, in turn (default: all alike)"
    )
    add("--high", type=_count, default=0, metavar="N", help="so many tenants are of the high class, the others low")
    add("--flood", action="store_true", help="one of the tenants floods")
    add("--slo", type=float, default=5.0, metavar="SECONDS", help="a first token within it counts as good")
    add("--step-tokens", type=_count, default=2048, metavar="N", help="prompt tokens in one step of Kvasir's workers")
    add("--step-ms", type=float, default=0.0, metavar="MS", help="what a step of theirs costs beside its tokens")
    add("--delay-ms", type=float, default=0.0, metavar="MS", help="one way between the gateway and them")
    for command in (cache, route):
        add = command.add_argument
        add("--jobs", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
        add("--json", type=Path, metavar="OUT", help="write the rows as a JSON list")
    args = parser.parse_args(argv)
    if args.command == "route" and args.flood and args.tenants < 2:
        parser.error("--flood needs several tenants: give --tenants 16")
    return args


def _route_cells(args: argparse.Namespace) -> list[replay_route.Cell]:
    return [
        replay_route.Cell(
            policy,
            num_workers,
            capacity,
            point,
            num_tenants=args.tenants,
            is_flooded=args.flood,
            slo_s=args.slo,
            step_tokens=args.step_tokens,
            step_s=args.step_ms / 1000,
            delay_s=args.delay_ms / 1000,
            weights=args.weights,
            num_high=args.high,
        )
        for num_workers in args.workers
        for capacity in args.capacity
        for load in args.load
        for policy in args.policy
        for point in spread(load, args.spread)
    ]


def spread(load: float | None, count: int) -> list[float | None]:
    """Return `count` loads evenly from 5 % less to 5 % more than `load`."""
    if load is None or count == 1:
        return [load]
    return [load * (0.95 + 0.1 * i / (count - 1)) for i in range(count)]


def _names() -> str:
    return ", ".join([*POLICIES, *LAB, OPTIMUM])


def _policies(text: str) -> list[str]:
    if text == "all":
        return [*POLICIES, OPTIMUM]
    names = text.split(",")
    for name in names:
        base, _, said = name.partition("+")
        if name not in (OPTIMUM, *LAB) and (base not in (*POLICIES, "session_lru") or said not in SAID):
            raise argparse.ArgumentTypeError(f"there is no policy {name!r}; choose of {_names()}")
    return names


def _routing_policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if not replay_route.is_policy(name):
            choice = ", ".join(replay_route.POLICIES)
            raise argparse.ArgumentTypeError(f"there is no routing policy {name!r}; choose of {choice}")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number that can be used here; give 1 or more")
    return int(text)


def _weights(text: str) -> tuple[int, ...]:
    return tuple(_count(item) for item in text.split(":"))


def _counts(text: str) -> list[int]:
    return [_count(item) for item in text.split(",")]


def _loads(text: str) -> list[float | None]:
    loads: list[float | None] = []
    for item in text.split(","):
        try:
            load = None if item == "native" else float(item)
        except ValueError:
            load = 0.0
        if load is not None and not 0 < load <= 10:
            raise argparse.ArgumentTypeError(f"{item!r} is no load; give 0.5, or native for the recorded times")
        loads.append(load)
    return loads


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
