"""What a Hugging Face `config.json` says about a model, checked and reduced to what the worker needs.

Knows four dense families: Llama, Mistral (Ministral too), Qwen2 and Qwen3. Everything that this worker would compute
wrongly (another architecture, activation, RoPE type, quantised weights) is refused here by name, before a tensor is
read; so is every key that is neither read here nor known to be without effect. Does not know files:
`worker.model.loader` reads them.
"""

from __future__ import annotations

import math
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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _names(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling "
    "rope_parameters partial_rotary_factor original_max_position_embeddings tie_word_embeddings eos_token_id dtype "
    "torch_dtype"
)
_READ_BY_FAMILY: dict[Family, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "mistral": frozenset({"sliding_window", "layer_types"}),
    "qwen2": frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"}),
    "qwen3": frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "attention_bias"}),
}
_WITHOUT_EFFECT = _names(  # on a token's logits: training, other tasks, and what `generation_config.json` is for
    "transformers_version attention_dropout hidden_dropout initializer_range pretraining_tp use_cache auto_map "
    "bos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id prefix "
    "tokenizer_class tokenizer_model_max_length tokenizer_padding_side model_max_length max_sequence_length "
    "return_dict output_attentions output_hidden_states output_scores return_dict_in_generate attn_implementation "
    "task_specific_params id2label label2id num_labels problem_type finetuning_task chunk_size_feed_forward "
    "neftune_noise_alpha router_aux_loss_coef unsloth_version unsloth_fixed is_llama_config transformers.js_config "
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens assistant_confidence_threshold assistant_lookbehind num_assistant_tokens "
    "num_assistant_tokens_schedule target_lookbehind"
)
_READ_OF_ROPE = _names(
    "rope_type type rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor "
    "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate partial_rotary_factor"
)


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
    _refuse_unread(raw, family)
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
        sliding_windows=_sliding_windows(fields, family, num_layers),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        eos_token_ids=_eos_token_ids(raw if generation is None else {**raw, **generation}),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _family(raw: Mapping[str, Any]) -> Family:
    names = raw.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in map(str, names):
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    by_model_type = {str(family): family for family in ARCHITECTURES.values()}
    if not names and str(raw.get("model_type")) in by_model_type:
        return by_model_type[raw["model_type"]]
    named = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    supported = ", ".join(ARCHITECTURES)
    raise ModelError(f"Architecture {named} is not supported; supported are {supported}.")


def _refuse_unread(raw: Mapping[str, Any], family: Family) -> None:
    """Refuse what would change the logits without our reading it. null, false and empty say that it is not there."""
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
        raise ModelError(
            f"The weights are quantised ({method}), which is not supported; use an unquantised checkpoint."
        )
    if raw.get("is_causal", True) is not True:
        raise ModelError("is_causal is not true; this worker computes causal attention only.")
    known = _READ | _READ_BY_FAMILY[family] | _WITHOUT_EFFECT | {"is_causal"}
    unread = sorted(name for name, value in raw.items() if value and name not in known and not name.startswith("_"))
    if unread:
        raise ModelError(
            f"config.json: {', '.join(unread)} is not known to this worker for a {family} model, and may change its "
            "answers; take it out if it does not."
        )


def _rope(raw: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Read the old keys (`rope_theta`, `rope_scaling`) and transformers 5's `rope_parameters`.

    Where there are both, `rope_scaling` stands in the place of all of `rope_parameters`, as in transformers 5.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    values = raw.get(name) or {}
    if not isinstance(values, Mapping):
        raise ModelError(f"config.json: {name} must be an object, not {values!r}.")
    if unread := sorted(key for key, value in values.items() if value and key not in _READ_OF_ROPE):
        raise ModelError(f"config.json: {', '.join(unread)} in {name} is not supported.")
    fields = _Fields(values)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.")
    if values.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported.")
    theta = fields.number("rope_theta", _Fields(raw).number("rope_theta", 10_000.0), above=1.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    outer = raw.get("original_max_position_embeddings")
    original = _Fields(raw if outer else values).count("original_max_position_embeddings", max_position)
    default_factor = max_position / original if kind == "yarn" else None
    factor = fields.number("factor", default_factor, above=0.0)
    if kind == "linear":
        return RopeConfig(kind, theta, factor)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        kind,
        theta,
        factor,
        original,
        attention_factor=fields.number_or_none("attention_factor"),
        beta_fast=fields.number_or_none("beta_fast") or 32.0,
        beta_slow=fields.number_or_none("beta_slow") or 1.0,
        mscale=fields.number_or_none("mscale"),
        mscale_all_dim=fields.number_or_none("mscale_all_dim"),
        truncate=bool(values.get("truncate", True)),
    )


def _sliding_windows(fields: _Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Return every layer's window. Mistral with `layer_types` is Ministral, whose layers alternate."""
    raw = fields.raw
    is_windowed = family == "mistral" or (family != "llama" and raw.get("use_sliding_window", False))
    if not is_windowed or raw.get("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = fields.count("sliding_window", 4096)
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = 0 if family == "mistral" else fields.number("max_window_layers", 28)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or any(k not in known for k in layer_types):
        raise ModelError(f"layer_types must name {num_layers} layers of full_attention or sliding_attention.")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _eos_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in token_ids):
        raise ModelError(f"eos_token_id must be a token id or a list of them, not {value!r}.")
    return tuple(token_ids)


class _Fields:
    """Typed look-ups in a configuration that came from outside."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def number(self, name: str, default: float | None = None, *, above: float = -math.inf) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise ModelError(f"config.json: {name} must be a number, not {value!r}.")
        if value <= above:
            raise ModelError(f"config.json: {name} must be more than {above:g}, not {value!r}.")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.number(name)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value < 1 or value != int(value):
            raise ModelError(f"config.json: {name} must be a positive whole number, not {value!r}.")
        return int(value)
