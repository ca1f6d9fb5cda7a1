"""Every answer that stops is valid by `jsonschema`, whatever the model would rather write."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvasir.protocol.grammars import make_matcher
from kvasir.worker.model.model import Model
from tests.engine_helpers import make_generate
from tests.grammar_engine import SIZE, load, make_engine, run
from tests.grammar_helpers import DEMO, EOS, TOKENIZER, held_to, schema_grammar, schemas

MAX_TOKENS = 80


def load_random(folder: Path) -> Model:
    for file in DEMO.iterdir():
        shutil.copy(file, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(DEMO / "model.safetensors")
    save_file(
        {name: torch.randn(w.shape, generator=generator).to(w.dtype) * 0.1 for name, w in weights.items()},
        folder / "model.safetensors",
    )
    return load(folder, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("is_random", "temperature"), [(False, 0.0), (False, 1.0), (True, 1.0)])
def test_an_answer_that_stops_is_valid_and_one_that_is_cut_is_a_valid_prefix(
    is_random: bool, temperature: float, tmp_path: Path
) -> None:
    model = load_random(tmp_path) if is_random else load(dtype=torch.float32)
    cases = list(schemas())
    assert len(cases) == 300
    commands = [
        make_generate(
            [7, 11, 300 + index],
            MAX_TOKENS,
            req_id=b"%d" % index,
            sampling=held_to(schema_grammar(schema), temperature=temperature, seed=index),
            size=SIZE,
        )
        for index, (_, schema) in enumerate(cases)
    ]
    reasons: Counter[tuple[str, str]] = Counter()
    for (kind, schema), stream in zip(cases, run(make_engine(model), *commands, timeout_s=110), strict=True):
        assert stream.finish_reason in ("stop", "length"), (schema, stream.error)
        reasons[kind, stream.finish_reason] += 1
        token_ids = [token_id for token_id in stream.token_ids if token_id not in EOS]
        if stream.finish_reason == "stop":
            answer = TOKENIZER.decode_bytes(token_ids).decode()
            jsonschema.validate(json.loads(answer), schema, jsonschema.Draft202012Validator)
        else:
            assert make_matcher(TOKENIZER, schema_grammar(schema)).consume_tokens(token_ids)
            assert len(stream.token_ids) == MAX_TOKENS
    for kind in {kind for kind, _ in cases}:  # else the check above could be one of nothing
        assert reasons[kind, "stop"] >= 10, reasons
