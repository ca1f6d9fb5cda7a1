"""Bodies that clients send compressed, unpacked within a bound."""

from __future__ import annotations

import zlib

from kvasir.gateway.http.parser import MAX_BODY_BYTES
from kvasir.protocol.errors import BadRequest, TooLarge

_GZIP = 16 + zlib.MAX_WBITS


def unpack(body: bytes, coding: str) -> bytes:
    """Return `body` as it was before the client packed it by `coding`, the value of its `content-encoding`.

    Takes milliseconds where much comes of little: call it in a thread.

    Raises:
        BadRequest: another coding than gzip, or no gzip.
        TooLarge: more comes of it than a body may have.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip"):
        raise BadRequest(f"content-encoding {coding[:40]!r} is not known here; send gzip, or the body as it is")
    whole = b""
    while body or not whole:  # several packed one after the other are one body
        packed = zlib.decompressobj(_GZIP)
        try:
            whole += packed.decompress(body, MAX_BODY_BYTES + 1 - len(whole))
        except zlib.error as error:
            raise BadRequest(f"the body is no gzip: {error}") from None
        if len(whole) > MAX_BODY_BYTES:
            raise TooLarge(f"the body has more than {MAX_BODY_BYTES} bytes when it is unpacked; send less at a time")
        if not packed.eof:
            raise BadRequest("the body's gzip is cut short; send all of it")
        body = packed.unused_data
    return whole
