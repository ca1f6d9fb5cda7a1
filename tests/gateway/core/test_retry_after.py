"""Who was refused and comes back once, when it was told to, is admitted: the whole core in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.promises import MAX_WAIT_S, Expected, Promises
from kvasir.gateway.core.requests import QueueConfig
from kvasir.protocol.messages import Generate
from kvasir.protocol.terms import NO_TERMS, Limits, Terms
from tests.core_helpers import Bench, make_submit, output

TICK_S = 0.1


@dataclass
class Crowd:
    """Clients of a core whose one worker takes `stay_s` over each request, `num_slots` at once."""

    terms: Terms = NO_TERMS
    stay_s: float = 0.3
    num_slots: int = 8
    max_queued: int = 10_000
    comes_back: bool = True
    most_late_s: float = 0.0  # they come back so much later than told at most
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_wait_s: float = 0.0

    def __post_init__(self) -> None:
        billing = Billing(lambda payer: self.terms, wall_clock=lambda: self.bench.now)
        self.bench = Bench(billing=billing, queue=QueueConfig(max_queued_per_tenant=self.max_queued))
        self.bench.join(max_requests=self.num_slots, num_blocks=100_000)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._rng = random.Random(1)

    def come(self, times: Sequence[float], tenant: str = "alpha") -> None:
        """Have a client come at each of `times`, from now."""
        for time_s in times:
            tokens = [next(self._serial), *range(9)]
            self._at(self.bench.now + time_s, lambda tokens=tokens: self._ask(tenant, tokens, is_second=False))

    def run(self, for_s: float) -> None:
        """Let time pass."""
        end, next_tick = self.bench.now + for_s, self.bench.now
        while (self._events and self._events[0][0] <= end) or next_tick <= end:
            if self._events and self._events[0][0] <= next_tick:
                self.bench.now, _, call = heapq.heappop(self._events)
                call()
            else:
                self.bench.now, next_tick = next_tick, next_tick + TICK_S
                self.bench.report(b"w1")  # it is alive
                self.bench.core.tick()
            for _, command in self.bench.take(Generate):
                self._at(self.bench.now + self.stay_s, lambda req_id=command.req_id: self._serve(req_id))
        self.bench.now = end

    @property
    def share_admitted(self) -> float:
        """The share of those that were refused and came back when they were told to that was admitted then."""
        return self.outcomes["admitted"] / max(1, self.outcomes["admitted"] + self.outcomes["refused twice"])

    def _at(self, time_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._serial), call))

    def _ask(self, tenant: str, tokens: list[int], *, is_second: bool) -> None:
        sink = self.bench.submit(b"%d" % next(self._serial), tokens, tenant=tenant)
        if sink.finished is None:
            self.outcomes["admitted" if is_second else "at once"] += 1
        elif is_second:
            self.outcomes["refused twice"] += 1
        else:
            assert sink.finished.error is not None and sink.finished.error.retry_after_s is not None
            wait_s = sink.finished.error.retry_after_s
            self.longest_wait_s = max(self.longest_wait_s, wait_s)
            if self.comes_back:
                late_s = self._rng.uniform(0.0, self.most_late_s)
                self._at(self.bench.now + wait_s + late_s, lambda: self._ask(tenant, tokens, is_second=True))

    def _serve(self, req_id: bytes) -> None:
        self.bench.report(b"w1", output(req_id, 0, [1, 2], "stop", num_cached_tokens=0))


def test_a_burst_on_a_full_queue_is_told_when_it_will_have_drained() -> None:
    crowd = Crowd(max_queued=20)
    crowd.come([i * 0.1 for i in range(50)])  # it has worked before
    crowd.run(10)
    crowd.come([0.0] * 150)
    crowd.run(70)
    assert crowd.outcomes["at once"] == 50 + 28
    assert crowd.outcomes.total() == 200
    assert crowd.share_admitted >= 0.9, crowd.outcomes
    assert crowd.longest_wait_s < 3 * 122 * 0.3 / 8  # that is how long it takes to serve them


def test_a_gateway_that_has_served_nothing_yet_does_not_send_clients_away_for_a_minute() -> None:
    crowd = Crowd(max_queued=20)
    crowd.come([0.0] * 150)
    crowd.run(70)
    assert crowd.share_admitted >= 0.9, crowd.outcomes
    assert crowd.longest_wait_s < 30


def test_each_of_two_tenants_is_told_by_its_own_part() -> None:
    crowd = Crowd(max_queued=20)
    crowd.come([0.0] * 60, "alpha")
    crowd.come([0.5] * 60, "beta")
    crowd.run(70)
    assert crowd.share_admitted >= 0.9, crowd.outcomes


@pytest.mark.parametrize(("load", "for_s"), [(1.1, 120), (1.5, 60)])
def test_under_steady_overload_newcomers_do_not_take_the_places_of_those_that_come_back(
    load: float, for_s: int
) -> None:
    crowd = Crowd(max_queued=20)
    per_s = load * crowd.num_slots / crowd.stay_s
    crowd.come([i / per_s for i in range(int(for_s * per_s))])
    crowd.run(for_s + 70)
    assert crowd.outcomes["admitted"] > 0.1 * crowd.outcomes.total()
    assert crowd.share_admitted >= 0.9, crowd.outcomes


def test_a_full_queue_takes_who_was_told_to_come_back_then_and_nobody_else() -> None:
    bench = Bench(models=frozenset({"demo"}), queue=QueueConfig(max_queued=4))
    for number in range(4):
        bench.submit(b"%d" % number)
    told = [bench.submit(b"told %d" % number, [number]).finished for number in range(3)]
    waits_s = [end.error.retry_after_s for end in told if end is not None and end.error is not None]
    assert [type(wait_s) for wait_s in waits_s] == [float] * 3
    assert bench.submit(b"early", [0]).finished is not None
    bench.now += max(wait_s or 0.0 for wait_s in waits_s)
    assert bench.submit(b"stranger", [0], tenant="beta").finished is not None
    assert bench.submit(b"newcomer", [9]).finished is not None
    assert [bench.submit(b"back %d" % number, [number]).finished for number in range(2)] == [None, None]
    assert bench.submit(b"again", [1]).finished is not None, "a ticket is good for once"
    assert bench.submit(b"beyond", [2]).finished is not None, "half as many may come on top"


@pytest.mark.parametrize(
    "limits",
    [Limits(requests_per_min=120), Limits(prompt_tokens_per_min=1_200), Limits(output_tokens_per_min=960)],
)
def test_a_burst_over_a_limit_per_minute_is_told_when_each_of_it_can_be_had(limits: Limits) -> None:
    crowd = Crowd(Terms(limits), stay_s=0.01)
    crowd.come([0.0] * 220)
    crowd.run(70)
    assert crowd.outcomes["at once"] == 120
    assert crowd.share_admitted >= 0.9, crowd.outcomes


def test_a_burst_over_a_limit_at_once_is_told_when_others_will_have_ended() -> None:
    crowd = Crowd(Terms(Limits(max_concurrent=4)), stay_s=0.5)
    crowd.come([float(i) for i in range(20)])  # it has seen how long they take
    crowd.run(25)
    crowd.come([0.0] * 44)
    crowd.run(70)
    assert crowd.outcomes["at once"] == 24
    assert crowd.share_admitted >= 0.9, crowd.outcomes


@pytest.mark.parametrize(("load", "for_s"), [(1.1, 120), (1.5, 60)])
def test_under_steady_overload_places_at_once_are_kept_for_those_that_were_told_to_come_back(
    load: float, for_s: int
) -> None:
    crowd = Crowd(Terms(Limits(max_concurrent=8)), num_slots=64)
    per_s = load * 8 / crowd.stay_s
    crowd.come([i / per_s for i in range(int(for_s * per_s))])
    crowd.run(for_s + 70)
    assert crowd.outcomes["admitted"] > 0.1 * crowd.outcomes.total()
    assert crowd.share_admitted >= 0.9, crowd.outcomes


@pytest.mark.parametrize("limits", [Limits(requests_per_min=480), Limits(prompt_tokens_per_min=4_800)])
@pytest.mark.parametrize(("load", "for_s"), [(1.1, 120), (1.5, 60)])
def test_under_steady_overload_a_limit_per_minute_is_used_up_by_those_that_were_told_to_come_back(
    limits: Limits, load: float, for_s: int
) -> None:
    crowd = Crowd(Terms(limits), stay_s=0.01, most_late_s=0.2)
    crowd.come([0.0] * 480)  # what may come at once is gone
    crowd.come([i / (8 * load) for i in range(int(8 * load * for_s))])
    crowd.run(for_s)
    assert crowd.outcomes["admitted"] > 0.9 * 8 * for_s, crowd.outcomes
    assert crowd.share_admitted >= 0.9, crowd.outcomes


def test_a_limit_per_minute_is_used_up_where_nobody_comes_back() -> None:
    crowd = Crowd(Terms(Limits(requests_per_min=480)), stay_s=0.01, comes_back=False)
    crowd.come([0.0] * 480)
    crowd.come([i / 12 for i in range(12 * 120)])
    crowd.run(60)
    crowd.outcomes.clear()
    crowd.run(60)
    assert crowd.outcomes["at once"] > 0.9 * 480


@pytest.mark.parametrize("stay_s", [0.1, 0.5, 3.0])
def test_places_are_not_kept_for_clients_that_never_come_back(stay_s: float) -> None:
    crowd = Crowd(Terms(Limits(max_concurrent=8)), stay_s, num_slots=64, comes_back=False)
    per_s = 1.5 * 8 / stay_s
    crowd.come([i / per_s for i in range(1_000)])
    crowd.run(500 / per_s)  # so long it takes until they are known
    crowd.outcomes.clear()
    crowd.run(500 / per_s)
    assert crowd.outcomes["at once"] > 0.9 * 500 / 1.5


def test_promises_come_one_after_the_other_and_begin_anew_when_they_are_too_far_away() -> None:
    promises = Promises()
    waits = [promises.wait_s(10.0, 1.0, 20.0) for _ in range(5)]
    assert waits == [1.0, 21.0, 41.0, 1.0, 21.0] and max(waits) <= MAX_WAIT_S


def test_of_a_crowd_that_was_told_to_come_back_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir.gateway.core.promises.MAX_TICKETS", 3)
    expected, submits = Expected(), [make_submit(b"%d" % i, tokens=[i])[0] for i in range(5)]
    for i, submit in enumerate(submits):
        expected.give(submit, 10.0 + i)
    assert expected.tickets.num == 3 and expected.num_before(100.0, 0.0) == 3
    assert [expected.take(submit, 20.0) for submit in submits] == [False, False, True, True, True]
