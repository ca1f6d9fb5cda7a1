"""The GPU check itself, on the CPU as far as that goes, and whole where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
import gpu_rates
import random_model

from kvasir.worker.model.model import Model
from kvasir.worker.model.working_set import WorkingSetAttention

CPU = torch.device("cpu")
SCRIPT = Path(gpu_check.__file__)


@pytest.mark.parametrize("family", list(gpu_check.FAMILIES))
def test_every_family_passes_where_the_paths_are_right(family: str) -> None:
    torch.set_num_threads(1)
    rows = gpu_check.check_family(family, CPU, {torch.float32: 1e-4})
    assert {row["path"] for row in rows} == {"GatherAttention", "WorkingSetAttention"}
    assert all(row["ok"] for row in rows)
    assert all(row["same_best_token"] == 1 for row in rows)


def test_a_wrong_path_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvasir.worker.model.attention.visible", lambda start, *rest: torch.ones(rest[:2], dtype=torch.bool)
    )
    assert not all(row["ok"] for row in gpu_check.check_family("mistral", CPU, {torch.float32: 1e-3}))


def test_rates_and_shares_are_sane() -> None:
    torch.set_num_threads(1)
    config = random_model.make_config(2, 64, 96, 4, 2, 100)
    weights = random_model.random_weights(config, CPU, torch.bfloat16)
    roofline = gpu_rates.measure_roofline(CPU, copy_bytes=1 << 20, matmul_size=128)
    model = Model(config, weights, WorkingSetAttention(config))
    row = gpu_rates.measure_model(config, 3, model, roofline, context=32, steps=8)
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_share_of_matmul", "decode_share_of_bandwidth")
    assert all(row[name] > 0 for name in (*rates, "mixed_share_of_roofline"))


def test_every_cell_is_timed_or_named_as_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that runs on a device, on the CPU with tiny shapes; prompts are longer than a step."""
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu_rates, "MAX_STEP_TOKENS", 24)
    monkeypatch.setattr(gpu_rates, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(gpu_rates, "MIXED_CHUNK", 16)
    shapes = {"tiny": random_model.make_config(2, 64, 96, 4, 2, 100), "huge": random_model.SHAPES["8b"]}
    roofline = gpu_rates.measure_roofline(CPU, copy_bytes=1 << 20, matmul_size=128)
    total = 1 << 20  # the tiny shape has 190 KiB of weights and 256 bytes of keys and values a token
    rows = gpu_rates.measure_shapes(
        shapes, [1, 4], [32, 1024], CPU, roofline, lambda: (total, total), gpu_rates.Budget(60), 8
    )
    timed = [(row["batch"], row["context"]) for row in rows if "left_out" not in row]
    left_out = [(row["model"], row["batch"], row["context"]) for row in rows if "left_out" in row]
    assert timed == [(1, 32), (4, 32), (1, 1024)]
    assert left_out == [("tiny", 4, 1024), ("huge", 0, 0)]
    for row in rows[:2]:
        assert row["engine_decode_tokens_per_s"] > 0 and row["host_ms_per_step"] > 0
        assert 0 <= row["idle_share"] < 1 and row["idle_ms_per_step"] >= 0
        assert row["continuous_decode_tokens_per_s"] > 0, row.get("continuous")


def test_cells_for_which_no_time_is_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    times = iter([0.0, 1.0])  # the budget begins; the first cell has (100 - 1) / 6 s, those after it none
    budget = gpu_rates.Budget(100.0, lambda: next(times, 100.0))
    monkeypatch.setattr(gpu_rates, "MIXED_CHUNK", 16)
    roofline = gpu_rates.Roofline(1e9, 1e9)
    shapes = {"tiny": random_model.make_config(1, 64, 96, 4, 2, 100)}
    rows = gpu_rates.measure_shapes(shapes, [1, 2], [16, 32], CPU, roofline, lambda: (1 << 30, 1 << 30), budget, 2)
    assert [row.get("left_out") for row in rows] == [None, *["no time is left"] * 3]
    assert not any("continuous_decode_tokens_per_s" in row or "continuous" in row for row in rows)


def test_a_measurement_ends_within_its_share_of_the_time() -> None:
    def calls(budget_s: float) -> int:
        seen: list[float] = []
        gpu_rates.timed(lambda: seen.append(0.0) or time.sleep(0.02), CPU, budget_s)
        return len(seen)

    assert (calls(0.0), calls(0.05), calls(5.0)) == (1, 2, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_and_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "No CUDA device" in done.stdout
    assert json.loads(out.read_text())["cuda"] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", list(gpu_check.FAMILIES))
def test_cuda_path_equals_the_reference(family: str) -> None:
    assert all(row["ok"] for row in gpu_check.check_family(family, torch.device("cuda", 0)))
