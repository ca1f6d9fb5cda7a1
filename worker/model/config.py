"""What a Hugging Face `config.json` says about a model, checked and reduced to what the worker needs.

Knows four dense families: Llama, Mistral, Qwen2 and Qwen3. Everything that this worker would compute wrongly
(another architecture, activation, RoPE type, quantised weights) is refused here by name, before a tensor is read.
Does not know files: `worker.model.model.loader` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvasir.protocol.errors import ModelError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a `kind` does not use keep their defaults."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None = derived from factor (and mscale)
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one model. `sliding_windows[i]` is layer i's window in tokens, None = full attention."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the checkpoint, as its config names it

    @property
    def sliding_window(self) -> int | None:
        """The window that *every* layer has, None when at least one layer sees everything."""
        windows = [window for window in self.sliding_windows if window is not None]
        return max(windows) if windows and len(windows) == self.num_layers else None

    @property
    def scale(self) -> float:
        """Factor on query·key before the softmax."""
        return float(self.head_dim**-0.5)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the checked configuration of the parsed `config.json` in `raw`.

    `generation` is the parsed `generation_config.json`; its end-of-sequence ids win over those of `raw`. Missing keys
    take the defaults of the public `transformers` implementation.

    Raises: ModelError for anything this worker cannot compute, naming it.
    """
    family = _family(raw)
    fields = _Fields(raw)
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    num_layers = fields.count("num_hidden_layers")
    num_kv_heads = fields.count("num_key_value_heads", 8 if family == "mistral" else num_heads)
    head_dim = fields.count("head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    max_position = fields.count("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(family, 32768))
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}.")
    if head_dim % 2:
        raise ModelError(f"head_dim is {head_dim}; rotary embeddings need an even one.")
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported; this worker computes silu only.")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "?")
        raise ModelError(
            f"The weights are quantised ({method}), which is not supported; use an unquantised checkpoint."
        )
    rope = _rope(raw, max_position)
    if rope.kind == "yarn":  # old configs keep the window before scaling in max_position_embeddings
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    attention_bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=rope,
        sliding_windows=_sliding_windows(raw, family, num_layers),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        eos_token_ids=_eos_token_ids(raw, generation or {}),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _family(raw: Mapping[str, Any]) -> Family:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    by_model_type = {family: family for family in ARCHITECTURES.values()}
    if not names and raw.get("model_type") in by_model_type:
        return by_model_type[raw["model_type"]]
    named = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    supported = ", ".join(ARCHITECTURES)
    raise ModelError(f"Architecture {named} is not supported; supported are {supported}.")


def _rope(raw: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Read both the old keys (`rope_theta`, `rope_scaling`) and transformers 5's one `rope_parameters`."""
    values = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    per_layer_type = [value for value in values.values() if isinstance(value, Mapping)]
    if per_layer_type:  # one entry per kind of layer: fine as long as they agree
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise ModelError("rope_parameters differ between kinds of layers, which is not supported.")
        values = dict(per_layer_type[0])
    fields = _Fields(values)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.")
    if values.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported.")
    theta = fields.number("rope_theta", _Fields(raw).number("rope_theta", 10_000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    original = int(
        raw.get("original_max_position_embeddings") or fields.number("original_max_position_embeddings", max_position)
    )
    default_factor = max_position / original if kind == "yarn" else None
    common: dict[str, Any] = {"kind": kind, "theta": theta, "factor": fields.number("factor", default_factor)}
    if kind == "linear":
        return RopeConfig(**common)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return RopeConfig(**common, original_max_position=original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        **common,
        original_max_position=original,
        attention_factor=values.get("attention_factor"),
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        truncate=values.get("truncate", True),
    )


def _sliding_windows(raw: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", 4096 if family != "llama" else None)
    if family == "llama" or window is None:
        return (None,) * num_layers
    if family == "mistral":
        return (int(window),) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if len(layer_types) != num_layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise ModelError(f"layer_types must name {num_layers} layers of full_attention or sliding_attention.")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(int(token_id) for token_id in value) if isinstance(value, list) else (int(value),)


class _Fields:
    """Typed look-ups in a configuration that came from outside."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"config.json: {name} must be a number, not {value!r}.")
        return float(value)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value < 1 or value != int(value):
            raise ModelError(f"config.json: {name} must be a positive whole number, not {value!r}.")
        return int(value)
