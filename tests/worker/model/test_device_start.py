"""What a start on a GPU finds out, on a CPU: a meter that reads out, and a capture that does nothing or fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.worker.engine.step import OutOfMemory, SequenceSlice
from kvasir.worker.model.attention import ReferenceAttention
from kvasir.worker.model.device_executor import DeviceExecutor
from kvasir.worker.model.device_start import choose_graphs, largest_step_bytes, share_of_bandwidth
from kvasir.worker.model.graphs import DecodeGraphs
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from kvasir.worker.options import parse_options
from kvasir.worker.sizes import choose_num_blocks
from kvasir.worker.startup_gpu import open_on_gpu
from tests.worker.model.test_device_executor import Run, make_commands
from tests.worker.model.test_graphs import FixedReference, make_store


@dataclass
class FakeMeter:
    """A device with `free_bytes`, on which the step measured takes `step_bytes`."""

    free_bytes: int
    step_bytes: int
    told: list[str] = field(default_factory=list)

    def free(self) -> int:
        self.told.append("free")
        return self.free_bytes

    def begin(self) -> None:
        self.told.append("begin")

    def peak(self) -> int:
        self.told.append("peak")
        return self.step_bytes


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(tiny_folder, "cpu", torch.float64, make_attention=FixedReference)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are computed in the fixed buffers, but nothing is captured."""
    monkeypatch.setattr(DecodeGraphs, "capture", lambda graphs, on_progress: on_progress(1, 1))


def test_the_largest_step_has_all_tokens_and_a_draw_for_each_request(model: Model) -> None:
    meter, shapes, forward = FakeMeter(1 << 30, 77), [], model.forward

    def watched(slices: list[SequenceSlice], kv: KvStore) -> Tensor:
        meter.told.append("step")
        shapes.append([len(piece.token_ids) for piece in slices])
        assert all(piece.num_logits == 1 for piece in slices)
        return forward(slices, kv)

    model.forward = watched  # type: ignore[assignment]
    assert largest_step_bytes(model, 16, max_step_tokens=100, max_requests=5, meter=meter) == 77
    assert shapes == [[96], [1, 1, 1, 1, 96], []]
    assert meter.told == ["step", "begin", "step", "peak", "step"]


def test_a_step_without_memory_for_it_is_told(model: Model) -> None:
    def fails(*given: Any) -> Tensor:
        raise OutOfMemory("none left")

    model.forward = fails  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory):
        largest_step_bytes(model, 16, 100, 5, FakeMeter(1, 1))


@pytest.mark.usefixtures("captures")
def test_graphs_are_used_if_they_are_right_and_leave_memory_for_a_step(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, progress = make_store(model), []
    kv.zero(range(kv.num_blocks + 1))

    def choose(free_mib: int = 100) -> tuple[DecodeGraphs | None, str]:
        meter = FakeMeter(free_mib << 20, 0)
        return choose_graphs(model, kv, 8, 512, 50 << 20, meter, lambda *done: progress.append(done))

    graphs, reason = choose()
    assert graphs is not None and not reason and progress == [(1, 1)]
    assert choose(40) == (None, "beside them 40 MiB are left, and a step takes 50")
    compute = DecodeGraphs._compute
    monkeypatch.setattr(DecodeGraphs, "_compute", lambda graphs, size: compute(graphs, size) or graphs._logits.add_(1))
    assert choose()[1].startswith("they differ from a step without by ")
    monkeypatch.setattr(DecodeGraphs, "capture", lambda *given: 1 / 0)
    assert choose() == (None, "ZeroDivisionError: division by zero")
    model.attention = ReferenceAttention(model.config)
    assert choose() == (None, "ValueError: attention by reference cannot be captured")
    assert not kv.data[: kv.num_blocks].any(), "the checks left something in the store"


def start(model: Model, meter: FakeMeter, *args: str) -> tuple[DeviceExecutor, int, str]:
    config = model.config
    block_bytes = bytes_per_block(config.num_layers, 16, config.num_kv_heads, config.head_dim, model.dtype)
    options = parse_options(["--model", "x", "--gateway", "ipc://x", "--max-requests=8", "--max-step-tokens=64", *args])

    def num_blocks_of(free_bytes: int) -> int:
        return choose_num_blocks(options.kv_memory, free_bytes=free_bytes, block_bytes=block_bytes, on_gpu=True)

    opened = open_on_gpu(options, [model], num_blocks_of, meter)
    (executor,), num_blocks = opened.executors, opened.num_blocks
    assert isinstance(executor, DeviceExecutor)
    assert num_blocks == int(0.85 * (meter.free_bytes - meter.step_bytes)) // block_bytes
    return executor, num_blocks, opened.graphs


@pytest.mark.usefixtures("captures")
def test_a_start_leaves_room_for_the_largest_step_and_says_what_it_found(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.worker.startup_gpu.share_of_bandwidth", lambda *given: 0.4242)
    executor, num_blocks, graphs = start(model, FakeMeter(64 << 20, 16 << 20))
    assert graphs == "CUDA graphs"
    told = capsys.readouterr().err
    assert f"device name=cpu attention=reference graphs=6 graph_bytes=0 step_bytes={16 << 20} pool_bytes=" in told
    assert told.split("decode_share_of_copy_bandwidth=")[1].strip() == "0.42"
    plain, run = Run(model, None, num_blocks), Run(model, model.forward, num_blocks)
    run.engine._executor = executor
    for each in (plain, run):
        each.take(make_commands(count=8))
    assert run.answers == plain.answers


@pytest.mark.usefixtures("captures")
def test_a_start_without_graphs_says_why(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = FakeMeter(64 << 20, 16 << 20)
    assert start(model, meter, "--graphs=off")[2] == "no CUDA graphs: --graphs off"
    assert "no_graphs" not in capsys.readouterr().err and "graphs=0" not in capsys.readouterr().out
    monkeypatch.setattr(DecodeGraphs, "capture", lambda *given: 1 / 0)
    assert start(model, meter)[2] == "no CUDA graphs: ZeroDivisionError: division by zero"
    assert 'no_graphs reason="ZeroDivisionError: division by zero"' in capsys.readouterr().err


def test_the_share_of_bandwidth_is_that_of_bytes_over_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.5, 4.0])  # copying 2 * 256 MiB, then a step
    monkeypatch.setattr(
        "kvasir.worker.model.device_start.seconds_of", lambda work, device: work() is None or next(times)
    )
    monkeypatch.setattr("kvasir.worker.model.device_start.weight_bytes", lambda *given: 1 << 30)
    assert share_of_bandwidth(model, model.forward, make_store(model)) == 0.25
