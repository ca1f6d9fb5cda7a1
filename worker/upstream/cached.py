"""What the upstream has cached, as far as we know: from its block events, or from what was sent if there are none."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable

from kvasir.protocol.prefix import HASH_BYTES
from kvasir.worker.upstream.kv_index import UpstreamIndex
from kvasir.worker.upstream.resident import ResidentHashes

MAX_BLOCKS = 1 << 20  # of the upstream's, all media together
LATE_EVENT_S = 1.0  # the event of an answer's last block may come after the answer


class CachedBlocks:
    """Both views; one of them is reported. `root` and `block_size` are the gateway's; `ratio` of its blocks are one of
    the upstream's.

    `is_exact`: the events are followed. When that changes, `snapshot` must be sent.
    """

    def __init__(self, root: bytes, block_size: int, ratio: int, num_blocks: int, lora: str | None) -> None:
        self.root = root
        self.block_size = block_size
        self._ratio = ratio
        self.followed = UpstreamIndex(root, block_size, block_size * ratio, lora, max_blocks=MAX_BLOCKS)
        self._sent = SentIndex(ratio, num_blocks)
        self.is_exact = False

    @property
    def resident(self) -> ResidentHashes:
        """The view that is reported."""
        return self.followed.resident if self.is_exact else self._sent.resident

    def num_leading_tokens(self, prefix_hashes: bytes, num_tokens: int, coming: Iterable[bytes] = ()) -> int:
        """Return how many tokens of a prompt are cached now, or will be when its turn comes: `coming` are the chains of
        the prompts before it. Its last token never counts: it is always computed."""
        resident = self.resident
        num_blocks = min(len(prefix_hashes) // HASH_BYTES, (num_tokens - 1) // self.block_size)
        num_found = 0
        while num_found + self._ratio <= num_blocks:
            end = (num_found + self._ratio) * HASH_BYTES
            if prefix_hashes[end - HASH_BYTES : end] not in resident:
                break
            num_found += self._ratio
        num_coming = max((_num_common(prefix_hashes, chain) for chain in coming), default=0)
        num_found = max(num_found, min(num_coming, num_blocks))
        return num_found // self._ratio * self._ratio * self.block_size

    def computed(self, prefix_hashes: bytes) -> None:
        """Note that the blocks of a chain were computed just now."""
        self._sent.computed(prefix_hashes)

    def answered(self, hashes: bytes, num_prompt_tokens: int, now: float) -> None:
        """Note that an answer is complete: the chain of prompt and answer, but for its last token, was computed."""
        self._sent.computed(hashes)
        size = self._ratio * HASH_BYTES
        num_whole = len(hashes) // size
        if num_whole * self._ratio * self.block_size > num_prompt_tokens:
            self.followed.expect(hashes[(num_whole - 1) * size : num_whole * size], now + LATE_EVENT_S)


class SentIndex:
    """The last `num_blocks` upstream blocks that were sent, as hashes of our own blocks, `ratio` each: `resident`.

    An upstream keeps full blocks and evicts the least recently used, the end of a prompt before its beginning. So does
    this index. It knows neither what others send there nor what the upstream evicts while requests run: the audit of
    predicted against actual cached tokens shows how far it is off.
    """

    def __init__(self, ratio: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._chunk_bytes = HASH_BYTES * ratio
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


def _num_common(one: bytes, other: bytes) -> int:
    """Return how many leading blocks two chains have in common. A chained hash stands for all before it: bisection."""
    num_blocks = min(len(one), len(other)) // HASH_BYTES

    def differ(index: int) -> bool:
        block = slice(index * HASH_BYTES, (index + 1) * HASH_BYTES)
        return one[block] != other[block]

    return bisect_left(range(num_blocks), True, key=differ)
