"""The index of an upstream's blocks: it holds what a model of vLLM's cache holds, or less, never more."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvasir.protocol.prefix import extend_chain, split_hashes
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream import kv_index
from kvasir.worker.upstream.kv_index import UpstreamIndex
from kvasir.worker.upstream.kv_wire import decode_batch
from tests.worker.upstream.block_cache_model import (
    NAMESPACES,
    ROOT,
    SALT_A,
    SALT_B,
    BlockCacheModel,
    Prompt,
    make_prompt,
)


def make_index(max_blocks: int = 1000, block_size: int = 4, upstream_block_size: int = 8) -> UpstreamIndex:
    return UpstreamIndex(ROOT, block_size, upstream_block_size, max_blocks=max_blocks)


def held(index: UpstreamIndex) -> set[bytes]:
    hashes = split_hashes(index.resident.snapshot())
    assert len(hashes) == len(set(hashes))
    return set(hashes)


def apply(index: UpstreamIndex, *events: Any) -> None:
    index.apply(decode_batch(msgspec.msgpack.encode([1.0, events, 0])))


def prompt_of(num_blocks: int, salt: str | None = SALT_A, **rest: Any) -> Prompt:
    return Prompt(tuple(range(8 * num_blocks)), salt, **rest)


class IndexMachine(RuleBasedStateMachine):
    """A model cache, an index that applies what it tells, and a gateway that believes what the index tells."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BlockCacheModel()
        self.index = make_index()
        self.gateway: set[bytes] = set()
        self.expected: dict[bytes, float] = {}
        self.now = 0.0

    def settle(self) -> None:
        """Apply what has happened; an expectation ends when its block is stored, or with everything at a clear."""
        for event in self.model.events:
            if event["type"] == "AllBlocksCleared":
                self.expected.clear()
        is_new = self.model.resident()
        self.index.apply(self.model.take_batch())
        self.expected = {digest: until for digest, until in self.expected.items() if digest not in is_new}

    @rule(seed=st.integers(0, 2**32), is_copied=st.booleans())
    def run(self, seed: int, is_copied: bool) -> None:
        self.model.run(make_prompt(random.Random(seed)), is_copied=is_copied)
        self.settle()

    @rule(num_blocks=st.integers(1, 8))
    def evict(self, num_blocks: int) -> None:
        self.model.evict(num_blocks)
        self.settle()

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def drop_any_copy(self, data: st.DataObject) -> None:
        """Parents before their children, too: the chain is not closed, and the index need not care."""
        self.model.drop(data.draw(st.sampled_from(self.model.held)))
        self.settle()

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), has_tokens=st.booleans())
    def offload(self, data: st.DataObject, has_tokens: bool) -> None:
        self.model.offload(data.draw(st.sampled_from(self.model.held))[0], has_tokens=has_tokens)
        self.settle()

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def hear_of_other_groups(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.model.held))[0]
        self.model.events += [
            self.model.stored([block], group=1),
            self.model.stored([block], group=0, kind="sliding_window"),
            self.model.removed([block], group=1),
            self.model.removed([block], group=2),
        ]
        self.settle()

    @rule()
    def clear(self) -> None:
        self.model.clear()
        self.settle()

    @rule(seed=st.integers(0, 2**32), delay=st.integers(0, 5))
    def expect(self, seed: int, delay: int) -> None:
        """The last block of an answer is promised before its event comes."""
        prompt = make_prompt(random.Random(seed))
        packed = extend_chain(ROOT, NAMESPACES[SALT_A], pack_tokens(prompt.token_ids), self.model.block_size)[-32:]
        resident = self.model.resident()
        for digest in split_hashes(packed):
            if digest not in resident:
                self.expected[digest] = max(self.now + delay, self.expected.get(digest, 0))
        self.index.expect(packed, self.now + delay)

    @rule(seconds=st.integers(1, 4))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        self.index.expire(self.now)
        self.expected = {digest: until for digest, until in self.expected.items() if until > self.now}

    @rule()
    def take(self) -> None:
        stored, removed = (set(split_hashes(packed)) for packed in self.index.resident.take())
        assert not stored & removed
        assert not stored & self.gateway and removed <= self.gateway, "not netted"
        self.gateway = (self.gateway | stored) - removed
        assert self.gateway == held(self.index)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        self.index.check_integrity()
        assert held(self.index) == self.model.resident() | self.expected.keys()
        assert self.index.num_orphans == 0
        assert len(self.index._expected) == len(self.expected)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("seed", range(20))
