"""Every message of every union: it round-trips, and whatever does not fit is refused with the path named.

Samples are built from the types themselves, so that a new message or field is covered the day it is added.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect as mi

from kvasir.protocol import admin_messages, client_messages, messages
from kvasir.protocol.codec import Decoder, Message, encode
from kvasir.protocol.errors import InvalidMessage

UNIONS: dict[str, Decoder[Any]] = {
    "commands": messages.COMMANDS,
    "reports": messages.REPORTS,
    "client": client_messages.CLIENT_MESSAGES,
    "gateway": client_messages.GATEWAY_MESSAGES,
    "admin_commands": admin_messages.ADMIN_COMMANDS,
    "admin_replies": admin_messages.ADMIN_REPLIES,
}
LARGE = 1 << 16  # bounds above this are not exercised one by one: building the value would cost more than it shows


def leaf_messages(base: type[Message] = Message) -> list[type[Message]]:
    found = [leaf for sub in base.__subclasses__() for leaf in leaf_messages(sub)]
    return found or [base]


def decoder_of(kind: type[Message]) -> Decoder[Any]:
    for name, decoder in UNIONS.items():
        try:
            decoder.decode(encode(sample(kind)))
        except InvalidMessage:
            continue
        assert name
        return decoder
    raise AssertionError(f"{kind.__name__} belongs to no union")


def sample(kind: Any) -> Any:
    """Return an instance of `kind` with every field set to something small, optional and defaulted ones too."""
    return build(mi.type_info(kind))


def build(info: Any) -> Any:
    match info:
        case mi.StructType():
            return info.cls(**{field.name: build(field.type) for field in info.fields})
        case mi.BytesType():
            return b"\x01" * max(info.min_length or 0, 4)
        case mi.StrType():
            return "s" * max(info.min_length or 0, 1)
        case mi.IntType():
            return max(info.ge or 0, 1)
        case mi.FloatType():
            return 0.5
        case mi.BoolType():
            return True
        case mi.LiteralType():
            return info.values[0]
        case mi.ListType() | mi.VarTupleType() | mi.SetType() | mi.FrozenSetType():
            items = [build(info.item_type)]
            return items if isinstance(info, mi.ListType) else {mi.VarTupleType: tuple}.get(type(info), set)(items)
        case mi.TupleType():
            return tuple(build(item) for item in info.item_types)
        case mi.DictType():
            return {build(info.key_type): build(info.value_type)}
        case mi.UnionType():
            return build(next(kind for kind in info.types if not isinstance(kind, mi.NoneType)))
        case mi.RawType():
            return msgspec.Raw(msgspec.msgpack.encode({"k": 1}))
        case mi.AnyType():
            return 1
    raise AssertionError(f"no sample for {info}")


KINDS = leaf_messages()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_round_trips(kind: type[Message]) -> None:
    message = sample(kind)
    assert decoder_of(kind).decode(encode(message)) == message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_refused_by_name(kind: type[Message]) -> None:
    decoder = decoder_of(kind)
    plain = msgspec.msgpack.decode(encode(sample(kind)))
    plain["surprise"] = 1
    with pytest.raises(InvalidMessage, match="surprise"):
        decoder.decode(msgspec.msgpack.encode(plain))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_list_and_string_on_a_wire_is_bounded_and_over_long_ones_are_refused_with_the_path(kind) -> None:
    decoder = decoder_of(kind)
    for field in mi.type_info(kind).fields:
        info = field.type
        if isinstance(info, mi.UnionType):
            info = next(inner for inner in info.types if not isinstance(inner, mi.NoneType))
        if not isinstance(info, (mi.BytesType, mi.StrType, mi.ListType, mi.DictType)):
            continue
        if issubclass(kind, (client_messages.GatewayMessage,)) or decoder is UNIONS["admin_replies"]:
            continue  # what a client reads from its own gateway is bounded by the frame
        assert info.max_length is not None, f"{kind.__name__}.{field.name} is unbounded"
        if info.max_length > LARGE:
            continue
        plain = msgspec.msgpack.decode(encode(sample(kind)))
        unit = plain[field.encode_name]
        if isinstance(info, mi.DictType):
            [value] = unit.values()
            plain[field.encode_name] = dict.fromkeys(range(info.max_length + 1), value)
        else:
            plain[field.encode_name] = (unit * (info.max_length + 1))[: info.max_length + 1]
        with pytest.raises(InvalidMessage, match=rf"\$\.{field.encode_name}"):
            decoder.decode(msgspec.msgpack.encode(plain))


def test_a_nested_fault_is_named_by_its_path() -> None:
    plain = msgspec.msgpack.decode(encode(sample(messages.Generate)))
    plain["sampling"]["temperature"] = -1
    with pytest.raises(InvalidMessage, match=r"\$\.sampling\.temperature"):
        messages.COMMANDS.decode(msgspec.msgpack.encode(plain))


def test_a_frame_above_its_bound_is_refused_before_it_is_looked_into() -> None:
    with pytest.raises(InvalidMessage, match="exceeds the bound"):
        Decoder(messages.Bye, max_bytes=10).decode(b"\xff" * 11)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_but_invalid_message(frame: bytes) -> None:
    for decoder in UNIONS.values():
        try:
            decoder.decode(frame)
        except InvalidMessage:
            pass


@given(st.data())
def test_a_mutated_frame_never_raises_anything_but_invalid_message(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    frame = bytearray(encode(sample(kind)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for decoder in UNIONS.values():
        try:
            decoder.decode(bytes(frame))
        except InvalidMessage:
            pass


def test_pickled_bytes_are_refused_everywhere() -> None:
    pickled = b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94."
    for decoder in UNIONS.values():
        with pytest.raises(InvalidMessage):
            decoder.decode(pickled)
    with pytest.raises(InvalidMessage, match=r"not a valid message"):
        messages.COMMANDS.decode(b"\x91" * 100_000 + os.urandom(4))
