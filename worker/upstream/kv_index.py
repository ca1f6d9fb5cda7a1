"""Which of our prefix hashes an upstream engine has cached, as its KV events tell. Pure: no I/O, no clock.

Some facts about the events, and what follows:

- The upstream names blocks by hashes of its own. We rehash: its token ids and the prompt's salt are all that our chain
  is made of, since the salt of a request of ours is its namespace, in hexadecimal. One block of the upstream's is as
  many of ours as its block size is a multiple of ours.
- Only the run that begins a prompt tells its salt; what follows finds the namespace through its parent. What nobody of
  ours has salted, what another adapter computed, and what images or embeddings are part of is *foreign*, and so is all
  that follows it. Foreign blocks are remembered, without hashes of ours, to know their children.
- One block may be cached several times, as copies or on several media. Each copy is stored and removed by itself.
- Models with several kinds of layers have several groups, each with blocks under the same names. One is followed: the
  lowest of those with full attention.

Whatever was missed makes the index hold less than the upstream, never more: a copy that nobody told of cannot be
removed twice, and a block whose parent is not known (an *orphan*) is not held.
"""

from __future__ import annotations

from msgspec import Struct

from kvasir.protocol.messages import MAX_TOKENS
from kvasir.protocol.prefix import HASH_BYTES, extend_chain, split_hashes
from kvasir.protocol.tokens import TOKEN_BYTES
from kvasir.worker.upstream.kv_wire import Batch, Cleared, Hash, Removed, Stored
from kvasir.worker.upstream.resident import ResidentHashes, blocks_per_block

MAX_MEDIA = 16
MAX_EXPECTED = 1 << 16
MAX_HASHES = MAX_TOKENS - MAX_EXPECTED  # all together as many as a `Snapshot` has room for
_SALT_CHARACTERS = 32


class IndexStatistics(Struct, frozen=True):
    """What is held now, the first four, and counters since the index was made, in blocks of the upstream's.

    `num_foreign_stored`: not made by requests of ours. `num_orphans`: under a parent that is not known.
    `num_unreadable`: of another block size, or without token ids. `num_other_groups`: of groups that are not followed.
    `num_unknown_removed`: removed, but not held. `num_skipped`: events of types that we do not know.
    """

    num_blocks: int
    num_foreign: int
    num_hashes: int
    num_expected: int
    num_foreign_stored: int
    num_orphans: int
    num_unreadable: int
    num_other_groups: int
    num_unknown_removed: int
    num_skipped: int
    num_clears: int
    is_overflowed: bool


class _Block(Struct, frozen=True, gc=False):
    """A block of the upstream's. `hashes`: ours, packed; none, and no namespace, for a foreign block."""

    hashes: bytes
    namespace: bytes | None


_FOREIGN = _Block(b"", None)


