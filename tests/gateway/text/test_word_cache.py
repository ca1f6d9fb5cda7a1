"""The word-wise encoder against the public tokenizer: equal wherever it answers, and silent where it should be."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import kvasir.gateway.text.word_cache as word_cache
from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.gateway.text.model_text import ModelText
from kvasir.gateway.text.piece_cache import Memory, Pieces
from kvasir.gateway.text.word_cache import MAX_NEW_WORDS, make_word_cache
from kvasir.protocol.tokens import unpack_tokens

DEMO = Path(__file__).resolve().parents[3] / "kvasir" / "demo_model"
SOURCE = Path(textwrap.__file__).read_text() + Path(statistics.__file__).read_text()
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(pre_tokenizer: pre_tokenizers.PreTokenizer, *, ignore_merges: bool = False) -> Tokenizer:
    """A small byte-level BPE, trained on some code."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|bos|>", "<|end|>", "<|end|>x"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def with_normalizer(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


KNOWN = {
    "demo": Tokenizer.from_file(str(DEMO / "tokenizer.json")),
    "gpt2": train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": train(split(LLAMA3), ignore_merges=True),
    "qwen": with_normalizer(train(split(QWEN))),
    "tekken": train(split(TEKKEN)),
}
ENCODERS = {name: make_word_cache(tokenizer) for name, tokenizer in KNOWN.items()}

pieces = st.one_of(
    st.sampled_from(["don't", "I'LL", " 's", "<|end|>", "<|end|>x", "<|endoftext|>", "\r\n", "  \n", "\t", "x1234567"]),
    st.text(st.characters(max_codepoint=127), max_size=8),
    st.integers(0, len(SOURCE) - 40).map(lambda start: SOURCE[start : start + 40]),
)


@pytest.mark.parametrize("name", KNOWN)
def test_ascii_texts_get_the_tokens_that_the_library_gives(name: str) -> None:
    encoder, tokenizer = ENCODERS[name], KNOWN[name]
    num_answered, memory = 0, {}

    @settings(max_examples=200)
    @given(st.lists(pieces, max_size=8).map("".join))
    def check(text: str) -> None:
        nonlocal num_answered
        ids = encoder.encode(text, memory)
        num_answered += ids is not None
        assert ids in (None, tokenizer.encode(text, add_special_tokens=False).ids)

    check()
    assert num_answered > 150


@given(st.text(min_size=1, max_size=20))
def test_other_texts_are_left_to_the_library(text: str) -> None:
    encoder = ENCODERS["demo"]
    assert text.isascii() or encoder.encode(text, {}) is None


def test_a_text_full_of_new_words_is_left_to_the_library_after_a_few() -> None:
    encoder = make_word_cache(KNOWN["demo"])
    words = [f" w{''.join(chr(97 + int(digit)) for digit in str(number))}" for number in range(3 * MAX_NEW_WORDS)]
    memory = {}
    assert encoder.encode("".join(words), memory) is None
    assert encoder.encode("".join(words[:MAX_NEW_WORDS]), memory) is not None
    assert encoder.encode("".join(words), memory) is None  # it has learnt that many more
    assert encoder.encode("".join(words), memory) is not None


def test_what_one_memory_has_learnt_another_does_not_know() -> None:
    """Two sharing scopes: the second is as slow with a word as if the first had never used it."""
    encoder = make_word_cache(KNOWN["demo"])
    mine, theirs = {}, {}
    encoder.encode("secret words", mine)
    encoder.encode("other words", theirs)
    assert "secret" in mine and "secret" not in theirs


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_WORDS", 10)
    encoder = make_word_cache(KNOWN["demo"])
    memory = {}
    for start in range(0, 4000, 40):
        text = SOURCE[start : start + 40]
        assert encoder.encode(text, memory) in (None, KNOWN["demo"].encode(text, add_special_tokens=False).ids)
        assert len(memory) <= 10


def make_unknown(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    match name:
        case "prefix space":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "lower case":
            tokenizer.normalizer = normalizers.Lowercase()
        case "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        case "no pre-tokenizer":
            tokenizer.pre_tokenizer = None
        case "stripping token":
            tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
        case "unknown class":
            tokenizer.pre_tokenizer = split(r"\p{Greek}+|.")
        case "merged":
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
            merging = pre_tokenizers.Split(Regex(r"\s"), "merged_with_next")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([merging, byte_level])
        case "dropout":
            tokenizer.model.dropout = 0.1
    return tokenizer


@pytest.mark.parametrize(
    "name",
    [
        "prefix space",
        "lower case",
        "metaspace",
        "no pre-tokenizer",
        "stripping token",
        "unknown class",
        "merged",
        "dropout",
    ],
)
def test_a_tokenizer_that_is_not_known_in_full_gets_no_word_cache(name: str) -> None:
    assert make_word_cache(make_unknown(name)) is None


def test_a_pattern_that_is_read_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_GPT2", word_cache._GPT2.replace(r"\s+(?!\S)|", ""))
    assert make_word_cache(KNOWN["gpt2"]) is None


def test_texts_keep_what_the_tokenizer_puts_around_them() -> None:
    tokenizer = train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    bos, end = (tokenizer.token_to_id(name) for name in ("<|bos|>", "<|end|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", bos), ("<|end|>", end)]
    )
    text = ModelText(tokenizer, ChatTemplate("{{ messages[0].content }}", {}), 600)
    for content in ("import os", "", "é", "x" * 10_000):
        plain = tokenizer.encode(content, add_special_tokens=False).ids
        known = unpack_tokens(text.pack(content, Memory(b"owner", Pieces(1 << 20))))
        assert text.encode(content) == known == tokenizer.encode(content).ids == [bos, *plain, end]
