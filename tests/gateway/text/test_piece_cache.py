"""Long texts piece by piece: equal to the public tokenizer, known pieces not tokenised again, owners apart, bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.text.model_text import QUICK_CHARS, load_text
from kvasir.gateway.text.piece_cache import ENTRY_BYTES, Memory, Pieces
from kvasir.gateway.text.word_cache import WordCache, make_word_cache
from kvasir.protocol.client_messages import ChatMessage
from kvasir.protocol.tokens import unpack_tokens
from tests.gateway.text.test_word_cache import DEMO, KNOWN, SOURCE

parts = st.one_of(
    st.sampled_from(
        ["<|end|>", "<|end|>x", "<|bos|>", "<|im_end|>", "<|endoftext|>", "<|", "don't", " \n", "e\u0301", "é"]
    ),
    st.text(max_size=12),
    st.integers(0, len(SOURCE) - 40).map(lambda start: SOURCE[start : start + 40]),
)


class Counting:
    """A tokenizer that keeps the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._tokenizer = tokenizer

    def encode(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self._tokenizer.encode(text, **options)


def make_encoder(name: str) -> WordCache:
    return make_word_cache(KNOWN[name])


@pytest.mark.parametrize("name", KNOWN)
def test_pieces_get_the_tokens_that_the_library_gives_the_whole(name: str) -> None:
    encoder, tokenizer, memory = make_encoder(name), KNOWN[name], Memory(b"owner", Pieces(1 << 20))

    @settings(max_examples=300)
    @given(st.lists(parts, max_size=12).map("".join))
    def check(text: str) -> None:
        for _ in range(2):  # new, then known
            assert (
                unpack_tokens(encoder.encode_pieces(text, memory))
                == tokenizer.encode(text, add_special_tokens=False).ids
            )

    check()


def test_the_next_turn_of_a_conversation_tokenises_what_is_new_in_it() -> None:
    text, memory = load_text(DEMO), Memory(b"owner", Pieces(1 << 20))
    counting = Counting(text._tokenizer)
    text._words._tokenizer = counting  # type: ignore[union-attr]
    messages = [ChatMessage("system", SOURCE[:9_000]), ChatMessage("user", "What is it?")]
    assert unpack_tokens(text.pack_chat(messages, memory)) == text.encode_chat(messages)
    counting.texts.clear()
    messages += [ChatMessage("assistant", "Code."), ChatMessage("user", "In which language?")]
    assert unpack_tokens(text.pack_chat(messages, memory)) == text.encode_chat(messages)
    assert counting.texts and sum(map(len, counting.texts)) < 100
    counting.texts.clear()
    stranger = Memory(b"stranger", memory.pieces)
    text.pack_chat(messages, stranger)
    assert any(len(new) >= 9_000 for new in counting.texts), "nobody finds what others have sent"


def test_a_lone_surrogate_is_refused_in_a_long_text_too() -> None:
    text = load_text(DEMO)
    with pytest.raises(UnicodeEncodeError):
        text.pack("a" * QUICK_CHARS + "\ud800", Memory(b"owner", Pieces(1 << 20)))


def test_what_was_used_longest_ago_goes_when_the_pieces_are_too_many() -> None:
    size = 400 + ENTRY_BYTES
    pieces = Pieces(3 * size)
    for name in (b"a", b"b", b"c"):
        pieces.put(name, bytes(400))
    pieces.put(b"a", bytes(400))  # known: nothing happens
    assert pieces.get(b"a") is not None
    pieces.put(b"d", bytes(400))
    assert [pieces.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    pieces.put(b"large", bytes(3 * size))
    assert pieces.get(b"large") is None and len(pieces) == 3
