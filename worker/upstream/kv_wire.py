"""vLLM's KV events as they come over the wire, read into plain frozen structs. Nothing here keeps state.

    live     [topic] [seq: u64, big-endian] [payload]                  from a PUB
    replay   [b""] [topic] [seq] [payload], at the end seq 2**64 - 1   from a ROUTER; older ones leave the topic out
    payload  MessagePack [ts: seconds, [event, …], data_parallel_rank or nil]

An event is a map with a "type" (vLLM since June 2026) or an array that begins with the type (before). Newer publishers
add fields and types: unknown ones are passed over.
The form was taken from vLLM 0.32, `vllm/distributed/kv_events.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.protocol.errors import InvalidMessage
from kvasir.protocol.tokens import pack_tokens

MAX_PAYLOAD_BYTES = 16 << 20
MAX_EVENTS = 1 << 17
MAX_BLOCKS_PER_EVENT = 1 << 17
MAX_TOKENS_PER_EVENT = 1 << 21
END_SEQ = (1 << 64) - 1
"""The number that ends a replay."""

FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""`kv_cache_spec_kind`s of groups that need every block of a prefix. Publishers that name no kind know no other."""

Hash = int | bytes
"""How the upstream names a block: the low 64 bits of its digest, or all of it."""


class Stored(Struct, frozen=True, gc=False):
    """A run of blocks, each the parent of the next. `parent` None: the run begins a prompt.

    `token_ids` is packed (`protocol.tokens`). `salt` is that of the prompt and only known for a run that begins one.
    The first `num_plain` blocks are made of tokens and salt alone; what follows depends on images or embeddings too.
    """

    hashes: list[Hash]
    parent: Hash | None
    token_ids: bytes
    block_size: int
    salt: str | None
    num_plain: int
    lora_name: str | None
    medium: str
    group: int
    is_full_attention: bool


class Removed(Struct, frozen=True, gc=False):
    """One copy of each of `hashes` is gone from `medium`."""

    hashes: list[Hash]
    medium: str
    group: int


class Cleared(Struct, frozen=True, gc=False):
    """Nothing is cached any more."""


Event = Stored | Removed | Cleared


class Batch(Struct, frozen=True, gc=False):
    """The events of one engine step. `ts`: Unix seconds by the publisher's clock."""

    ts: float
    events: list[Event]
    rank: int | None = None


def decode_batch(payload: bytes) -> Batch:
    """Return the batch in `payload`.

    Raises:
        InvalidMessage: too long, no MessagePack, or not of the form above; says where.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidMessage(f"a KV event batch of {len(payload)} bytes exceeds the bound of {MAX_PAYLOAD_BYTES} bytes")
    try:
        wire = _batches.decode(payload)
        if not math.isfinite(wire.ts):
            raise ValueError(f"ts is {wire.ts}")
        events = [event for raw in wire.events if (event := _decode_event(raw)) is not None]
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidMessage(f"no KV event batch as vLLM sends it: {error}") from None
    return Batch(wire.ts, events, wire.data_parallel_rank)


def split_live(frames: list[bytes]) -> tuple[int, bytes]:
    """Return (seq, payload) of a message from the PUB.

    Raises:
        InvalidMessage: it has other frames.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        raise InvalidMessage(f"no KV event message: frames of {[len(frame) for frame in frames]} bytes")
    return int.from_bytes(frames[1], "big"), frames[2]


def split_replayed(frames: list[bytes]) -> tuple[int, bytes]:
    """Return (seq, payload) of a message from the replay ROUTER, with or without the topic; `END_SEQ` is the last.

    Raises:
        InvalidMessage: it has other frames.
    """
    if len(frames) not in (3, 4) or frames[0] or len(frames[-2]) != 8:
        raise InvalidMessage(f"no replayed KV event message: frames of {[len(frame) for frame in frames]} bytes")
    return int.from_bytes(frames[-2], "big"), frames[-1]


def make_replay_request(start: int) -> list[bytes]:
    """Return the frames that ask for every batch from number `start` on. Without the empty one vLLM stays silent."""
    return [b"", start.to_bytes(8, "big")]


# ---- the wire's own structs: names and order are vLLM's

