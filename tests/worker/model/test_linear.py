"""Linear maps: packed equals plain, and the probe takes packing only where it is right and faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kvasir.worker.model import linear
from kvasir.worker.model.linear import Linear, Packing, choose_packing, make_linear, probe_packing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_probe() -> Iterator[None]:
    probe_packing.cache_clear()
    yield
    probe_packing.cache_clear()


def is_packable(dtype: torch.dtype) -> bool:
    try:
        linear.pack(torch.ones(16, 16, dtype=dtype))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("packing", [Packing(), Packing(True, True), Packing(True, False)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 40])
def test_every_way_to_keep_a_matrix_gives_the_same_map(
    num_rows: int, dtype: torch.dtype, tolerance: float, packing: Packing, has_bias: bool
) -> None:
    if packing.packs and not is_packable(dtype):
        pytest.skip(f"this torch has no packed linears of {dtype}")
    generator = torch.Generator().manual_seed(num_rows)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((33, 50), (33,), (num_rows, 50)))
    expected = x @ weight.t() + (bias if has_bias else 0)
    mapped = make_linear(weight.to(dtype), bias.to(dtype) if has_bias else None, packing)
    assert (mapped(x.to(dtype)).float() - expected).abs().max() < tolerance
    residual = torch.ones(num_rows, 33, dtype=dtype)
    mapped.add_to(residual, x.to(dtype))
    assert (residual.float() - expected - 1).abs().max() < tolerance


def test_what_the_probe_measures_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_packable(torch.float32):
        pytest.skip("this torch has no packed linears")
    monkeypatch.setattr(linear, "gain", lambda *args: 1.0)
    assert choose_packing(torch.float32, CPU, 1 << 20) == Packing()
    probe_packing.cache_clear()
    monkeypatch.setattr(linear, "gain", lambda *args: 1.8)
    assert choose_packing(torch.float32, CPU, 1 << 20) == Packing(True, True)
    assert choose_packing(torch.float32, CPU, 1 << 40) == Packing(True, False), "a large model is kept once"


def test_the_gain_of_a_type_is_that_of_the_same_map_over_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def gain(before: Callable[[], torch.Tensor], after: Callable[[], torch.Tensor]) -> float:
        seen[:] = before(), after()
        return 0.5

    monkeypatch.setattr(linear, "gain", gain)
    assert linear.gain_over_fp32(torch.bfloat16) == 0.5
    assert [x.dtype for x in seen] == [torch.float32, torch.bfloat16]
    assert torch.equal(seen[0], seen[1].float())


@pytest.mark.parametrize("fault", ["differs", "gives NaN", "raises"])
def test_packing_that_is_wrong_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = linear.apply_packed

    def faulty(*args: torch.Tensor) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no such operator")
        return apply(*args) + (float("nan") if fault == "gives NaN" else 0.01)

    monkeypatch.setattr(linear, "gain", lambda *args: 9.0)
    monkeypatch.setattr(linear, "apply_packed", faulty)
    assert probe_packing(torch.float32) == Packing()


def test_float64_and_devices_have_plain_matrices() -> None:
    assert choose_packing(torch.float64, CPU, 1) == Packing()
    assert choose_packing(torch.bfloat16, torch.device("cuda"), 1) == Packing()
    x = torch.ones(3, 2)
    assert torch.equal(Linear(torch.ones(2, 4))(x), torch.full((3, 4), 2.0))
