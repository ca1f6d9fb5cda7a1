"""The four families against the public `transformers` implementation: logits and greedy tokens, on every path."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention
from kvasir.worker.model.attention_paths import choose_attention
from kvasir.worker.model.config import ModelConfig, parse_config
from kvasir.worker.model.linear import Packing
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from tests.model_helpers import (
    VARIANTS,
    Sequence,
    greedy,
    make_reference,
    make_store,
    reference_greedy,
    save_reference,
    scattered_tables,
)

NUM_TOKENS = 64
PROMPT = random.Random(3).choices(range(2, 160), k=37)  # longer than every window used here


def _default(config: ModelConfig) -> Attention:
    return choose_attention(config, torch.device("cpu"), torch.float32, 16, 1 << 30)


PATHS: dict[str, Callable[[ModelConfig], Attention]] = {
    "reference": ReferenceAttention,
    "gather": GatherAttention,
    "default": _default,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Every variant on the path that serves, some on the others (tests/test_attention.py compares the paths in detail).
CASES = [(variant, "default") for variant in VARIANTS]
CASES += [(variant, path) for path in ("reference", "gather") for variant in ("mistral-window", "qwen3")]


# Whatever is fastest here and now, every variant is computed in each way: plain, packed, packed but for single rows.
WAYS = (Packing(), Packing(True, True), Packing(True, False))
PACKINGS = {variant: WAYS[i % 3] for i, variant in enumerate(VARIANTS)}


@dataclass(frozen=True)
class Oracle:
    """A model's folder, `transformers`' greedy continuation of PROMPT and the logits [NUM_TOKENS, vocab] of it."""

    folder: Path
    tokens: list[int]
    logits: torch.Tensor


@functools.cache
def oracle_of(variant: str, parent: Path) -> Oracle:
    reference = make_reference(variant)
    tokens, logits = reference_greedy(reference, PROMPT, NUM_TOKENS)
    return Oracle(save_reference(reference, parent / variant), tokens, logits)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Oracle]:
    variant, path = request.param
    oracle = oracle_of(variant, tmp_path_factory.getbasetemp())
    return load_model(oracle.folder, "cpu", "float32", make_attention=PATHS[path], packing=PACKINGS[variant]), oracle


@pytest.fixture
def model(case: tuple[Model, Oracle]) -> Model:
    return case[0]


@pytest.fixture
def oracle(case: tuple[Model, Oracle]) -> Oracle:
    return case[1]


def assert_equals_oracle(sequence: Sequence, oracle: Oracle) -> None:
    assert sequence.tokens == PROMPT + oracle.tokens
    assert (torch.stack(sequence.logits) - oracle.logits).abs().max().item() <= 1e-4


def make_sequence(key: int = 1, seed: int = 0, prompt: list[int] = PROMPT) -> Sequence:
    return Sequence(key, list(prompt), scattered_tables(2, 32, seed)[0])


def test_cold_prompt_gives_the_logits_and_tokens_of_transformers(model: Model, oracle: Oracle) -> None:
    sequence = make_sequence()
    greedy(model, make_store(model), [sequence], NUM_TOKENS)
    assert_equals_oracle(sequence, oracle)


def test_cached_prefix_gives_the_logits_and_tokens_of_transformers(model: Model, oracle: Oracle) -> None:
    store = make_store(model)
    first = make_sequence()
    greedy(model, store, [first], 1)
    for num_cached in (4, 20, 36):  # the last leaves one token to compute
        own = [block for block in range(64) if block not in first.block_table]
        shared = first.block_table[: num_cached // 4]
        second = Sequence(2, list(PROMPT), shared + own, num_stored=num_cached)
        greedy(model, store, [second], NUM_TOKENS)
        assert_equals_oracle(second, oracle)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_prefill_gives_the_logits_and_tokens_of_transformers(model: Model, oracle: Oracle, chunk: int) -> None:
    sequence = make_sequence()
    greedy(model, make_store(model), [sequence], NUM_TOKENS, chunk)
    assert_equals_oracle(sequence, oracle)


def test_batched_with_others_gives_the_logits_and_tokens_of_transformers(model: Model, oracle: Oracle) -> None:
    rng = random.Random(5)
    tables = scattered_tables(5, 32, seed=2)
    prompts = [rng.choices(range(2, 160), k=n) for n in (3, 60, 17, 29)]
    prompts.insert(2, list(PROMPT))
    sequences = [Sequence(key, prompt, table) for key, (prompt, table) in enumerate(zip(prompts, tables, strict=True))]
    greedy(model, make_store(model, 160), sequences, NUM_TOKENS, chunk=8)  # decode and prefill share steps
    assert_equals_oracle(sequences[2], oracle)


def test_sequences_can_leave_between_steps(model: Model, oracle: Oracle) -> None:
    tables = scattered_tables(4, 32)
    sequences = [Sequence(key, list(PROMPT), table) for key, table in enumerate(tables)]
    store = make_store(model, 128)
    greedy(model, store, sequences, 8)
    greedy(model, store, [sequences[1]], NUM_TOKENS)
    assert_equals_oracle(sequences[1], oracle)


def test_several_logits_of_one_slice_are_those_of_its_last_positions(model: Model, oracle: Oracle) -> None:
    sequence = Sequence(1, PROMPT + oracle.tokens[:-1], scattered_tables(1, 32)[0])
    rows = model.forward([sequence.slice(num_logits=NUM_TOKENS)], make_store(model))
    assert (rows - oracle.logits).abs().max().item() <= 1e-4


def test_logits_come_in_the_order_of_the_slices_whatever_the_pack_does(model: Model) -> None:
    tables = scattered_tables(3, 20)
    prompts = [PROMPT[:9], PROMPT[:1], PROMPT[5:20]]
    store = make_store(model)
    together = model.forward(
        [Sequence(i, p, t).slice() for i, (p, t) in enumerate(zip(prompts, tables, strict=True))], store
    )
    for i, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
        alone = model.forward([Sequence(10 + i, prompt, table).slice()], store)
        assert (together[i] - alone[0]).abs().max().item() <= 1e-4


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-4), ("bfloat16", 0.5), ("float16", 0.06)])
def test_other_dtypes_stay_near_transformers(tmp_path: Path, variant: str, dtype: str, tolerance: float) -> None:
    reference = make_reference(variant)
    _, logits = reference_greedy(reference, PROMPT, 1)
    model = load_model(save_reference(reference, tmp_path), "cpu", dtype)
    sequence = make_sequence()
    greedy(model, make_store(model), [sequence], 8, chunk=16)
    assert sequence.logits[0].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert (sequence.logits[0] - logits[0]).abs().max().item() <= tolerance * logits.abs().max().item()


def test_old_rope_keys_mean_what_the_new_ones_mean(tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    base = transformers.Qwen2Config().to_dict() | {"architectures": ["Qwen2ForCausalLM"], "rope_parameters": None}
    assert parse_config(base | old) == parse_config(base | new)
    assert parse_config(base | old).max_position == 4 * 32768


def test_rope_scaling_beside_rope_parameters_stands_in_their_place(tmp_path: Path) -> None:
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    }
    assert_read_as_transformers_does(tmp_path, "qwen3", both)


def test_mistral_with_layer_types_alternates_as_ministral_does(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert_read_as_transformers_does(tmp_path, "mistral-window", {"layer_types": kinds})


def assert_read_as_transformers_does(folder: Path, variant: str, changes: dict[str, object]) -> None:
    """Compare logits of a folder whose config.json was edited by hand with those of transformers' `AutoModel`."""
    save_reference(make_reference(variant), folder)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens, logits = reference_greedy(reference, PROMPT, 16)
    model = load_model(folder)
    sequence = make_sequence()
    greedy(model, make_store(model), [sequence], 16)
    assert_equals_oracle(sequence, Oracle(folder, tokens, logits))
