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

from kvasir.protocol.codec import MAX_TOKENS
from kvasir.protocol.prefix import HASH_BYTES, extend_chain, split_hashes
from kvasir.protocol.tokens import TOKEN_BYTES
from kvasir.worker.upstream.kv_wire import Batch, Cleared, Hash, Removed, Stored
from kvasir.worker.upstream.resident import ResidentHashes

MAX_MEDIA = 16
MAX_EXPECTED = 1 << 16
MAX_HASHES = MAX_TOKENS - MAX_EXPECTED  # all together as many as a `Snapshot` has room for
_SALT_CHARACTERS = 32


class _Block(Struct, frozen=True, gc=False):
    """A block of the upstream's. `hashes`: ours, packed; none, and no namespace, for a foreign block."""

    hashes: bytes
    namespace: bytes | None


_FOREIGN = _Block(b"", None)


class UpstreamIndex:
    """The hashes of our chain that are resident in one upstream's cache, or about to be: `resident`.

    `is_overflowed`: the upstream has more blocks than `max_blocks`; nothing is held or followed until the next clear.
    The counters are of blocks of the upstream's, since the index was made. `num_foreign`: not made by requests of ours.
    `num_orphans`: under a parent that is not known. `num_unreadable`: of another block size, or without token ids.
    `num_other_groups`: of groups that are not followed. `num_unknown_removed`: removed, but not held.

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
        """`root` and `block_size` are the gateway's, `lora_name` the adapter that the model is, or None. A block of the
        upstream's is a whole number of the gateway's.

        At most `max_blocks` of the upstream's blocks are held, all media together, foreign ones too, and at most
        `MAX_HASHES` of ours.
        """
        self._ratio = upstream_block_size // block_size
        self._root, self._lora_name = root, lora_name
        self._block_size, self._upstream_block_size = block_size, upstream_block_size
        self._max_blocks = min(max_blocks, MAX_HASHES // self._ratio)
        self._group: int | None = None  # the one followed
        self._blocks: dict[Hash, _Block] = {}
        self._copies: dict[str, dict[Hash, int]] = {}  # medium -> block -> how many
        self.resident = ResidentHashes()  # held by blocks of the upstream's, and once more while expected
        self._expected: dict[bytes, float] = {}  # ours -> until when
        self._next_expiry = float("inf")
        self.is_overflowed = False
        self.num_foreign = self.num_orphans = self.num_unreadable = self.num_other_groups = 0
        self.num_unknown_removed = self.num_clears = 0

    def apply(self, batch: Batch) -> None:
        """Follow one batch. Batches must come in the order of their numbers; after a loss, `clear` first."""
        for event in batch.events:
            if isinstance(event, Cleared):
                self.clear()
            elif self.is_overflowed:
                continue
            elif isinstance(event, Stored):
                self._store(event)
            else:
                self._remove(event)

    def clear(self) -> None:
        """Hold and expect nothing from here on: all that was resident becomes removed. Ends an overflow."""
        self._blocks.clear()
        self._copies.clear()
        self.resident.clear()
        self._expected.clear()
        self._next_expiry = float("inf")
        self._group = None
        self.is_overflowed = False
        self.num_clears += 1

    def expect(self, prefix_hashes: bytes, until: float) -> None:
        """Count packed hashes as resident though their event has not come: it trails the answer that made them.

        They become ordinary when their event comes, and are removed at `until` (any clock, the same as `expire`'s)
        otherwise. What is resident already is left alone. No more than `MAX_EXPECTED` are expected at a time: what is
        beyond is not.
        """
        if self.is_overflowed:
            return
        for digest in split_hashes(prefix_hashes):
            if digest in self._expected:
                self._expected[digest] = max(until, self._expected[digest])
            elif digest not in self.resident:
                if len(self._expected) == MAX_EXPECTED:
                    return
                self._expected[digest] = until
                self._next_expiry = min(self._next_expiry, until)
                self.resident.hold(digest)

    def expire(self, now: float) -> None:
        """Remove what was expected until `now` and has not come. Nothing to do costs nothing: call it often."""
        if now < self._next_expiry:
            return
        for digest in [digest for digest, until in self._expected.items() if until <= now]:
            del self._expected[digest]
            self.resident.release(digest)
        self._next_expiry = min(self._expected.values(), default=float("inf"))

    def check_integrity(self) -> None:
        """Assert that all tables agree. O(blocks), for tests."""
        holders = dict.fromkeys(self._expected, 1)
        for block in self._blocks.values():
            assert bool(block.hashes) == (block.namespace is not None)
            assert len(block.hashes) in (0, self._ratio * HASH_BYTES)
            for digest in split_hashes(block.hashes):
                holders[digest] = holders.get(digest, 0) + 1
        self.resident.check_integrity(holders)
        assert set().union(*self._copies.values()) == set(self._blocks)
        assert all(count > 0 for copies in self._copies.values() for count in copies.values())
        assert len(self._blocks) <= self._max_blocks and len(self._copies) <= MAX_MEDIA
        assert self._next_expiry <= min(self._expected.values(), default=float("inf"))
        assert not self.is_overflowed or not self._blocks

    # ---- events

    def _store(self, event: Stored) -> None:
        if not event.is_full_attention or (self._group is not None and event.group > self._group):
            self.num_other_groups += len(event.hashes)
            return
        if self._group is not None and event.group < self._group:
            self.clear()  # what was followed up to here was the wrong group
        self._group = event.group
        if event.medium not in self._copies and len(self._copies) == MAX_MEDIA:
            self.num_unreadable += len(event.hashes)
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
                        self.is_overflowed = True
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
            self.num_unreadable += 1
            return None
        if parent is None:
            self.num_orphans += 1
            return None
        if parent.namespace is None or index >= event.num_plain or event.lora_name != self._lora_name:
            self.num_foreign += 1
            return _FOREIGN
        tokens = event.token_ids[index * size : (index + 1) * size]
        return _Block(
            extend_chain(parent.hashes[-HASH_BYTES:], parent.namespace, tokens, self._block_size), parent.namespace
        )

    def _remove(self, event: Removed) -> None:
        if self._group is not None and event.group != self._group:
            self.num_other_groups += len(event.hashes)
            return
        copies = self._copies.get(event.medium, {})
        for name in event.hashes:
            count = copies.get(name, 0)
            if count > 1:
                copies[name] = count - 1
            elif count == 1:
                del copies[name]
                if not any(name in others for others in self._copies.values()):
                    self.resident.release(self._blocks.pop(name).hashes)
            else:
                self.num_unknown_removed += 1

    def _insert(self, name: Hash, block: _Block) -> None:
        self._blocks[name] = block
        self.resident.hold(block.hashes)
        if self._expected:
            for digest in split_hashes(block.hashes):
                if self._expected.pop(digest, None) is not None:
                    self.resident.release(digest)  # held as every other from now on
