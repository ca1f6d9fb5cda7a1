"""The pool: every block is free or used, and never both."""

import pytest

from kvasir.cache.block_pool import BlockPool, IntegrityError


def test_blocks_are_handed_out_once_until_they_are_freed() -> None:
    pool = BlockPool(5)
    block_ids = pool.allocate("a", 3)[0] + pool.allocate("a", 2)[0]
    assert sorted(block_ids) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.free(block_ids[1:3])
    assert pool.num_free == 2
    with pytest.raises(IndexError):
        pool.allocate("a", 3)
    assert pool.allocate("a", 2)[0] == block_ids[1:3]
    with pytest.raises(IndexError):
        pool.allocate("a", 1)


def test_only_blocks_that_change_owner_have_to_be_zeroed() -> None:
    pool = BlockPool(3)
    seen = []
    for owner, num_blocks in (("a", 1), ("a", 2), ("b", 1), ("b", 3), ("a", 3), ("a", 3)):
        block_ids, to_zero = pool.allocate(owner, num_blocks)
        assert set(to_zero) <= set(block_ids)
        seen.append(len(to_zero))
        pool.free(block_ids)
    assert seen == [0, 0, 1, 1, 3, 0]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_check_integrity_finds_a_block_used_twice_a_double_free_and_a_lost_block() -> None:
    pool = BlockPool(4)
    (block_id,), _ = pool.allocate("a", 1)
    pool.check_integrity([block_id])
    with pytest.raises(IntegrityError, match="used for two things"):
        pool.check_integrity([block_id, block_id])
    with pytest.raises(IntegrityError, match="is lost"):
        pool.check_integrity([])
    pool.free([block_id])
    pool.check_integrity([])
    pool.free([block_id])
    with pytest.raises(IntegrityError, match="twice"):
        pool.check_integrity([])


def test_check_integrity_finds_a_free_block_that_is_still_used() -> None:
    pool = BlockPool(2)
    block_ids, _ = pool.allocate("a", 1)
    pool.free(block_ids)
    with pytest.raises(IntegrityError, match="free but in use"):
        pool.check_integrity(block_ids)
