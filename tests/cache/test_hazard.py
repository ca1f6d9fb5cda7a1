"""The hazard model against made-up traffic whose rates are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, inf

import pytest

from kvasir.cache.policies.hazard import (
    BIN_EDGES,
    NUM_BINS,
    NUM_ZONES,
    ZONE_EDGES,
    Description,
    HazardModel,
    Row,
    bin_of,
)


def teach(model: HazardModel, row: Row, rest_s: float) -> None:
    """Show `model` one visit that was used again after `rest_s`; inf: never."""
    for zone in range(NUM_ZONES):
        end_s = ZONE_EDGES[zone + 1]
        model.learn(row, zone, min(end_s, rest_s), rest_s < end_s)
        if rest_s < end_s:
            return


def teach_all(model: HazardModel, description: Description, count: int, draw: Callable[[], float]) -> None:
    row = model.row(description)
    for _ in range(count):
        teach(model, row, draw())


def density(model: HazardModel, description: Description, age_s: float) -> float:
    [worth] = model.densities([model.row(description)], [age_s])
    return worth


@pytest.mark.parametrize("rate", [0.2, 0.02, 0.002])
def test_a_constant_rate_is_found_at_every_age(rate: float) -> None:
    rng, model = random.Random(1), HazardModel(1)
    teach_all(model, [], 4000, lambda: rng.expovariate(rate))
    for age_s in (0.0, 0.3 / rate, 1.0 / rate):  # the best of all horizons: some noise speaks for one of them
        assert 0.8 * rate < density(model, [], age_s) < 2.0 * rate


def test_two_kinds_that_come_together_are_told_apart() -> None:
    rng, model = random.Random(2), HazardModel(1)
    quick, slow = model.kind(0, 1), model.kind(0, 2)
    for _ in range(3000):
        teach(model, model.row(quick), rng.expovariate(0.1))
        teach(model, model.row(slow), rng.expovariate(0.01))
    assert density(model, quick, 0.0) == pytest.approx(0.1, rel=0.3)
    assert density(model, slow, 0.0) == pytest.approx(0.01, rel=0.3)


def test_the_share_that_never_returns_counts() -> None:
    rng, model = random.Random(3), HazardModel(1)
    loyal, lost = model.kind(0, 1), model.kind(0, 2)
    for _ in range(2000):
        teach(model, model.row(loyal), rng.expovariate(0.05))
        teach(model, model.row(lost), rng.expovariate(0.05) if rng.random() < 0.1 else inf)
    assert density(model, lost, 0.0) < 0.3 * density(model, loyal, 0.0)
    assert density(model, lost, 120.0) < 0.05 * density(model, loyal, 120.0)


def test_what_is_due_is_worth_more_than_what_was_used_just_now() -> None:
    rng, model = random.Random(4), HazardModel(1)
    teach_all(model, [], 2000, lambda: rng.uniform(12.0, 15.0))
    assert (
        0.0 < density(model, [], 200.0) < density(model, [], 0.0) < density(model, [], 8.0) < density(model, [], 12.0)
    )


def test_quantities_in_between_are_in_between() -> None:
    rng, model = random.Random(5), HazardModel(1)
    for _ in range(3000):
        length = rng.choice([3.0, 255.0])  # both lie on nodes
        teach(model, model.row(model.amount(0, length)), rng.expovariate(0.1 if length == 3.0 else 0.01))
    short, middle, long = (density(model, model.amount(0, length), 0.0) for length in (3.0, 6.0, 255.0))
    assert long < middle < short


def test_traffic_that_changes_is_learned_anew() -> None:
    rng, model = random.Random(6), HazardModel(6)
    visit = [node for feature in range(6) for node in model.kind(feature, 1)]
    teach_all(model, visit, 5000, lambda: rng.expovariate(0.1))
    before = density(model, visit, 0.0)
    teach_all(model, visit, 3000, lambda: rng.expovariate(0.01))
    assert before == pytest.approx(0.1, rel=0.3)
    assert density(model, visit, 0.0) < 0.02


def test_untaught_it_orders_as_lru_does_and_beliefs_shift_it() -> None:
    model = HazardModel(1)
    ages = [0.0, 1.0, 10.0, 100.0, 1000.0, 10_000.0]
    densities = [density(model, [], age_s) for age_s in ages]
    assert densities == sorted(densities, reverse=True) and len(set(densities)) == len(ages)
    model.believe(0, 3, -2.0)
    assert density(model, model.kind(0, 3), 100.0) == pytest.approx(exp(-2.0) * density(model, [], 100.0), rel=0.3)


def test_what_is_seen_of_young_ages_is_believed_of_old_ones() -> None:
    model = HazardModel(1)
    before = density(model, [], 100.0)
    for _ in range(1000):
        model.learn(model.row([]), 0, 1.0, False)  # nobody comes back, and nobody is watched for longer than a second
    assert density(model, [], 100.0) < 0.5 * before


def test_classes_of_visits_share_what_features_do_but_not_their_rates() -> None:
    rng, model = random.Random(7), HazardModel(1, 2)
    quick, slow = model.kind(0, 1), model.kind(0, 2)
    for _ in range(3000):
        teach(model, model.row(quick, 0), rng.expovariate(0.2))
        teach(model, model.row(slow, 0), rng.expovariate(0.02))
        teach(model, model.row(quick, 1), rng.expovariate(0.02))
    at_once = [model.row(quick, 0), model.row(slow, 0), model.row(quick, 1), model.row(slow, 1)]
    first, second, third, fourth = model.densities(at_once, [0.0] * 4)
    assert first == pytest.approx(0.2, rel=0.3)
    assert second == pytest.approx(0.02, rel=0.3)
    assert third == pytest.approx(0.02, rel=0.3)
    assert fourth < 0.5 * third  # never seen, and yet known to be slower than the quick of its class


def test_many_are_appraised_as_each_by_itself_and_as_the_formula_says() -> None:
    rng, model = random.Random(8), HazardModel(2)
    rows, ages = [], []
    for _ in range(40):
        rows.append(model.row([*model.amount(0, rng.choice([None, 3.0, 700.0])), *model.kind(1, rng.randrange(3))]))
        ages.append(rng.choice([0.0, 0.7, 5.0, 300.0, 9000.0]))
        teach(model, rows[-1], rng.expovariate(0.01))
    together = model.densities(rows, ages)
    alone = [model.densities([row], [age_s])[0] for row, age_s in zip(rows, ages, strict=True)]
    assert together == pytest.approx(alone)
    steps = 200
    for row, age_s, found in zip(rows, ages, together, strict=True):
        if age_s >= BIN_EDGES[-1]:
            continue
        [rates], left, idle_s, best = model.rates([row]), 1.0, 0.0, 0.0
        for i in range(bin_of(age_s), NUM_BINS):  # in small steps, and every moment a candidate for giving up
            rate = rates[i]
            width = (BIN_EDGES[i + 1] - max(age_s, BIN_EDGES[i])) / steps
            for _ in range(steps):
                survival = left * exp(-rate * width)
                idle_s += 0.5 * (left + survival) * width
                left = survival
                best = max(best, (1.0 - left) / idle_s)
        assert found == pytest.approx(best, rel=0.1)


def test_bins_and_zones_tile_all_ages() -> None:
    for age_s in (0.0, 0.4, 0.5, 0.99, 1.0, 3.9, 4.1, 63.0, 65.0, 4095.0):
        i = bin_of(age_s)
        assert BIN_EDGES[i] <= age_s < BIN_EDGES[i + 1]
        assert ZONE_EDGES[i >> 1] <= age_s < ZONE_EDGES[(i >> 1) + 1]
    assert BIN_EDGES[::2] == pytest.approx(ZONE_EDGES)
