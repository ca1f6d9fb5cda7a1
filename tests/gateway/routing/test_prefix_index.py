"""The prefix index: exact while the stream is whole, silent after a gap, and always at a border."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.routing.prefix_index import STRIDE, PrefixIndex
from kvasir.protocol.prefix import split_hashes
from tests.core_helpers import make_hashes

HASHES = make_hashes(range(40))  # ten blocks


def blocks(*numbers: int) -> bytes:
    return b"".join(HASHES[16 * i : 16 * i + 16] for i in numbers)


def test_it_follows_what_a_worker_stores_and_removes() -> None:
    index = PrefixIndex()
    assert index.apply(1, blocks(0, 1, 2), b"")
    assert index.match(HASHES, 10) == (3, 3)
    assert index.apply(1, b"", b"")  # nothing happened: the number repeats
    assert index.apply(2, blocks(3), blocks(2))
    assert index.match(HASHES[:32], 10) == (2, 2)
    assert index.match(HASHES, 1) == (1, 1)
    assert index.match(b"", 10) == (0, 0)
    assert index.match(make_hashes(range(1, 41)), 10) == (0, 0)


def test_a_gap_is_told_once_and_nothing_is_believed_until_the_snapshot() -> None:
    index = PrefixIndex()
    assert index.apply(1, blocks(0), b"")
    assert not index.apply(3, blocks(2), b"")
    assert not index.in_sync
    assert index.match(HASHES, 10) == (0, 0)
    assert index.apply(4, blocks(3), b"")  # older than the snapshot that was asked for: ignored
    index.replace(5, blocks(0, 1, 2, 3, 4))
    assert index.in_sync
    assert index.match(HASHES, 10) == (5, 5)
    assert index.apply(6, blocks(5), b"")
    assert index.match(HASHES, 10) == (6, 6)


def test_a_skipped_number_without_events_is_a_gap_too() -> None:
    index = PrefixIndex()
    assert index.apply(0, b"", b"")
    assert not index.apply(2, b"", b"")
    index.replace(2, b"")
    assert not index.apply(2, blocks(0), b"")  # an old number with new events


def test_a_worker_that_joins_with_a_warm_cache_is_asked_for_a_snapshot() -> None:
    index = PrefixIndex()
    assert not index.apply(57, b"", b"")


def test_reserved_blocks_count_as_cached_until_every_request_has_released_them() -> None:
    index = PrefixIndex()
    index.apply(1, blocks(0, 1), b"")
    index.reserve(blocks(0, 1, 2, 3, 4), 2)
    index.reserve(blocks(0, 1, 2, 3, 4, 5), 2)
    assert index.match(HASHES, 10) == (2, 6)
    assert index.statistics().num_reserved == 3 + 4
    index.release(blocks(0, 1, 2, 3, 4), 2)
    assert index.match(HASHES, 10) == (2, 6)
    index.release(blocks(0, 1, 2, 3, 4, 5), 2)
    assert index.match(HASHES, 10) == (2, 2)
    assert (index.statistics().num_reserved, index._reserved) == (0, {})


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 12))
def test_closed_sets_are_matched_exactly(num_resident: int, num_reserved: int, max_blocks: int) -> None:
    index = PrefixIndex()
    index.apply(1, blocks(*range(num_resident)) or b"x" * 16, b"")
    if num_reserved > num_resident:
        index.reserve(blocks(*range(num_reserved)), num_resident)
    limit = min(max_blocks, 10)
    expected = (min(num_resident, limit), min(max(num_resident, num_reserved), limit))
    assert index.match(HASHES, max_blocks) == expected


@settings(max_examples=300)
@given(st.data())
def test_what_prompts_of_any_length_have_in_common_with_reserved_ones_is_found(data: st.DataObject) -> None:
    """The oracle: the longest common beginning. Exact as long as nothing of a reserved prompt is computed; up to a
    stride short once a part is; never more."""
    rng = random.Random(data.draw(st.integers(0, 1_000)))
    tree = [make_hashes([rng.randrange(50) for _ in range(4 * 120)]) for _ in range(2)]

    def chain(length: int) -> bytes:
        """A chain that follows one of two others for a while and then goes its own way."""
        trunk = rng.choice(tree)[: 16 * rng.randrange(length + 1)]
        return trunk + b"".join(rng.randbytes(16) for _ in range(length - len(trunk) // 16))

    def common(one: bytes, two: bytes) -> int:
        pairs = zip(split_hashes(one), split_hashes(two), strict=False)
        return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(one), len(two)) // 16)

    index, reserved = (
        PrefixIndex(),
        [chain(data.draw(st.integers(1, 120))) for _ in range(data.draw(st.integers(0, 3)))],
    )
    for prompt in reserved:
        index.reserve(prompt, 0)
    num_computed = data.draw(st.integers(0, 60)) if reserved else 0
    index.apply(1, reserved[0][: 16 * num_computed] if num_computed else b"x" * 16, b"")
    wanted = chain(120)
    resident, cached = index.match(wanted, 1_000)
    best = max([common(wanted, prompt) for prompt in reserved], default=0)
    assert resident == (common(wanted, reserved[0][: 16 * num_computed]) if reserved else 0)
    if resident:
        assert max(resident, best - STRIDE) <= cached <= best
    else:
        assert cached == best
    for prompt in reserved:
        index.release(prompt, 0)
    assert (index._reserved, index.match(wanted, 1_000)[1]) == ({}, resident)


@given(st.sets(st.integers(0, 9)))
def test_a_set_that_is_not_closed_still_gives_a_border(resident: set[int]) -> None:
    """The last block counted is there and the next one is not: another estimate, never an arbitrary number."""
    index = PrefixIndex()
    index.apply(1, blocks(*resident) or b"x" * 16, b"")
    matched, _ = index.match(HASHES, 10)
    assert matched == 0 or matched - 1 in resident
    assert matched == 10 or matched not in resident


def test_events_with_random_loss_end_exact_after_resync() -> None:
    """A worker's true set against the index, over a stream from which reports are lost."""
    rng = random.Random(3)
    index, truth, event_seq, pending = PrefixIndex(), set[int](), 0, False
    for _ in range(2_000):
        stored = {i for i in range(10) if i not in truth and rng.random() < 0.2}
        removed = {i for i in truth if rng.random() < 0.2}
        if not (stored or removed):
            continue
        truth = (truth | stored) - removed
        event_seq += 1
        if rng.random() < 0.05:
            continue  # lost on the way
        pending = pending or not index.apply(event_seq, blocks(*stored), blocks(*removed))
        if pending and rng.random() < 0.5:
            index.replace(event_seq, blocks(*truth))
            pending = False
        if index.in_sync:
            assert index.statistics().num_blocks == len(truth)
    assert index.statistics().num_gaps > 10