def test_an_index_that_has_missed_something_never_holds_more_than_the_model(seed: int) -> None:
    rng = random.Random(seed)
    model, index = BlockCacheModel(num_blocks=24), make_index()
    num_held = 0
    for _ in range(300):
        model.run(make_prompt(rng), is_copied=rng.random() < 0.3)
        if rng.random() < 0.1 and model.held:
            model.offload(rng.choice(model.held)[0], has_tokens=rng.random() < 0.5)
        if rng.random() < 0.1 and (offloaded := [copy for copy in model.held if copy[1] == "CPU"]):
            model.drop(rng.choice(offloaded))
        batch = model.take_batch()
        if rng.random() < 0.1:
            index.clear()  # as whoever feeds it does, having missed this batch
        else:
            index.apply(batch)
        index.check_integrity()
        assert held(index) <= model.resident()
        num_held += len(held(index))
    assert num_held > 300, "a test that holds nothing shows nothing"
    model.clear()
    index.apply(model.take_batch())
    for _ in range(50):
        model.run(make_prompt(rng), is_copied=True)
        index.apply(model.take_batch())
        assert held(index) == model.resident()


@pytest.mark.parametrize("has_byte_hashes", [False, True])
@pytest.mark.parametrize(("block_size", "upstream_block_size"), [(16, 16), (16, 32), (16, 128)])
def test_blocks_are_rehashed_into_the_gateway_s_own_chain(
    block_size: int, upstream_block_size: int, has_byte_hashes: bool
) -> None:
    model = BlockCacheModel(block_size, upstream_block_size, has_byte_hashes=has_byte_hashes)
    index = make_index(block_size=block_size, upstream_block_size=upstream_block_size)
    prompt = Prompt(tuple(range(2 * upstream_block_size + 10)))
    model.run(prompt)
    index.apply(model.take_batch())
    chain = extend_chain(ROOT, NAMESPACES[SALT_A], pack_tokens(prompt.token_ids), block_size)
    num_hashes = 2 * upstream_block_size // block_size
    assert held(index) == set(split_hashes(chain)[:num_hashes])
    model.run(Prompt((*prompt.token_ids, *range(upstream_block_size))))  # the next turn finds its parent
    index.apply(model.take_batch())
    assert held(index) == model.resident()
    assert len(held(index)) == 3 * upstream_block_size // block_size


def test_equal_prompts_under_two_salts_share_nothing() -> None:
    model, index = BlockCacheModel(), make_index()
    model.run(prompt_of(2, SALT_A))
    model.run(prompt_of(2, SALT_B))
    index.apply(model.take_batch())
    assert len(held(index)) == 8


@pytest.mark.parametrize(
    "foreign",
    [
        prompt_of(3, None),
        prompt_of(3, ""),
        prompt_of(3, "chat"),
        prompt_of(3, SALT_A.upper()),
        prompt_of(3, SALT_A[:-1] + "g"),
        prompt_of(3, SALT_A + "00"),
        prompt_of(3, "a0 " * 10 + "a0"),
        prompt_of(3, lora_name="other"),
        prompt_of(3, image_at=0),
    ],
)
def test_foreign_blocks_and_all_that_follow_them_are_ignored_and_counted(foreign: Prompt) -> None:
    model, index = BlockCacheModel(), make_index()
    model.run(Prompt(foreign.token_ids[:8], foreign.salt, foreign.lora_name, foreign.image_at))
    index.apply(model.take_batch())
    model.run(foreign)
    index.apply(model.take_batch())
    assert (held(index), index.resident.take()) == (set(), (b"", b""))
    assert (len(index._blocks), index.num_foreign, index.num_orphans) == (3, 3, 0)
    model.evict(3)
    index.apply(model.take_batch())
    assert (len(index._blocks), index.num_unknown_removed) == (0, 0)


def test_an_image_makes_foreign_what_comes_after_it_only() -> None:
    model, index = BlockCacheModel(), make_index()
    model.run(prompt_of(4, image_at=2))
    index.apply(model.take_batch())
    assert held(index) == model.resident()
    assert len(held(index)) == 4
    assert index.num_foreign == 2


def test_an_index_of_an_adapter_follows_that_adapter_only() -> None:
    model = BlockCacheModel()
    index = UpstreamIndex(ROOT, 4, 8, "legal", max_blocks=10)
    model.run(prompt_of(1, lora_name="legal"))
    model.run(prompt_of(1, lora_name=None))
    index.apply(model.take_batch())
    assert len(held(index)) == 2
    assert index.num_foreign == 1


def test_a_child_without_its_parent_is_an_orphan() -> None:
    model, index = BlockCacheModel(), make_index()
    blocks = model.blocks_of(prompt_of(3))
    apply(index, model.stored(blocks[1:]))
    assert (held(index), index.num_orphans) == (set(), 2)
    apply(index, model.stored(blocks[:1]), model.stored(blocks[1:]))
    assert len(held(index)) == 6


@pytest.mark.parametrize("num_copies", [1, 2, 3])
def test_a_block_stays_until_its_last_copy_is_removed(num_copies: int) -> None:
    model, index = BlockCacheModel(), make_index()
    blocks = model.blocks_of(prompt_of(1))
    apply(index, *[model.stored(blocks)] * num_copies)
    for _ in range(num_copies):
        assert len(held(index)) == 2
        apply(index, model.removed(blocks))
    assert not held(index)
    apply(index, model.removed(blocks))
    assert index.num_unknown_removed == 1


