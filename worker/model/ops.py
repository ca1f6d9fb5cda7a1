"""What is done between a layer's matrices and to draw: plainly, or by fused kernels that are right at start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvasir.cache.kv_store import KvStore
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.draws import race
from kvasir.worker.model.rope import rotate_

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}  # 1e-5 for other types
_HEAD_TILE, _TILE = 8, 1024


class Ops:
    """The plain way. `fallback_reason`: why it is taken on a device that has another."""

    def __init__(self, config: ModelConfig, fallback_reason: str = "") -> None:
        self.fallback_reason = fallback_reason
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads

    def rotate_and_store(self, layer: int, heads: Tensor, rotation: Tensor, rows: Tensor, kv: KvStore) -> None:
        """Rotate queries and keys in place, write the keys and values of `layer` to `rows` of the store.

        `heads` [num_tokens, num_heads + 2 * num_kv_heads, head_dim], contiguous: queries, keys, values.
        """
        num_rotated = self._num_heads + self._num_kv_heads
        rotate_(heads[:, :num_rotated], rotation)
        kv.write(layer, rows, heads[:, self._num_heads : num_rotated], heads[:, num_rotated:])

    def multiply_silu(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up [num_tokens, size] of `gate_up` [num_tokens, 2 * size], contiguous."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def race(self, keys: Tensor, weights: Tensor) -> Tensor:
        """Do what `worker.model.draws.race` does."""
        return race(keys, weights)


class FusedOps(Ops):
    """One launch each (`worker.model.fused_kernels`), in fp16, bf16 and fp32."""

    def __init__(self, config: ModelConfig) -> None:
        from kvasir.worker.model.fused_kernels import multiply_silu, race_tiles, rotate_and_store_heads

        super().__init__(config)
        self._rotate, self._multiply, self._race = rotate_and_store_heads, multiply_silu, race_tiles
        self._half = 1 << (config.head_dim // 2 - 1).bit_length()

    def rotate_and_store(self, layer: int, heads: Tensor, rotation: Tensor, rows: Tensor, kv: KvStore) -> None:
        key_rows, value_rows = kv.token_rows(layer)
        num_tokens, num_heads, head_dim = heads.shape
        self._rotate[num_tokens, -(-num_heads // _HEAD_TILE)](
            heads,
            torch.view_as_real(rotation),
            key_rows,
            value_rows,
            rows,
            NUM_HEADS=self._num_heads,
            NUM_KV_HEADS=self._num_kv_heads,
            HEAD_DIM=head_dim,
            PADDED_HALF=self._half,
            TILE=_HEAD_TILE,
        )

    def multiply_silu(self, gate_up: Tensor) -> Tensor:
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((num_tokens, size))
        self._multiply[num_tokens, -(-size // _TILE)](gate_up, out, size, TILE=_TILE)
        return out

    def race(self, keys: Tensor, weights: Tensor) -> Tensor:
        num_rows, vocab = weights.shape
        times = weights.new_empty((num_rows, -(-vocab // _TILE)))
        ids = torch.empty(times.shape, dtype=torch.int64, device=weights.device)
        self._race[times.shape](weights, keys, times, ids, vocab, TILE=_TILE)
        return ids.gather(1, times.argmin(dim=1, keepdim=True))[:, 0]


def choose_ops(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, make: Callable[[ModelConfig], Ops] = FusedOps
) -> Ops:
    """Return what `make` makes if it is right on `device`, else the plain way, with the reason."""
    if device.type == "cpu":
        return Ops(config)
    try:
        difference = largest_difference(make(config), config, device, dtype)
    except Exception as failure:  # whatever a compiler or driver raises: the worker can serve without them
        return Ops(config, f"{type(failure).__name__}: {failure}".splitlines()[0][:200])
    if difference > _TOLERANCE.get(dtype, 1e-5):
        return Ops(config, f"they differ from the plain way by {difference:.1e}")
    return make(config)


@torch.inference_mode()
def largest_difference(ops: Ops, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Return by how much `ops` differ from the plain way at most in random tokens; NaN counts as infinite."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    num_tokens, num_heads = 5, config.num_heads + 2 * config.num_kv_heads
    heads, gate_up = random(num_tokens, num_heads, config.head_dim), random(num_tokens, 2 * config.intermediate_size)
    angles = torch.rand(num_tokens, 1, config.head_dim // 2, generator=generator).mul_(6).to(device)
    rotation = torch.polar(torch.ones_like(angles), angles)
    slots = torch.tensor([3, 17, 0, 31, 16], device=device)
    keys = torch.randint(-(1 << 62), 1 << 62, (20, 1), generator=generator).to(device)
    weights = torch.randn(20, 3000, generator=generator).exp_().double().to(device)
    results = []
    for each in (ops, Ops(config)):
        kv = KvStore(2, 2, 16, config.num_kv_heads, config.head_dim, dtype, device)
        turned = heads.clone()
        each.rotate_and_store(1, turned, rotation, kv.rows(slots), kv)
        results.append((turned, kv.data, each.multiply_silu(gate_up.clone()), each.race(keys, weights.clone())))
    differences = [(a.float() - b.float()).abs().max() for a, b in zip(*results, strict=True)]
    return torch.stack(differences).max().nan_to_num(torch.inf).item()
