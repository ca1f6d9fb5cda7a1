"""Prefix hashes: golden vectors, zones, and what must never be equal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from kvasir.protocol.prefix import derive_namespace, derive_root, extend_chain, hash_prompt, split_hashes
from kvasir.protocol.tokens import num_tokens, pack_tokens, unpack_tokens

SECRET = bytes(range(32))
ROOT = derive_root(SECRET, "fingerprint", "float32")
PUBLIC = derive_namespace(SECRET, "public")
ALICE = derive_namespace(SECRET, "tenant", "alice")
tokens = st.lists(st.integers(0, (1 << 32) - 1), max_size=200)


def test_golden_vectors() -> None:
    """Frozen: a change here makes every cache and every index of a running deployment worthless."""
    assert ROOT.hex() == "62f062515d00fb2bf23a5bd329a49f10"
    assert PUBLIC.hex() == "85afd09bda2a6ef06f40f595fcd94880"
    assert ALICE.hex() == "6bedf173c721b34898b9b8b5b2a009dc"
    assert derive_root(SECRET, "fingerprint", "float32", "adapter").hex() == "55628af5fc4d7060c472c13a98f588ae"
    chain = hash_prompt(ROOT, PUBLIC, ALICE, pack_tokens(range(40)), 16, 16)
    assert [digest.hex() for digest in split_hashes(chain)] == [
        "fed3cd7a07b7157669212d9073cc4f41",
        "65781bdffa4b063212d4a2fa8e581020",
    ]


@pytest.mark.parametrize("num_hashes", [0, 1, 63, 64, 65, 200])
def test_packed_hashes_are_split_in_order(num_hashes: int) -> None:
    hashes = [i.to_bytes(16, "big") for i in range(num_hashes)]
    assert split_hashes(b"".join(hashes)) == hashes


def test_the_chain_is_what_the_docstring_says() -> None:
    packed = pack_tokens([1, 2, 3, 4])
    assert packed == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])
    [digest] = split_hashes(extend_chain(ROOT, ALICE, packed, 4))
    assert digest.hex() == xxh3_128_hexdigest(ROOT + ALICE + packed)


def test_another_process_computes_the_same_digests() -> None:
    code = (
        "from protocol.prefix import *; from protocol.tokens import *; s = bytes(range(32));"
        "print(hash_prompt(derive_root(s, 'fingerprint', 'float32'), derive_namespace(s, 'public'),"
        "derive_namespace(s, 'tenant', 'alice'), pack_tokens(range(100)), 32, 16).hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.strip() == hash_prompt(ROOT, PUBLIC, ALICE, pack_tokens(range(100)), 32, 16).hex()


@given(tokens, st.integers(0, 12))
def test_growing_a_chain_block_by_block_equals_hashing_it_at_once(ids: list[int], cut: int) -> None:
    packed = pack_tokens(ids)
    whole = extend_chain(ROOT, ALICE, packed, 16)
    border = min(cut * 16, len(ids) // 16 * 16) * 4
    first = extend_chain(ROOT, ALICE, packed[:border], 16)
    assert first + extend_chain(first[-16:] or ROOT, ALICE, packed[border:], 16) == whole
    assert len(whole) == len(ids) // 16 * 16


@given(tokens, tokens)
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int]) -> None:
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    left = split_hashes(extend_chain(ROOT, ALICE, pack_tokens(a), 16))
    right = split_hashes(extend_chain(ROOT, ALICE, pack_tokens(b), 16))
    equal = sum(x == y for x, y in zip(left, right, strict=False))
    assert equal == common // 16


def test_scopes_models_and_secrets_never_share_a_digest() -> None:
    spaces = [
        derive_namespace(SECRET, "tenant", "alice"),
        derive_namespace(SECRET, "group", "alice"),
        derive_namespace(SECRET, "tenant", "alic"),
        derive_namespace(SECRET, "tenantalice", ""),
        derive_namespace(SECRET, "tenanta", "lice"),
        derive_namespace(SECRET, "public", ""),
        derive_namespace(SECRET[::-1], "tenant", "alice"),
        derive_root(SECRET, "f", "float32"),
        derive_root(SECRET, "f", "bfloat16"),
        derive_root(SECRET, "ff", "loat32"),
        derive_root(SECRET, "f", "float32", "a"),
    ]
    assert len(set(spaces)) == len(spaces)


def test_the_public_zone_is_shared_and_the_rest_is_not() -> None:
    packed = pack_tokens(range(64))
    bob = derive_namespace(SECRET, "tenant", "bob")
    left = split_hashes(hash_prompt(ROOT, PUBLIC, ALICE, packed, 32, 16))
    right = split_hashes(hash_prompt(ROOT, PUBLIC, bob, packed, 32, 16))
    assert left[:2] == right[:2]
    assert not set(left[2:]) & set(right[2:])


def test_a_public_zone_that_is_no_whole_number_of_blocks_is_refused() -> None:
    for border in (8, 80):
        with pytest.raises(ValueError, match="whole number of blocks"):
            hash_prompt(ROOT, PUBLIC, ALICE, pack_tokens(range(64)), border, 16)


@given(tokens)
def test_token_ids_survive_packing(ids: list[int]) -> None:
    assert unpack_tokens(pack_tokens(ids)) == ids
    assert num_tokens(pack_tokens(ids)) == len(ids)
