"""Prefix hashes: the one definition that gateway, index and worker share.

A block is `block_size` token ids; only full blocks are hashed. With `h_0 = root`,

    h_i = xxh3_128(h_{i-1} || namespace_i || tokens_i as little-endian u32)

The root is a keyed BLAKE2b over (version, model fingerprint, dtype, adapter), the namespaces are a keyed BLAKE2b of a
sharing scope; both keys are the deployment's secret, which only the gateway knows. A request has two zones: its first
`num_public_tokens` tokens are hashed in the public namespace (a published prefix), the rest in the tenant's own.

xxhash finds, tokens decide: XXH3 has published collisions for chosen input, so whoever acts on a hit compares
namespace, parent and token ids with what is stored. A hash is never proof.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from struct import Struct

from xxhash import xxh3_128_digest

from kvasir.protocol.tokens import TOKEN_BYTES

HASH_BYTES = 16
SCHEME_VERSION = 1
_MANY = Struct(f"{HASH_BYTES}s" * 64)  # taken apart at a time, four times as fast as one by one
_FEW = [Struct(f"{HASH_BYTES}s" * count) for count in range(64)]


def derive_root(secret: bytes, fingerprint: str, dtype: str, adapter: str = "") -> bytes:
    """Return the 16-byte chain root of one model as served: same fingerprint, dtype and adapter, same root."""
    return _keyed(secret, b"kvasir-root", str(SCHEME_VERSION), fingerprint, dtype, adapter)


def derive_namespace(secret: bytes, scope: str, name: str = "", salt: str = "") -> bytes:
    """Return the 16-byte namespace of a sharing scope: ("public", ""), ("tenant", id) or ("group", name).

    A `salt` makes one of its own inside that scope: no salt leads from one scope to another.
    """
    return _keyed(secret, b"kvasir-space", scope, name, *([salt] if salt else []))


def extend_chain(parent: bytes, namespace: bytes, packed_tokens: bytes, block_size: int) -> bytes:
    """Return the packed hashes (16 bytes each) of the full blocks of `packed_tokens`, chained on from `parent`.

    Tokens after the last full block are ignored.
    """
    size = block_size * TOKEN_BYTES
    hashes = []
    for start in range(0, len(packed_tokens) - size + 1, size):
        parent = xxh3_128_digest(parent + namespace + packed_tokens[start : start + size])
        hashes.append(parent)
    return b"".join(hashes)


def hash_prompt(
    root: bytes,
    public_namespace: bytes,
    namespace: bytes,
    packed_tokens: bytes,
    num_public_tokens: int,
    block_size: int,
) -> bytes:
    """Return the packed hashes of a prompt's full blocks: the public zone first, the tenant's own zone after it.

    Raises:
        ValueError: `num_public_tokens` is not a multiple of `block_size` or exceeds the prompt.
    """
    border = num_public_tokens * TOKEN_BYTES
    if num_public_tokens % block_size or border > len(packed_tokens):
        raise ValueError(f"public zone of {num_public_tokens} tokens is no whole number of blocks of this prompt")
    public = extend_chain(root, public_namespace, packed_tokens[:border], block_size)
    parent = public[-HASH_BYTES:] or root
    return public + extend_chain(parent, namespace, packed_tokens[border:], block_size)


def split_hashes(packed: bytes) -> list[bytes]:
    """Return the 16-byte hashes in `packed`, in order."""
    num_bytes = len(packed) // _MANY.size * _MANY.size
    rest = _FEW[(len(packed) - num_bytes) // HASH_BYTES].unpack_from(packed, num_bytes)
    return [*chain.from_iterable(_MANY.iter_unpack(packed[:num_bytes])), *rest] if num_bytes else list(rest)


def _keyed(secret: bytes, person: bytes, *fields: str) -> bytes:
    """Keyed BLAKE2b over length-prefixed fields: ("a", "bc") and ("ab", "c") never meet."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, key=secret[:64], person=person)
    for field in fields:
        raw = field.encode()
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return digest.digest()