class UpstreamIndex:
    """The hashes of our chain that are resident in one upstream's cache, or about to be.

    O(1) per block. Memory per block of the upstream: about 240 bytes at equal block sizes, 1,020 at eight of ours to
    one of its (u64 names; a test measures it).
    """

    def __init__(
        self,
        root: bytes,
        block_size: int,
        upstream_block_size: int,
        lora_name: str | None = None,
        *,
        max_blocks: int,
    ) -> None:
        """`root` and `block_size` are the gateway's, `lora_name` the adapter that the model is, or None.

        At most `max_blocks` of the upstream's blocks are held, all media together, foreign ones too, and at most
        `MAX_HASHES` of ours.

        Raises:
            ValueError: `upstream_block_size` is no multiple of `block_size`, or `max_blocks` is below 1.
        """
        if max_blocks < 1:
            raise ValueError(f"an index of {max_blocks} blocks follows nothing")
        self._ratio = blocks_per_block(block_size, upstream_block_size)
        self._root, self._lora_name = root, lora_name
        self._block_size, self._upstream_block_size = block_size, upstream_block_size
        self._max_blocks = min(max_blocks, MAX_HASHES // self._ratio)
        self._group: int | None = None  # the one followed
        self._blocks: dict[Hash, _Block] = {}
        self._copies: dict[str, dict[Hash, int]] = {}  # medium -> block -> how many
        self._resident = ResidentHashes()  # held by blocks of the upstream's, and once more while expected
        self._expected: dict[bytes, float] = {}  # ours -> until when
        self._next_expiry = float("inf")
        self._is_overflowed = False
        self._num_foreign = 0
        self._num_foreign_stored = self._num_orphans = self._num_unreadable = self._num_other_groups = 0
        self._num_unknown_removed = self._num_skipped = self._num_clears = 0

    @property
    def is_overflowed(self) -> bool:
        """The upstream has more blocks than `max_blocks`: nothing is held or followed until the next clear."""
        return self._is_overflowed

    @property
    def has_changes(self) -> bool:
        """Whether `take` has something to say."""
        return self._resident.has_changes

    def apply(self, batch: Batch) -> None:
        """Follow one batch. Batches must come in the order of their numbers; after a loss, `clear` first."""
        self._num_skipped += batch.num_skipped
        for event in batch.events:
            if isinstance(event, Cleared):
                self.clear()
            elif self._is_overflowed:
                continue
            elif isinstance(event, Stored):
                self._store(event)
            else:
                self._remove(event)

    def __contains__(self, digest: bytes) -> bool:
        """Whether a hash of ours is resident, as far as this index knows."""
        return digest in self._resident

    def take(self) -> tuple[bytes, bytes]:
        """Return (stored, removed) since the last call: packed hashes, disjoint, netted, ready for a `StepReport`."""
        return self._resident.take()

    def snapshot(self) -> bytes:
        """Return all resident hashes, packed. `take` before it, or the next `take` says some of it again."""
        return self._resident.snapshot()

    def clear(self) -> None:
        """Hold and expect nothing from here on: all that was resident becomes removed. Ends an overflow."""
        self._blocks.clear()
        self._copies.clear()
        self._resident.clear()
        self._expected.clear()
        self._next_expiry = float("inf")
        self._num_foreign = 0
        self._group = None
        self._is_overflowed = False
        self._num_clears += 1

    def expect(self, prefix_hashes: bytes, until: float) -> None:
        """Count packed hashes as resident though their event has not come: it trails the answer that made them.

        They become ordinary when their event comes, and are removed at `until` (any clock, the same as `expire`'s)
        otherwise. What is resident already is left alone. No more than `MAX_EXPECTED` are expected at a time: what is
        beyond is not.
        """
        if self._is_overflowed:
            return
        for digest in split_hashes(prefix_hashes):
            if digest in self._expected:
                self._expected[digest] = max(until, self._expected[digest])
            elif digest not in self._resident:
                if len(self._expected) == MAX_EXPECTED:
                    return
                self._expected[digest] = until
                self._next_expiry = min(self._next_expiry, until)
                self._resident.hold(digest)

    def expire(self, now: float) -> None:
        """Remove what was expected until `now` and has not come. Nothing to do costs nothing: call it often."""
        if now < self._next_expiry:
            return
        for digest in [digest for digest, until in self._expected.items() if until <= now]:
            del self._expected[digest]
            self._resident.release(digest)
        self._next_expiry = min(self._expected.values(), default=float("inf"))

    def statistics(self) -> IndexStatistics:
        return IndexStatistics(
            len(self._blocks),
            self._num_foreign,
            len(self._resident),
            len(self._expected),
            self._num_foreign_stored,
            self._num_orphans,
            self._num_unreadable,
            self._num_other_groups,
            self._num_unknown_removed,
            self._num_skipped,
            self._num_clears,
            self._is_overflowed,
        )

    def check_integrity(self) -> None:
        """Assert that all tables agree. O(blocks), for tests."""
        holders = dict.fromkeys(self._expected, 1)
        for block in self._blocks.values():
            assert bool(block.hashes) == (block.namespace is not None)
            assert len(block.hashes) in (0, self._ratio * HASH_BYTES)
            for digest in split_hashes(block.hashes):
                holders[digest] = holders.get(digest, 0) + 1
        self._resident.check_integrity(holders)
        assert set().union(*self._copies.values()) == set(self._blocks)
        assert all(count > 0 for copies in self._copies.values() for count in copies.values())
        assert self._num_foreign == sum(block.namespace is None for block in self._blocks.values())
        assert len(self._blocks) <= self._max_blocks and len(self._copies) <= MAX_MEDIA
        assert self._next_expiry <= min(self._expected.values(), default=float("inf"))
        assert not self._is_overflowed or not self._blocks

    # ---- events

    def _store(self, event: Stored) -> None:
        if not event.is_full_attention or (self._group is not None and event.group > self._group):
            self._num_other_groups += len(event.hashes)
            return
        if self._group is not None and event.group < self._group:
            self.clear()  # what was followed up to here was the wrong group
        self._group = event.group
        if event.medium not in self._copies and len(self._copies) == MAX_MEDIA:
            self._num_unreadable += len(event.hashes)
            return
        copies = self._copies.setdefault(event.medium, {})
        parent = self._begin(event) if event.parent is None else self._blocks.get(event.parent)
        for index, name in enumerate(event.hashes):
            block = self._blocks.get(name)
            if block is None:
                block = self._make_block(event, index, parent)
                if block is not None:
                    if len(self._blocks) == self._max_blocks:
                        self.clear()
                        self._is_overflowed = True
                        return
                    self._insert(name, block)
            if block is not None:
                copies[name] = copies.get(name, 0) + 1
            parent = block

    def _begin(self, event: Stored) -> _Block:
        """Return what stands for the parent of a prompt's first block."""
        salt = event.salt
        if salt is None or len(salt) != _SALT_CHARACTERS or event.lora_name != self._lora_name:
            return _FOREIGN
        try:
            namespace = bytes.fromhex(salt)
        except ValueError:
            return _FOREIGN
        # Capitals or spaces: another salt than ours for the upstream, and nothing that we would find there.
        return _Block(self._root, namespace) if namespace.hex() == salt else _FOREIGN

    def _make_block(self, event: Stored, index: int, parent: _Block | None) -> _Block | None:
        """Return block `index` of `event`, or None if it cannot be placed in our chain."""
        size = self._upstream_block_size * TOKEN_BYTES
        if event.block_size != self._upstream_block_size or len(event.token_ids) != size * len(event.hashes):
            self._num_unreadable += 1
            return None
        if parent is None:
            self._num_orphans += 1
            return None
        if parent.namespace is None or index >= event.num_plain or event.lora_name != self._lora_name:
            self._num_foreign_stored += 1
            return _FOREIGN
        tokens = event.token_ids[index * size : (index + 1) * size]
        return _Block(
            extend_chain(parent.hashes[-HASH_BYTES:], parent.namespace, tokens, self._block_size), parent.namespace
        )

    def _remove(self, event: Removed) -> None:
        if self._group is not None and event.group != self._group:
            self._num_other_groups += len(event.hashes)
            return
        copies = self._copies.get(event.medium, {})
        for name in event.hashes:
            count = copies.get(name, 0)
            if count > 1:
                copies[name] = count - 1
            elif count == 1:
                del copies[name]
                if not any(name in others for others in self._copies.values()):
                    self._discard(name)
            else:
                self._num_unknown_removed += 1

    # ---- tables

    def _insert(self, name: Hash, block: _Block) -> None:
        self._blocks[name] = block
        self._num_foreign += block.namespace is None
        self._resident.hold(block.hashes)
        if self._expected:
            for digest in split_hashes(block.hashes):
                if self._expected.pop(digest, None) is not None:
                    self._resident.release(digest)  # held as every other from now on

    def _discard(self, name: Hash) -> None:
        block = self._blocks.pop(name)
        self._num_foreign -= block.namespace is None
        self._resident.release(block.hashes)
