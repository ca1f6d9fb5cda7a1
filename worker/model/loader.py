"""From a Hugging Face folder to a `Model`: config.json, safetensors shards, and a fingerprint of both.

Shard headers are read and checked here before any weight, so that a truncated download or a missing tensor is named
in one sentence. The tokenizer and chat template in the same folder are the gateway's business.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvasir.protocol.errors import ModelError
from kvasir.worker.model.attention import Attention
from kvasir.worker.model.attention_paths import choose_attention
from kvasir.worker.model.config import ModelConfig, parse_config
from kvasir.worker.model.linear import Linear, Packing, choose_packing, make_linear
from kvasir.worker.model.model import LayerWeights, Model, Weights
from kvasir.worker.model.ops import choose_ops
from kvasir.worker.model.rope import make_pairs_adjacent

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SAMPLE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, under which name, and what its header says."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    block_size: int = 16,
    working_set_limit_bytes: int = 1 << 30,
    make_attention: Callable[[ModelConfig], Attention] | None = None,
    packing: Packing | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load the model in folder `path` onto `device`, its weights converted to `dtype` (see `resolve_dtype`).

    `working_set_limit_bytes` bounds the decode working set on a CPU (`worker.model.working_set`), beside the KV pool.
    `make_attention` overrides the attention path (`worker.model.attention_paths`), `packing` how matrices are kept
    (`worker.model.linear`).
    `on_progress(done, total)` is called after every layer. Peak memory is `weight_bytes` plus one layer.

    Raises: ModelError when the folder is no model that this worker can serve.
    """
    folder = Path(path)
    device = torch.device(device)
    config = read_config(folder)
    resolved = resolve_dtype(dtype, config, device)
    stored = read_headers(folder)
    with ExitStack() as stack:
        packing = packing or choose_packing(resolved, device, weight_bytes(config, resolved, Packing(), device))
        reader = _Reader(folder, config, stored, stack, device, resolved, packing)
        config = reader.check()
        layers = []
        for i in range(config.num_layers):
            layers.append(reader.layer(i))
            if on_progress is not None:
                on_progress(i + 1, config.num_layers)
        embedding = reader.read(_EMBEDDING)
        head = embedding if config.tie_word_embeddings else reader.read(_LM_HEAD)
        lm_head = Linear(head.t()) if _shares_head(config, device) else make_linear(head, None, packing)
        weights = Weights(embedding, layers, reader.read("model.norm.weight"), lm_head)
    if make_attention is not None:
        attention = make_attention(config)
    else:
        attention = choose_attention(config, device, resolved, block_size, working_set_limit_bytes)
    return Model(config, weights, attention, choose_ops(config, device, resolved))


