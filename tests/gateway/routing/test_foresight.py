"""What will still be cached, against a plain list of blocks in the order of their last use."""

import os
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.routing.foresight import STRIDE, Foresight
from kvasir.protocol.prefix import HASH_BYTES, split_hashes

SPLIT = 64  # blocks in the longest prompt


class PlainLru:
    """Blocks, the least recently used first; of a prompt, the last one."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blocks: OrderedDict[bytes, None] = OrderedDict()

    def use(self, prefix_hashes: bytes) -> None:
        for digest in reversed(split_hashes(prefix_hashes)):
            self.blocks[digest] = None
            self.blocks.move_to_end(digest)
        while len(self.blocks) > self.num_blocks:
            self.blocks.popitem(last=False)

    def limit(self, prefix_hashes: bytes) -> int:
        hashes = split_hashes(prefix_hashes)
        return next((i for i, digest in enumerate(hashes) if digest not in self.blocks), len(hashes))


def prompt(conversation: int, num_blocks: int) -> bytes:
    """The first blocks of one of some conversations; all have the first two strides in common."""
    names = [b"common" if i < 2 * STRIDE else b"own %d" % conversation for i in range(num_blocks)]
    return b"".join(name.ljust(HASH_BYTES - 2) + i.to_bytes(2, "big") for i, name in enumerate(names))


prompts = st.builds(prompt, st.integers(0, 5), st.integers(1, SPLIT // STRIDE).map(lambda n: n * STRIDE))


@given(st.integers(SPLIT, 4 * SPLIT), st.lists(prompts, max_size=40), prompts)
def test_whole_strides_are_as_in_a_plain_lru_of_blocks(num_blocks: int, sent: list[bytes], asked: bytes) -> None:
    foresight, plain = Foresight(num_blocks), PlainLru(num_blocks)
    for each in sent:
        foresight.use(each)
        plain.use(each)
    expected = plain.limit(asked)
    found = foresight.limit(asked, len(asked) // HASH_BYTES)
    assert expected - STRIDE < found <= expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, SPLIT)), max_size=40))
def test_it_never_expects_more_than_the_cache_holds(sent: list[tuple[int, int]]) -> None:
    foresight = Foresight(SPLIT)
    for each in sent:
        foresight.use(prompt(*each))
        foresight.add(os.urandom(HASH_BYTES), each[1] // 8)
    expected = {
        split_hashes(prompt(c, SPLIT))[i] for c in range(6) for i in range(foresight.limit(prompt(c, SPLIT), SPLIT))
    }
    assert len(expected) <= SPLIT


def test_answers_take_room_and_a_short_rest_goes_with_the_strides_before_it() -> None:
    foresight = Foresight(4 * STRIDE)
    first = prompt(0, 3 * STRIDE + 1)
    foresight.use(first)
    assert foresight.limit(first, 3 * STRIDE + 1) == 3 * STRIDE + 1
    foresight.add(b"answer", STRIDE)
    assert foresight.limit(first, 3 * STRIDE + 1) == 3 * STRIDE + 1, "only the rest of one block had to go"
    foresight.add(b"another", STRIDE)
    assert foresight.limit(first, 3 * STRIDE + 1) == 2 * STRIDE
    assert foresight.limit(first, STRIDE) == STRIDE
