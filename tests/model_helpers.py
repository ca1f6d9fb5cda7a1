"""Small random models of every family, made with the public `transformers`, and a decoder driven by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.model import Model

SMALL = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # wide enough that tokens differ clearly
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-no-gqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases-head-dim": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn-factor": ("Llama", {"rope_parameters": YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 16.0}}),
    "mistral-window": ("Mistral", {"sliding_window": 13}),
    "mistral-full": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied-yarn-mscale": (
        "Qwen3",
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": YARN_ROPE | {"mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
        },
    ),
    "qwen3-window-bias": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
        },
    ),
}


def make_reference(variant: str, **overrides: Any) -> transformers.PreTrainedModel:
    """Return a `transformers` model with random weights; biases and norms are random as well, not zeros and ones."""
    name, changes = VARIANTS[variant]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes, **overrides})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_reference(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@torch.inference_mode()
def reference_greedy(
    model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int
) -> tuple[list[int], Tensor]:
    """Return greedy tokens and the logits [num_tokens, vocab] they come from, of one uncached pass over everything."""
    cache = transformers.DynamicCache(config=model.config)
    output = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    tokens = [int(output.logits[0, -1].argmax())]
    while len(tokens) < num_tokens:
        output = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return tokens, logits


def make_store(model: Model, num_blocks: int = 64, block_size: int = 4) -> KvStore:
    config = model.config
    shape = (num_blocks, config.num_layers, block_size, config.num_kv_heads, config.head_dim)
    return KvStore(*shape, dtype=model.dtype, device=model.device)


@dataclass
class Sequence:
    """A sequence driven by hand: tokens, its block table, and how much of it is in the store."""

    key: int
    tokens: list[int]
    block_table: list[int]
    num_stored: int = 0
    logits: list[Tensor] = field(default_factory=list)

    def slice(self, num_tokens: int | None = None, num_logits: int | None = None) -> SequenceSlice:
        """Return the next `num_tokens` (all that are known by default) and count them as stored."""
        end = len(self.tokens) if num_tokens is None else min(len(self.tokens), self.num_stored + num_tokens)
        wanted = (1 if end == len(self.tokens) else 0) if num_logits is None else num_logits
        piece = SequenceSlice(self.key, self.tokens[self.num_stored : end], self.num_stored, self.block_table, wanted)
        self.num_stored = end
        return piece


def scattered_tables(num_sequences: int, blocks_each: int, seed: int = 0) -> list[list[int]]:
    """Return block tables whose blocks are mixed and out of order, as a real pool's are after a while."""
    ids = list(range(num_sequences * blocks_each))
    random.Random(seed).shuffle(ids)
    return [ids[i::num_sequences] for i in range(num_sequences)]


def greedy(model: Model, store: KvStore, sequences: list[Sequence], num_tokens: int, chunk: int | None = None) -> None:
    """Run all sequences together, prefill in chunks of `chunk`, until the shortest has `num_tokens` logits rows.

    Sequences that have theirs go on meanwhile, so that decode and prefill share steps.
    """
    while any(len(sequence.logits) < num_tokens for sequence in sequences):
        pieces = [sequence.slice(chunk) for sequence in sequences if len(sequence.logits) < num_tokens]
        rows = iter(model.forward(pieces, store))
        by_key = {sequence.key: sequence for sequence in sequences}
        for piece in pieces:
            if piece.num_logits:
                sequence = by_key[piece.seq_key]
                sequence.logits.append(next(rows))
                sequence.tokens.append(int(sequence.logits[-1].argmax()))
