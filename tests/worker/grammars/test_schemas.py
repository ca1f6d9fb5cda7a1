"""Every answer that stops is valid by `jsonschema`, whatever the model would rather write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import jsonschema
import pytest
import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.protocol.grammars import make_matcher
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.model import Model
from tests.engine_helpers import make_generate
from tests.grammar_engine import SIZE, load, make_engine, run
from tests.grammar_helpers import EOS, TOKENIZER, VOCAB, held_to, schema_grammar, schemas

MAX_TOKENS = 80


def say_anything(model: Model) -> None:
    """Have `model` compute nothing and say whatever chance says."""
    generator = torch.Generator().manual_seed(1)

    def forward(slices: Sequence[SequenceSlice], kv: KvStore) -> Tensor:
        num_rows = sum(piece.num_logits * piece.num_draws for piece in slices)
        return torch.randn(num_rows, VOCAB, generator=generator) * 2

    model.forward = forward


@pytest.mark.slow
@pytest.mark.parametrize("is_random", [False, True])
def test_an_answer_that_stops_is_valid_and_one_that_is_cut_is_a_valid_prefix(is_random: bool) -> None:
    model = load(dtype=torch.float32)
    if is_random:
        say_anything(model)
    cases = list(schemas())
    assert len(cases) == 300
    commands = [
        make_generate(
            [7, 11, 300 + index],
            MAX_TOKENS,
            req_id=b"%d" % index,
            sampling=held_to(schema_grammar(schema), temperature=1.0, seed=index),
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
