"""The meter against a plain leaky bucket that counts in fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.core.gcra import MINUTE_NS, Meter, cost_ns

STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "put_back"]), st.integers(1, 2_000), st.integers(0, MINUTE_NS)), max_size=60
)


@given(st.integers(1, 2_000), STEPS)
def test_a_meter_never_grants_more_than_a_bucket_that_fills_evenly(
    per_min: int, steps: list[tuple[str, int, int]]
) -> None:
    meter, now, start = Meter(), MINUTE_NS, MINUTE_NS
    used, open_takes = 0, []
    for kind, num, pause in steps:
        now += pause // 7
        if kind == "take" and num <= per_min:
            available, wait = meter.available(per_min, now), meter.wait_ns(num, per_min, now)
            assert (wait == 0) == (num <= available), "what is available and what may be taken disagree"
            if not wait:
                meter.take(num, per_min, now)
                used += num
                open_takes.append(num)
            else:
                assert meter.wait_ns(num, per_min, now + wait) == 0, "it waits longer than it says"
        elif kind == "put_back" and open_takes:
            taken = open_takes.pop()
            meter.put_back(min(num, taken), taken, per_min)
            used -= min(num, taken)
        assert used <= per_min + Fraction((now - start) * per_min, MINUTE_NS), "granted more than the rate allows"


@pytest.mark.parametrize("per_min", [1, 7, 60, 999_983, 10**9])
def test_a_whole_minute_s_worth_may_come_at_once_and_comes_back_evenly(per_min: int) -> None:
    meter = Meter()
    assert meter.available(per_min, 5) == per_min
    meter.take(per_min, per_min, 5)
    assert meter.available(per_min, 5) == 0
    assert meter.wait_ns(1, per_min, 5) == cost_ns(1, per_min)
    assert meter.available(per_min, 5 + MINUTE_NS + per_min) == per_min


def test_an_unused_meter_does_not_save_up_more_than_a_minute() -> None:
    meter = Meter()
    meter.take(60, 60, 0)
    assert meter.available(60, 3600 * 10**9) == 60
