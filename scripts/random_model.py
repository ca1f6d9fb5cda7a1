"""Random models of given shapes, and stores with block tables for them: for timing and comparing, not for answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.linear import Linear
from kvasir.worker.model.model import LayerWeights, Weights

BLOCK_SIZE = 16


def make_config(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **changes: Any
) -> ModelConfig:
    config = ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        max_position=131_072,
        rope=RopeConfig(theta=500_000.0),
        sliding_windows=(None,) * layers,
    )
    return replace(config, **changes)


SHAPES = {
    "1b": make_config(16, 2048, 8192, 32, 8, 128_256, tie_word_embeddings=True),
    "8b": make_config(32, 4096, 14_336, 32, 8, 128_256),
}


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Return weights whose activations stay of the size of one, made on `device`."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(rows**-0.5)

    def vector(size: int, mean: float) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(0.1).add_(mean)

    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    layers = [
        LayerWeights(
            input_norm=vector(hidden, 1.0),
            qkv=Linear(matrix(hidden, qkv_size), vector(qkv_size, 0.0) if config.qkv_bias else None),
            output=Linear(matrix(config.num_heads * head_dim, hidden)),
            post_norm=vector(hidden, 1.0),
            gate_up=Linear(matrix(hidden, 2 * inner)),
            down=Linear(matrix(inner, hidden)),
            q_norm=vector(head_dim, 1.0) if config.qk_norm else None,
            k_norm=vector(head_dim, 1.0) if config.qk_norm else None,
        )
        for _ in range(config.num_layers)
    ]
    lm_head = matrix(hidden, config.vocab_size)
    embedding = lm_head.t() if config.tie_word_embeddings else matrix(config.vocab_size, hidden)
    return Weights(embedding, layers, vector(hidden, 1.0), Linear(lm_head))


def make_store(
    config: ModelConfig,
    num_tokens: list[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_spare: bool = False,
) -> tuple[KvStore, list[list[int]]]:
    """Return a store and one block table per sequence, their blocks interleaved."""
    blocks_each = [-(-count // BLOCK_SIZE) for count in num_tokens]
    ids = iter(torch.randperm(sum(blocks_each), generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(ids) for _ in range(count)] for count in blocks_each]
    shape = (sum(blocks_each), config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return KvStore(*shape, dtype=dtype, device=device, has_spare=has_spare), tables
