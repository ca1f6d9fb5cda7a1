"""Block events for routers that follow vLLM workers: the wire form, and the bookkeeping that keeps followers exact.

A batch is `[ts, [event, …], data_parallel_rank]`, MessagePack. Events are maps tagged by "type" (vLLM since June 2026)
or arrays that begin with the tag (before). `kv_publisher` numbers the batches and sends them.

Whatever is lost on the way to the publisher makes the stream *dirty*: the next batch is `AllBlocksCleared`, after which
everything resident is announced again, a chunk at a time and parents before their children. So a follower that has
applied every batch since a clear knows exactly what is resident. A new stream begins dirty.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import msgspec
import zmq

from kvasir.cache.events import Stored
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.tokens import unpack_tokens

MEDIUM = "GPU"
"""What vLLM calls the pool that the engine computes in. Routers take any other name for a slower tier."""

CHUNK_BLOCKS = 1024  # announced at a time, so that no step waits long

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


class Outlet(Protocol):
    """What takes the batches (`KvPublisher`)."""

    socket: zmq.Socket[bytes]

    def offer(self, payload: bytes, is_clear: bool) -> bool: ...

    def wants_announcement(self) -> bool: ...

    def close(self) -> None: ...


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


class KvEvents:
    """One worker's stream of block events, from the engine's side. Its calls never wait, `close` apart.

    Poll `outlet.socket`: readable means that `pump` should be called, writable that it can send.
    """

    def __init__(
        self,
        cache: PrefixCache,
        form: WireForm,
        outlet: Outlet,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.outlet = outlet
        self._cache, self._form, self._clock = cache, form, clock
        self._is_dirty = True
        # What is still to be announced, parents before children: what was resident at the clear, without what has gone
        # since, and then what was stored since. Block by block.
        self._snapshot: Iterator[Stored] | None = None
        self._gone: set[bytes] = set()
        self._late: OrderedDict[bytes, Stored] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether `pump` has something to send."""
        return self._is_dirty or self._is_announcing

    def announce_all(self) -> None:
        """Have the next `pump`s clear and announce everything again."""
        self._is_dirty = True
        self._end_announcement()

    def on_step(self, stored: list[Stored], removed: bytes) -> None:
        """Send what one step has stored and removed (packed hashes), netted."""
        if self._is_dirty:
            return
        gone = split_hashes(removed)
        if self._is_announcing:
            self._gone.update(gone)
            for digest in gone:
                self._late.pop(digest, None)
            for piece in stored:  # behind their parents, which may not be announced yet
                self._late.update((block.hashes, block) for block in piece.blocks())
            stored = []
        events: list[Any] = [self._form.removed(gone)] if gone else []
        if stored:
            events += self._form.stored(stored, self._cache.block_size)
        if events:
            self._send(events)

    def pump(self) -> None:
        """Send the next piece of a re-announcement, at most `CHUNK_BLOCKS` blocks. Call it between steps."""
        if self.outlet.wants_announcement():
            self.announce_all()
        if self._is_dirty:
            self._is_dirty = False
            if self._send([self._form.cleared()], is_clear=True):
                self._snapshot = (block for piece in self._cache.resident() for block in piece.blocks())
        if self._is_announcing:
            events: list[Any] = list(self._form.stored(self._next_chunk(), self._cache.block_size))
            if not self._is_announcing:
                self._end_announcement()
            if events:
                self._send(events)

    @property
    def _is_announcing(self) -> bool:
        return self._snapshot is not None or bool(self._late)

    def _next_chunk(self) -> list[Stored]:
        if self._snapshot is not None:
            chunk = list(islice(self._snapshot, CHUNK_BLOCKS))
            if len(chunk) < CHUNK_BLOCKS:
                self._snapshot = None
            return [block for block in chunk if block.hashes not in self._gone]
        return [self._late.popitem(last=False)[1] for _ in range(min(CHUNK_BLOCKS, len(self._late)))]

    def _end_announcement(self) -> None:
        self._snapshot = None
        self._gone.clear()
        self._late.clear()

    def _send(self, events: list[Any], is_clear: bool = False) -> bool:
        if not self.outlet.offer(encode_batch(self._clock(), events), is_clear):
            self.announce_all()
            return False
        return True


_encoder = msgspec.msgpack.Encoder()
