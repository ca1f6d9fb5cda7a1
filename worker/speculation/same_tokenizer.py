"""Whether a draft model speaks of the same tokens as the model that it drafts for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvasir.protocol.errors import ModelError


def check_same_tokenizer(folder: Path, draft_folder: Path) -> None:
    """Compare what the tokenizers of two model folders call by which id, and how they split text.

    Raises:
        ModelError: they differ, or there is none.
    """
    ours, its = (_read(path) for path in (folder, draft_folder))
    if ours == its:
        return
    words, its_words = (_words(tokenizer) for tokenizer in (ours, its))
    if words != its_words:
        differing = [word for word in sorted({*words, *its_words}) if words.get(word) != its_words.get(word)]
        what = f"{len(differing)} tokens have other ids, such as {differing[0]!r}"
    elif _rules(ours) != _rules(its):
        what = "they split text differently"
    else:
        return
    raise ModelError(f"--draft-model {draft_folder} has another tokenizer than {folder}: {what}.")


def _read(folder: Path) -> dict[str, Any]:
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {folder} cannot be compared with the draft model's: {error}") from None
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise ModelError(f"{folder / 'tokenizer.json'} is no tokenizer.")
    return tokenizer


def _words(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the ids of all tokens; a unigram vocabulary is a list of pairs of a token and its score."""
    vocab = tokenizer["model"].get("vocab", {})
    ids = vocab if isinstance(vocab, dict) else {str(word[0]): i for i, word in enumerate(vocab)}
    return {**ids, **{str(added["content"]): added["id"] for added in tokenizer.get("added_tokens") or ()}}


def _rules(tokenizer: dict[str, Any]) -> list[Any]:
    """Return how a text is split; merges are written as text or as pairs, by version."""
    merges = tokenizer["model"].get("merges") or []
    joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return [joined, tokenizer["model"].get("type"), tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
