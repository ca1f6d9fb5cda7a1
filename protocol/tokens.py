"""Token ids as packed little-endian u32 bytes: how they travel and how they are hashed."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

TOKEN_BYTES = 4
_CODE: Literal["I", "L"] = "I" if array("I").itemsize == TOKEN_BYTES else "L"
_SWAP = sys.byteorder != "little"


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Return `token_ids` as little-endian u32 bytes, 4 bytes per token.

    Raises:
        OverflowError: an id is negative or does not fit 32 bits.
    """
    packed = array(_CODE, token_ids)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Return the token ids in `packed`.

    Raises:
        ValueError: the length is not a multiple of 4.
    """
    ids = array(_CODE)
    ids.frombytes(packed)
    if _SWAP:
        ids.byteswap()
    return ids.tolist()


def view_tokens(packed: bytes) -> Sequence[int]:
    """Return the token ids in `packed`, which holds a whole number of them, without a copy where that is possible."""
    return unpack_tokens(packed) if _SWAP else memoryview(packed).cast(_CODE)


def num_tokens(packed: bytes) -> int:
    """Return how many token ids `packed` holds."""
    return len(packed) // TOKEN_BYTES