_Hash = int | Annotated[bytes, Meta(max_length=64)]
_Hashes = Annotated[list[_Hash], Meta(max_length=MAX_BLOCKS_PER_EVENT)]
_TokenIds = Annotated[list[Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]], Meta(max_length=MAX_TOKENS_PER_EVENT)]
_Size = Annotated[int, Meta(ge=0, le=1 << 20)]
_Text = Annotated[str, Meta(max_length=1024)]
_Keys = Annotated[list[list[Any] | None], Meta(max_length=MAX_BLOCKS_PER_EVENT)]


class _WireBatch(Struct, array_like=True, gc=False):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=MAX_EVENTS)]
    data_parallel_rank: int | None = None


class _MapStored(Struct, tag="BlockStored", gc=False):
    block_hashes: _Hashes
    parent_block_hash: _Hash | None
    token_ids: _TokenIds
    block_size: _Size
    lora_id: int | None = None
    medium: _Text | None = None
    lora_name: _Text | None = None
    extra_keys: _Keys | None = None
    group_idx: _Size | None = None
    kv_cache_spec_kind: _Text | None = None


class _MapRemoved(Struct, tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: _Text | None = None
    group_idx: _Size | None = None


class _MapCleared(Struct, tag="AllBlocksCleared", gc=False):
    pass


class _ArrayStored(_MapStored, tag="BlockStored", array_like=True, gc=False):
    pass


class _ArrayRemoved(_MapRemoved, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ArrayCleared(_MapCleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _MapHead(Struct, gc=False):
    type: str


class _ArrayHead(Struct, array_like=True, gc=False):
    type: str


_batches = msgspec.msgpack.Decoder(_WireBatch)
_maps = msgspec.msgpack.Decoder(_MapStored | _MapRemoved | _MapCleared)
_arrays = msgspec.msgpack.Decoder(_ArrayStored | _ArrayRemoved | _ArrayCleared)
_map_heads = msgspec.msgpack.Decoder(_MapHead)
_array_heads = msgspec.msgpack.Decoder(_ArrayHead)
_KNOWN_TYPES = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


def _decode_event(raw: Raw) -> Event | None:
    """Return the event, None if its type is one that we do not know."""
    is_array = _is_array(bytes(memoryview(raw)[:1]))
    try:
        wire = (_arrays if is_array else _maps).decode(raw)
    except msgspec.ValidationError:
        head = (_array_heads if is_array else _map_heads).decode(raw)
        if head.type in _KNOWN_TYPES:
            raise
        return None
    if isinstance(wire, _MapStored):
        return _read_stored(wire)
    if isinstance(wire, _MapRemoved):
        return Removed(wire.block_hashes, wire.medium or "", wire.group_idx or 0)
    return Cleared()


def _is_array(first_byte: bytes) -> bool:
    """Whether a MessagePack value that begins with `first_byte` is an array (fixarray, array 16, array 32)."""
    return b"\x90" <= first_byte <= b"\x9f" or first_byte in (b"\xdc", b"\xdd")


def _read_stored(wire: _MapStored) -> Stored:
    lora_name = wire.lora_name
    if lora_name is None and wire.lora_id is not None:
        lora_name = f"adapter without a name, number {wire.lora_id}"  # older publishers: no adapter that we could mean
    salt, num_plain = _read_keys(wire, lora_name)
    return Stored(
        wire.block_hashes,
        wire.parent_block_hash,
        pack_tokens(wire.token_ids),
        wire.block_size,
        salt,
        num_plain,
        lora_name,
        wire.medium or "",
        wire.group_idx or 0,
        wire.kv_cache_spec_kind is None or wire.kv_cache_spec_kind in FULL_ATTENTION,
    )


def _read_keys(wire: _MapStored, lora_name: str | None) -> tuple[str | None, int]:
    """Return (salt, num_plain). A block's extra keys are, in this order: its adapter's name, images, salt, embeddings.

    The salt is a bare string, and only the first block of a prompt has it. An image's key may be a bare string too, in
    older publishers: so a string counts as the salt only where it stands alone.
    """
    num_blocks = len(wire.block_hashes)
    if wire.extra_keys is None:
        return None, num_blocks
    salt = None
    for index, keys in enumerate(wire.extra_keys[:num_blocks]):
        if not keys:
            continue
        rest = keys[1:] if lora_name is not None and keys[0] == lora_name else keys
        if index == 0 and wire.parent_block_hash is None and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            return salt, index
    return salt, min(num_blocks, len(wire.extra_keys))
