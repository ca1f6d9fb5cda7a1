"""The measure of `scripts/leak_probe.py`, against counting every pair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.leak_probe import auc

TIMES = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30)


@given(TIMES, TIMES)
def test_the_area_is_the_share_of_pairs_in_which_the_right_guess_was_faster(
    wrong: list[float], right: list[float]
) -> None:
    pairs = [(slow, fast) for slow in wrong for fast in right]
    counted = sum(1.0 if fast < slow else 0.5 if fast == slow else 0.0 for slow, fast in pairs) / len(pairs)
    assert auc((wrong, right)) == pytest.approx(counted)
