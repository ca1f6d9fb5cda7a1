"""The events of a prefix cache: which blocks it has stored and removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvasir.protocol.prefix import HASH_BYTES, split_hashes


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks of one chain: packed hashes and tokens. `parent` is the hash of the block before them, None
    if they begin the chain."""

    parent: bytes | None
    hashes: bytes
    tokens: bytes

    def blocks(self) -> Iterator[Stored]:
        """Yield every block by itself."""
        size = len(self.tokens) // (len(self.hashes) // HASH_BYTES)
        parent = self.parent
        for i, digest in enumerate(split_hashes(self.hashes)):
            yield Stored(parent, digest, self.tokens[i * size : (i + 1) * size])
            parent = digest


class EventLog:
    """What was stored and removed, in order, until it is taken."""

    def __init__(self) -> None:
        self._log: list[Stored | bytes] = []

    def store(self, stored: Stored) -> None:
        self._log.append(stored)

    def remove(self, hashes: bytes) -> None:
        """Note that the blocks of these packed hashes are gone."""
        self._log.append(hashes)

    def take(self) -> tuple[list[Stored], bytes]:
        """Return what was stored, parents before children, and the packed hashes removed since the last call.

        Netted: no hash is in both.
        """
        log, self._log = self._log, []
        stored = [entry for entry in log if isinstance(entry, Stored)]
        removed = b"".join(entry for entry in log if isinstance(entry, bytes))
        gone = set(split_hashes(removed))
        if not stored or not gone or gone.isdisjoint(split_hashes(b"".join(entry.hashes for entry in stored))):
            return stored, removed
        return _net(log)


def _net(log: list[Stored | bytes]) -> tuple[list[Stored], bytes]:
    stored: dict[bytes, Stored] = {}
    removed: dict[bytes, None] = {}
    for entry in log:
        if isinstance(entry, Stored):
            for block in entry.blocks():
                if block.hashes in removed:
                    del removed[block.hashes]
                else:
                    stored[block.hashes] = block
        else:
            for digest in split_hashes(entry):
                if digest in stored:
                    del stored[digest]
                else:
                    removed[digest] = None
    return list(stored.values()), b"".join(removed)
