"""The lab: the optimum against brute force, the replayed cache against a plain leaf-first LRU, and the command."""

from __future__ import annotations

import gzip
import json
import random
import sys
from itertools import combinations
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import replay_trace
from replay_cache import Trace, chains, load_trace, replay, replay_optimum
from replay_sessions import SessionLru, SessionTwoHeaps, last_words, sessions_of

from kvasir.cache.policies import POLICIES

BLOCK_TOKENS = 16
FIELDS = {
    "trace",
    "policy",
    "capacity_blocks",
    "capacity_share",
    "block_hit_rate",
    "token_hit_rate",
    "cpu_us_per_request",
}


def write_trace(path: Path, prompts: list[list[int]], spare_tokens: int = 0) -> Path:
    """Write a trace of `prompts`, each a list of block ids; every one has `spare_tokens` more than its blocks hold."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        for i, prompt in enumerate(prompts):
            row = {"t_ms": 1000 * (i // 3), "in_len": BLOCK_TOKENS * len(prompt) + spare_tokens, "out_len": 5}
            file.write(json.dumps({**row, "hash_ids": prompt}) + "\n")
    return path


def make_prompts(rng: random.Random, count: int, depth: int, fan: int) -> list[list[int]]:
    """Random walks down a tree; an id stands for the whole path."""
    ids: dict[tuple[int, ...], int] = {}
    prompts = []
    for _ in range(count):
        path = tuple(rng.randrange(fan) for _ in range(rng.randrange(1, depth + 1)))
        prompts.append([ids.setdefault(path[: i + 1], len(ids)) for i in range(len(path))])
    return prompts


def make_trace(folder: Path, prompts: list[list[int]]) -> Trace:
    return load_trace(write_trace(folder / "small.jsonl", prompts))


def best_by_brute_force(prompts: list[list[int]], capacity: int) -> int:
    """The most hits of all ways to keep, after every request, up to `capacity` blocks of those that were there or came,
    none without its parent."""
    parents = {block: parent for prompt in prompts for parent, block in zip([-1, *prompt], prompt, strict=False)}
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for prompt in prompts:
        following: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            found = next((i for i, block in enumerate(prompt) if block not in kept), len(prompt))
            there = kept | set(prompt)
            for size in range(min(capacity, len(there)) + 1):
                for chosen in combinations(sorted(there), size):
                    state = frozenset(chosen)
                    if all(parents[block] == -1 or parents[block] in state for block in state):
                        following[state] = max(following.get(state, 0), hits + found)
        best = following
    return max(best.values())


def hits_of_leaf_first_lru(prompts: list[list[int]], capacity: int) -> int:
    """Leaf-first LRU by scanning: what the request needs stays; of the others the leaf used longest ago goes."""
    parents = {block: parent for prompt in prompts for parent, block in zip([-1, *prompt], prompt, strict=False)}
    used: dict[int, int] = {}  # resident blocks -> moment of last use, a request's tail before its head
    clock = hits = 0
    for prompt in prompts:
        prompt = prompt[:capacity]
        found = next((i for i, block in enumerate(prompt) if block not in used), len(prompt))
        hits += found
        for block in reversed(prompt):
            clock += 1
            used[block] = clock
        while len(used) > capacity:
            inner = {parents[block] for block in used}
            del used[min((b for b in used if b not in inner and b not in prompt), key=lambda block: used[block])]
    return hits


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_what_brute_force_finds(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    prompts = make_prompts(rng, rng.randrange(3, 8), depth=3, fan=2)
    capacity = rng.randrange(1, 5)
    assert replay_optimum(make_trace(tmp_path, prompts), capacity).num_hits == best_by_brute_force(prompts, capacity)


@pytest.mark.parametrize("capacity", [3, 10, 25, 60])
def test_lru_is_a_plain_leaf_first_lru(tmp_path: Path, capacity: int) -> None:
    prompts = make_prompts(random.Random(capacity), 300, depth=7, fan=3)
    expected = hits_of_leaf_first_lru(prompts, capacity)
    assert expected > 0
    assert replay(make_trace(tmp_path, prompts), "lru", capacity).num_hits == expected


def test_no_policy_beats_the_optimum_and_all_meet_it_when_everything_fits(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, make_prompts(random.Random(1), 200, depth=6, fan=3))
    for capacity in (8, 40):
        optimum = replay_optimum(trace, capacity).num_hits
        for policy in POLICIES:
            assert 0 < replay(trace, policy, capacity).num_hits <= optimum, policy
    everything = replay_optimum(trace, trace.num_distinct).num_hits
    assert everything == trace.num_blocks - trace.num_distinct
    for policy in POLICIES:
        assert replay(trace, policy, trace.num_distinct).num_hits == everything, policy


def test_a_request_larger_than_the_cache_keeps_what_fits(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    assert (replay(trace, "lru", 3).num_hits, replay_optimum(trace, 3).num_hits) == (3, 3)


# ---- sessions


def test_chains_stand_for_sessions_that_have_no_name_and_only_the_last_request_is_a_last_word(tmp_path: Path) -> None:
    prompts = [[0, 1], [5, 6], [0, 1, 2], [0, 1, 2, 3], [8]]
    assert chains(make_trace(tmp_path, prompts)) == [0, 1, 0, 0, 4]
    assert last_words([0, 1, 0, 0, 4]) == [None, "one_shot", None, "closing", "one_shot"]
    path = write_trace(tmp_path / "named.jsonl", prompts)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    more = [{"session": 7, "type": "sub" if i in (1, 4) else "main"} for i in range(5)]
    path.write_text("".join(json.dumps({**row, **said}) + "\n" for row, said in zip(rows, more, strict=True)))
    assert sessions_of(load_trace(path)) == [7, -2, 7, 7, -5], "sub-agents are sessions of their own"


def test_without_a_last_word_the_session_aware_rule_is_lru_and_with_it_the_closed_go_first(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, make_prompts(random.Random(2), 300, depth=6, fan=3))
    sessions = sessions_of(trace)
    for capacity in (9, 30):
        plain = replay(trace, "lru", capacity).num_hits
        assert replay(trace, SessionLru, capacity, sessions=sessions).num_hits == plain
        assert replay(trace, SessionTwoHeaps, capacity, sessions=sessions).num_hits > 0
    # Two sessions, the second one over: it goes, though it was used last.
    trace = make_trace(tmp_path, [[0, 1], [5, 6], [8], [0, 1, 2]])
    sessions = [0, 1, 2, 0]
    hits = {
        hints is None: replay(trace, SessionLru, 4, sessions=sessions, hints=hints).num_hits
        for hints in (None, last_words(sessions))
    }
    assert hits == {True: 1, False: 2}


def test_the_command_prints_a_table_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(5)
    files = [write_trace(tmp_path / name, make_prompts(rng, 120, 6, 3), 4) for name in ("one.jsonl.gz", "two.jsonl")]
    out = tmp_path / "rows.json"
    command = [
        "cache",
        "--trace",
        *map(str, files),
        "--policy",
        "lru,two_heaps,two_heaps+hints,two_heaps+session,two_heaps+intent,session_lru,session_lru+intent,optimum",
        "--capacity",
        "5%,25%,30",
    ]
    replay_trace.main([*command, "--json", str(out), "--jobs", "2"])
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 8 * 3
    assert all(set(row) == FIELDS for row in rows)
    assert {row["trace"] for row in rows} == {"one", "two"}
    for row in rows:
        trace = load_trace(files[row["trace"] == "two"])
        assert row["capacity_share"] == pytest.approx(row["capacity_blocks"] / trace.num_distinct)
        assert 0 <= row["token_hit_rate"] < row["block_hit_rate"] < 1  # the spare tokens are in no block: never hit
        assert (row["cpu_us_per_request"] is None) == (row["policy"] == "optimum")
        if row["policy"] == "lru":
            hits = replay(trace, "lru", row["capacity_blocks"]).num_hits
            assert row["block_hit_rate"] == pytest.approx(hits / trace.num_blocks)
    assert [row["capacity_blocks"] for row in rows if (row["trace"], row["policy"]) == ("one", "lru")][2] == 30
    printed = capsys.readouterr().out
    replay_trace.main([*command, "--json", str(out), "--jobs", "1"])
    alone = json.loads(out.read_text())
    assert [row | {"cpu_us_per_request": None} for row in alone] == [row | {"cpu_us_per_request": None} for row in rows]
    for row in rows:
        assert f"{100 * row['block_hit_rate']:8.1f}" in printed
    assert "share of the gap" in printed


def test_the_share_of_the_gap_is_from_lru_to_the_optimum() -> None:
    rates = {"lru": 0.2, "two_heaps": 0.3, "optimum": 0.6}
    rows = [replay_trace.Row("t", name, 10, 0.1, rate, rate, 1.0) for name, rate in rates.items()]
    assert replay_trace.render(rows).splitlines()[-1].split() == ["two_heaps", "25"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "lru,clock"], "there is no policy 'clock'; choose of lru, two_heaps"),
        (["--capacity", "5%,0"], "'0' is no capacity"),
        (["--capacity", "120%"], "'120%' is no capacity"),
        (["--capacity", "much"], "'much' is no capacity"),
        (["--jobs", "0"], "'0' is no number that can be used here"),
    ],
)
def test_senseless_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    path = write_trace(tmp_path / "t.jsonl", [[0]])
    with pytest.raises(SystemExit):
        replay_trace.main(["cache", "--trace", str(path), *arguments])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no request"),
        ("no json\n", "line 1"),
        ('{"t_ms": 0, "in_len": 16, "out_len": 1}\n', "line 1.*hash_ids"),
        ('{"t_ms": 0, "in_len": 16, "out_len": 1, "hash_ids": [0, 1]}\n' * 2 + "[]\n", "line 3"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_line(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match=f"replay_trace: .*bad.jsonl.*{complaint}"):
        replay_trace.main(["cache", "--trace", str(path), "--policy", "lru", "--capacity", "5%"])


def test_ids_that_are_not_chained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block 1 has two parents"):
        make_trace(tmp_path, [[0, 1], [2, 1]])
