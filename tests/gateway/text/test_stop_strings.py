"""Stop strings: what is found is what a search of the whole text finds, at a cost that nobody can drive up."""

from __future__ import annotations

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.text.stop_strings import StopStrings

STRINGS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=1000)
@given(STRINGS, st.text("ab", max_size=12), st.lists(st.integers(0, 12), max_size=3))
def test_the_string_that_is_complete_first_is_found_in_whatever_pieces(
    strings: list[str], text: str, cuts: list[int]
) -> None:
    stops = StopStrings(strings)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = None
    for start, end in itertools.pairwise(bounds):
        found = stops.push(text[start:end])
        if found is not None:
            found = start + found[0], found[1]
            break
        open_ends = [n for each in strings for n in range(len(each)) if text[:end].endswith(each[:n])]
        assert stops.num_open == max(open_ends)
    ends = [(text.find(each) + len(each), -len(each)) for each in strings if each in text]
    assert found == ((min(ends)[0], -min(ends)[1]) if ends else None)


def test_strings_made_to_match_almost_cost_little() -> None:
    strings = ["x" * 255 + "z", *("x" * 100 + "w" + "x" * (154 - n) + "q" * (n + 1) for n in range(15))]
    stops = StopStrings(strings)
    began = time.process_time()
    for _ in range(20_000):
        assert stops.push("x") is None
    assert stops.num_open == 255
    assert time.process_time() - began < 2  # comparing ends takes 8 s and more
