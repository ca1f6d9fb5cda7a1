"""What a worker that computes prompts as they come will still have cached when it gets to the next one.

Such a worker, an engine that another one fronts, evicts what was used least recently, the end of a prompt before its
beginning. What waits there will evict some of what is resident now; a prompt that is sent for its sake would find it
gone.
"""

from __future__ import annotations

from kvasir.protocol.prefix import HASH_BYTES

STRIDE = 4
_STRIDE_BYTES = STRIDE * HASH_BYTES


class Foresight:
    """The last `num_blocks` blocks of prompts and answers that were sent there or came from there.

    Kept by strides of `STRIDE` blocks, each known by the hash of its last block; what is left at the end of a prompt,
    by that of the prompt's last block.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._num_used = 0
        self._sizes: dict[bytes, int] = {}  # by hash, in blocks; the least recently used first

    def use(self, prefix_hashes: bytes) -> None:
        """Count a prompt (packed hashes, from its root on) as used after all before it. O(blocks / STRIDE)."""
        num_bytes = len(prefix_hashes)
        whole = num_bytes - num_bytes % _STRIDE_BYTES
        if whole < num_bytes:
            self._touch(prefix_hashes[-HASH_BYTES:], (num_bytes - whole) // HASH_BYTES)
        for end in range(whole, 0, -_STRIDE_BYTES):
            self._touch(prefix_hashes[end - HASH_BYTES : end], STRIDE)
        self._trim()

    def add(self, name: bytes, num_blocks: int) -> None:
        """Count `num_blocks` of an answer, which nothing looks for under `name`, as just used."""
        if num_blocks:
            self._touch(name, num_blocks)
            self._trim()

    def limit(self, prefix_hashes: bytes, num_blocks: int) -> int:
        """Return how many of the first `num_blocks` blocks of a prompt will still be there: all, or a whole number of
        strides. O(log n)."""
        low, high = 0, num_blocks // STRIDE
        while low < high:
            middle = (low + high + 1) // 2
            end = middle * _STRIDE_BYTES
            if prefix_hashes[end - HASH_BYTES : end] in self._sizes:
                low = middle
            else:
                high = middle - 1
        return num_blocks if low == num_blocks // STRIDE else low * STRIDE

    def _touch(self, name: bytes, size: int) -> None:
        self._num_used += size - self._sizes.pop(name, 0)
        self._sizes[name] = size

    def _trim(self) -> None:
        num_over, gone = self._num_used - self._num_blocks, []
        for name, size in self._sizes.items():
            if num_over <= 0:
                break
            gone.append(name)
            num_over -= size
        for name in gone:
            self._num_used -= self._sizes.pop(name)
