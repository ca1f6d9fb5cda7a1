"""The routing lab: workers and rules of the peers by hand-made numbers, bounds, tenants, and the product in it."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import replay_route
import replay_trace
from replay_cache import Request, Trace, load_trace
from replay_route import Cell, Row, fair_shares, jain_by_weight
from route_arrivals import PREFILL_TOKENS_PER_S, Arrival, arrivals, flooded, tenants_of, uncached_tokens
from route_peers import DECODE_S, MAX_RUNNING, FifoWorker, Served, run_peer, run_pooled_optimum
from route_policies import Sglang, make_policy

SIZE = 256  # tokens of a block
BLOCK_S = SIZE / PREFILL_TOKENS_PER_S


def write_trace(path: Path, prompts: list[list[int]], *, out_len: int = 3, every_ms: int = 40) -> Path:
    """Write a trace of `prompts`, each a list of block ids and ten tokens more."""
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            row = {"t_ms": every_ms * i, "in_len": SIZE * len(prompt) + 10, "out_len": out_len, "hash_ids": prompt}
            file.write(json.dumps(row) + "\n")
    return path


def make_conversations(seed: int, num_sessions: int, num_turns: int) -> list[list[int]]:
    """Conversations that begin with the same block and grow by one to four blocks each turn, interleaved."""
    rng = random.Random(seed)
    sessions = [[0] for _ in range(num_sessions)]
    next_id, prompts = 1, []
    for _ in range(num_turns):
        session = rng.choice(sessions)
        num_new = rng.randrange(1, 5)
        session += range(next_id, next_id + num_new)
        next_id += num_new
        prompts.append(list(session))
    return prompts


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return load_trace(write_trace(tmp_path / "chat.jsonl", make_conversations(1, 12, 150)))


def request(*block_ids: int, out: int = 1) -> Request:
    return Request(0.0, SIZE * len(block_ids), list(block_ids), out)


def make_worker(trace: Trace) -> FifoWorker:
    return FifoWorker(trace, 1_000)


def test_arrivals_keep_the_workers_as_busy_as_asked_for(trace: Trace) -> None:
    for num_workers, load in ((2, 0.5), (5, 0.2)):
        coming = arrivals(trace, num_workers, load)
        work_s = sum(uncached_tokens(trace.requests, SIZE)) / PREFILL_TOKENS_PER_S
        assert work_s / (num_workers * coming[-1].time_s) == pytest.approx(load)
    native = arrivals(trace, 2, None)
    assert [one.time_s for one in native] == pytest.approx([one.time_s for one in trace.requests])


def test_a_fifo_worker_computes_one_prompt_after_the_other_and_skips_what_is_cached(trace: Trace) -> None:
    worker = make_worker(trace)
    assert worker.send(request(0, 1, 2, 3), 0.0) == (0, pytest.approx(4 * BLOCK_S))
    assert worker.wait_s(BLOCK_S) == pytest.approx(3 * BLOCK_S)
    assert worker.send(request(0, 1, 2, 9, 10), BLOCK_S) == (3 * SIZE, pytest.approx(5 * BLOCK_S))
    assert (worker.num_outstanding(BLOCK_S), worker.num_outstanding(5 * BLOCK_S)) == (6, 2)
    assert (worker.num_in_flight(BLOCK_S), worker.num_active_blocks) == (2, 6)
    assert worker.num_active(request(0, 1, 2, 9, 77), BLOCK_S) == 4
    assert worker.num_in_flight(4 * BLOCK_S + DECODE_S) == 1
    assert worker.num_active_blocks == 5


def test_a_fifo_worker_has_a_bounded_number_of_slots(trace: Trace) -> None:
    worker = make_worker(trace)
    for i in range(MAX_RUNNING):
        worker.send(request(100 + i, out=1_000), 0.0)
    first_end_s = BLOCK_S + 1_000 * DECODE_S
    assert worker.send(request(9), 5.0)[1] == pytest.approx(first_end_s + BLOCK_S - 5.0)


def test_sglang_goes_by_its_own_trees_until_loads_differ_too_much(trace: Trace) -> None:
    workers, policy = [make_worker(trace) for _ in range(3)], Sglang(abs_threshold=2)

    def route(*block_ids: int) -> int:
        chosen = policy.choose(request(*block_ids), workers, 0.0)
        workers[chosen].send(request(*block_ids, out=1_000), 0.0)
        return chosen

    assert [route(0, 1, 2), route(10, 11), route(20)] == [0, 1, 2]  # the smallest tree, the first of equals
    assert route(30) == 2
    assert route(0, 1, 2, 3, 4) == 0  # 3 of 5 blocks
    assert route(0, 40, 41, 42) == 1  # 1 of 4 is not enough; the trees have 5, 2 and 2 blocks
    assert [route(0, 1, 2), route(0, 1, 2), route(0, 1, 2)] == [0, 0, 0]
    assert [worker.num_in_flight(0.0) for worker in workers] == [5, 2, 2]
    assert route(0, 1, 2) == 1


def test_dynamo_adds_prefill_blocks_and_distinct_active_blocks(trace: Trace) -> None:
    workers, policy = [make_worker(trace) for _ in range(2)], make_policy("dynamo")
    workers[0].send(request(0, 1, 2, 3), 0.0)
    # While it is computed there: 4 outstanding + 2 new + 4 active + 2 more, against 6 + 6; then the fewest unfinished.
    assert policy.choose(request(0, 1, 2, 3, 4, 5), workers, 0.0) == 1
    assert policy.choose(request(0, 1, 2, 3, 4, 5), workers, 4 * BLOCK_S) == 0
    assert policy.choose(request(7, 8), workers, 4 * BLOCK_S) == 1


def test_no_policy_has_more_hits_than_the_pooled_optimum(trace: Trace) -> None:
    for num_blocks in (24, 60):
        for load in (0.3, 2.0):
            coming = arrivals(trace, 3, load)
            best = sum(one.num_hit_tokens for one in run_pooled_optimum(trace, coming, 3, num_blocks))
            for name in ("round-robin", "hash-2", "overlap", "sglang", "dynamo", "wait+2miss", "kvasir", "kvasir-fifo"):
                row = replay_route.measure(trace, Cell(name, 3, num_blocks, load))
                all_tokens = sum(one.request.num_tokens for one in coming)
                assert row.token_hit_rate * all_tokens <= best + 1e-6, name


def test_with_room_for_everything_and_one_worker_all_hit_the_same(trace: Trace) -> None:
    names = ("round-robin", "power-of-two", "wait+1miss", "kvasir", "kvasir-fifo", "pooled-lru", "pooled-optimum")
    rates = {name: replay_route.measure(trace, Cell(name, 1, 1.0, 0.3)).token_hit_rate for name in names}
    assert len({round(rate, 9) for rate in rates.values()}) == 1, rates
    assert rates["kvasir"] > 0.5


def test_the_product_alone_with_its_worker_is_as_fast_as_the_model_of_a_fifo_worker(tmp_path: Path) -> None:
    prompts = make_conversations(3, 4, 40)
    trace = load_trace(write_trace(tmp_path / "slow.jsonl", prompts, every_ms=1_000))
    coming = arrivals(trace, 1, None)
    policy = make_policy("round-robin")
    expected = run_peer(trace, coming, policy, 1, trace.num_distinct)
    options = replay_route.ProductOptions(is_fifo=True, step_tokens=1 << 20)
    found = replay_route.run_product(trace, coming, 1, trace.num_distinct, options)
    for one, other in zip(found, expected, strict=True):
        assert one.num_hit_tokens == other.num_hit_tokens
        assert one.ttft_s == pytest.approx(other.ttft_s, abs=16 / PREFILL_TOKENS_PER_S)
    slower = replay_route.run_product(trace, coming, 1, trace.num_distinct, replace(options, delay_s=0.1, step_s=0.05))
    for one, other in zip(slower, found, strict=True):
        assert one.ttft_s == pytest.approx(other.ttft_s + 0.25)


def test_the_products_own_order_lets_short_prompts_overtake_and_fifo_does_not(tmp_path: Path) -> None:
    long = list(range(400))
    trace = load_trace(write_trace(tmp_path / "mixed.jsonl", [long, [1_000], [1_001]], every_ms=10))
    own, fifo = (
        replay_route.run_product(trace, arrivals(trace, 1, None), 1, 500, replay_route.ProductOptions(is_fifo=is_fifo))
        for is_fifo in (False, True)
    )
    assert own[1].ttft_s < 1.0 < fifo[1].ttft_s
    assert own[0].ttft_s < fifo[0].ttft_s + 3 * BLOCK_S


def test_a_prompt_that_fits_no_worker_counts_as_failed(tmp_path: Path) -> None:
    trace = load_trace(write_trace(tmp_path / "large.jsonl", [[0], list(range(1, 30)), [40]]))
    row = replay_route.measure(trace, Cell("kvasir", 2, 20, None))
    assert row.goodput == pytest.approx(2 / 3)


def test_tenants_are_sessions_or_the_roots_of_conversations(trace: Trace) -> None:
    by_root = tenants_of(trace.requests, 4)
    roots = {}
    for one, tenant in zip(trace.requests, by_root, strict=True):
        assert roots.setdefault(one.block_ids[1], tenant) == tenant  # the first block is common
    assert len(set(by_root)) > 1
    named = [replace(one, session=i) for i, one in enumerate(trace.requests)]
    assert tenants_of(named, 4)[:6] == [0, 1, 2, 3, 0, 1]
    assert set(tenants_of(named, 1)) == {0}


def test_a_flood_raises_the_whole_load_with_work_of_one_tenant(trace: Trace) -> None:
    normal = arrivals(trace, 2, 0.4, 4)
    coming, flooder = flooded(normal, 2, SIZE)
    extra = [one for one in coming if one.is_extra]
    assert {one.tenant for one in extra} == {flooder}
    assert [one for one in coming if not one.is_extra] == normal
    end_s = normal[-1].time_s
    assert all(end_s / 4 <= one.time_s <= 0.8 * end_s for one in extra)
    work: Counter[bool] = Counter()
    for one, tokens in zip(coming, uncached_tokens([one.request for one in coming], SIZE), strict=True):
        if end_s / 4 <= one.time_s < 3 * end_s / 4:
            work[one.is_extra] += tokens
    assert work.total() / (2 * PREFILL_TOKENS_PER_S * end_s / 2) == pytest.approx(1.5, abs=0.15)


def test_fair_shares_are_max_min_fair() -> None:
    assert fair_shares(Counter({1: 10, 2: 50, 3: 100}), 90) == {1: 10, 2: 40, 3: 40}
    assert fair_shares(Counter({1: 10, 2: 20}), 90) == {1: 10, 2: 20}


def test_by_weight_counts_what_is_computed_while_all_wait() -> None:
    def answer(tenant: int, at_s: float, until_s: float, num_tokens: int) -> Served:
        return Served(Arrival(at_s, tenant, Request(at_s, num_tokens, [0])), 0, 0, until_s - at_s)

    cell = Cell("kvasir", 1, 0.5, 1.5, num_tenants=2, weights=(1, 2))
    alone = [answer(0, 0.0, 9.0, 900), answer(0, 1.0, 20.0, 900)]
    both = [answer(1, 10.0, 12.0, 200), answer(0, 10.0, 13.0, 100), answer(1, 10.0, 19.0, 300)]
    assert jain_by_weight(alone, cell) is None
    assert jain_by_weight([*alone, *both], cell) == 1.0
    assert jain_by_weight([*alone, *both, answer(1, 10.0, 14.0, 800)], cell) < 0.9
    assert jain_by_weight([*alone, *both, answer(1, 20.0, 21.0, 800)], cell) == 1.0


def test_a_flood_is_measured_by_its_victims(trace: Trace) -> None:
    cells = [Cell(name, 2, 0.5, 0.4, num_tenants=4, is_flooded=True) for name in ("wait+2miss", "kvasir")]
    rows = [replay_route.measure(trace, cell) for cell in cells]
    for row in rows:
        assert row.victim_p99_over_solo > 1.0
        assert 0.25 <= row.jain <= 1.0
    assert replay_route.measure(trace, cells[1]) == rows[1]  # the same again


def test_tenants_of_the_high_class_come_first_whatever_order_workers_compute_in(trace: Trace) -> None:
    for policy in ("kvasir", "kvasir-fifo"):
        cells = [Cell(policy, 2, 0.5, 1.1, num_tenants=4, num_high=num_high) for num_high in (2, 4)]
        first, all_alike = [replay_route.measure(trace, cell).victim_p99_over_solo or 0.0 for cell in cells]
        assert 1.0 <= first < all_alike


def test_the_command_prints_a_table_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_trace(tmp_path / f"{i}.jsonl", make_conversations(i, 6, 60)) for i in range(2)]
    out = tmp_path / "rows.json"
    command = ["route", "--trace", *map(str, files), "--policy", "kvasir,dynamo,pooled-lru", "--workers", "2,3"]
    command += ["--capacity", "40%", "--load", "0.4,native", "--json", str(out)]
    replay_trace.main([*command, "--jobs", "2"])
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 3 * 2 * 2
    assert all(set(row) == set(Row.__dataclass_fields__) for row in rows)
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row['ttft_mean_s']:9.3f}{row['ttft_p99_s']:9.2f}" in printed
    replay_trace.main([*command, "--jobs", "1"])
    assert json.loads(out.read_text()) == rows


def test_several_loads_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "chat.jsonl", make_conversations(1, 6, 60))
    replay_trace.main(["route", "--trace", str(path), "--policy", "sglang", "--spread", "3", "--jobs", "1"])
    *lines, summary = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[3] for line in lines[-3:]] == ["0.475", "0.5", "0.525"]
    assert summary.startswith("sglang, 8 workers, 3 loads: hits ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "magic"], "no routing policy 'magic'"),
        (["--policy", "hash-0"], "no routing policy"),
        (["--load", "fast"], "'fast' is no load"),
        (["--workers", "0"], "give 1 or more"),
        (["--flood"], "--flood needs several tenants"),
    ],
)
def test_wrong_arguments_are_explained(
    tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(tmp_path / "chat.jsonl", [[0]])
    with pytest.raises(SystemExit):
        replay_trace.main(["route", "--trace", str(path), *arguments])
    assert complaint in capsys.readouterr().err
