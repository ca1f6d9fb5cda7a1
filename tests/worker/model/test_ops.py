"""The seam between the plain way and fused kernels: what is wrong is found at start. (The kernels: gpu_check.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.ops import Ops, choose_ops, largest_difference

CONFIG = ModelConfig("llama", 8, 24, 48, 1, 4, 2, 8, 1e-5, 999, RopeConfig(), (None,))
CPU = torch.device("cpu")


class Wrong(Ops):
    """Fails in one of the things that ops do."""

    kind = ""

    def rotate_and_store(self, layer: int, heads: Tensor, rotation: Tensor, rows: Tensor, kv: KvStore) -> None:
        given = heads.clone()
        super().rotate_and_store(layer, heads, rotation, rows.roll(1) if self.kind == "rows" else rows, kv)
        if self.kind == "rotation":
            heads.copy_(given)

    def race(self, keys: Tensor, weights: Tensor) -> Tensor:
        return super().race(keys + (self.kind == "race"), weights)

    def multiply_silu(self, gate_up: Tensor) -> Tensor:
        product = super().multiply_silu(gate_up)
        return product * torch.nan if self.kind == "nan" else product + 1 if self.kind == "silu" else product


@pytest.mark.parametrize("kind", ["", "rows", "rotation", "silu", "nan", "race"])
def test_ops_that_differ_from_the_plain_way_are_found(kind: str) -> None:
    ops = Wrong(CONFIG)
    ops.kind = kind
    difference = largest_difference(ops, CONFIG, CPU, torch.float32)
    assert difference == 0 if not kind else difference > 0.1
    assert (difference == torch.inf) == (kind == "nan")


def test_ops_that_fail_leave_the_plain_way_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_ops(CONFIG, CPU, torch.float32).fallback_reason == ""
    device = torch.device("meta")  # stands for one that is no CPU

    def fails(config: ModelConfig) -> Ops:
        raise RuntimeError("no compiler\nat all")

    ops = choose_ops(CONFIG, device, torch.float32, fails)
    assert type(ops) is Ops and ops.fallback_reason == "RuntimeError: no compiler"
    for difference, reason in ((0.02, "they differ from the plain way by 2.0e-02"), (0.0, "")):
        monkeypatch.setattr("kvasir.worker.model.ops.largest_difference", lambda *given, found=difference: found)
        ops = choose_ops(CONFIG, device, torch.float32, Wrong)
        assert ops.fallback_reason == reason and type(ops) is (Ops if reason else Wrong)
