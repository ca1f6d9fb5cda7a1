"""One worker's stream of block events, from the engine's side: the bookkeeping that keeps followers exact.

Whatever is lost on the way to the publisher makes the stream *dirty*: the next batch is `AllBlocksCleared`, after which
everything resident is announced again, a chunk at a time and parents before their children. So a follower that has
applied every batch since a clear knows exactly what is resident. A new stream begins dirty.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from kvasir.cache.events import Stored
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import split_hashes
from kvasir.worker.events.publisher import KvPublisher
from kvasir.worker.events.wire import WireForm, encode_batch

CHUNK_BLOCKS = 1024  # announced at a time, so that no step waits long


class KvEvents:
    """What the engine does to its cache, put into batches for `outlet`. Its calls never wait.

    Poll `outlet.socket`: readable means that `pump` should be called, writable that it can send.
    """

    def __init__(
        self,
        cache: PrefixCache,
        form: WireForm,
        outlet: KvPublisher,
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
