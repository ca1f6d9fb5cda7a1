"""Seeded stories of faults: whatever happens, streams equal the oracle's and nothing is left behind."""

from __future__ import annotations

import pytest

from tests.simulation import Simulation

NUM_SEEDS = 150


@pytest.mark.timeout(600)
def test_streams_equal_the_oracle_whatever_happens_to_workers() -> None:
    reasons: dict[str, int] = {}
    num_losses = num_redispatches = num_gaps = 0
    for seed in range(NUM_SEEDS):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for client in simulation.clients.values():
            assert client.sink.finished is not None
            reasons[client.sink.finished.reason] = reasons.get(client.sink.finished.reason, 0) + 1
        statistics = simulation.core.statistics()
        num_losses += simulation.num_losses
        num_redispatches += statistics.totals.num_redispatches
        num_gaps += statistics.totals.num_resyncs
    # The stories are worth telling: every kind of end and of trouble has happened.
    assert set(reasons) - {"error"} == {"stop", "length", "abort", "deadline"}
    assert reasons.get("error", 0) < 0.001 * sum(reasons.values()), "unrelated deaths are no reason to give up"
    assert min(num_losses, num_redispatches, num_gaps) > NUM_SEEDS // 2


def test_the_same_seed_is_the_same_story() -> None:
    assert Simulation(7).run() == Simulation(7).run()
    assert Simulation(7).run() != Simulation(8).run()


def test_without_faults_every_request_gets_its_whole_answer() -> None:
    simulation = Simulation(1, num_faults=0)
    simulation.run()
    whole = [client for client in simulation.clients.values() if not client.may_be_cut]
    assert len(whole) > len(simulation.clients) // 4
    for client in whole:
        assert client.sink.tokens == client.expected
    assert simulation.core.statistics().totals.num_lost == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_more_seeds() -> None:
    for seed in range(10_000, 10_200):
        try:
            Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
