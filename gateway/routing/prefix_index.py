"""Which blocks one worker holds, as far as its reports say, and which it is about to compute.

Exact while the event stream is whole: block events are numbered, a gap makes the index ask for a snapshot and believe
nothing until it comes. It serves routing only: the worker's own cache decides what is a hit, so that a wrong entry
costs time and never correctness.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from kvasir.protocol.prefix import HASH_BYTES, split_hashes

MAX_EVICTED = 8_192  # blocks per worker of which it is remembered when they were dropped
STRIDE = 16  # every so many blocks of a reserved prompt one is marked
MAX_COMPARED = 4  # reserved prompts with the same mark


class IndexStatistics(msgspec.Struct, frozen=True):
    """`num_reserved`: blocks that count as cached because a request in flight will make them, once for each."""

    num_blocks: int
    num_reserved: int
    num_gaps: int
    in_sync: bool


class PrefixIndex:
    """One worker's resident prefix hashes (fed by its reports) and reserved ones (fed by the router's decisions).

    Lookups are binary searches: they presume that whoever holds a block holds its parents, which every worker's cache
    guarantees and reservations keep up. Were the sets not closed, the answer would still end at a border (the last
    block counted is there, the next one is not), only not at the first border: a longer or shorter estimate.
    """

    def __init__(self) -> None:
        self._resident: set[bytes] = set()
        self._reserved: dict[bytes, list[bytes]] = {}  # marked hash -> prompts in flight that will make it
        self._num_reserved = 0
        self._evicted: OrderedDict[bytes, float] = OrderedDict()  # hash -> when, the oldest first
        self._event_seq = 0
        self._in_sync = True
        self._num_gaps = 0

    @property
    def in_sync(self) -> bool:
        """False from a gap in the events until the next snapshot."""
        return self._in_sync

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    def apply(self, event_seq: int, stored: bytes, removed: bytes, now: float = 0.0) -> bool:
        """Follow one report's block events; return False if a snapshot must be asked for now.

        A report with events has the next number, one without repeats the last. After a gap everything resident is
        forgotten, and events are ignored until `replace`: they are older than the snapshot, the stream being ordered.
        """
        if not self._in_sync:
            return True
        expected = self._event_seq + 1 if stored or removed else self._event_seq
        if event_seq != expected:
            self._num_gaps += 1
            self.distrust()
            return False
        self._event_seq = event_seq
        if removed:
            hashes = split_hashes(removed)
            self._resident.difference_update(hashes)
            self._note_evicted(hashes, now)
        if stored:
            self._resident.update(split_hashes(stored))
        return True

    def distrust(self) -> None:
        """Believe nothing until the next snapshot."""
        self._in_sync = False
        self._resident.clear()

    def replace(self, event_seq: int, hashes: bytes) -> None:
        """Believe a snapshot: exactly `hashes` are resident after event `event_seq`."""
        self._resident = set(split_hashes(hashes))
        self._event_seq = event_seq
        self._in_sync = True

    def match(self, prefix_hashes: bytes, max_blocks: int) -> tuple[int, int]:
        """Return (resident, cached): how many leading blocks are resident, and how many are resident or reserved.

        `prefix_hashes` packed; at most its first `max_blocks` count. O(log n), and O(1) where nothing is cached. What a
        prompt has in common with a reserved one that is partly computed may be found up to `STRIDE` blocks short.
        """
        num_blocks = min(len(prefix_hashes) // HASH_BYTES, max_blocks)
        if not num_blocks:
            return 0, 0
        resident = 0
        if prefix_hashes[:HASH_BYTES] in self._resident:
            resident = _partition(prefix_hashes, 1, num_blocks, self._resident)
        if resident == num_blocks or not self._reserved:
            return resident, resident
        return resident, self._match_reserved(prefix_hashes, resident, num_blocks)

    def _match_reserved(self, prefix_hashes: bytes, start: int, num_blocks: int) -> int:
        """Return how many of the first `num_blocks` blocks, beyond the first `start`, some reserved prompt has."""
        reserved = self._reserved
        cached = start
        for prompt in reserved.get(prefix_hashes[start * HASH_BYTES : (start + 1) * HASH_BYTES], ())[:MAX_COMPARED]:
            cached = _extended(prefix_hashes, prompt, cached, num_blocks)
        low, high = cached // STRIDE, num_blocks // STRIDE  # of the marks at the ends of strides
        while low < high:
            middle = (low + high) // 2
            end = (middle + 1) * STRIDE * HASH_BYTES
            if prefix_hashes[end - HASH_BYTES : end] in reserved:
                low = middle + 1
            else:
                high = middle
        marked = low * STRIDE
        if marked > cached:
            cached = marked
            for prompt in reserved[prefix_hashes[(marked - 1) * HASH_BYTES : marked * HASH_BYTES]][:MAX_COMPARED]:
                cached = _extended(prefix_hashes, prompt, cached, min(num_blocks, marked + STRIDE))
        return cached

    def reserve(self, prefix_hashes: bytes, start: int) -> None:
        """Count the blocks of a prompt from `start` on as cached until they are released: a request on its way will
        make them. Only some are marked; the prompt's hashes say the rest."""
        reserved = self._reserved
        for digest in _marks(prefix_hashes, start):
            prompts = reserved.get(digest)
            if prompts is None:
                reserved[digest] = [prefix_hashes]
            else:
                prompts.append(prefix_hashes)
        self._num_reserved += len(prefix_hashes) // HASH_BYTES - start

    def release(self, prefix_hashes: bytes, start: int) -> None:
        """Undo `reserve` with the same arguments."""
        reserved = self._reserved
        for digest in _marks(prefix_hashes, start):
            prompts = reserved[digest]
            if len(prompts) == 1:
                del reserved[digest]
            else:
                prompts.remove(prefix_hashes)
        self._num_reserved -= len(prefix_hashes) // HASH_BYTES - start

    def evicted_at(self, digest: bytes) -> float | None:
        """Return when a block was last dropped; None if it was not, or that is too long ago."""
        return self._evicted.get(digest)

    def is_resident(self, digest: bytes) -> bool:
        return digest in self._resident

    def statistics(self) -> IndexStatistics:
        """Return what is known."""
        return IndexStatistics(len(self._resident), self._num_reserved, self._num_gaps, self._in_sync)

    def _note_evicted(self, hashes: list[bytes], now: float) -> None:
        evicted = self._evicted
        for digest in hashes:
            evicted.pop(digest, None)
            evicted[digest] = now
        while len(evicted) > MAX_EVICTED:
            evicted.popitem(last=False)  # a dict would look for its first key behind all that were deleted before


