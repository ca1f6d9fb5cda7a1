"""A draft model has to have the tokens of the model that it drafts for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvasir.protocol.errors import ConfigurationError, ModelError
from kvasir.worker.options import parse_options
from kvasir.worker.speculation.same_tokenizer import check_same_tokenizer
from kvasir.worker.startup import build

DEMO = Path(__file__).resolve().parents[3] / "kvasir" / "demo_model"


def swap(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["the"], vocab["of"] = vocab["of"], vocab["the"]


def rename(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][-1]["content"] = "<|other|>"


def split(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (swap, "2 tokens have other ids, such as 'of'"),
        (rename, "[12] tokens have other ids, such as"),
        (split, "they split text differently"),
    ],
)
def test_other_tokens_are_refused_with_what_is_other(
    change: Callable[[dict[str, Any]], None], error: str, tmp_path: Path
) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=f"--draft-model {tmp_path} has another tokenizer than .*: {error}"):
        check_same_tokenizer(DEMO, tmp_path)


def test_another_way_to_write_the_same_tokenizer_is_none(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges]
    tokenizer["truncation"] = {"max_length": 9}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_same_tokenizer(DEMO, tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be compared"):
        check_same_tokenizer(DEMO, tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="is no tokenizer"):
        check_same_tokenizer(DEMO, tmp_path)


def test_a_worker_starts_with_a_draft_model_whose_keys_count_as_kv_memory() -> None:
    args = ["--model", str(DEMO), "--gateway", "ipc://nowhere", "--kv-memory", "8M", "--device=cpu"]
    alone, _ = build(parse_options(args))
    engine, hello = build(parse_options([*args, "--draft-model", str(DEMO)]))
    assert engine.speculator is not None and engine.speculator.model is not None
    assert 2 * hello.num_blocks in (alone.cache.pool.num_blocks, alone.cache.pool.num_blocks - 1)
    with pytest.raises(ConfigurationError, match="not with --speculate off"):
        parse_options([*args, "--draft-model", str(DEMO), "--speculate", "off"])
