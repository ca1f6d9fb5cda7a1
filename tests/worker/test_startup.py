"""Sizes chosen at a start, and lines in the log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvasir.cache.kv_store import KvStore
from kvasir.worker.log import log
from kvasir.worker.model.working_set import WorkingSetAttention
from kvasir.worker.options import MemorySize, parse_options
from kvasir.worker.sizes import choose_num_blocks, free_memory
from kvasir.worker.startup import build

MODEL = Path(__file__).resolve().parents[2] / "kvasir" / "demo_model"
SHARE = MemorySize(share=0.6)


@pytest.mark.parametrize(
    ("kv_memory", "on_gpu", "num_blocks"),
    [
        (None, False, 100),  # as many as the window and the slots can use
        (SHARE, False, 100),
        (MemorySize(size_bytes=500_000), False, 500),  # as asked for
        (SHARE, True, 600),
        (None, True, 850),
    ],
)
def test_on_a_cpu_a_share_of_memory_is_bounded_by_what_the_model_can_use(
    kv_memory: MemorySize | None, on_gpu: bool, num_blocks: int
) -> None:
    sizes = {"free_bytes": 1_000_000, "block_bytes": 1000, "num_useful": 100}
    assert choose_num_blocks(kv_memory, on_gpu=on_gpu, **sizes) == num_blocks


def test_on_a_cpu_with_little_memory_the_share_is_the_bound() -> None:
    assert choose_num_blocks(None, free_bytes=80_000, block_bytes=1000, on_gpu=False, num_useful=100) == 20


def test_a_store_on_the_cpu_takes_memory_when_it_is_written_to() -> None:
    before = resident_bytes()
    store = KvStore(1024, 4, 16, 8, 64, torch.float32, "cpu")  # 256 MiB
    assert resident_bytes() - before < 1 << 24
    assert not store.data[512].any()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_free_memory_is_the_least_that_a_cgroup_above_leaves_and_cached_files_are_free(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def limit(folder: str, size: str, used: int, *files: int) -> None:
        inactive, active = files or (0, 0)
        write(f"cg/{folder}/memory.max", f"{size}\n")
        write(f"cg/{folder}/memory.current", f"{used}\n")
        write(f"cg/{folder}/memory.stat", f"anon 5\nfile 9\ninactive_file {inactive}\nactive_file {active}\n")

    def free() -> int:
        return free_memory(tmp_path / "proc", tmp_path / "cg")

    write("proc/meminfo", "MemFree: 1 kB\nMemAvailable: 1000 kB\n")
    assert free() == 1_024_000, "no cgroups"
    write("proc/self/cgroup", "0::/system.slice/kvasir.service\n")
    limit("system.slice/kvasir.service", "max", 700_000)
    assert free() == 1_024_000
    limit("system.slice", "900000", 700_000)
    assert free() == 200_000
    limit("system.slice/kvasir.service", "600000", 550_000, 300_000, 200_000)
    assert free() == 200_000, "all but 50,000 bytes are files that were read"
    limit("system.slice/kvasir.service", "100000", 90_000)
    assert free() == 10_000


def test_lines_of_the_log_begin_with_date_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    log("ready", worker="w 1", share=0.25)
    assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ready worker="w 1" share=0.25\n', capsys.readouterr().err)


@pytest.mark.parametrize(("gain", "is_told"), [(0.05, True), (4.0, False)])
def test_a_narrow_type_that_is_slower_on_this_cpu_is_told(
    gain: float, is_told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.worker.model.linear.gain_over_fp32", lambda dtype: gain)
    args = ["--model", str(MODEL), "--gateway", "ipc://nowhere", "--kv-memory", "8M", "--device=cpu"]
    assert build(parse_options([*args, "--dtype", "bfloat16"]))[1].dtype == "bfloat16"
    assert ("slow_dtype dtype=bfloat16 times_fp32=0.05" in capsys.readouterr().err) == is_told
    build(parse_options(args))
    assert "slow_dtype" not in capsys.readouterr().err


def test_a_worker_says_which_attention_it_runs_and_why_it_is_a_slow_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse_options(["--model", str(MODEL), "--gateway", "ipc://nowhere", "--kv-memory", "8M", "--device=cpu"])
    assert build(options)[1].attention == "working set"
    assert "slow_attention" not in capsys.readouterr().err
    monkeypatch.setattr(WorkingSetAttention, "begin", lambda *args: 1 / 0)
    assert build(options)[1].attention == "gather: ZeroDivisionError: division by zero"
    assert 'slow_attention path=gather reason="ZeroDivisionError: division by zero"' in capsys.readouterr().err
