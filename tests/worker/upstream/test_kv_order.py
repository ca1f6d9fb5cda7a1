"""The order of batches: whatever a connection loses, doubles or swaps, the index is exact again once it settles."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvasir.protocol.prefix import split_hashes
from kvasir.worker.upstream import kv_order
from kvasir.worker.upstream.kv_index import UpstreamIndex
from kvasir.worker.upstream.kv_order import BatchOrder
from tests.worker.upstream.block_cache_model import ROOT, Publisher


class Site:
    """A publisher and an order that follows it, without anything in between but what a test lets go wrong."""

    def __init__(self, seed: int = 0, *, num_kept: int = 10_000, has_replay: bool = True) -> None:
        self.rng = random.Random(seed)
        self.publisher = Publisher(num_kept)
        self.index = UpstreamIndex(ROOT, 4, 8, max_blocks=1000)
        self.order = BatchOrder(self.index, has_replay=has_replay)
        self.order.connected()

    def publish(self, num_batches: int = 1, *, is_heard: bool = True) -> list[tuple[int, bytes]]:
        batches = [self.publisher.publish(self.rng) for _ in range(num_batches)]
        for batch in batches if is_heard else []:
            self.order.live(*batch)
        return batches

    def replay(self, lose: Callable[[], bool] = lambda: False, between: Callable[[], object] = lambda: None) -> None:
        """Carry out one replay. Answers after the first get lost as `lose` says, the end too."""
        start = self.order.begin_replay()
        for number, batch in enumerate(self.publisher.replay(start)):
            between()
            if (number == 0 or not lose()) and not self.order.replayed(*batch):
                return
        if lose():
            self.order.fail_replay()
        else:
            self.order.end_replay()

    def settle(self) -> None:
        """Nothing happens any more; replays are asked for as long as they are wanted, and one more as in a silence."""
        for is_silence in (False, True):
            if is_silence:
                self.order.want_replay()
            for _ in range(20):
                if not self.order.wants_replay:
                    break
                self.replay()
            assert not self.order.wants_replay, "replays without an end"
        self.index.check_integrity()

    def held(self) -> set[bytes]:
        return set(split_hashes(self.index.resident.snapshot()))

    @property
    def is_exact(self) -> bool:
        return self.order.in_order and self.held() == self.publisher.model.resident()


def drive(site: Site, num_batches: int, *, is_restarting: bool = True) -> None:
    """Publish with losses, doubles, swaps, lossy replays, reconnects and restarts, known or not.

    After a restart there is a new connection, always. What the old one had on its way may come after that.
    """
    rng, order = site.rng, site.order
    site.publisher.clear_odds = 0.02
    delayed: list[tuple[int, bytes]] = []
    was_whole = True  # the replay before
    for _ in range(num_batches):
        batch = site.publisher.publish(rng)
        fate = rng.random()
        if fate < 0.15:
            continue
        if fate < 0.3:
            delayed.append(batch)
            continue
        order.live(*batch)
        if fate < 0.4:
            order.live(*batch)
        if delayed and rng.random() < 0.5:
            order.live(*delayed.pop(rng.randrange(len(delayed))))
        if order.wants_replay and rng.random() < 0.5:
            odds = rng.choice((0.0, 0.1)) * was_whole  # never `MAX_TRIES` losses of the same batch
            was_whole = odds == 0.0
            site.replay(lambda odds=odds: rng.random() < odds, lambda: rng.random() < 0.05 and site.publish())
        if rng.random() < 0.02:
            order.connected()
        if is_restarting and rng.random() < 0.02:
            site.publisher.restart()
            site.publish(rng.randrange(30), is_heard=False)
            order.connected()
            if rng.random() < 0.3:
                order.restarted()
        if rng.random() < 0.01:
            order.live(rng.randrange(2**64), b"garbage" if rng.random() < 0.5 else batch[1])


@pytest.mark.parametrize("seed", range(25))
def test_after_any_chaos_the_index_is_exact_once_the_stream_settles(seed: int) -> None:
    site = Site(seed)
    drive(site, 200)
    site.settle()
    assert site.is_exact
    assert site.order.num_batches > 50


@pytest.mark.parametrize("seed", range(15))
def test_where_too_little_is_kept_the_index_holds_less_than_the_upstream_and_never_more(seed: int) -> None:
    site = Site(seed, num_kept=5)
    drive(site, 200)
    site.order.connected()
    site.settle()
    assert site.order.num_lost > 0
    assert site.order.in_order and site.held() <= site.publisher.model.resident()
    site.publisher.model.clear()
    site.publish(5)
    assert site.is_exact


@pytest.mark.parametrize("seed", range(15))
def test_without_replays_a_gap_empties_the_index_and_a_clear_makes_it_exact(seed: int) -> None:
    site = Site(seed, has_replay=False)
    drive(site, 200)
    site.order.connected()
    site.publish()
    assert not site.order.wants_replay
    assert site.order.num_lost > 0
    assert site.order.in_order and site.held() <= site.publisher.model.resident()
    site.publisher.model.clear()
    site.publish(5)
    assert site.is_exact


def test_what_is_cached_already_is_known_from_the_start() -> None:
    site = Site()
    site.publish(30, is_heard=False)
    assert site.order.wants_replay and not site.order.in_order
    site.settle()
    assert site.is_exact and site.held()
    assert (site.order.num_gaps, site.order.num_lost, site.order.num_restarts) == (0, 0, 0)


def test_live_batches_wait_while_the_first_replay_goes_on() -> None:
    site = Site()
    site.publish(10, is_heard=False)
    site.replay(between=lambda: site.publish() if site.publisher.seq < 20 else None)
    assert site.is_exact
    assert site.order.num_batches == site.publisher.seq


def test_a_whole_stream_needs_one_replay() -> None:
    site = Site()
    site.settle()
    num_replays = site.order.num_replays
    site.publish(100)
    assert site.is_exact
    assert (site.order.num_replays, site.order.num_gaps) == (num_replays, 0)


def test_a_gap_is_filled_from_the_last_batch_on_and_counted_once() -> None:
    site = Site()
    site.publish(3)
    site.settle()
    site.publish(2, is_heard=False)
    site.publish(4)
    assert site.order.wants_replay and not site.order.in_order
    assert site.order.begin_replay() == 2
    site.order.fail_replay()
    site.settle()
    assert site.is_exact
    assert (site.order.num_gaps, site.order.num_lost, site.order.num_late) == (1, 0, 0)


def test_a_swapped_batch_is_applied_in_its_place() -> None:
    site = Site()
    site.settle()
    first, second, third = site.publish(3, is_heard=False)
    for batch in (second, third, first):
        site.order.live(*batch)
    assert site.is_exact
    site.settle()
    assert site.order.num_batches == 3


def test_a_batch_that_comes_again_changes_nothing() -> None:
    site = Site()
    site.settle()
    batches = site.publish(5)
    for batch in batches:
        site.order.live(*batch)
    assert site.is_exact
    assert (site.order.num_late, site.order.num_restarts, site.order.num_batches) == (5, 0, 5)


def test_the_last_batch_before_a_silence_is_fetched_by_asking() -> None:
    site = Site()
    site.publish(5)
    site.settle()
    site.publisher.model.clear()
    site.publish(1, is_heard=False)
    assert site.order.in_order and not site.is_exact
    site.order.want_replay()
    site.replay()
    assert site.is_exact


def test_a_lower_number_with_a_newer_time_is_a_restart() -> None:
    site = Site()
    site.publish(9)
    site.settle()
    site.publisher.restart()
    site.publish(4, is_heard=False)
    site.publish(1)
    assert site.order.num_restarts == 1 and not site.held() and site.order.wants_replay
    site.settle()
    assert site.is_exact and site.order.num_restarts == 1


@pytest.mark.parametrize("num_missed", [2, 9, 10, 11, 30])
def test_a_restart_is_found_on_reconnecting_whatever_its_numbers_look_like(num_missed: int) -> None:
    site = Site()
    site.publish(10)
    site.settle()
    site.publisher.restart()
    site.publish(num_missed, is_heard=False)
    site.order.connected()
    site.publish(3)
    assert not site.order.in_order
    site.settle()
    assert site.is_exact and site.order.num_restarts == 1


def test_a_reconnect_to_the_same_publisher_keeps_what_is_held() -> None:
    site = Site()
    site.publish(10)
    site.settle()
    num_clears = site.index.num_clears
    site.order.connected()
    site.publish(5, is_heard=False)
    site.settle()
    assert site.is_exact and site.order.num_restarts == 0
    assert site.index.num_clears == num_clears


def test_a_batch_that_cannot_be_read_empties_the_index() -> None:
    site = Site()
    site.publish(5)
    site.settle()
    assert site.held()
    site.publisher.publish(site.rng)
    site.order.live(5, b"garbage")
    assert site.held() == set()
    assert site.order.num_malformed == 1 and site.order.in_order
    site.publish(20)
    assert site.held() <= site.publisher.model.resident()


def test_replays_that_never_answer_end_in_going_on_without_what_is_missing() -> None:
    site = Site()
    site.publish(5)
    site.settle()
    site.publish(1, is_heard=False)
    site.publish(3)
    for _ in range(kv_order.MAX_TRIES):
        assert site.order.wants_replay
        site.order.begin_replay()
        site.order.fail_replay()
    assert not site.order.wants_replay and site.order.in_order
    assert site.order.num_lost == 1
    assert site.held() <= site.publisher.model.resident()


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_order, "MAX_WAITING", 4)
    site = Site()
    site.publish(20)
    assert len(site.order._waiting) == 4
    site.settle()
    assert site.is_exact
    monkeypatch.setattr(kv_order, "MAX_WAITING_BYTES", 1)
    site.publish(1, is_heard=False)
    site.publish(3)
    assert not site.order._waiting
    site.settle()
    assert site.is_exact and site.order._waiting_bytes == 0


def test_other_ranks_are_ignored_if_one_is_wanted() -> None:
    site = Site()
    site.order = BatchOrder(site.index, has_replay=True, rank=1)
    site.order.connected()
    site.replay()
    site.publish(3)
    assert site.order.num_other_ranks == 3 and site.order.num_batches == 0
    site.order = BatchOrder(site.index, has_replay=True, rank=0)
    site.order.connected()
    site.settle()
    assert site.is_exact


def test_a_restart_is_not_overlooked_where_the_proof_is_no_longer_kept() -> None:
    site = Site(num_kept=3)
    site.settle()
    site.publish(10)
    assert site.held()
    site.publisher.restart()
    site.publish(13, is_heard=False)  # kept: 10, 11 and 12, as if they were the old stream's next
    site.order.connected()
    site.settle()
    assert site.order.in_order and site.order.num_lost == 1
    assert site.held() <= site.publisher.model.resident()


@pytest.mark.parametrize("is_proven", [False, True])
def test_what_the_old_connection_still_delivers_is_not_taken_for_the_new_stream_s_next(is_proven: bool) -> None:
    site = Site()
    site.settle()
    batches = site.publish(8, is_heard=False)
    for batch in batches[:2]:
        site.order.live(*batch)
    site.publisher.restart()
    site.publish(4, is_heard=False)
    site.order.connected()
    site.replay()
    assert site.order.wants_replay  # from the beginning
    if is_proven:
        site.replay()
    site.order.live(*batches[4])
    site.settle()
    assert site.is_exact
    site.publish(5)
    site.settle()
    assert site.is_exact and site.order.num_restarts == 1
