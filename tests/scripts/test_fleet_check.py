"""The fleet check itself, over two stand-ins: a gateway, its upstream workers and vLLM's wire, all as processes."""

from __future__ import annotations

import gzip
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fleet.routers import read_load

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fleet_check.py"


def free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody uses now."""
    for first in range(20_000, 30_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_predictions_are_exact_tenants_are_apart_and_streams_survive_over_stand_ins(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = ["--turns", "40", "--conversations", "3", "--streams", "4", "--pool-tokens", "2560"]
    command = [sys.executable, str(SCRIPT), "--standin", *sizes, "--port", str(free_ports(60)), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert figures.exists(), done.stdout + done.stderr
    result = json.loads(figures.read_text())
    one, many, after = result["phases"]
    for phase in (one, after):
        assert phase["num_exact"] == phase["num_requests"], result
    assert one["is_told_right"] and many["is_told_right"], result
    assert one["num_evicted"] > 0 and one["hit_share"] > 0.3, result
    assert result["isolation"]["own_hit"] > 0 and result["isolation"]["other_hit"] == 0, result
    survival = result["survival"]
    assert survival["num_whole"] == survival["num_equal"] == 4 and not survival["errors"], result
    assert survival["num_moved"] > 0, result


def test_a_trace_becomes_text_that_is_equal_where_its_ids_are(tmp_path: Path) -> None:
    rows = [
        {"t_ms": 0, "in_len": 96, "out_len": 160, "hash_ids": [1, 2, 3]},
        {"t_ms": 5, "in_len": 96, "out_len": 900, "hash_ids": [1, 2, 4]},
        {"t_ms": 9, "in_len": 96, "out_len": 10, "hash_ids": list(range(1, 200))},
    ]
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    first, second, third = (each.prompt.split() for each in read_load(path, 3, 32, 1))
    assert [len(first), len(second), len(third)] == [96, 96, 1888]  # cut to what the model can take
    assert first[:64] == second[:64] == third[:64] and first[64:] != second[64:]
    assert third[:96] == first
    assert [each.max_tokens for each in read_load(path, 3, 32, 1)] == [11, 24, 1]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no such request"):
        read_load(path, 4, 32, 1)


def test_a_thinned_trace_keeps_whole_conversations(tmp_path: Path) -> None:
    chance = random.Random(1)
    path = tmp_path / "trace.jsonl"
    turns = [[0, number, *range(1000 * number, 1000 * number + turn)] for number in range(1, 41) for turn in range(3)]
    chance.shuffle(turns)
    path.write_text("".join(json.dumps({"in_len": 1, "out_len": 1, "hash_ids": ids}) + "\n" for ids in turns))
    kept = [len(list(group)) for group in _by_conversation(path, 999)]
    assert kept and set(kept) == {3}


def _by_conversation(path: Path, count: int) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for request in read_load(path, count, 1, 4):
        found.setdefault(request.prompt.split()[1], []).append(request.prompt)
    return list(found.values())
