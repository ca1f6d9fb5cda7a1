"""One MessagePack frame per message, tagged unions, every list and number bounded, unknown fields refused.

A decoder is built once per union; whatever does not fit it is an `InvalidMessage` whose text names the path
(`$.sampling.temperature`) and whose `param` is the field. Bulk bytes travel in frames of their own, never through here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from kvasir.protocol.errors import InvalidMessage

M = TypeVar("M")

MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 32) - 1

Id = Annotated[bytes, Meta(min_length=1, max_length=32)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Key16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
PackedTokens = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
PackedHashes = Annotated[bytes, Meta(max_length=16 * MAX_TOKENS)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Reason = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
MAX_SECONDS = 1e9  # thirty years: sums stay finite
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]

_encoder = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of everything on a wire. Instances must not be mutated once they are sent."""


def encode(message: Message) -> bytes:
    """Return `message` as one MessagePack frame."""
    return _encoder.encode(message)


class Decoder(Generic[M]):
    """Decodes frames of one union of messages, refusing frames longer than `max_bytes` before looking inside."""

    def __init__(self, union: Any, *, max_bytes: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._max_bytes = max_bytes

    def decode(self, frame: bytes) -> M:
        """Return the message in `frame`.

        Raises:
            InvalidMessage: too long, not MessagePack, an unknown tag or field, a bound exceeded, a wrong type.
        """
        if len(frame) > self._max_bytes:
            raise InvalidMessage(f"a frame of {len(frame)} bytes exceeds the bound of {self._max_bytes} bytes")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            field = re.search(r"at `\$\.(?:sampling\.)?(\w+)", str(error))
            raise InvalidMessage(f"not a valid message: {error}", param=field[1] if field else None) from None
