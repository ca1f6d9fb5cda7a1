"""The prediction for upstreams without events: what was sent lately, bounded, ends before beginnings."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.protocol.prefix import extend_chain, split_hashes
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream.cached import SentIndex


def chain(*token_ids: int, repeat: int = 4) -> bytes:
    """Return the hashes of a prompt with one of our blocks (of `repeat` tokens) per given token."""
    return extend_chain(bytes(16), bytes(16), pack_tokens([t for t in token_ids for _ in range(repeat)]), repeat)


def resident(index: SentIndex) -> set[bytes]:
    return set(split_hashes(index.resident.snapshot()))


def test_only_full_blocks_of_the_upstream_count() -> None:
    index = SentIndex(2, num_blocks=10)
    index.computed(chain(1, 2, 3))
    assert resident(index) == set(split_hashes(chain(1, 2)))
    index.computed(chain(1))
    assert len(resident(index)) == 2


def test_the_least_recently_used_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    index = SentIndex(1, num_blocks=5)
    index.computed(chain(1, 2, 3))
    index.computed(chain(7, 8))
    index.computed(chain(1, 2))
    index.computed(chain(9))
    assert resident(index) == {*split_hashes(chain(1, 2)), *split_hashes(chain(7, 8)), *split_hashes(chain(9))}
    index.computed(chain(5))
    assert resident(index) == {*split_hashes(chain(1, 2)), chain(7)[:16], chain(9), chain(5)}


def test_a_chain_longer_than_the_upstream_keeps_its_beginning() -> None:
    index = SentIndex(2, num_blocks=2)
    index.computed(chain(*range(10)))
    assert resident(index) == set(split_hashes(chain(0, 1, 2, 3)))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=8), st.booleans()), max_size=20), st.integers(1, 6))
def test_what_is_taken_adds_up_to_what_is_resident_within_the_bound(prompts, num_blocks: int) -> None:
    index = SentIndex(2, num_blocks)
    gateway: set[bytes] = set()
    for tokens, is_taken in prompts:
        index.computed(chain(*tokens))
        assert len(resident(index)) <= 2 * num_blocks
        if is_taken:
            stored, removed = (set(split_hashes(packed)) for packed in index.resident.take())
            assert not stored & removed and not stored & gateway and removed <= gateway
            gateway = (gateway | stored) - removed
            assert gateway == resident(index)
        # closed under parents: a block without the one before it could not be found
        for end in range(2, len(tokens) + 1, 2):
            hashes = split_hashes(chain(*tokens))[:end]
            assert hashes[-1] not in resident(index) or set(hashes) <= resident(index)


def test_two_blocks_that_differ_near_their_ends_share_the_hashes_of_their_beginning() -> None:
    index = SentIndex(2, num_blocks=2)
    index.computed(chain(1, 2))
    index.computed(chain(1, 3))
    assert resident(index) == {*split_hashes(chain(1, 2)), *split_hashes(chain(1, 3))}
    index.computed(chain(9, 9))
    assert resident(index) == {*split_hashes(chain(1, 3)), *split_hashes(chain(9, 9))}
