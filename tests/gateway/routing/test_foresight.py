"""What waiting prompts will evict, against a plain list of blocks in the order of their last use."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.routing.foresight import STRIDE, Foresight
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.protocol.prefix import HASH_BYTES, split_hashes

MOST = 64  # blocks in a prompt


class PlainCache:
    """A worker's cache: the least recently used block first, of a prompt the last one."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blocks: OrderedDict[bytes, None] = OrderedDict()

    def use(self, prefix_hashes: bytes) -> None:
        for digest in reversed(split_hashes(prefix_hashes)):
            self.blocks[digest] = None
            self.blocks.move_to_end(digest)
        self.make_room(0)

    def make_room(self, num_coming: int) -> None:
        while len(self.blocks) > max(0, self.num_blocks - num_coming):
            self.blocks.popitem(last=False)

    def num_leading(self, prefix_hashes: bytes) -> int:
        hashes = split_hashes(prefix_hashes)
        return next((i for i, digest in enumerate(hashes) if digest not in self.blocks), len(hashes))


def prompt(conversation: int, num_blocks: int) -> bytes:
    """The first blocks of one of some conversations; all have the first two strides in common."""
    names = [b"common" if i < 2 * STRIDE else b"own %d" % conversation for i in range(num_blocks)]
    return b"".join(name.ljust(HASH_BYTES - 2) + i.to_bytes(2, "big") for i, name in enumerate(names))


prompts = st.builds(prompt, st.integers(0, 5), st.integers(1, MOST // STRIDE).map(lambda n: n * STRIDE))


@given(st.integers(MOST, 4 * MOST), st.lists(prompts, max_size=40), st.integers(0, 3 * MOST), prompts)
def test_whole_strides_are_as_in_a_plain_cache(num_blocks: int, sent: list[bytes], coming: int, asked: bytes) -> None:
    foresight, cache, index = Foresight(num_blocks), PlainCache(num_blocks), PrefixIndex()
    for each in sent:
        foresight.use(each)
        cache.use(each)
    index.replace(1, b"".join(cache.blocks))
    cached, _ = index.match(asked, len(asked) // HASH_BYTES)
    assert cached == cache.num_leading(asked)
    left = foresight.num_left(asked, cached, index, coming)
    if not coming:
        assert left == cached, "what is known is not guessed"
    cache.make_room(coming)
    expected = cache.num_leading(asked)
    # Strides go as wholes, and the blocks of one whose end is gone already are counted for no stride.
    assert expected - 2 * STRIDE < left <= expected + STRIDE


def test_what_the_worker_has_of_others_does_not_count_as_going_first() -> None:
    """Blocks that were never sent, such as answers, take room; the strides sent go for them, the oldest first."""
    foresight, index = Foresight(10 * STRIDE), PrefixIndex()
    old, new = prompt(0, 4 * STRIDE), prompt(1, 4 * STRIDE)
    foresight.use(old)
    foresight.use(new)
    answers = b"".join(bytes([i]).rjust(HASH_BYTES) for i in range(4 * STRIDE))
    index.replace(1, b"".join({*split_hashes(old + new)}) + answers)
    assert index.num_resident == 10 * STRIDE
    assert foresight.num_left(old, 4 * STRIDE, index, STRIDE) == 3 * STRIDE
    assert foresight.num_left(new, 4 * STRIDE, index, 2 * STRIDE) == 4 * STRIDE
    assert foresight.num_left(new, 4 * STRIDE, index, 3 * STRIDE) == 3 * STRIDE
    assert foresight.num_left(old, 4 * STRIDE, index, 100 * STRIDE) == 0
