"""KV events as vLLM sends them: every form of the wire is read, whatever else comes is a clear error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.protocol.errors import InvalidMessage
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream import kv_wire
from kvasir.worker.upstream.kv_wire import (
    END_SEQ,
    Batch,
    Cleared,
    Removed,
    Stored,
    decode_batch,
    make_replay_request,
    split_live,
    split_replayed,
)

SALT = "0123456789abcdef0123456789abcdef"
STORED_FIELDS = {
    "block_hashes": [2**64 - 1, 5],
    "parent_block_hash": None,
    "token_ids": [1, 300, 2, 70000],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [[SALT], None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
STORED = Stored(
    hashes=[2**64 - 1, 5],
    parent=None,
    token_ids=pack_tokens([1, 300, 2, 70000]),
    block_size=2,
    salt=SALT,
    num_plain=2,
    lora_name=None,
    medium="GPU",
    group=0,
    is_full_attention=True,
)

# Payloads of a vLLM 0.32.0 server: two blocks with the salt "s" and hashes as bytes; a prompt after a reset.
RECORDED_STORE = bytes.fromhex(
    "93cb41dac2dd52f71ac0918ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392c420be28804fa92f7c2a6d63b3"
    "f703864f00c7db4278e9652d9311c8f2ab7398d767c420472a2a0cccb874ba8ac7db110f57448d41ce9424d15e71116847d7bc54f237bbb1"
    "706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473dc0040cd0f59cd0293cd056fcd084dcd0b2dcd0e0fcd0153cd0439cd"
    "0721cd0a0bcd0c96cd0f84cd02d4cd05c6cd0859cd0b4fcd0e47cd01a1cd043ccd073acd09d9cd0cdb3fcd02e4cd05eccd0895cd0ba1cd0e"
    "4ecd015dcd046fcd0722cd0a38cd0cefcd0fa8cd0324cd05e1cd08a0cd0b61cd0e85cd01aacd0471cd073acd0a05cd0cd262cd0333cd0606"
    "cd08dbcd0bb2cd0e8bcd01c6cd04a3cd0782cd0a63cd0ce52acd0311cd05facd08e5cd0bd2cd0e60cd01b1cd04a4cd0799aa626c6f636b5f"
    "73697a6520a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b6579739291a173c0a967726f"
    "75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
)
RECORDED_CLEAR = bytes.fromhex(
    "93cb41dac2dd148800749281a474797065b0416c6c426c6f636b73436c65617265648ba474797065ab426c6f636b53746f726564ac626c6f"
    "636b5f68617368657391cf1da470cb77507c90b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473dc0020cd0cfc36cd"
    "0312cd05f0cd08d0cd0bb2cd0e96cd01dccd04c4cd07aecd0a39cd0d2777cd0369cd05fccd08f2cd0beacd0ee4cd01dfcd04ddcd077ccd0a"
    "7ecd0d82cc87cd038fcd0638cd0944cd0bf1cd0ea0cd0212cd04c5cd07dbaa626c6f636b5f73697a6520a76c6f72615f6964c0a66d656469"
    "756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797391c0a967726f75705f69647800b26b765f63616368655f737065635f"
    "6b696e64ae66756c6c5f617474656e74696f6e00"
)


def pack(*events: Any, ts: float = 1.5, rest: tuple[Any, ...] = (0,)) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), *rest])


def as_map(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, **fields}


def as_array(kind: str, fields: dict[str, Any]) -> list[Any]:
    return [kind, *fields.values()]


def stored(**changes: Any) -> Stored:
    """Return what a `BlockStored` with `changes` to `STORED_FIELDS` is read as."""
    (event,) = decode_batch(pack(as_map("BlockStored", STORED_FIELDS | changes))).events
    assert isinstance(event, Stored)
    return event


@pytest.mark.parametrize("form", [as_map, as_array])
def test_every_event_is_read_from_a_map_and_from_an_array(form: Any) -> None:
    payload = pack(
        form("BlockStored", STORED_FIELDS),
        form("BlockRemoved", {"block_hashes": [5], "medium": "GPU", "group_idx": 1}),
        form("AllBlocksCleared", {}),
        rest=(3,),
    )
    assert decode_batch(payload) == Batch(1.5, [STORED, Removed([5], "GPU", 1), Cleared()], 3)


def test_the_bytes_of_a_batch_are_read_as_documented() -> None:
    payload = bytes.fromhex(
        "93 cb3ff8000000000000 92"
        "84 a474797065 ab426c6f636b53746f726564 ac626c6f636b5f686173686573 91 cfffffffffffffffff"
        "b1706172656e745f626c6f636b5f68617368 c0 a9746f6b656e5f696473 92 01 cd012c"
        "81 a474797065 b0416c6c426c6f636b73436c6561726564 c0"
    )
    with pytest.raises(InvalidMessage, match="block_size"):
        decode_batch(payload)
    payload = payload.replace(b"\x84\xa4type", b"\x85\xaablock_size\x02\xa4type")
    event = Stored([2**64 - 1], None, pack_tokens([1, 300]), 2, None, 1, None, "", 0, True)
    assert decode_batch(payload) == Batch(1.5, [event, Cleared()], None)


def test_the_bytes_of_a_real_server_are_read() -> None:
    batch = decode_batch(RECORDED_STORE)
    (event,) = batch.events
    assert isinstance(event, Stored) and batch.rank == 0
    assert [len(name) for name in event.hashes if isinstance(name, bytes)] == [32, 32]
    assert (event.parent, event.block_size, len(event.token_ids), event.salt) == (None, 32, 4 * 64, "s")
    assert (event.num_plain, event.medium, event.group, event.is_full_attention) == (2, "GPU", 0, True)
    cleared, event = decode_batch(RECORDED_CLEAR).events
    assert cleared == Cleared() and isinstance(event, Stored)
    assert (event.hashes, event.salt, event.num_plain) == ([2135956142462893200], None, 1)


@pytest.mark.parametrize("num_fields", range(5, 11))
def test_an_older_publisher_leaves_the_last_fields_out(num_fields: int) -> None:
    fields = dict(list(STORED_FIELDS.items())[:num_fields])
    (event,) = decode_batch(pack(as_array("BlockStored", fields))).events
    assert isinstance(event, Stored)
    assert (event.hashes, event.token_ids, event.is_full_attention) == (STORED.hashes, STORED.token_ids, True)
    assert event.salt == (SALT if num_fields >= 8 else None)
    assert event.medium == ("GPU" if num_fields >= 6 else "")


def test_hashes_are_numbers_of_either_sign_or_bytes() -> None:
    digest = bytes(range(32))
    event = stored(block_hashes=[digest, -7], parent_block_hash=digest, extra_keys=None)
    assert (event.hashes, event.parent) == ([digest, -7], digest)
    assert decode_batch(pack(as_map("BlockRemoved", {"block_hashes": [digest]}))).events == [Removed([digest], "", 0)]


def test_unknown_fields_later_elements_and_unknown_types_are_passed_over() -> None:
    later = {"session_id": "s", "invented": [1, {"a": None}]}
    payload = pack(
        as_map("BlockStored", STORED_FIELDS | later),
        as_map("BlockMoved", {"to": "CPU"}),
        as_array("BlockStored", STORED_FIELDS | {"window": None, "locality": "LOCAL"} | later),
        ["BlockMoved", 1],
        rest=(None, "later"),
    )
    assert decode_batch(payload) == Batch(1.5, [STORED, STORED], None)


@pytest.mark.parametrize(
    ("kind", "is_full"),
    [
        (None, True),
        ("full_attention", True),
        ("mla_attention", True),
        ("sliding_window", False),
        ("mamba", False),
        ("unknown", False),
    ],
)
def test_only_full_attention_counts_as_such(kind: str | None, is_full: bool) -> None:
    assert stored(kv_cache_spec_kind=kind).is_full_attention is is_full


@pytest.mark.parametrize(
    ("changes", "salt", "num_plain"),
    [
        ({}, SALT, 2),
        ({"extra_keys": None}, None, 2),
        ({"extra_keys": [None, None]}, None, 2),
        ({"extra_keys": [[SALT], []]}, SALT, 2),
        ({"extra_keys": [[["image", 0], SALT], None]}, None, 0),  # an image in the first block
        ({"extra_keys": [["image", SALT], None]}, None, 0),  # as older publishers name it
        ({"extra_keys": [[SALT, b"embeddings"], None]}, None, 0),
        ({"extra_keys": [[SALT], [["image", 0]]]}, SALT, 1),
        ({"extra_keys": [[SALT], [SALT]]}, SALT, 1),  # no salt stands in a second block
        ({"extra_keys": [[SALT]]}, SALT, 1),  # of the second nothing is known
        ({"parent_block_hash": 9, "extra_keys": [[SALT], None]}, None, 0),
        ({"lora_name": "a", "extra_keys": [["a", SALT], ["a"]]}, SALT, 2),
        ({"lora_name": "a", "extra_keys": [["b", SALT], ["a"]]}, None, 0),
        ({"lora_name": "a", "extra_keys": [["a"], ["a", ["image", 3]]]}, None, 1),
    ],
)
def test_the_salt_is_told_from_every_other_extra_key(changes: Any, salt: str | None, num_plain: int) -> None:
    event = stored(**changes)
    assert (event.salt, event.num_plain) == (salt, num_plain)


def test_an_adapter_without_a_name_is_not_the_base_model() -> None:
    assert stored(lora_id=None).lora_name is None
    assert stored(lora_id=3).lora_name is not None
    assert stored(lora_id=3, lora_name="a").lora_name == "a"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93\xcb",
        msgspec.msgpack.encode({"ts": 1.0}),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode(["now", [], 0]),
        pack(ts=float("nan")),
        pack(ts=float("inf")),
        pack(1),
        pack([]),
        pack([1]),
        pack({"block_hashes": []}),
        pack(["BlockStored"]),
        pack(["BlockStored", [1], None, [1, 2], "two"]),
        pack({"type": "BlockRemoved"}),
        pack({"type": "BlockRemoved", "block_hashes": ["text"]}),
        pack({"type": "BlockRemoved", "block_hashes": [bytes(65)]}),
        pack({"type": "BlockRemoved", "block_hashes": [1.5]}),
        pack({"type": "BlockRemoved", "block_hashes": [1], "medium": "x" * 2000}),
        pack(as_map("BlockStored", STORED_FIELDS | {"token_ids": [-1]})),
        pack(as_map("BlockStored", STORED_FIELDS | {"token_ids": [2**32]})),
        pack(as_map("BlockStored", STORED_FIELDS | {"block_size": -1})),
        pack(as_map("BlockStored", STORED_FIELDS | {"group_idx": -1})),
        pack(as_map("BlockStored", STORED_FIELDS | {"extra_keys": [SALT]})),
        pack({"type": "BlockRemoved", "block_hashes": [1], "later": 0})[:-1],
        pack({"type": b"\xff".decode("latin1"), "block_hashes": []}).replace(b"\xc3\xbf", b"\xff\xfe"),
        b"\x93\xcb\x3f\xf8" + bytes(6) + b"\x91" + b"\x91" * 100_000,
    ],
)
def test_whatever_is_no_batch_is_one_clear_error(payload: bytes) -> None:
    with pytest.raises(InvalidMessage, match="no KV event batch as vLLM sends it"):
        decode_batch(payload)


def test_everything_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidMessage, match="exceeds the bound"):
        decode_batch(bytes(kv_wire.MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(InvalidMessage, match="<="):
        decode_batch(pack(*[0] * (kv_wire.MAX_EVENTS + 1)))
    many = [1] * (kv_wire.MAX_BLOCKS_PER_EVENT + 1)
    with pytest.raises(InvalidMessage, match="<="):
        decode_batch(pack({"type": "BlockRemoved", "block_hashes": many}))
    with pytest.raises(InvalidMessage, match="<="):
        decode_batch(
            pack(as_map("BlockStored", STORED_FIELDS | {"token_ids": [1] * (kv_wire.MAX_TOKENS_PER_EVENT + 1)}))
        )


_plain = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text("aé", max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(STORED_FIELDS)), _plain), st.booleans())
def test_no_field_of_any_kind_raises_anything_else(changes: dict[str, Any], is_map: bool) -> None:
    event = (as_map if is_map else as_array)("BlockStored", STORED_FIELDS | changes)
    try:
        decode_batch(pack(event))
    except InvalidMessage:
        pass


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(payload: bytes) -> None:
    for data in (payload, pack(as_map("BlockStored", STORED_FIELDS))[: len(payload)] + payload):
        try:
            decode_batch(data)
        except InvalidMessage:
            pass


def test_frames_of_live_and_replayed_batches_are_told_apart() -> None:
    seq = (258).to_bytes(8, "big")
    assert split_live([b"topic", seq, b"p"]) == (258, b"p")
    assert split_replayed([b"", b"topic", seq, b"p"]) == (258, b"p")
    assert split_replayed([b"", seq, b"p"]) == (258, b"p")
    assert split_replayed([b"", b"", b"\xff" * 8, b""]) == (END_SEQ, b"")
    assert make_replay_request(258) == [b"", seq]
    for frames in ([], [b"t"], [b"t", seq], [b"t", b"short", b"p"], [b"t", seq, b"p", b""]):
        with pytest.raises(InvalidMessage):
            split_live(frames)
    for frames in ([], [b""], [b"", seq], [b"x", seq, b"p"], [b"", b"t", b"short", b"p"], [b"", b"t", seq, b"p", b""]):
        with pytest.raises(InvalidMessage):
            split_replayed(frames)
