"""Kvasir in front of two real vLLM servers: exact predictions, tenants apart, streams that survive, others beside it.

    python scripts/fleet_check.py --env DIR                          the checks; exits with 1 if one does not hold
    python scripts/fleet_check.py --env DIR --compare --trace FILE   a trace through Kvasir and other routers
    python scripts/fleet_check.py --standin                          the checks over two stand-ins, in half a minute;
                                                                     --compare too, but for what asks for a tokenizer

`--env DIR`: where the environments are made on the first run, which takes minutes: vLLM's CPU build in DIR/vllm, the
routers in DIR/routers. Each server takes about 3 GB and a core. One server has blocks of 32 tokens and one the default,
128 on a CPU; both pools are small, so that blocks are evicted all the time.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.fleet.chat import ChatLoad
from scripts.fleet.checks import Exactness, Isolation, Survival, check_exactness, check_isolation, check_survival
from scripts.fleet.environment import (
    CacheFigures,
    Server,
    ServerSettings,
    make_routers,
    make_vllm,
    running,
    standin_server,
    vllm_server,
)
from scripts.fleet.gateway import running_gateway
from scripts.fleet.routers import ROUTER_BLOCK_SIZE, Leg, legs, read_load, run_leg

TENANTS = ("amber", "birch", "cedar")
EXACT_SHARE_OF_MANY = 0.97
HIT_SHARE = 0.5
ERROR_SHARE = 0.01


def make_servers(given: argparse.Namespace, logs: Path, block_sizes: Sequence[int | None]) -> list[Server]:
    servers = []
    for number, block_size in enumerate(block_sizes):
        settings = ServerSettings(
            f"server-{number}", given.port + 10 * number, block_size, given.pool_tokens // (block_size or 128)
        )
        log = logs / f"{settings.name}.log"
        servers.append(
            standin_server(settings, log) if given.standin else vllm_server(make_vllm(given.env), settings, log)
        )
    return servers


def check(given: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Run everything and return the figures and what does not hold."""
    servers = make_servers(given, logs, (32, None))
    with running(servers), running_gateway(servers, given.port + 50) as gateway:
        keys = [gateway.key(tenant) for tenant in TENANTS]
        load = ChatLoad(gateway, keys, given.conversations, given.seed)
        load.run(given.turns // 2, 1)  # until the pools are full
        phases = [check_exactness(load, servers, given.turns, num_in_flight) for num_in_flight in (1, 8)]
        isolation = check_isolation(gateway, keys, servers)
        survival = check_survival(gateway, keys, servers, given.streams)
        after = check_exactness(load, servers, max(8, given.turns // 4), 1)
    return {
        "phases": [_shown(phase) for phase in (*phases, after)],
        "isolation": asdict(isolation),
        "survival": asdict(survival),
        "fails": [*_complaints(phases, isolation, survival), *_complaints_after(after)],
    }


def _shown(phase: Exactness) -> dict[str, Any]:
    shares = {name: getattr(phase, name) for name in ("exact_share", "hit_share", "error_share", "is_told_right")}
    return {**asdict(phase), **shares}


def _complaints(phases: list[Exactness], isolation: Isolation, survival: Survival) -> list[str]:
    one, many = phases
    rules = {
        "with one request in flight every prediction is exact": one.num_exact == one.num_requests,
        f"with eight at least {EXACT_SHARE_OF_MANY:.0%} are": many.exact_share >= EXACT_SHARE_OF_MANY,
        f"hits are at least {HIT_SHARE:.0%}": all(phase.hit_share >= HIT_SHARE for phase in phases),
        "evictions go on": all(phase.num_evicted > 0 for phase in phases),
        f"|predicted - actual| is at most {ERROR_SHARE:.0%}": all(phase.error_share <= ERROR_SHARE for phase in phases),
        "clients are told what the servers count": all(phase.is_told_right for phase in phases),
        "a tenant hits its own prompt": isolation.own_hit > 0,
        "another tenant's equal prompt hits nothing": isolation.other_hit == 0,
        "streams ran on the server that was killed": survival.num_on_the_dead > 0 and survival.num_moved > 0,
        "every stream ends whole": survival.num_whole == survival.num_streams and not survival.errors,
    }
    return [rule for rule, holds in rules.items() if not holds]


def _complaints_after(phase: Exactness) -> list[str]:
    return [] if phase.num_exact == phase.num_requests else ["exact again after the killed server has come back"]


def compare(given: argparse.Namespace, logs: Path) -> list[dict[str, Any]]:
    """Run every leg, in turn `--rounds` times, and return their figures."""
    load = read_load(given.trace, given.requests, given.tokens_per_block, given.one_of)
    programs = make_routers(given.env)
    servers = make_servers(given, logs, (ROUTER_BLOCK_SIZE, ROUTER_BLOCK_SIZE))
    results: list[Leg] = []
    with running(servers):
        ways = legs(programs, servers, given.port + 50, logs)
        for number in range(given.rounds):
            wanted = [name for name in ways if any(text in name for text in given.only or [""])]
            names = [name for name in wanted if not (given.standin and "kv_aware" in name)]
            for name in names if number % 2 == 0 else reversed(names):
                results.append(run_leg(name, ways[name], load, servers, given.in_flight))
                print_legs(results[-1:], with_head=len(results) == 1)
    if given.rounds > 1:
        print(f"\nmeans of {given.rounds} rounds")
        means = [mean_of([leg for leg in results if leg.name == name]) for name in names]
        print_legs(means, with_head=True)
    return [{**asdict(leg), "hit_share": leg.hit_share} for leg in results]


def mean_of(same: Sequence[Leg]) -> Leg:
    """The mean of several rounds of one leg; counts are summed."""
    return Leg(
        same[0].name,
        sum(leg.num_requests for leg in same),
        sum(leg.num_errors for leg in same),
        sum((leg.figures for leg in same), CacheFigures()),
        *(fmean(getattr(leg, name) for leg in same) for name in ("ttft_mean_ms", "ttft_p99_ms", "requests_per_s")),
    )


def print_legs(shown: Sequence[Leg], *, with_head: bool) -> None:
    if with_head:
        print("through                    requests  errors  hits     TTFT mean ms  TTFT p99 ms  requests/s")
    for leg in shown:
        print(
            f"{leg.name:<25}  {leg.num_requests:>8}  {leg.num_errors:>6}  {leg.hit_share:>6.1%}  "
            f"{leg.ttft_mean_ms:>12.0f}  {leg.ttft_p99_ms:>11.0f}  {leg.requests_per_s:>10.2f}",
            flush=True,
        )


def print_table(result: dict[str, Any]) -> None:
    print("in flight  requests  exact    hits     |p-a|/prompt  over  under  evicted blocks  told right")
    for phase in result["phases"]:
        print(
            f"{phase['num_in_flight']:>9}  {phase['num_requests']:>8}  {phase['exact_share']:>6.1%}  "
            f"{phase['hit_share']:>6.1%}  {phase['error_share']:>12.2%}  {phase['num_over']:>4}  "
            f"{phase['num_under']:>5}  {phase['num_evicted']:>14}  {'yes' if phase['is_told_right'] else 'NO':>10}"
        )
    print("(the last line: after one server was killed and has come back)")
    isolation, survival = result["isolation"], result["survival"]
    print(
        f"a prompt of {isolation['num_prompt']} tokens sent again hits {isolation['own_hit']}; "
        f"by another tenant {isolation['other_hit']}"
    )
    print(
        f"kill -9 of a server under {survival['num_streams']} streams, {survival['num_on_the_dead']} of them there: "
        f"{survival['num_whole']} end whole, {survival['num_equal']} with the same text, "
        f"{survival['num_moved']} moved, {len(survival['errors'])} errors; longest pause "
        f"{survival['longest_pause_s']:.2f} s; back {survival['back_after_s']:.1f} s after it answers again"
    )
    for rule in result["fails"]:
        print(f"DOES NOT HOLD: {rule}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--env", type=Path, metavar="DIR", help="where the environments are, or are made")
    parser.add_argument("--standin", action="store_true", help="stand-ins in the place of vLLM")
    parser.add_argument("--compare", action="store_true", help="the same load through other routers too")
    parser.add_argument("--trace", type=Path, help="with --compare: JSON lines of in_len, out_len, hash_ids")
    parser.add_argument("--only", metavar="TEXT", action="append", help="with --compare: routers named so; repeatable")
    parser.add_argument("--requests", type=int, default=400, help="with --compare: of the trace (default 400)")
    parser.add_argument("--tokens-per-block", type=int, default=32, help="of a block of the trace (default 32)")
    parser.add_argument("--one-of", type=int, default=1, help="take one in so many conversations (default 1: all)")
    parser.add_argument("--in-flight", type=int, default=8, help="with --compare (default 8)")
    parser.add_argument("--rounds", type=int, default=1, help="with --compare: every other one backwards (default 1)")
    parser.add_argument("--turns", type=int, default=240, help="of chat, in each phase (default 240)")
    parser.add_argument("--conversations", type=int, default=8, help="per tenant (default 8)")
    parser.add_argument("--pool-tokens", type=int, default=9600, help="of each server's cache (default 9600)")
    parser.add_argument("--streams", type=int, default=8, help="over the death of a server (default 8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=18300, help="the first of the ports used (default 18300)")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.env is None and not given.standin:
        parser.error("give --env DIR, a folder for vLLM's environment, or --standin")
    if given.compare and (given.trace is None or given.env is None):
        parser.error("--compare takes --trace FILE, and --env DIR for the other routers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    with tempfile.TemporaryDirectory(prefix="fleet") as scratch:
        logs = given.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        result: Any = compare(given, logs) if given.compare else check(given, logs)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.compare:
        return 0
    print_table(result)
    return 1 if result["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
