"""Linear maps. On a CPU their weights are packed by oneDNN, where a probe at start finds that right and faster.

With 4 to 64 rows (decoding in batches) packed weights give 1.3 to 2.5 times the rate of `mm`, but with one row in fp32
0.7 to 1 times. So a small model keeps both; a large one that is packed is packed only. The operators are torch's own
but private, which is one more reason to probe.

oneDNN compiles for every number of rows anew, which takes as long as half a step of a small model (half a millisecond)
and half a megabyte, and keeps the last 1,024 results: some 450 MB. Chunks and drafts have more numbers of rows than
that, but with 8,192 kept a worker came to 2.5 GB.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_KEEP_BOTH_BYTES = 2 << 30  # of weights: twice that is little on a machine that serves
_FEW_ROWS = 2  # for which the plain weights are taken, where they are kept
_PROBE_SIZE, _PROBE_ROWS, _PROBE_TURNS = 1024, 8, 15


@dataclass(frozen=True, slots=True)
class Packing:
    """`packs`: weights are packed. `keeps_plain`: they are kept unpacked, too, for a few rows."""

    packs: bool = False
    keeps_plain: bool = True

    @property
    def num_copies(self) -> int:
        return self.packs + self.keeps_plain


@dataclass(slots=True)
class Linear:
    """`x @ weight + bias`, at least one of `plain` and `packed` given.

    `plain` [in, out] lies transposed: with few rows a CPU then reads it up to 1.5 times as fast.
    """

    plain: Tensor | None
    bias: Tensor | None = None  # [out]
    packed: Tensor | None = None  # [out, in] in a layout of oneDNN's own

    def __call__(self, x: Tensor) -> Tensor:
        """Return [num_rows, out] for `x` [num_rows, in]."""
        if self.packed is not None and (x.shape[0] > _FEW_ROWS or self.plain is None):
            return apply_packed(x, self.packed, self.bias)
        assert self.plain is not None
        return torch.mm(x, self.plain) if self.bias is None else torch.addmm(self.bias, x, self.plain)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add the map of `x` to `residual` [num_rows, out] in place."""
        if self.packed is not None and (x.shape[0] > _FEW_ROWS or self.plain is None):
            residual.add_(apply_packed(x, self.packed, self.bias))
            return
        assert self.plain is not None
        residual.addmm_(x, self.plain)
        if self.bias is not None:
            residual.add_(self.bias)


def make_linear(weight: Tensor, bias: Tensor | None, packing: Packing) -> Linear:
    """Return the map of a checkpoint's `weight` [out, in]."""
    plain = weight.t().contiguous() if packing.keeps_plain else None
    return Linear(plain, bias, pack(weight) if packing.packs else None)


def choose_packing(dtype: torch.dtype, device: torch.device, size_bytes: int) -> Packing:
    """Return how the weights of a model, `size_bytes` in all, are kept on `device`."""
    if device.type != "cpu":
        return Packing()
    packing = probe_packing(dtype)
    if packing.packs and size_bytes > _KEEP_BOTH_BYTES:
        return replace(packing, keeps_plain=False)
    return packing


@functools.cache
@torch.inference_mode()
def probe_packing(dtype: torch.dtype) -> Packing:
    """Compute a few rows both ways; packing has to be right and faster by a tenth."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(rows, _PROBE_SIZE, generator=generator).div_(_PROBE_SIZE**0.5).to(dtype)
        for rows in (_PROBE_SIZE, _PROBE_ROWS)
    )
    plain = Linear(weight.t().contiguous())
    try:
        packed = Linear(None, None, pack(weight))
        error = (packed(x) - plain(x)).abs().max().item()
    except (RuntimeError, AttributeError, NotImplementedError):  # no oneDNN, or not for this dtype
        return Packing()
    if not error < (1e-5 if dtype == torch.float32 else 2e-2):
        return Packing()
    if gain(lambda: plain(x), lambda: packed(x)) < 1.1:
        return Packing()
    return Packing(packs=True, keeps_plain=dtype == torch.float32)


@torch.inference_mode()
def gain_over_fp32(dtype: torch.dtype) -> float:
    """Return how many times as fast as in fp32 a CPU maps a few rows in `dtype`.

    Much less than 1 where it has no instructions for that type.
    """
    x = torch.ones(_PROBE_ROWS, _PROBE_SIZE)
    weight = torch.ones(_PROBE_SIZE, _PROBE_SIZE)
    full, narrow = (make_linear(weight.to(kind), None, probe_packing(kind)) for kind in (torch.float32, dtype))
    narrow_x = x.to(dtype)
    return gain(lambda: full(x), lambda: narrow(narrow_x))


def gain(before: Callable[[], object], after: Callable[[], object]) -> float:
    """Return how many times as fast as `before` `after` is: medians, taken in turns."""
    times: list[list[float]] = [[], []]
    for _ in range(_PROBE_TURNS):
        for compute, seen in zip((before, after), times, strict=True):
            begin = time.perf_counter()
            compute()
            seen.append(time.perf_counter() - begin)
    medians = [sorted(seen)[_PROBE_TURNS // 2] for seen in times]
    return medians[0] / medians[1]


def pack(weight: Tensor) -> Tensor:
    """Return `weight` [out, in] as `apply_packed` takes it. Raises: RuntimeError and others, see `probe_packing`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PROBE_ROWS)
    return packed


def apply_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, of shape [num_rows, out]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
