"""What each token id adds to a text, as bytes: one table per tokenizer, so that detokenising is a join.

Byte-level tokenizers (Llama 3, Qwen, the bundled model) and SentencePiece-like ones (Llama 2, Mistral) decode token by
token: a token's bytes do not depend on its neighbours. Only the beginning of a text is special, where SentencePiece
drops a space; an answer continues a prompt and never begins a text, so nothing is dropped here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from kvasir.protocol.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes_by_id(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Return by token id the bytes that it adds to a text: none for special tokens and for ids that are no token.

    Raises:
        ModelError: a decoder that does not work token by token; names it.
    """
    convert = _converter(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    found = [b""] * max(vocab_size, max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token_id not in added or not added[token_id].special:
            found[token_id] = convert(token)
    return found


def _converter(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """Return the function from a token's name to its bytes, as the tokenizer's decoder prescribes."""
    steps = _decoder_steps(tokenizer)
    kinds = {str(step.get("type")) for step in steps}
    unknown = kinds - {"ByteLevel", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    replacements: list[tuple[str, str]] = []
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
            case {"type": "Replace" | "Metaspace"} | {"type": "Strip", "stop": 1}:
                unknown.add(json.dumps(step))
    if unknown or not steps or ("ByteLevel" in kinds and replacements):
        found = ", ".join(sorted(unknown or kinds)) or "none"
        raise ModelError(
            f"the tokenizer's decoder cannot be used for streaming: {found}; byte-level and SentencePiece-like ones can"
        )
    if "ByteLevel" in kinds:
        return _from_byte_level

    def from_sentence_piece(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return from_sentence_piece


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state.get("type") == "Sequence" else [state]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_of_char()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:  # an added token, kept as it is
        return token.encode()
