"""Bodies that clients send compressed, unpacked within a bound."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from kvasir.gateway.http.parser import MAX_BODY_BYTES
from kvasir.protocol.errors import BadRequest, TooLarge

_GZIP = 16 + zlib.MAX_WBITS


def read_coding(headers: Mapping[str, str]) -> bool:
    """Return whether the body to these headers is packed by gzip.

    Raises:
        BadRequest: by another coding.
    """
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip"):
        raise BadRequest(f"content-encoding {coding[:40]!r} is not known here; send gzip, or the body as it is")
    return coding.endswith("gzip")


def unpack(body: bytes) -> bytes:
    """Return what was packed by gzip. Takes milliseconds where much comes of little: call it in a thread.

    Raises:
        BadRequest: it is no gzip.
        TooLarge: more comes of it than a body may have.
    """
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
