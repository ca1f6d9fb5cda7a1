"""Prompt lookup against a naive search, its bounds, and whose answers it proposes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.worker.speculation import lookup as lookup_module
from kvasir.worker.speculation import suffix_index
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.proposer import Draft, Text
from kvasir.worker.speculation.suffix_index import BREAK, MAX_MATCH, SuffixIndex

SPACE, OTHER_SPACE = b"s" * 16, b"t" * 16
FEW_TOKENS = st.lists(st.integers(0, 3), max_size=60)


def naive_find(text: list[int], suffix: list[int]) -> tuple[int, int]:
    """Return what `SuffixIndex.find` has to, by looking at every position."""
    best, longest = 0, 0
    for position in range(1, len(text)):
        length = 0
        while length < min(len(suffix), position, MAX_MATCH) and text[position - 1 - length] == suffix[-1 - length]:
            length += 1
        if length >= max(2, longest) and text[position] != BREAK:
            best, longest = position, length
    return best, longest


def make_text(prompt: list[int], *, tenant: str = "a", space: bytes = SPACE, leaves_nothing: bool = False) -> Text:
    return Text(tenant, space, prompt, [], leaves_nothing)


def finish(lookup: Lookup, text: Text, answer: list[int]) -> None:
    lookup.open(text)
    text.output_ids.extend(answer)
    lookup.close(text)


@given(st.lists(FEW_TOKENS, min_size=1, max_size=4), FEW_TOKENS, st.booleans())
def test_the_index_finds_the_last_of_the_longest_matches(parts: list[list[int]], other: list[int], own: bool) -> None:
    index, text = SuffixIndex(16), list[int]()
    for part in parts:
        index.extend(part)
        text += part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix_index, "MAX_LOOKS", 1_000)
        suffix = text if own else other
        assert index.find(suffix) == naive_find(text, suffix)
    assert index.tokens.tolist() == text


@given(st.lists(st.integers(0, 40), max_size=300), st.integers(2, 300))
def test_few_looks_find_a_match_that_is_one(text: list[int], cut: int) -> None:
    index = SuffixIndex(16)
    index.extend(text)
    position, length = index.find(text[:cut])
    assert text[position - length : position] == text[:cut][len(text[:cut]) - length :]
    assert (length == 0) == (naive_find(text, text[:cut])[1] == 0)


def test_what_followed_the_same_tokens_in_the_prompt_is_proposed() -> None:
    text = make_text([1, 2, 3, 4, 5, 6, 7, 9, 9, 2, 3])
    reader = Lookup().open(text)
    assert reader.propose(4) == Draft([4, 5, 6, 7], 2)
    text.output_ids.extend([4, 5])
    assert reader.propose(3) == Draft([6, 7, 9], 4)
    text.output_ids.extend([8, 7])
    assert reader.propose(3) == Draft()


def test_a_text_that_repeats_itself_is_proposed_to_go_on_so() -> None:
    assert Lookup().open(make_text([8, 1, 2, 3, 1, 2, 3])).propose(7) == Draft([1, 2, 3, 1, 2, 3, 1], 3)


def test_a_long_prompt_is_read_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "READ_TOKENS", 5)
    reader = Lookup().open(make_text([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2]))
    assert [reader.propose(2) for _ in range(3)] == [Draft(), Draft(), Draft([3, 4], 2)]


def test_answers_are_proposed_to_their_tenant_in_their_namespace_alone() -> None:
    lookup = Lookup()
    finish(lookup, make_text([0, 0]), [11, 12, 13, 14, 15])
    assert lookup.open(make_text([11, 12])).propose(8) == Draft([13, 14, 15], 2)
    assert lookup.open(make_text([11, 12], space=OTHER_SPACE)).propose(8) == Draft()
    assert lookup.open(make_text([11, 12], tenant="b")).propose(8) == Draft()
    lookup.forget("b")
    assert lookup.open(make_text([11, 12])).propose(8) != Draft()
    lookup.forget("a")
    assert lookup.open(make_text([11, 12])).propose(8) == Draft() and lookup.size_bytes == 0


def test_a_request_that_leaves_nothing_reads_answers_and_leaves_none() -> None:
    lookup = Lookup()
    finish(lookup, make_text([0], leaves_nothing=True), [11, 12, 13])
    assert lookup.open(make_text([11, 12])).propose(8) == Draft()
    finish(lookup, make_text([0]), [11, 12, 13])
    assert lookup.open(make_text([11, 12], leaves_nothing=True)).propose(8) == Draft([13], 2)


def test_a_request_sees_answers_that_end_while_it_runs_and_prefers_the_longer_match() -> None:
    lookup = Lookup()
    reader = lookup.open(make_text([5, 1, 2, 3, 77, 78, 1, 2, 3]))
    assert reader.propose(2) == Draft([77, 78], 3)
    finish(lookup, make_text([0]), [78, 1, 2, 3, 99])
    assert reader.propose(2) == Draft([99], 4)


def test_no_match_goes_across_the_end_of_an_answer() -> None:
    lookup = Lookup()
    finish(lookup, make_text([0]), [11, 12])
    finish(lookup, make_text([0]), [13, 14])
    assert lookup.open(make_text([11, 12])).propose(8) == Draft()
    assert lookup.open(make_text([12, 13])).propose(8) == Draft()
    assert lookup.open(make_text([13, 14])).propose(8) == Draft()


def test_what_is_remembered_is_bounded_per_tenant_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "HALF_TOKENS", 1_000)
    lookup = Lookup(max_bytes=100_000, max_tenant_bytes=40_000)
    for number in range(300):
        answer = [(number * 7 + i * i) % 4_000 for i in range(400)]
        finish(lookup, make_text([0], tenant="ab"[number % 2], space=bytes([number % 7]) * 16), answer)
        assert lookup.size_bytes_of("a") <= 40_000 and lookup.size_bytes_of("b") <= 40_000
    assert 40_000 < lookup.size_bytes <= 80_000
    for number in range(10):
        finish(lookup, make_text([0], tenant=f"t{number}"), list(range(400)))
        assert lookup.size_bytes <= 100_000
    assert lookup.open(make_text([5, 6], tenant="t9")).propose(2) == Draft([7, 8], 2)
    assert lookup.open(make_text([7, 14], tenant="a")).propose(2) == Draft()
