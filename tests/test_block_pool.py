"""The pool: every block is free or used, and no ref count lies."""

import pytest

from cache.block_pool import Block, BlockPool, IntegrityError


def test_blocks_are_handed_out_once_until_they_are_freed() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate("a")[0] for _ in range(3)]
    assert sorted(block.block_id for block in blocks) == [0, 1, 2]
    assert pool.num_free == 0
    release(pool, blocks[1])
    assert pool.num_free == 1
    assert pool.allocate("a")[0] is blocks[1]
    with pytest.raises(IndexError):
        pool.allocate("a")


def test_only_a_block_that_changes_owner_has_to_be_zeroed() -> None:
    pool = BlockPool(1)
    seen = []
    for owner in ("a", "a", "b", "b", "a"):
        block, must_zero = pool.allocate(owner)
        seen.append(must_zero)
        release(pool, block)
    assert seen == [False, False, True, False, True]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_check_integrity_finds_a_wrong_ref_count_a_double_free_and_a_lost_block() -> None:
    pool = BlockPool(4)
    block, _ = pool.allocate("a")
    pool.check_integrity([block.block_id])
    with pytest.raises(IntegrityError, match="has ref count 1 but 2 references"):
        pool.check_integrity([block.block_id, block.block_id])
    block.ref_count = 0
    with pytest.raises(IntegrityError, match="is lost"):
        pool.check_integrity([])
    pool.free(block)
    pool.check_integrity([])
    pool.free(block)
    with pytest.raises(IntegrityError, match="twice"):
        pool.check_integrity([])


def test_check_integrity_finds_a_free_block_that_is_still_referenced() -> None:
    pool = BlockPool(2)
    block, _ = pool.allocate("a")
    pool.free(block)
    with pytest.raises(IntegrityError, match="free but referenced"):
        pool.check_integrity([block.block_id])


def release(pool: BlockPool, block: Block) -> None:
    block.ref_count = 0
    pool.free(block)