def resolve_dtype(dtype: str | torch.dtype, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the torch type for a name ("auto", "float32", "bfloat16", …).

    "auto" is the checkpoint's own type on CUDA, and fp32 on a CPU, where narrower types are slower, not faster.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype = config.dtype if device.type == "cuda" and config.dtype in DTYPES else "float32"
    if dtype not in DTYPES:
        raise ModelError(f"Unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def read_config(folder: Path) -> ModelConfig:
    """Return the checked configuration of the model in `folder`.

    Raises: ModelError.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give the local folder of a Hugging Face checkpoint.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no model; give a Hugging Face checkpoint's folder.")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else None
    try:
        return parse_config(_read_json(folder / "config.json"), generation)
    except ModelError as error:
        raise ModelError(f"{folder}: {error.message}") from None


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor's place, dtype and shape, after checking that all shards are there and complete.

    Raises: ModelError.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        for name, entry in _shard_header(shard)[1].items():
            tensors[name] = StoredTensor(name, shard, entry["dtype"], tuple(entry["shape"]))
    return tensors


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the checkpoint of such a model must hold."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_rows, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_rows, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_rows, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_rows, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for i in range(config.num_layers):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size,)
    return shapes


def weight_bytes(config: ModelConfig, dtype: torch.dtype, packing: Packing, device: str | torch.device = "cpu") -> int:
    """Return what the weights of such a model take in memory, to refuse it before loading it."""
    shapes = expected_shapes(config)
    if config.tie_word_embeddings and not _shares_head(config, torch.device(device)):
        shapes[_LM_HEAD] = shapes[_EMBEDDING]
    once = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 1 or name == _EMBEDDING)
    matrices = sum(map(math.prod, shapes.values())) - once
    return (once + packing.num_copies * matrices) * dtype.itemsize


def _shares_head(config: ModelConfig, device: torch.device) -> bool:
    """Return whether tied heads share memory; a CPU gets a transposed copy, which it reads faster."""
    return config.tie_word_embeddings and device.type != "cpu"


def model_fingerprint(path: str | Path) -> str:
    """Return 32 hex digits that differ between models.

    BLAKE2b of the configuration and of every shard's size, header and samples. Reads the first and last MiB of each
    shard's data and 64 pages between, not the whole: fast for big models, and two fine-tunes of one base differ in some
    of them. No protection against forged weights.

    Raises: ModelError.
    """
    folder = Path(path)
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for changes_nothing in ("_name_or_path", "transformers_version"):
        config.pop(changes_nothing, None)
    digest = hashlib.blake2b(digest_size=16, person=b"kvasir-model")
    digest.update(json.dumps(config, sort_keys=True).encode())
    for shard in _shards(folder):
        data_start, header = _shard_header(shard)
        size = shard.stat().st_size
        digest.update(f"\0{size}\0{json.dumps(header, sort_keys=True)}\0".encode())
        with shard.open("rb") as file:
            for offset, length in _sample_ranges(data_start, size):
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()


def _sample_ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    if end - start <= 2 * _SAMPLE_BYTES + 64 * 4096:
        yield start, end - start
        return
    yield start, _SAMPLE_BYTES
    step = (end - start - 2 * _SAMPLE_BYTES) // 64
    for i in range(64):
        yield start + _SAMPLE_BYTES + i * step, 4096
    yield end - _SAMPLE_BYTES, _SAMPLE_BYTES


def _shards(folder: Path) -> list[Path]:
    """Return the model's shard files in the order of their names; all exist."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index_path} holds no weight_map; download the model again.")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index_path} names {name!r}, which is outside the folder.")
        if not (folder / name).is_file():
            hint = "convert its weights to safetensors" if any(folder.glob("*.bin")) else "download the model again"
            raise ModelError(f"{folder}: the weight file {name} is missing; {hint}.")
    return [folder / name for name in names]


def _shard_header(shard: Path) -> tuple[int, dict[str, Any]]:
    """Return where a shard's data begins and its tensors' entries, checked against the file's size."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{shard} is truncated or no safetensors file ({size:,} bytes); download it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"{shard} has an unreadable header; download it again.") from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ModelError(f"{shard} is truncated: {size:,} of {expected:,} bytes are there; download it again.")
    return 8 + length, header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__} where an object belongs; download it again.")
    return value


class _Reader:
    """Reads checked tensors and merges projections that share their input."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        stored: dict[str, StoredTensor],
        stack: ExitStack,
        device: torch.device,
        dtype: torch.dtype,
        packing: Packing,
    ) -> None:
        self._packing = packing
        self._folder, self._config, self._stored = folder, config, stored
        self._stack, self._device, self._dtype = stack, device, dtype
        self._open: dict[Path, Any] = {}

    def check(self) -> ModelConfig:
        """Compare all names, shapes and dtypes with what the configuration asks for; return it as the weights have it.

        As in transformers, a tied model may store either matrix; where it stores two that differ, it is not tied.
        """
        if self._config.tie_word_embeddings and _LM_HEAD in self._stored:
            self._stored.setdefault(_EMBEDDING, self._stored[_LM_HEAD])
            is_tied = torch.equal(self._stored_tensor(_EMBEDDING), self._stored_tensor(_LM_HEAD))
            self._config = replace(self._config, tie_word_embeddings=is_tied)
        for name, shape in expected_shapes(self._config).items():
            stored = self._stored.get(name)
            if stored is None:
                raise ModelError(
                    f"{self._folder}: tensor {name} is missing from the weight files; download them again."
                )
            if stored.shape != shape:
                message = f"tensor {name} is {list(stored.shape)} where config.json asks for {list(shape)}"
                raise ModelError(f"{self._folder}: {message}; config and weights do not belong together.")
            if stored.dtype not in _STORED_DTYPES:
                raise ModelError(
                    f"{self._folder}: tensor {name} has dtype {stored.dtype}; use an unquantised checkpoint."
                )
        return self._config

    def layer(self, i: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{i}."

        def paired(name: str) -> Tensor:
            return make_pairs_adjacent(self.read(prefix + name), config.head_dim)

        def qkv(kind: str) -> Tensor:
            value = self.read(f"{prefix}self_attn.v_proj.{kind}")
            return torch.cat((paired(f"self_attn.q_proj.{kind}"), paired(f"self_attn.k_proj.{kind}"), value))

        def gate_up(kind: str) -> Tensor:
            return torch.cat([self.read(f"{prefix}mlp.{part}_proj.{kind}") for part in ("gate", "up")])

        def linear(weight: Tensor, bias: Tensor | None) -> Linear:
            return make_linear(weight, bias, self._packing)

        output_bias = self.read(prefix + "self_attn.o_proj.bias") if config.output_bias else None
        down_bias = self.read(prefix + "mlp.down_proj.bias") if config.mlp_bias else None
        return LayerWeights(
            input_norm=self.read(prefix + "input_layernorm.weight"),
            qkv=linear(qkv("weight"), qkv("bias") if config.qkv_bias else None),
            output=linear(self.read(prefix + "self_attn.o_proj.weight"), output_bias),
            post_norm=self.read(prefix + "post_attention_layernorm.weight"),
            gate_up=linear(gate_up("weight"), gate_up("bias") if config.mlp_bias else None),
            down=linear(self.read(prefix + "mlp.down_proj.weight"), down_bias),
            q_norm=paired("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=paired("self_attn.k_norm.weight") if config.qk_norm else None,
        )

    def read(self, name: str) -> Tensor:
        return self._stored_tensor(name).to(device=self._device, dtype=self._dtype, copy=True)

    def _stored_tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        shard = stored.shard
        try:
            if shard not in self._open:
                self._open[shard] = self._stack.enter_context(safe_open(shard, framework="pt", device="cpu"))
            tensor: Tensor = self._open[shard].get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard} cannot be read ({error}); download it again.") from None
        return tensor
