"""What beginnings of prompts have saved: nothing counted twice, prompts that begin alike together, bounded."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.core.api import Submit
from kvasir.gateway.core.savings import Savings
from tests.core_helpers import BLOCK_SIZE, make_submit


def make(tokens: tuple[int, ...], num_public_blocks: int = 0, tenant: str = "t1", model: str = "demo") -> Submit:
    submit, _ = make_submit(b"r", tokens, tenant=tenant, model=model)
    return msgspec.structs.replace(submit, num_public_tokens=num_public_blocks * BLOCK_SIZE)


def prompt(salt: int, num_blocks: int = 6) -> tuple[int, ...]:
    """Return a prompt of whole blocks; those of one salt begin alike, whatever their length."""
    return tuple(1000 * salt + i for i in range(num_blocks * BLOCK_SIZE))


def test_turns_of_a_conversation_count_together_and_apart_from_others() -> None:
    savings = Savings(BLOCK_SIZE)
    for num_blocks in (2, 4):
        savings.add(make(prompt(1, num_blocks)), (num_blocks - 1) * BLOCK_SIZE)
    savings.add(make(prompt(2)), BLOCK_SIZE)
    savings.add(make(prompt(1), tenant="t2"), 2 * BLOCK_SIZE)
    savings.add(make(prompt(1), model="other"), 0)
    found = [(tenant, saving.num_hits, saving.num_tokens) for tenant, _, saving in savings.top_private(10)]
    assert found == [("t1", 2, 4 * BLOCK_SIZE), ("t2", 1, 2 * BLOCK_SIZE), ("t1", 1, BLOCK_SIZE)]
    assert len(savings.top_private(2)) == 2
    assert savings.published == {}


def test_conversations_under_one_published_prefix_are_told_apart_after_it() -> None:
    savings = Savings(BLOCK_SIZE)
    shared = prompt(1, 2)
    for salt in (2, 2, 3):
        savings.add(make((*shared, *prompt(salt, 3)), num_public_blocks=2), 4 * BLOCK_SIZE)
    [published] = savings.published.values()
    assert (published.num_hits, published.num_tokens) == (3, 6 * BLOCK_SIZE)
    assert [saving.num_tokens for _, _, saving in savings.top_private(9)] == [4 * BLOCK_SIZE, 2 * BLOCK_SIZE]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 6)), max_size=60))
def test_every_block_found_is_counted_once(hits: list[tuple[int, int, int]]) -> None:
    savings = Savings(BLOCK_SIZE)
    for salt, num_public_blocks, num_cached_blocks in hits:
        savings.add(make(prompt(salt), num_public_blocks), num_cached_blocks * BLOCK_SIZE)
    counted = [*savings.published.values(), *(saving for _, _, saving in savings.top_private(1000))]
    assert sum(saving.num_tokens for saving in counted) == sum(num for _, _, num in hits) * BLOCK_SIZE


def test_what_saves_most_outlives_any_number_of_prompts_that_come_once() -> None:
    savings = Savings(BLOCK_SIZE, max_private=10)
    for salt in range(1, 200):
        savings.add(make(prompt(0)), 4 * BLOCK_SIZE)
        savings.add(make(prompt(salt)), 2 * BLOCK_SIZE)
        assert len(savings.top_private(1000)) <= 10
    assert savings.top_private(1)[0][2].num_hits == 199
