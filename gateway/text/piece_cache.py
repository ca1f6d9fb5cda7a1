"""Token ids of long texts that come again: a conversation's next turn re-sends all before it.

Special tokens cut a text into pieces, and no piece's token ids depend on another: a message that was tokenised once
need not be again. A piece is found by a keyed digest of its text and its owner, so nobody finds what others have sent,
not even by the clock. One memory serves all owners, since what an owner may need is very different; what was used
longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock

ENTRY_BYTES = 200  # what a piece takes beside its token ids
_DIGEST_BYTES = 16


class Pieces:
    """Packed token ids of pieces of text, at most `max_bytes` in all. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._packed: OrderedDict[bytes, bytes] = OrderedDict()  # by digest, the last used one last
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._packed)

    def get(self, digest: bytes) -> bytes | None:
        """Return the token ids of a piece, None if they are not known."""
        with self._lock:
            packed = self._packed.get(digest)
            if packed is not None:
                self._packed.move_to_end(digest)
            return packed

    def put(self, digest: bytes, packed: bytes) -> None:
        """Remember the token ids of a piece, unless they alone are too many."""
        size = len(packed) + ENTRY_BYTES
        with self._lock:
            if digest in self._packed or size > self._max_bytes:
                return
            self._packed[digest] = packed
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                _, oldest = self._packed.popitem(last=False)
                self._num_bytes -= len(oldest) + ENTRY_BYTES


@dataclass(slots=True)
class Memory:
    """What is known of the texts that one owner has sent to one model: the token ids of words (`word_cache`) and of
    pieces. `owner`: at most 64 bytes, secret, no two owners' or models' alike."""

    owner: bytes
    pieces: Pieces
    words: dict[str, list[int]] = field(default_factory=dict)

    def digest(self, piece: str) -> bytes:
        """Return what a piece is found by.

        Raises:
            UnicodeEncodeError: it is no valid Unicode.
        """
        return blake2b(piece.encode(), digest_size=_DIGEST_BYTES, key=self.owner).digest()
