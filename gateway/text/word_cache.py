"""A quicker way through a byte-level BPE for short ASCII texts, with the public tokenizer as its oracle.

Most of what the `tokenizers` library spends on a short text goes into cutting it into words and keeping their offsets,
which nobody here wants. This cuts the text with Python's `re` and remembers the token ids of each word, which the
library itself has computed. Only ASCII, since there the patterns' character classes mean the same to both regex
engines; only what is recognised in full. Everything else is left to the library.

Whether a word is remembered shows in the time a text takes. So the memory belongs to the caller, who keeps one per
sharing scope: no tenant can learn from the clock which words another one uses.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import BPE

from kvasir.gateway.text.piece_cache import Memory, Pieces
from kvasir.protocol.tokens import pack_tokens

MAX_WORDS = 1 << 14  # in one memory
MAX_WORD_CHARS = 64
MAX_NEW_WORDS = 32  # in one text; learning a word costs as much as the library takes for ten of them

# The cut that `ByteLevel` makes by itself: GPT-2's (Radford et al., 2019).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ASCII_CLASSES = {"L": "A-Za-z", "N": "0-9", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": ""}


Words = dict[str, list[int]]
"""The token ids of words met so far. Filled by `WordCache.encode`; start with an empty one."""


class WordCache:
    """Token ids of short ASCII texts, word by word. Make it with `make_word_cache`. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, cuts: list[re.Pattern[str]], specials: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._cuts = cuts
        self.specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if specials else None
        self._packed_specials = {name: pack_tokens((token_id,)) for name, token_id in specials.items()}

    def encode(self, text: str, known: Words) -> list[int] | None:
        """Return what the tokenizer gives for `text` without adding special tokens, None if that is its own affair.

        New words are added to `known`, at most `MAX_NEW_WORDS` of them.
        """
        if not text.isascii():
            return None
        ids: list[int] = []
        num_new = 0
        specials = self.specials
        for index, part in enumerate([text] if self._special is None else self._special.split(text)):
            if index % 2:
                ids.append(specials[part])
                continue
            words = [part] if part else []
            for cut in self._cuts:
                words = [word for piece in words for word in cut.findall(piece)]
            if len("".join(words)) != len(part):
                return None
            for word in words:
                found = known.get(word)
                if found is None:
                    num_new += 1
                    found = self._learn(word, known) if num_new <= MAX_NEW_WORDS else None
                    if found is None:
                        return None
                ids += found
        return ids

    def encode_pieces(self, text: str, memory: Memory) -> bytes:
        """Return what the tokenizer gives for `text` without adding special tokens, packed.

        Only pieces that `memory` does not know are tokenised, and added to it.

        Raises:
            UnicodeEncodeError: `text` is no valid Unicode.
        """
        packed = []
        for index, piece in enumerate([text] if self._special is None else self._special.split(text)):
            if index % 2:
                packed.append(self._packed_specials[piece])
            elif piece:
                digest = memory.digest(piece)
                found = memory.pieces.get(digest)
                if found is None:
                    found = pack_tokens(self._tokenizer.encode(piece, add_special_tokens=False).ids)
                    memory.pieces.put(digest, found)
                packed.append(found)
        return b"".join(packed)

    def _learn(self, word: str, known: Words) -> list[int] | None:
        """Ask the tokenizer for a word, and remember what it says if to it, too, this is one word."""
        if len(word) > MAX_WORD_CHARS or len(self._tokenizer.pre_tokenizer.pre_tokenize_str(word)) != 1:
            return None
        if len(known) >= MAX_WORDS:
            known.clear()
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        known[word] = ids
        return ids


def make_word_cache(tokenizer: Tokenizer) -> WordCache | None:
    """Return an encoder for `tokenizer`, None if its parts are not all known or a try on some text differs."""
    model = tokenizer.model
    normalizer = None if tokenizer.normalizer is None else _state(tokenizer.normalizer).get("type")
    if not isinstance(model, BPE) or model.dropout or normalizer not in (None, "NFC") or not tokenizer.pre_tokenizer:
        return None
    state = _state(tokenizer.pre_tokenizer)
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    cuts: list[re.Pattern[str]] = []
    for step in steps:
        match _cut(step):
            case re.Pattern() as cut:
                cuts.append(cut)
            case None:
                return None
    if "ByteLevel" not in [step.get("type") for step in steps]:
        return None
    specials: dict[str, int] = {}
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word or token.normalized or not token.content:
            return None
        specials[token.content] = token_id
    encoder = WordCache(tokenizer, cuts, specials)
    return encoder if _agrees(encoder, tokenizer) else None


def _cut(step: dict[str, Any]) -> re.Pattern[str] | Literal[""] | None:
    """Return a pattern that matches the pieces of one step of pre-tokenisation; "": it cuts nothing; None: unknown."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}:
            return _ascii_pattern(_GPT2) if use_regex else ""
        case {"type": "Digits", "individual_digits": bool(individual)}:
            return re.compile("[0-9]|[^0-9]+" if individual else "[0-9]+|[^0-9]+")
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": invert}:
            return _ascii_pattern(pattern) if (behavior, invert) in (("Isolated", False), ("Removed", True)) else None
    return None


def _ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """Return `pattern` with its Unicode classes narrowed to ASCII, None if it holds something unknown."""
    out, in_class = "", False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith("\\p"):
            chars = _ASCII_CLASSES.get(part[3:-1])
            if chars is None or not (chars or in_class):
                return None
            part = chars if in_class else f"[{chars}]"
        elif part.startswith("\\P") or (part == "[" and in_class):
            return None
        elif part in "[]":
            in_class = part == "["
        out += part
    try:
        compiled = re.compile(out, re.ASCII)
    except re.error:
        return None
    return compiled if compiled.groups == 0 else None


def _agrees(encoder: WordCache, tokenizer: Tokenizer) -> bool:
    """Try it on text of all kinds: a pattern that is read wrongly shows at once."""
    rng, known, memory = random.Random(1), Words(), Memory(b"", Pieces(1 << 20))
    kinds = ["abcXYZ", "0123456789", " ", "  \t", "\n\r\n", "'sS'LL't", '!?.,;(){}[]<>=+-*/_#"\\', "\0\x1c\x1f\x7f\v\f"]
    between = [*encoder.specials, "", "é", "e\u0301", "😀 "]
    for _ in range(300):
        text = "".join(rng.choice(rng.choice(kinds)) * rng.choice((1, 1, 2, 5)) for _ in range(24))
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if encoder.encode(text, known) not in (None, expected):
            return False
        text += rng.choice(between) + text[:8] + rng.choice(between)
        if encoder.encode_pieces(text, memory) != pack_tokens(tokenizer.encode(text, add_special_tokens=False).ids):
            return False
    return True


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state
