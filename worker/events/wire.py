"""Block events as vLLM's followers read them: the wire form. No state.

A batch is `[ts, [event, …], data_parallel_rank]`, MessagePack. Events are maps tagged by "type" (vLLM since June 2026)
or arrays that begin with the tag (before). `worker.events.publisher` numbers the batches and sends them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from kvasir.cache.events import Stored
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.tokens import unpack_tokens

MEDIUM = "GPU"
"""What vLLM calls the pool that the engine computes in. Routers take any other name for a slower tier."""

Form = Literal["map", "array"]
HashForm = Literal["bytes", "int"]
Hash = bytes | int


class BlockStored(msgspec.Struct, tag="BlockStored", gc=False):
    """A run of blocks, each the parent of the next. `token_ids` is empty unless asked for."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = MEDIUM
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[Hash]
    medium: str | None = MEDIUM


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class BlockStoredArray(BlockStored, tag="BlockStored", array_like=True, gc=False):
    pass


class BlockRemovedArray(BlockRemoved, tag="BlockRemoved", array_like=True, gc=False):
    pass


class AllBlocksClearedArray(AllBlocksCleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class Batch(msgspec.Struct, array_like=True, gc=False):
    """The payload: Unix time in seconds, the events in order, and the rank, which is 0 for us always."""

    ts: float
    events: list[Any]
    data_parallel_rank: int = 0


@dataclass(frozen=True, slots=True)
class WireForm:
    """How events look. `hashes="int"` sends the low 64 bits of the digest, read as a big-endian number."""

    form: Form = "map"
    hashes: HashForm = "bytes"
    token_ids: bool = False

    def hash(self, digest: bytes) -> Hash:
        return int.from_bytes(digest[-8:], "big") if self.hashes == "int" else digest

    def stored(self, pieces: Iterable[Stored], block_size: int) -> list[BlockStored]:
        """Return one event per run of blocks in which each is the parent of the next, over the borders of `pieces`."""
        kind = BlockStoredArray if self.form == "array" else BlockStored
        events: list[BlockStored] = []
        previous: bytes | None = None
        for piece in pieces:
            if previous is None or piece.parent != previous:
                parent = None if piece.parent is None else self.hash(piece.parent)
                events.append(kind([], parent, [], block_size))
            digests = split_hashes(piece.hashes)
            events[-1].block_hashes += map(self.hash, digests)
            if self.token_ids:
                events[-1].token_ids += unpack_tokens(piece.tokens)
            previous = digests[-1]
        return events

    def removed(self, digests: Iterable[bytes]) -> BlockRemoved:
        kind = BlockRemovedArray if self.form == "array" else BlockRemoved
        return kind([self.hash(digest) for digest in digests])

    def cleared(self) -> AllBlocksCleared:
        return AllBlocksClearedArray() if self.form == "array" else AllBlocksCleared()


def encode_batch(ts: float, events: list[Any]) -> bytes:
    return _encoder.encode(Batch(ts, events))


_encoder = msgspec.msgpack.Encoder()
