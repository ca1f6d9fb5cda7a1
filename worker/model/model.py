"""The transformer: four dense families in one forward pass over the packed tokens of a step.

Llama, Mistral, Qwen2 and Qwen3 differ only in biases, query/key norms and sliding windows, so that there is one
`forward` and the configuration decides. Projections that read the same input are merged at load. Knows nothing
of requests, sampling or who owns a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention
from kvasir.worker.model.batch import pack
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.linear import Linear
from kvasir.worker.model.memory import memory_errors
from kvasir.worker.model.ops import Ops
from kvasir.worker.model.rope import RotaryTable


@dataclass(slots=True)
class LayerWeights:
    """One layer. Query and key columns have rotated pairs adjacent (`worker.model.rope`)."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    output: Linear  # num_heads * head_dim -> hidden
    post_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate
    down: Linear  # intermediate -> hidden
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None


@dataclass(slots=True)
class Weights:
    """All tensors of a model."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    final_norm: Tensor  # [hidden]
    lm_head: Linear  # hidden -> vocab


class Model:
    """Weights, configuration, an attention path, and how the rest is computed. One thread, one step at a time."""

    def __init__(self, config: ModelConfig, weights: Weights, attention: Attention, ops: Ops | None = None) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention
        self.ops = ops or Ops(config)
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.rotary = RotaryTable(config.rope, config.head_dim, self.device, self.dtype)

    @torch.inference_mode()
    @memory_errors()
    def forward(self, slices: list[SequenceSlice], kv: KvStore, drawn: Tensor | None = None) -> Tensor:
        """Compute the tokens of `slices`, write their keys and values to `kv`, return the logits asked for.

        `drawn` [num_draws] int64: the draws of the step before, on the model's device, if a slice has one as its token.
        Returns [sum of num_logits * num_draws, vocab] in the order of `slices`, fp32 (fp64 for an fp64 model).

        Raises: OutOfMemory.
        """
        singles, chunks = self.attention.arrange(slices, kv)
        if not slices:
            return self.weights.embedding.new_empty((0, self.config.vocab_size))
        batch = pack(slices, singles, chunks, kv.block_size, self.device, drawn)
        self.attention.begin(batch, kv)
        rotation = self.rotary(batch.positions, batch.max_position)
        return self.compute(batch.token_ids, rotation, kv.rows(batch.slots), kv, batch.logit_rows)

    def compute(
        self,
        token_ids: Tensor,
        rotation: Tensor,
        rows: Tensor,
        kv: KvStore,
        logit_rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of `logit_rows`, by default of all, in `out` if given; the attention has begun the step.

        `token_ids` [num_tokens], their `rotation` (`RotaryTable`), and the `rows` of `kv` (`KvStore.rows`) that their
        keys and values are written to.
        """
        config, weights, attention, ops = self.config, self.weights, self.attention, self.ops
        x = embedding(token_ids, weights.embedding)  # [num_tokens, hidden]
        for i, layer in enumerate(weights.layers):
            h = rms_norm(x, (config.hidden_size,), layer.input_norm, config.rms_norm_eps)
            heads = layer.qkv(h).view(len(h), -1, config.head_dim)
            q, k, v = heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q.copy_(rms_norm(q, (config.head_dim,), layer.q_norm, config.rms_norm_eps))
                k.copy_(rms_norm(k, (config.head_dim,), layer.k_norm, config.rms_norm_eps))
            ops.rotate_and_store(i, heads, rotation, rows, kv)
            layer.output.add_to(x, attention.attend(i, q, k, v, kv))
            h = rms_norm(x, (config.hidden_size,), layer.post_norm, config.rms_norm_eps)
            layer.down.add_to(x, ops.multiply_silu(layer.gate_up(h)))
        if logit_rows is not None:
            x = x.index_select(0, logit_rows)
        x = rms_norm(x, (config.hidden_size,), weights.final_norm, config.rms_norm_eps)
        logits = weights.lm_head(x)
        if out is not None:
            return out.copy_(logits)
        return logits if logits.dtype == torch.float64 else logits.float()