def test_a_copy_on_one_medium_is_not_removed_by_the_other_s_event() -> None:
    model, index = BlockCacheModel(), make_index()
    blocks = model.blocks_of(prompt_of(1))
    apply(index, model.stored(blocks), model.removed(blocks, medium="CPU"))
    assert len(held(index)) == 2
    apply(index, model.stored(blocks, medium="CPU"), model.removed(blocks))
    assert len(held(index)) == 2
    apply(index, model.removed(blocks, medium="CPU"))
    assert not held(index)


def test_the_lowest_group_with_full_attention_is_followed() -> None:
    model, index = BlockCacheModel(), make_index()
    first, second = model.blocks_of(prompt_of(2))
    apply(index, model.stored([first], group=0, kind="mamba"))
    assert not held(index)
    apply(index, model.stored([first], group=2))
    assert len(held(index)) == 2
    apply(index, model.stored([first], group=1), model.stored([second], group=1), model.removed([first], group=2))
    assert len(held(index)) == 4
    assert index.num_other_groups == 2
    apply(index, model.removed([first], group=1))
    assert len(held(index)) == 2


@pytest.mark.parametrize(
    "change",
    [{"block_size": 4}, {"block_size": 16}, {"token_ids": [1] * 7}, {"token_ids": []}],
)
def test_blocks_of_another_size_or_without_tokens_are_counted_and_ignored(change: dict[str, Any]) -> None:
    model, index = BlockCacheModel(), make_index()
    apply(index, model.stored(model.blocks_of(prompt_of(1))) | change)
    assert (held(index), index.num_unreadable, len(index._blocks)) == (set(), 1, 0)


def test_what_is_expected_is_resident_at_once_and_removed_when_nothing_comes() -> None:
    model, index = BlockCacheModel(), make_index()
    (block,) = model.blocks_of(prompt_of(1))
    packed = b"".join(model.our_hashes(block))
    index.expect(packed, until=5.0)
    assert index.resident.take() != (b"", b"")
    index.expire(4.9)
    assert len(held(index)) == 2
    index.expire(5.0)
    assert index.resident.take()[0] == b"" and not held(index)
    index.expect(packed, until=7.0)
    apply(index, model.stored([block]))  # its event comes: ordinary from now on
    index.expire(100.0)
    assert len(held(index)) == 2
    apply(index, model.removed([block]))
    assert not held(index)
    index.check_integrity()


def test_what_is_resident_is_not_expected_again() -> None:
    model, index = BlockCacheModel(), make_index()
    (block,) = model.blocks_of(prompt_of(1))
    apply(index, model.stored([block]))
    index.expect(b"".join(model.our_hashes(block)), until=9.0)
    apply(index, model.removed([block]))
    assert not held(index)


def test_expectations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_index, "MAX_EXPECTED", 3)
    index = make_index()
    index.expect(bytes(range(16 * 5)), until=1.0)
    assert len(index._expected) == 3
    index.check_integrity()


def test_an_index_that_overflows_holds_nothing_until_the_next_clear() -> None:
    model, index = BlockCacheModel(), make_index(max_blocks=3)
    model.run(prompt_of(3))
    index.apply(model.take_batch())
    assert not index.is_overflowed
    stored, _ = index.resident.take()
    model.run(prompt_of(1, None))  # foreign blocks take room, too
    model.run(prompt_of(1, SALT_B))
    index.apply(model.take_batch())
    index.expect(bytes(16), until=1.0)
    assert index.is_overflowed and not held(index)
    assert set(split_hashes(index.resident.take()[1])) == set(split_hashes(stored))
    index.check_integrity()
    model.clear()
    model.run(prompt_of(2, SALT_B))
    index.apply(model.take_batch())
    assert not index.is_overflowed and held(index) == model.resident()


def test_more_media_than_any_upstream_has_are_not_followed() -> None:
    model, index = BlockCacheModel(), make_index()
    blocks = model.blocks_of(prompt_of(1))
    for number in range(kv_index.MAX_MEDIA + 5):
        apply(index, model.stored(blocks, medium=f"shelf {number}"))
    assert index.num_unreadable == 5
    index.check_integrity()


@pytest.mark.parametrize(("upstream_block_size", "bytes_per_block"), [(16, 240), (128, 1020)])
def test_a_block_takes_as_much_memory_as_the_docstring_says(upstream_block_size: int, bytes_per_block: int) -> None:
    """Up to a third more or less: dictionaries grow in steps."""
    num_blocks = 4096
    assert f"{bytes_per_block:,}" in (UpstreamIndex.__doc__ or "")
    model = BlockCacheModel(16, upstream_block_size)
    prompts = [Prompt(tuple(range(i, i + 8 * upstream_block_size))) for i in range(0, num_blocks, 8)]
    batches = [msgspec.msgpack.encode([1.0, [model.stored(model.blocks_of(prompt))], 0]) for prompt in prompts]
    index = make_index(num_blocks, 16, upstream_block_size)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for payload in batches:
            index.apply(decode_batch(payload))
            index.resident.take()
        size = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(index._blocks) == num_blocks
    assert 0.67 * bytes_per_block < size / num_blocks < 1.34 * bytes_per_block
