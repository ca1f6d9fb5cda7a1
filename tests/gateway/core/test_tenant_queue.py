"""The queue: who was charged least is next, a tenant's own requests keep their order, idleness earns nothing."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.core.request import Request
from kvasir.gateway.core.tenant_queue import CLASS_S, FADE_S, FEWEST_LOOKS, LOOKS, TenantQueue
from kvasir.protocol.terms import RANKS
from tests import core_helpers
from tests.core_helpers import make_submit

HIGH, NORMAL, LOW = (RANKS[priority] for priority in ("high", "normal", "low"))


def make_request(req_id: bytes, tenant: str, rank: int = NORMAL, queued_at: float = 0.0) -> Request:
    return core_helpers.make_request(make_submit(req_id, tenant=tenant)[0], queued_at, rank)


def serve(queue: TenantQueue, cost: float = 1.0, count: int = 1_000, now: float = 0.0) -> list[bytes]:
    """Take requests in turn, each charged `cost` and computed at once."""
    taken = []
    for request in queue.turns(now):
        queue.remove(request)
        queue.charge(request.submit.tenant_id, cost)
        taken.append(request.submit.req_id)
        if len(taken) == count:
            break
    return taken


def test_a_flood_of_one_tenant_delays_another_by_one_request() -> None:
    queue = TenantQueue()
    for i in range(100):
        queue.push(make_request(b"a%d" % i, "alpha"))
    assert serve(queue, count=20)[-1] == b"a19"
    for i in range(2):
        queue.push(make_request(b"b%d" % i, "beta"))
    assert serve(queue, count=5) == [b"b0", b"a20", b"b1", b"a21", b"a22"]


def test_turns_go_by_what_was_charged_and_not_by_the_number_of_requests() -> None:
    queue = TenantQueue()
    for i in range(9):
        queue.push(make_request(b"a%d" % i, "alpha"))
        queue.push(make_request(b"b%d" % i, "beta"))
    taken: Counter[str] = Counter()
    for request in queue.turns(0.0):
        queue.remove(request)
        queue.charge(request.submit.tenant_id, 30.0 if request.submit.tenant_id == "alpha" else 10.0)
        taken[request.submit.tenant_id] += 1
        if taken.total() == 8:
            break
    assert taken == {"alpha": 2, "beta": 6}


def test_tenants_get_by_their_weights_and_a_new_weight_is_heeded_with_the_next_request() -> None:
    weights = {"alpha": 1, "beta": 2, "gamma": 4}
    queue = TenantQueue(weights.__getitem__)
    for i in range(100):
        for tenant in weights:
            queue.push(make_request(b"%s%d" % (tenant.encode(), i), tenant))
    assert Counter(req_id[:1] for req_id in serve(queue, count=70)) == {b"a": 10, b"b": 20, b"g": 40}
    weights["alpha"] = 4
    queue.push(make_request(b"a100", "alpha"))
    queue.check_integrity()
    assert Counter(req_id[:1] for req_id in serve(queue, count=100)) == {b"a": 40, b"b": 20, b"g": 40}


def test_a_lead_says_the_same_whatever_the_scale_of_the_weights() -> None:
    leads = []
    for scale in (1, 10):
        weights = {"alpha": scale, "beta": 3 * scale}
        queue = TenantQueue(weights.__getitem__)
        for tenant in weights:
            queue.computing(tenant)
        queue.charge("alpha", 1_000.0)
        leads.append(queue.lead("alpha", 0.0))
        assert queue.lead("beta", 0.0) == pytest.approx(-2 * 1_000 / 4)  # it got less than its part
    assert leads[0] == pytest.approx(leads[1]) == pytest.approx(2 * (1_000 - 1_000 / 4))


def test_higher_classes_come_first_whatever_was_charged() -> None:
    queue = TenantQueue()
    for tenant in ("alpha", "beta"):
        for rank in (LOW, NORMAL, HIGH):
            queue.push(make_request(b"%s%d" % (tenant.encode(), rank), tenant, rank))
    queue.charge("alpha", 1_000.0)
    assert serve(queue) == [b"beta0", b"alpha0", b"beta1", b"alpha1", b"beta2", b"alpha2"]


def test_whoever_has_waited_long_enough_counts_as_the_class_above_and_nothing_starves() -> None:
    queue = TenantQueue()
    queue.push(make_request(b"low", "alpha", LOW))
    served = []
    for second in range(40):  # a high one a second, of another tenant, and one request a second is served
        queue.push(make_request(b"high%d" % second, "beta", HIGH, queued_at=float(second)))
        served += serve(queue, count=1, now=float(second))
    assert served.index(b"low") == 2 * CLASS_S
    queue.check_integrity()


def test_among_requests_of_one_class_waiting_long_changes_nothing() -> None:
    queue = TenantQueue()
    for i in range(2):
        queue.push(make_request(b"a%d" % i, "alpha"))
    queue.charge("alpha", 1.0)
    queue.push(make_request(b"b0", "beta", queued_at=CLASS_S))
    queue.charge("alpha", 10.0)
    assert serve(queue, now=CLASS_S) == [b"b0", b"a0", b"a1"]


def test_a_tenants_own_low_requests_do_not_starve_behind_its_high_ones() -> None:
    queue = TenantQueue()
    queue.push(make_request(b"low", "alpha", LOW))
    served = []
    for second in range(40):
        queue.push(make_request(b"high%d" % second, "alpha", HIGH, queued_at=float(second)))
        served += serve(queue, count=1, now=float(second))
    assert served.index(b"low") == 2 * CLASS_S


@pytest.mark.parametrize("num_others", [0, 1, 3, 40])
def test_what_waits_for_its_worker_lets_some_behind_it_pass(num_others: int) -> None:
    queue = TenantQueue()
    for i in range(100):
        queue.push(make_request(b"a%d" % i, "alpha"))
    others = [b"b%02d" % i for i in range(num_others)]
    for req_id in others:
        queue.push(make_request(req_id, req_id.decode()))
    own = [b"a%d" % i for i in range(max(FEWEST_LOOKS, LOOKS // (1 + num_others)))]
    assert [request.submit.req_id for request in queue.turns(0.0)] == [*own, *others]


def test_a_tenant_that_was_idle_has_saved_nothing() -> None:
    queue = TenantQueue()
    queue.push(make_request(b"a0", "alpha"))
    queue.computing("alpha")
    serve(queue, 1_000.0)
    assert queue.lead("alpha", 0.0) == 0.0  # alone it takes nothing from others
    queue.push(make_request(b"b0", "beta"))  # alpha is still being computed
    queue.charge("alpha", 50.0)
    assert (queue.lead("alpha", 0.0), queue.lead("beta", 0.0)) == (25.0, -25.0)
    queue.charge("beta", 50.0)
    assert (queue.lead("alpha", 0.0), queue.lead("beta", 0.0)) == (0.0, 0.0)


def test_a_tenant_that_asks_for_less_than_its_part_has_no_lead_however_long_it_goes_on() -> None:
    queue = TenantQueue()
    for tenant in ("flooder", "modest", "small"):
        queue.computing(tenant)
    for i in range(100):
        queue.charge("flooder", 1_000.0)
        for tenant, num_tokens in (("modest", 200.0), ("small", 10.0)):
            queue.push(make_request(b"%s%d" % (tenant.encode(), i), tenant))
            assert queue.lead(tenant, 0.0) == 0.0
            [request] = queue
            queue.remove(request)
            queue.charge(tenant, num_tokens)
    assert queue.lead("flooder", 0.0) == pytest.approx(100 * (1_000 - 1_210 / 3), rel=0.02)


def test_what_nobody_else_wanted_is_not_owed_when_all_want_more() -> None:
    queue = TenantQueue()
    tenants = ("flooder", "beta", "gamma")
    for i in range(1_000):  # the others ask for little, and always have something that is computed
        for tenant in tenants[1:]:
            queue.computing(tenant)
        queue.push(make_request(b"f%d" % i, "flooder"))
        assert serve(queue) == [b"f%d" % i]
        for tenant in tenants[1:]:
            queue.computed(tenant)
    for tenant in tenants:
        for i in range(100):
            queue.push(make_request(b"%s-%d" % (tenant.encode(), i), tenant))
    assert Counter(req_id.split(b"-")[0] for req_id in serve(queue, count=90)) == {
        tenant.encode(): 30 for tenant in tenants
    }


def test_a_lead_fades_and_what_a_tenant_has_got_too_little_does_not() -> None:
    queue = TenantQueue()
    for tenant in ("alpha", "beta"):
        queue.computing(tenant)
    queue.charge("alpha", 1_000.0)
    for now in (10.0, FADE_S):
        assert queue.lead("alpha", now) == pytest.approx(500.0 * math.exp(-now / FADE_S))
        assert queue.lead("beta", now) == -500.0
    queue.charge("alpha", 1_000.0)
    assert queue.lead("alpha", 2 * FADE_S) == pytest.approx((500.0 / math.e + 500.0) / math.e)
    assert queue.lead("alpha", 1e6) == pytest.approx(0.0)


def test_a_lead_over_those_that_wait_does_not_fade() -> None:
    queue = TenantQueue()
    for i in range(2):
        for tenant in ("alpha", "beta"):
            queue.push(make_request(b"%s%d" % (tenant.encode(), i), tenant))
    queue.charge("alpha", 1_000.0)
    list(queue.turns(0.0))
    assert queue.lead("alpha", 1e6) == pytest.approx(500.0) == -queue.lead("beta", 1e6)
    [beta] = [request for request in queue if request.submit.req_id == b"beta0"]
    queue.take(beta)
    queue.charge("beta", 900.0)
    list(queue.turns(1e6))
    assert queue.lead("alpha", 2e6) == pytest.approx(50.0)


def test_what_was_charged_too_much_is_given_back() -> None:
    queue = TenantQueue()
    for tenant in ("alpha", "beta"):
        queue.computing(tenant)
    queue.charge("alpha", 1_000.0)
    queue.charge("alpha", -900.0)
    assert queue.lead("alpha", 0.0) == pytest.approx(50.0)


def test_handed_back_requests_come_first_of_their_tenant() -> None:
    queue = TenantQueue()
    queue.push(make_request(b"a1", "alpha"))
    queue.push_front(make_request(b"a0", "alpha"))
    assert serve(queue) == [b"a0", b"a1"]


def test_iterating_and_counting_show_what_waits() -> None:
    queue = TenantQueue()
    requests = [make_request(b"a0", "alpha"), make_request(b"b0", "beta"), make_request(b"a1", "alpha")]
    for request in requests:
        queue.push(request)
    assert set(queue) == set(requests)
    assert (len(queue), requests[0] in queue) == (3, True)
    queue.hold(requests[1], "w1")
    queue.hold(requests[2], "w1")
    queue.hold(requests[2], "w2")
    assert (queue.num_held("w1"), queue.num_held("w2")) == (1, 1)
    queue.remove(requests[1])
    assert (requests[1].held_for, queue.num_held("w1")) == ("", 0)
    assert serve(queue) == [b"a0", b"a1"]
    assert list(queue.turns(0.0)) == []


STEPS = st.tuples(st.sampled_from(["push", "front", "take", "remove", "compute", "hold"]), st.integers(0, 3))


@given(st.lists(STEPS, max_size=80))
def test_the_turn_is_always_that_of_the_least_tag_and_a_tenants_own_stay_in_order(
    steps: list[tuple[str, int]],
) -> None:
    """The oracle: plain lists of requests, and two numbers per tenant, whose weight is 1 more than its number."""
    weights = {f"t{i}": i + 1 for i in range(4)}
    queue = TenantQueue(weights.__getitem__)
    waiting: dict[str, list[Request]] = {}
    computing: Counter[str] = Counter()
    charged: dict[str, float] = {}
    tags: dict[str, float] = {}
    fair = highest = 0.0
    for number, (what, choice) in enumerate(steps):
        tenant = f"t{choice}"
        own = waiting.setdefault(tenant, [])
        if what in ("push", "front"):
            if not own:
                charged[tenant] = max(charged.get(tenant, 0.0), fair)
                least = min([tags[name] for name, requests in waiting.items() if requests], default=highest)
                tags[tenant] = max(tags.get(tenant, 0.0), least)
            request = make_request(b"%d" % number, tenant)
            (queue.push if what == "push" else queue.push_front)(request)
            own.insert(len(own) if what == "push" else 0, request)
        elif what == "take":
            taken = next(queue.turns(0.0), None)
            assert (taken is None) == (not any(waiting.values()))
            if taken is not None:
                owner = taken.submit.tenant_id
                assert tags[owner] == min(tags[name] for name, requests in waiting.items() if requests)
                assert waiting[owner].pop(0) is taken
                queue.take(taken)
                computing[owner] += 1
                queue.charge(owner, 1.0 + choice)
                charged[owner] += (1.0 + choice) / weights[owner]
                tags[owner] += (1.0 + choice) / weights[owner]
                highest = max(highest, tags[owner])
                fair += (1.0 + choice) / sum(
                    weight for name, weight in weights.items() if waiting.get(name) or computing[name]
                )
        elif what == "remove" and own:
            queue.remove(own.pop())
        elif what == "compute" and computing[tenant]:
            queue.computed(tenant)
            computing[tenant] -= 1
        elif what == "hold" and own:
            queue.hold(own[0], f"w{number % 3}")
        queue.check_integrity()
        active = [weight for name, weight in weights.items() if waiting.get(name) or computing[name]]
        for name, amount in charged.items():
            mean = sum(active) / len(active) if active else 1.0
            assert queue.lead(name, 0.0) == pytest.approx((amount - fair) * mean)
        assert len(queue) == sum(map(len, waiting.values()))
