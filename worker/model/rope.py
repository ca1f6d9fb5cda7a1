"""Rotary position embeddings: plain, linear, llama3 and yarn scaling.

The worker keeps the two halves of each rotated pair next to each other (the loader permutes the query and key
projections, which leaves every dot product as it was), so that rotating is one multiplication of complex numbers
in place instead of four operations. Frequencies follow the public `transformers` implementation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvasir.worker.model.config import RopeConfig


class RotaryTable:
    """cos + i·sin per position, grown on demand by doubling: windows of 128k are common and rarely used."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        inv_freq, self._factor = inverse_frequencies(rope, head_dim)
        self._inv_freq = inv_freq.to(device)
        self._table = self._computed(1024)

    def reserve(self, num_positions: int) -> None:
        """Never grow for positions below `num_positions`: a CUDA graph reads the table where it lies."""
        if num_positions > self._table.shape[0]:
            self._table = self._computed(num_positions)

    def __call__(self, positions: Tensor, max_position: int) -> Tensor:
        """Return [num_tokens, 1, head_dim / 2] complex factors for `positions` [num_tokens], all <= `max_position`."""
        size = self._table.shape[0]
        if max_position >= size:
            self._table = self._computed(max(2 * size, max_position + 1))
        return self.rows(positions)

    def rows(self, positions: Tensor) -> Tensor:
        """The same for `positions` that the table has."""
        return self._table.index_select(0, positions)

    def _computed(self, count: int) -> Tensor:
        angles = torch.arange(count, device=self._inv_freq.device, dtype=torch.float32)[:, None] * self._inv_freq
        return torch.polar(torch.full_like(angles, self._factor), angles).to(self._dtype)[:, None]


def rotate_(heads: Tensor, factors: Tensor) -> None:
    """Rotate `heads` [num_tokens, num_heads, head_dim] (pairs adjacent) in place by `factors` of `RotaryTable`."""
    pairs = heads.view(*heads.shape[:-1], -1, 2)
    if heads.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(pairs).mul_(factors)
    else:  # there are no complex numbers of bf16 parts
        rotated = torch.view_as_complex(pairs.float()).mul_(factors)
        pairs.copy_(torch.view_as_real(rotated))


def make_pairs_adjacent(weight: Tensor, head_dim: int) -> Tensor:
    """Return rows [num_heads * head_dim, ...] with each head's features i and i + head_dim / 2 at 2i and 2i + 1."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return [head_dim / 2] fp32 radians per position and the factor on cos and sin (1 except for yarn)."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "linear":
            return frequencies / rope.factor, 1.0
        case "llama3":
            return _llama3(frequencies, rope), 1.0
        case "yarn":
            return _yarn(frequencies, rope, head_dim), _yarn_attention_factor(rope)
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Blend interpolated and original frequencies by a ramp over the dimensions (arXiv 2309.00071)."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