def _marks(prefix_hashes: bytes, start: int) -> list[bytes]:
    """Return the hashes by which a reserved prompt is found: of its first block that is not resident, and of the last
    one of each stride after it."""
    num_blocks = len(prefix_hashes) // HASH_BYTES
    if start >= num_blocks:
        return []
    first = (start // STRIDE + 1) * STRIDE
    marks = [prefix_hashes[(i - 1) * HASH_BYTES : i * HASH_BYTES] for i in range(first, num_blocks + 1, STRIDE)]
    if first - 1 != start:
        marks.append(prefix_hashes[start * HASH_BYTES : (start + 1) * HASH_BYTES])
    return marks


def _extended(ours: bytes, theirs: bytes, low: int, high: int) -> int:
    """Return how many leading blocks two chains have in common, `high` at most, if that is more than `low`; else
    `low`."""
    start = low * HASH_BYTES
    if low >= high or ours[start : start + HASH_BYTES] != theirs[start : start + HASH_BYTES]:
        return low  # the usual case, seen at once
    low, high = low + 1, min(high, len(theirs) // HASH_BYTES)
    while low < high:
        middle = (low + high) // 2
        start, end = middle * HASH_BYTES, (middle + 1) * HASH_BYTES
        if ours[start:end] == theirs[start:end]:
            low = middle + 1
        else:
            high = middle
    return low


def _partition(packed: bytes, low: int, high: int, members: set[bytes]) -> int:
    """Return the border in [low, high]: the block before it is in `members`, the one after is not."""
    while low < high:
        middle = (low + high) // 2
        if packed[middle * HASH_BYTES : (middle + 1) * HASH_BYTES] in members:
            low = middle + 1
        else:
            high = middle
    return low
