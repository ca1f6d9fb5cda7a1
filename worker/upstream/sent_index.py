"""What an upstream without KV events is likely to have cached, predicted from what was sent to it.

An upstream keeps full blocks and evicts the least recently used, the end of a prompt before its beginning. So does this
index. It knows neither what others send there nor what the upstream evicts while requests run: the audit of predicted
against actual cached tokens shows how far it is off.
"""

from __future__ import annotations

from collections import OrderedDict

from kvasir.protocol.prefix import HASH_BYTES
from kvasir.worker.upstream.resident import ResidentHashes, blocks_per_block


class SentIndex:
    """The last `num_blocks` upstream blocks that were sent, as hashes of our own blocks: `resident`."""

    def __init__(self, block_size: int, upstream_block_size: int, num_blocks: int) -> None:
        """`num_blocks`: how many blocks of `upstream_block_size` tokens the upstream has.

        Raises:
            ValueError: `upstream_block_size` is no multiple of `block_size`, or `num_blocks` is below 1.
        """
        if num_blocks < 1:
            raise ValueError(f"an upstream of {num_blocks} blocks caches nothing")
        self._num_blocks = num_blocks
        self._chunk_bytes = HASH_BYTES * blocks_per_block(block_size, upstream_block_size)
        # A block's last hash of ours -> all of them. Least recently used first.
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()
        self.resident = ResidentHashes()

    def computed(self, prefix_hashes: bytes) -> None:
        """Count the full upstream blocks of a chain (packed hashes, from its root on) as resident and just used.

        Of a chain longer than the whole index, only the beginning is kept.
        """
        size = self._chunk_bytes
        num_blocks = min(len(prefix_hashes) // size, self._num_blocks)
        for start in range((num_blocks - 1) * size, -1, -size):  # so that the end of a chain goes first
            hashes = prefix_hashes[start : start + size]
            name = hashes[-HASH_BYTES:]
            if name in self._blocks:
                self._blocks.move_to_end(name)
            else:
                self._blocks[name] = hashes
                self.resident.hold(hashes)
        while len(self._blocks) > self._num_blocks:
            self.resident.release(self._blocks.popitem(last=False)[1])
