"""What of a worker's cache will be evicted by the prompts that wait there.

For workers that compute prompts as they come: engines that another one fronts. They evict what was used least recently,
the end of a prompt before its beginning. A prompt that is sent for the sake of what is cached now would find it gone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict

from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.protocol.prefix import HASH_BYTES

STRIDE = 4
_STRIDE_BYTES = STRIDE * HASH_BYTES


class Foresight:
    """The order in which prompts were sent to one worker: whole strides of `STRIDE` blocks, each known by the hash of
    its last block."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks`: of the worker."""
        self._num_blocks = num_blocks
        self._strides: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first
        self._doomed: tuple[int, set[bytes]] = (0, set())  # so many blocks, if they have to go, are these

    def use(self, prefix_hashes: bytes) -> None:
        """Count a prompt (packed hashes, from its root on) as used after all before it. O(blocks / STRIDE)."""
        strides = self._strides
        for end in range(len(prefix_hashes) // _STRIDE_BYTES * _STRIDE_BYTES, 0, -_STRIDE_BYTES):
            digest = prefix_hashes[end - HASH_BYTES : end]
            strides.pop(digest, None)
            strides[digest] = None
        while len(strides) * STRIDE > 2 * self._num_blocks:  # most of the older half is gone
            strides.popitem(last=False)  # a dict would look for its first key behind all that were deleted before
        self._doomed = (0, set())

    def num_left(self, prefix_hashes: bytes, num_blocks: int, index: PrefixIndex, num_coming: int) -> int:
        """Return how many of the first `num_blocks` blocks of a prompt, all of them cached or to be computed, will be
        left when `num_coming` blocks have been computed: all, or a whole number of strides."""
        num_evicted = index.num_resident + num_coming - self._num_blocks
        if num_evicted <= 0 or not num_coming:
            return num_blocks
        doomed = self._first(num_evicted, index)

        def is_doomed(stride: int) -> bool:
            end = (stride + 1) * _STRIDE_BYTES
            return prefix_hashes[end - HASH_BYTES : end] in doomed

        num_strides = num_blocks // STRIDE
        num_left = bisect_left(range(num_strides), True, key=is_doomed)  # ends were used before their beginnings
        return num_blocks if num_left == num_strides else num_left * STRIDE

    def _first(self, num_evicted: int, index: PrefixIndex) -> set[bytes]:
        """Return the strides, among those resident, that `num_evicted` blocks are which have to go."""
        num, doomed = self._doomed
        if num != num_evicted:
            num, doomed = num_evicted, set()
            for digest in self._strides:
                if num <= 0:
                    break
                if index.is_resident(digest):
                    doomed.add(digest)
                    num -= STRIDE
            self._doomed = num_evicted, doomed
        return doomed
