"""Runs: cut and trimmed they are what they were, and the cache makes no more of them than it must."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.cache.block_pool import IntegrityError
from kvasir.cache.block_table import BlockTable
from kvasir.cache.events import EventLog, Stored
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.cache.run import BLOCK_IDS, Run
from kvasir.protocol.prefix import HASH_BYTES, split_hashes
from kvasir.protocol.tokens import TOKEN_BYTES
from tests.cache_helpers import compute, make_chain


def make_run(num_blocks: int) -> Run:
    return Run(
        parent=None,
        root=b"r" * 16,
        start=0,
        namespace=b"n" * 16,
        owner="a",
        block_ids=array(BLOCK_IDS, range(100, 100 + num_blocks)),
        hashes=b"".join(bytes([i]) * HASH_BYTES for i in range(num_blocks)),
        tokens=b"".join(bytes([i]) * TOKEN_BYTES for i in range(num_blocks)),
        released_at=7,
        note="note",
    )


def runs_of(cache: PrefixCache, *tokens: int) -> list[int]:
    """How long the runs are that hold `tokens`, from the root on."""
    chain, table = make_chain(tokens, size=1), BlockTable()
    cache.match(chain, table, len(chain), again=True)
    lengths = [len(run) for run in table.runs()]
    cache.free(table)
    return lengths[::-1]


@given(st.integers(2, 9), st.data())
def test_the_two_parts_of_a_cut_run_are_the_whole(num_blocks: int, data: st.DataObject) -> None:
    whole, tail = make_run(num_blocks), make_run(num_blocks)
    cut = data.draw(st.integers(1, num_blocks - 1))
    head = tail.cut(cut)
    assert (head.parent, tail.parent, head.num_children, tail.num_children) == (None, head, 1, 0)
    assert (len(head), head.start, tail.start, tail.end) == (cut, 0, cut, num_blocks)
    assert head.block_ids + tail.block_ids == whole.block_ids
    assert (head.hashes + tail.hashes, head.tokens + tail.tokens) == (whole.hashes, whole.tokens)
    assert (head.ref_count, head.owner, head.namespace, head.note) == (1, "a", b"n" * 16, "note")
    # Block i of the whole was released as number 7 + (num_blocks - 1 - i).
    assert (tail.released_at, head.released_at) == (7, 7 + num_blocks - cut)


@given(st.integers(1, 9), st.data())
def test_a_run_is_trimmed_from_its_end(num_blocks: int, data: st.DataObject) -> None:
    whole, run = make_run(num_blocks), make_run(num_blocks)
    num_gone = data.draw(st.integers(1, num_blocks))
    block_ids, hashes = run.trim(num_gone)
    assert (len(run), len(block_ids), len(hashes)) == (num_blocks - num_gone, num_gone, num_gone * HASH_BYTES)
    assert run.block_ids + block_ids == whole.block_ids
    assert run.hashes + hashes == whole.hashes
    assert run.tokens == whole.tokens[: len(run) * TOKEN_BYTES]
    assert run.released_at == 7 + num_gone


def test_a_prompt_is_one_run_per_zone_until_somebody_uses_a_part_of_it() -> None:
    cache = PrefixCache(32, 1)
    cache.free(compute(cache, make_chain([1, 2, 3, 4, 5, 6], size=1, num_public=2)))
    assert len(cache._tree) == 2
    chain = make_chain([1, 2, 3, 4, 9], size=1, num_public=2)
    cache.free(compute(cache, chain))
    assert len(cache._tree) == 4  # public; common; the end of each
    assert cache.evict(2) == 2  # the end of the first, whole
    assert len(cache._tree) == 3
    assert cache.evict(2) == 2  # the end of the second and a part of what they had in common
    cache.check_integrity([])
    assert len(cache._tree) == 2
    assert cache.probe(chain, 5) == (3, 3)


def test_what_a_sequence_publishes_block_by_block_is_one_run_while_nobody_else_uses_it() -> None:
    cache = PrefixCache(32, 1)
    chain = make_chain([1, 2, 3], size=1)
    table = compute(cache, chain)
    live = [table]

    def go_on(token: int) -> None:
        chain.extend([token])
        assert cache.allocate(chain, table, 1) is not None
        cache.insert(chain, table, len(chain))
        cache.check_integrity(live)

    go_on(4)
    go_on(5)
    assert [len(run) for run in table.runs()] == [5]
    other = compute(cache, make_chain([1, 2, 3, 4, 5], size=1))  # from here on the first five have another history
    live.append(other)
    go_on(6)
    go_on(7)
    assert [len(run) for run in table.runs()] == [2, 5]
    cache.free(other)
    live.remove(other)
    go_on(8)
    assert [len(run) for run in table.runs()] == [3, 5]
    cache.free(table)
    assert cache.match(chain, table, len(chain)) == 8
    go_on(9)  # a new visit
    assert [len(run) for run in table.runs()] == [1, 3, 5]
    cache.free(table)
    cache.check_integrity([])


def test_a_request_that_finds_only_a_part_does_not_keep_the_rest() -> None:
    cache = PrefixCache(8, 1)
    cache.free(compute(cache, make_chain([1, 2, 3, 4, 5], size=1)))
    table = BlockTable()
    assert cache.match(make_chain([1, 2, 9], size=1), table, 3) == 2
    assert cache.statistics().num_idle == 3
    assert cache.evict(8) == 3
    assert cache.probe(make_chain([1, 2, 3], size=1), 3) == (2, 0)
    cache.free(table)
    cache.check_integrity([])


def test_events_are_netted_block_by_block_where_only_a_part_comes_back() -> None:
    first, second, third = (bytes([i]) * HASH_BYTES for i in range(3))
    log = EventLog()
    log.remove(first + second)
    log.store(Stored(None, first, b"1"))
    log.store(Stored(first, second + third, b"23"))
    assert log.take() == ([Stored(second, third, b"3")], b"")
    log.store(Stored(None, first + second, b"12"))
    log.remove(second)
    assert log.take() == ([Stored(None, first, b"1")], b"")
    log.store(Stored(None, first, b"1"))
    log.remove(second)
    assert log.take() == ([Stored(None, first, b"1")], second)
    assert log.take() == ([], b"")


def test_what_is_resident_can_be_told_whole() -> None:
    cache = PrefixCache(16, 1)
    long, short = make_chain([1, 2, 3], size=1), make_chain([1, 9], size=1)
    for chain in (long, short):
        cache.free(compute(cache, chain))
    blocks = [block for piece in cache.resident() for block in piece.blocks()]
    expected = {(None, long.hashes[0], long.tokens_of(0, 1)), (short.hashes[0], short.hashes[1], short.tokens_of(1, 2))}
    expected |= {(long.hashes[i - 1], long.hashes[i], long.tokens_of(i, i + 1)) for i in (1, 2)}
    assert {(block.parent, block.hashes, block.tokens) for block in blocks} == expected
    assert [block.hashes for block in blocks] == split_hashes(cache.resident_hashes())


def break_children(run: Run) -> None:
    run.num_children += 1


def break_start(run: Run) -> None:
    run.start += 1


def break_tokens(run: Run) -> None:
    run.tokens = run.tokens[:-1]


def break_owner(run: Run) -> None:
    run.owner = "b"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (break_children, "counts 1 children"),
        (break_start, "where its parent does not end"),
        (break_tokens, "other hashes or tokens"),
        (break_owner, "holds|somebody else's"),
    ],
)
def test_check_integrity_finds_a_damaged_run(damage, match: str) -> None:  # type: ignore[no-untyped-def]
    cache = PrefixCache(8, 1)
    table = compute(cache, make_chain([1, 2, 3], size=1))
    cache.check_integrity([table])
    damage(table.last)
    with pytest.raises(IntegrityError, match=match):
        cache.check_integrity([table])
