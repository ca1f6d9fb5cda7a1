"""The hazard model against made-up traffic whose rates are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, inf

import pytest

from cache.policies.hazard import BIN_EDGES, NUM_ZONES, ZONE_EDGES, Active, HazardModel, bin_of, next_edge, zone_of


def teach(model: HazardModel, active: Active, rest_s: float) -> None:
    """Show `model` one visit that was used again after `rest_s`; inf: never."""
    for zone in range(NUM_ZONES):
        end_s = ZONE_EDGES[zone + 1]
        model.learn(active, ZONE_EDGES[zone], min(end_s, rest_s), rest_s < end_s)
        if rest_s < end_s:
            return


def teach_all(model: HazardModel, active: Active, count: int, draw: Callable[[], float]) -> None:
    for _ in range(count):
        teach(model, active, draw())


@pytest.mark.parametrize("rate", [0.2, 0.02, 0.002])
def test_a_constant_rate_is_found_at_every_age(rate: float) -> None:
    rng, model = random.Random(1), HazardModel(1)
    teach_all(model, [], 4000, lambda: rng.expovariate(rate))
    for age_s in (0.0, 0.3 / rate, 1.0 / rate):  # the best of all horizons: some noise speaks for one of them
        assert 0.8 * rate < model.density([], age_s) < 2.0 * rate


def test_two_kinds_that_come_together_are_told_apart() -> None:
    rng, model = random.Random(2), HazardModel(1)
    quick, slow = model.kind(0, 1), model.kind(0, 2)
    for _ in range(3000):
        teach(model, quick, rng.expovariate(0.1))
        teach(model, slow, rng.expovariate(0.01))
    assert model.density(quick, 0.0) == pytest.approx(0.1, rel=0.3)
    assert model.density(slow, 0.0) == pytest.approx(0.01, rel=0.3)


def test_the_share_that_never_returns_counts() -> None:
    rng, model = random.Random(3), HazardModel(1)
    loyal, lost = model.kind(0, 1), model.kind(0, 2)
    for _ in range(2000):
        teach(model, loyal, rng.expovariate(0.05))
        teach(model, lost, rng.expovariate(0.05) if rng.random() < 0.1 else inf)
    assert model.density(lost, 0.0) < 0.3 * model.density(loyal, 0.0)
    assert model.density(lost, 120.0) < 0.05 * model.density(loyal, 120.0)


def test_what_is_due_is_worth_more_than_what_was_used_just_now() -> None:
    rng, model = random.Random(4), HazardModel(1)
    teach_all(model, [], 2000, lambda: rng.uniform(12.0, 15.0))
    assert 0.0 < model.density([], 200.0) < model.density([], 0.0) < model.density([], 8.0) < model.density([], 12.0)


def test_quantities_in_between_are_in_between() -> None:
    rng, model = random.Random(5), HazardModel(1)
    for _ in range(3000):
        length = rng.choice([3.0, 255.0])  # both lie on nodes
        teach(model, model.amount(0, length), rng.expovariate(0.1 if length == 3.0 else 0.01))
    short, middle, long = (model.density(model.amount(0, length), 0.0) for length in (3.0, 6.0, 255.0))
    assert long < middle < short


def test_traffic_that_changes_is_learned_anew() -> None:
    rng, model = random.Random(6), HazardModel(6)
    visit = [weight for feature in range(6) for weight in model.kind(feature, 1)]
    teach_all(model, visit, 5000, lambda: rng.expovariate(0.1))
    before = model.density(visit, 0.0)
    teach_all(model, visit, 3000, lambda: rng.expovariate(0.01))
    assert before == pytest.approx(0.1, rel=0.3)
    assert model.density(visit, 0.0) < 0.02


def test_untaught_it_orders_as_lru_does_and_beliefs_shift_it() -> None:
    model = HazardModel(1)
    ages = [0.0, 1.0, 10.0, 100.0, 1000.0, 10_000.0]
    densities = [model.density([], age_s) for age_s in ages]
    assert densities == sorted(densities, reverse=True) and len(set(densities)) == len(ages)
    model.believe(0, 3, -2.0)
    assert model.density(model.kind(0, 3), 100.0) == pytest.approx(exp(-2.0) * model.density([], 100.0), rel=0.3)


def test_what_is_seen_of_young_ages_is_believed_of_old_ones() -> None:
    model = HazardModel(1)
    before = model.density([], 100.0)
    for _ in range(1000):
        model.learn([], 0.0, 1.0, False)  # nobody comes back, and nobody is watched for longer than a second
    assert model.density([], 100.0) < 0.5 * before


def test_bins_and_zones_tile_all_ages() -> None:
    for age_s in (0.0, 0.4, 0.5, 0.99, 1.0, 3.9, 4.1, 63.0, 65.0, 4095.0):
        i, zone = bin_of(age_s), zone_of(age_s)
        assert BIN_EDGES[i] <= age_s < BIN_EDGES[i + 1] and ZONE_EDGES[zone] <= age_s < ZONE_EDGES[zone + 1]
        assert i >> 1 == zone
    for age_s in (*BIN_EDGES, 1e6):
        assert next_edge(age_s) > age_s
