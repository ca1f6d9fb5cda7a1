"""The hashes that an index reports as resident, and what has changed since it was last asked."""

from __future__ import annotations

from kvasir.protocol.prefix import split_hashes


class ResidentHashes:
    """Counts the holders of each hash: it is resident while there is one. O(1) per hash.

    A hash of ours often has several: two blocks of the upstream's that differ near their ends begin with equal blocks
    of ours.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._stored: set[bytes] = set()  # since the last `take`, as `_removed`; netted
        self._removed: set[bytes] = set()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._holders

    @property
    def has_changes(self) -> bool:
        return bool(self._stored or self._removed)

    def hold(self, hashes: bytes) -> None:
        """Add one holder to each of `hashes` (packed)."""
        for digest in split_hashes(hashes):
            count = self._holders.get(digest, 0)
            self._holders[digest] = count + 1
            if not count:
                _cross(digest, self._stored, self._removed)

    def release(self, hashes: bytes) -> None:
        """Take one holder from each of `hashes` (packed), which all have one."""
        for digest in split_hashes(hashes):
            count = self._holders[digest] - 1
            if count:
                self._holders[digest] = count
            else:
                del self._holders[digest]
                _cross(digest, self._removed, self._stored)

    def clear(self) -> None:
        """Take all holders."""
        for digest in self._holders:
            _cross(digest, self._removed, self._stored)
        self._holders.clear()

    def take(self) -> tuple[bytes, bytes]:
        """Return (stored, removed) since the last call: packed, disjoint, netted, as a `StepReport` has them."""
        stored, removed = b"".join(self._stored), b"".join(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def snapshot(self) -> bytes:
        """Return all that is resident, packed. `take` before it, or the next `take` says some of it again."""
        return b"".join(self._holders)

    def check_integrity(self, holders: dict[bytes, int]) -> None:
        """Assert that exactly `holders` are counted, and that the changes agree with them."""
        assert self._holders == holders
        assert self._stored <= holders.keys()
        assert not self._removed & holders.keys()


def _cross(digest: bytes, now: set[bytes], before: set[bytes]) -> None:
    """Note a change in `now`, or that it undoes the one in `before`."""
    if digest in before:
        before.remove(digest)
    else:
        now.add(digest)
