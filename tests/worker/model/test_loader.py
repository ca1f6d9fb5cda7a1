"""Folders that are models, folders that are not, and what tells two models apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvasir.protocol.errors import ModelError
from kvasir.worker.model.linear import Linear, Packing
from kvasir.worker.model.loader import load_model, model_fingerprint, read_config, resolve_dtype, weight_bytes
from kvasir.worker.model.model import LayerWeights, Model
from tests.model_helpers import Sequence, make_reference, make_store, save_reference


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(make_reference("qwen2", tie_word_embeddings=False), tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_sharded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def logits(model: Model) -> torch.Tensor:
    return model.forward([Sequence(1, list(range(2, 12)), [3, 1, 2]).slice()], make_store(model))


def test_sharded_and_single_file_checkpoints_load_alike(original: Path, folder: Path) -> None:
    make_sharded(folder)
    assert torch.equal(logits(load_model(original)), logits(load_model(folder)))


def test_loading_reports_what_it_holds_and_how_far_it_is(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load_model(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    tensors = load_file(folder / "model.safetensors")
    num_bytes = weight_bytes(loaded.config, loaded.dtype, Packing())
    assert num_bytes == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert weight_bytes(loaded.config, torch.bfloat16, Packing()) * 2 == num_bytes
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("packing", [Packing(), Packing(True, True), Packing(True, False)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_are_what_the_weights_take(tmp_path: Path, tied: bool, packing: Packing) -> None:
    folder = save_reference(make_reference("qwen3", tie_word_embeddings=tied), tmp_path)
    weights = load_model(folder, packing=packing).weights
    values = [getattr(layer, name) for layer in weights.layers for name in LayerWeights.__dataclass_fields__]
    tensors = [weights.embedding, weights.final_norm]
    for value in (weights.lm_head, *values):
        tensors += [value.plain, value.bias, value.packed] if isinstance(value, Linear) else [value]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    assert size_bytes == weight_bytes(read_config(folder), torch.float32, packing)


def test_end_of_sequence_ids_come_from_the_generation_config_first(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert read_config(folder).eos_token_ids == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_config(folder).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [("auto", "cpu", torch.float32), ("auto", "cuda", torch.bfloat16), ("float16", "cpu", torch.float16)],
)
def test_dtype_names_resolve_per_device(folder: Path, name: str, device: str, dtype: torch.dtype) -> None:
    change_config(folder, dtype="bfloat16")
    assert resolve_dtype(name, read_config(folder), torch.device(device)) == dtype


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _end_with(folder: Path, eos_token_id: object) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_config(folder, eos_token_id=eos_token_id)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds list"),
    "another architecture": (
        lambda f: change_config(f, architectures=["GPT2LMHeadModel"]),
        r"GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, .*Qwen3ForCausalLM",
    ),
    "no architecture": (lambda f: change_config(f, architectures=None, model_type="t5"), "model_type 't5'"),
    "another rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1.0}),
        "RoPE type 'longrope' is not supported; supported are default, linear, llama3, yarn",
    ),
    "quantised": (lambda f: change_config(f, quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
    "quantised, in a word": (lambda f: change_config(f, quantization_config="awq"), r"quantised \(awq\)"),
    "rope in a word": (lambda f: change_config(f, rope_scaling="yarn"), "rope_scaling must be an object, not 'yarn'"),
    "rope with an unknown key": (
        lambda f: change_config(f, rope_scaling={"rope_type": "linear", "factor": 2.0, "mrope_section": [8, 8]}),
        "mrope_section in rope_scaling is not supported",
    ),
    "rope factor in words": (
        lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": "big"}),
        "mscale must be a number",
    ),
    "rope factor 0": (
        lambda f: change_config(f, rope_scaling={"rope_type": "linear", "factor": 0}),
        "factor must be more than 0",
    ),
    "odd end of sequence": (lambda f: _end_with(f, "</s>"), "eos_token_id must be a token id or a list"),
    "odd ends of sequence": (lambda f: _end_with(f, [1, None]), "eos_token_id must be a token id or a list"),
    "a key of another family": (lambda f: change_config(f, mlp_bias=True), "mlp_bias is not known .* qwen2"),
    "unknown keys": (
        lambda f: change_config(f, dual_chunk_attention_config={"chunk_size": 8}, logits_scaling=8.0),
        "dual_chunk_attention_config, logits_scaling is not known",
    ),
    "not causal": (lambda f: change_config(f, is_causal=False), "computes causal attention only"),
    "layer types in words": (
        lambda f: change_config(f, use_sliding_window=True, sliding_window=9, layer_types="full_attention"),
        "layer_types must name 3 layers",
    ),
    "infinite counts": (lambda f: change_config(f, num_hidden_layers=float("inf")), "must be a number"),
    "another activation": (lambda f: change_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "odd counts": (lambda f: change_config(f, num_hidden_layers=-1), "num_hidden_layers must be a positive"),
    "words for numbers": (lambda f: change_config(f, hidden_size="big"), "hidden_size must be a number"),
    "heads that do not divide": (lambda f: change_config(f, num_key_value_heads=4), "no multiple"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors", 40_000), "is truncated: 40,000 of"),
    "truncated header": (lambda f: _truncate(f / "model.safetensors", 100), "truncated or no safetensors file"),
    "empty weights": (lambda f: _truncate(f / "model.safetensors", 0), "truncated or no safetensors file"),
    "garbage header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x05" + b"\0" * 7 + b"12345"),
        "unreadable header",
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        "tensor model.layers.2.mlp.up_proj.weight is missing",
    ),
    "missing bias": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias")),
        "tensor model.layers.0.self_attn.k_proj.bias is missing",
    ),
    "missing head": (lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "wrong shape": (
        lambda f: change_config(f, intermediate_size=81),
        r"\[80, 48\] where config.json asks for \[81, 48\]",
    ),
    "integer tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)})),
        "dtype I32",
    ),
    "missing shard": (
        lambda f: (make_sharded(f), (f / "part-1.safetensors").unlink()),
        "part-1.safetensors is missing",
    ),
    "shard outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "outside the folder",
    ),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_folders_are_refused_in_one_clear_sentence(folder: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert "\n" not in caught.value.message


def test_keys_without_effect_and_keys_that_say_nothing_are_passed_over(folder: Path) -> None:
    before = read_config(folder)
    change_config(folder, pretraining_tp=2, temperature=0.7, _attn_implementation="eager", use_mrope=False, bands=None)
    assert read_config(folder) == before


@pytest.mark.parametrize("stored", ["both alike", "both, different", "only lm_head"])
def test_a_tied_model_with_a_stored_head_is_what_transformers_makes_of_it(tmp_path: Path, stored: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.roll(3, 0) if stored == "both, different" else embedding.clone()
        if stored == "only lm_head":
            del tensors["model.embed_tokens.weight"]

    folder = save_reference(make_reference("qwen2", tie_word_embeddings=True), tmp_path)
    change_tensors(folder, change)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference(torch.arange(2, 12)[None]).logits[0, -1]
    loaded = load_model(folder)
    assert (logits(loaded)[0] - expected).abs().max() < 1e-4
    assert loaded.config.tie_word_embeddings == (stored != "both, different")


def test_a_path_that_is_no_folder_and_an_unknown_dtype_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_model(folder / "nowhere")
    with pytest.raises(ModelError, match="Unknown dtype 'int4'"):
        load_model(folder, dtype="int4")


def test_fingerprint_is_the_same_for_a_copy_and_ignores_who_saved_it(original: Path, folder: Path) -> None:
    change_config(folder, transformers_version="1.2.3", _name_or_path="elsewhere")
    assert model_fingerprint(folder) == model_fingerprint(original)
    assert len(model_fingerprint(folder)) == 32


def test_fingerprint_sees_other_weights_shapes_and_settings(original: Path, folder: Path) -> None:
    seen = {model_fingerprint(original)}
    change_tensors(folder, lambda t: t["model.norm.weight"].add_(1e-3))
    seen.add(model_fingerprint(folder))
    change_config(folder, rms_norm_eps=1e-4)
    seen.add(model_fingerprint(folder))
    make_sharded(folder)
    seen.add(model_fingerprint(folder))
    assert len(seen) == 4


def test_fingerprint_of_a_large_shard_samples_begin_end_and_pages_between(tmp_path: Path) -> None:
    tensor = torch.zeros(2_000_000)
    prints = set()
    for position in (None, 0, 1_999_999):
        if position is not None:
            tensor[position] = 1.0
        save_file({"a": tensor}, tmp_path / "model.safetensors")
        prints.add(model_fingerprint(tmp_path))
    save_file({"a": tensor + 1}, tmp_path / "model.safetensors")
    prints.add(model_fingerprint(tmp_path))
    assert len(prints) == 4
