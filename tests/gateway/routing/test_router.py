"""The router's rule: a table of situations with one right answer each, and properties over random ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.routing.backlog import Backlog, Pending
from kvasir.gateway.routing.router import Candidate, RouterConfig, choose
from tests.core_helpers import BLOCK_SIZE, Bench, make_hashes, output

CONFIG = RouterConfig()
RATE = 1_000.0  # tokens/s: a token is a millisecond


def make_candidate(worker_id: str = "w1", cached: int = 0, *, pending: tuple[int, ...] = (), **extra) -> Candidate:
    backlog = Backlog()
    for num_tokens in pending:
        backlog.add(num_tokens / RATE, num_tokens, b"")
    values = {"round_s": 0.0, "step_tokens": 512, "num_running": len(pending), "heat_s": 0.0, "leader": None, **extra}
    return Candidate(worker_id, cached, 0, RATE, backlog=backlog, **values)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([make_candidate("w1"), make_candidate("w2", 900)], "w2"),
        # 900 tokens more to compute cost 2.7 s (c = 3); the queue costs 0.1 s, and 0.1 s for the one overtaken
        ([make_candidate("w1"), make_candidate("w2", 900, pending=(50, 50, 2_900))], "w2"),
        ([make_candidate("w1"), make_candidate("w2", 900, pending=(90,) * 40)], "w1"),
        ([make_candidate("w1", num_running=3), make_candidate("w2", num_running=2)], "w2"),
        ([make_candidate("w2"), make_candidate("w1")], "w1"),
        ([make_candidate("w1", round_s=0.5), make_candidate("w2", round_s=0.1)], "w2"),
        ([make_candidate("w1", heat_s=4.0), make_candidate("w2", heat_s=3.0)], "w2"),
        # heat is no reason to leave a prefix
        ([make_candidate("w1", 900, heat_s=60.0), make_candidate("w2", 0, heat_s=0.0)], "w1"),
        # 0.9 ms of difference is a tie: load decides
        ([make_candidate("w1", 500, num_running=3), make_candidate("w2", 499, num_running=1)], "w1"),
        ([make_candidate("w1", num_running=9, heat_s=0.0), make_candidate("w2", heat_s=0.002, num_running=1)], "w2"),
    ],
    ids=[
        "the cached one",
        "the cached one in spite of a short queue, since long prompts are overtaken",
        "the empty one when the cached one has a long queue of short prompts",
        "fewest running among equals",
        "the lowest id among equals",
        "the shorter decode round",
        "the cooler one when nobody has the prefix",
        "the cached one in spite of heat",
        "the cached one by two price units",
        "fewest running within the tie",
    ],
)
def test_the_right_worker_is_chosen(candidates: list[Candidate], expected: str) -> None:
    assert choose(1_000, candidates, 0.0, CONFIG).worker_id == expected


def test_the_terms_of_every_candidate_are_kept_and_add_up() -> None:
    candidates = [make_candidate("w1", 600, pending=(100, 800), heat_s=9.0), make_candidate("w2", 0, heat_s=9.0)]
    decision = choose(1_000, candidates, 0.0, CONFIG)
    one, two = decision.terms
    assert (one.wait_s, one.miss_s, one.num_overtaken) == pytest.approx((0.1, 0.4, 1))
    assert one.cost_s == pytest.approx(0.1 + (3 + 1) * 0.4)
    assert two.cost_s == pytest.approx(3 * 1.0)  # no heat: w1 holds more than half
    cold = choose(1_000, candidates[1:], 0.0, CONFIG).chosen
    assert cold.cost_s == pytest.approx(3 * 1.0 + 0.3 * 9.0)


def test_a_request_waits_for_the_one_that_computes_its_prefix() -> None:
    backlog = Backlog()
    leader = backlog.add(0.9, 900, make_hashes(range(900)))
    hashes = make_hashes([*range(900), 1, 2, 3])
    assert backlog.leader(hashes, 225) is leader
    assert backlog.leader(make_hashes([7, *range(899)]), 225) is None
    candidate = Candidate("w1", 900, 0, RATE, 0.0, 512, 1, 0.0, backlog, leader)
    # It would be computed first, having 100 tokens, but not before the leader's 900.
    assert choose(1_000, [candidate], 0.0, CONFIG).chosen.wait_s == pytest.approx(0.9 + 0.256)


def test_a_worker_that_computes_in_order_makes_every_request_wait_for_all_before_it() -> None:
    candidate = make_candidate(pending=(800, 100), is_fifo=True)
    chosen = choose(50, [candidate], 1.0, CONFIG).chosen
    assert (chosen.wait_s, chosen.num_overtaken) == (pytest.approx(0.9), 0)
    decision = choose(50, [candidate], 2.0, CONFIG)
    assert decision.key == 2.0  # the place in its order is when it was sent


def test_a_tenants_lead_counts_like_time_not_waited() -> None:
    candidate = make_candidate(pending=(1_000,))
    ahead = choose(500, [candidate], 0.0, CONFIG, lead=0.0).chosen
    behind = choose(500, [candidate], 0.0, CONFIG, lead=3_000.0).chosen
    assert (ahead.num_overtaken, behind.num_overtaken) == (1, 0)  # 0.5 s of difference is 2.5 s of lead
    assert choose(500, [candidate], 3.0, CONFIG).key == choose(500, [candidate], 0.0, CONFIG, lead=3_000.0).key


def test_who_lets_a_request_pass_because_of_its_tenants_lead_is_not_counted_as_overtaken() -> None:
    backlog = Backlog()
    for num_tokens, lead_s in ((300, 5.0), (300, 0.0), (700, 5.0), (700, 0.0)):
        backlog.add(num_tokens / RATE + lead_s, num_tokens, b"", "tenant", lead_s)
    candidate = Candidate("w1", 0, 0, RATE, 0.0, 512, 4, 0.0, backlog)
    chosen = choose(500, [candidate], 0.0, CONFIG).chosen
    assert chosen.wait_s == pytest.approx(0.3)  # both with a lead come after it,
    assert chosen.num_overtaken == 2  # the shorter one of them by right
    own = choose(500, [candidate], 0.0, CONFIG, lead=5_000.0 / CONFIG.ageing).chosen
    assert (own.wait_s, own.num_overtaken) == (pytest.approx(1.3), 1)


def test_a_long_prompt_goes_to_a_worker_full_of_a_flood_and_not_to_one_full_of_others() -> None:
    flooded = make_candidate("w1")
    for _ in range(5):
        flooded.backlog.add(0.2 + 100.0, 200, b"", "flooder", lead_s=100.0)
    others = make_candidate("w2", pending=(600, 600))
    assert choose(1_000, [flooded, others], 0.0, CONFIG).worker_id == "w1"
    flooded.backlog.remove(flooded.backlog.next_step(1)[0])
    for _ in range(8):  # the control: without a lead they come first
        flooded.backlog.add(0.2, 200, b"", "busy")
    assert choose(1_000, [flooded, others], 0.0, CONFIG).worker_id == "w2"


def test_without_a_credit_the_wait_for_one_counts() -> None:
    full, other = make_candidate("w1", 900, slot_wait_s=5.0), make_candidate("w2")
    decision = choose(1_000, [full, other], 0.0, CONFIG)
    assert (decision.worker_id, decision.terms[0].wait_s) == ("w2", 5.0)


def test_waiting_makes_a_long_prompt_go_before_later_short_ones() -> None:
    candidate = make_candidate(pending=(1_000,))  # sent at time 0
    early, late = (choose(500, [candidate], now, CONFIG).chosen for now in (0.0, 3.0))
    assert (early.num_overtaken, late.num_overtaken) == (1, 0)  # 0.5 s of difference is 2.5 s of ageing
    assert late.wait_s == pytest.approx(1.0)


@given(st.data())
@settings(max_examples=200)
def test_choosing_is_deterministic_ordered_and_monotone(data: st.DataObject) -> None:
    number = st.integers(0, 2_000)
    candidates = [
        make_candidate(
            f"w{i}",
            data.draw(number),
            pending=tuple(data.draw(st.lists(st.integers(1, 2_000), max_size=4))),
            heat_s=data.draw(number) / 100,
            round_s=data.draw(number) / 10_000,
        )
        for i in range(data.draw(st.integers(1, 5)))
    ]
    num_tokens = data.draw(st.integers(1, 2_000))
    decision = choose(num_tokens, candidates, 1.0, CONFIG)
    shuffled = data.draw(st.permutations(candidates))
    assert choose(num_tokens, shuffled, 1.0, CONFIG).worker_id == decision.worker_id
    assert decision.chosen.cost_s <= min(terms.cost_s for terms in decision.terms) + CONFIG.tie_s
    assert all(0 <= terms.wait_s <= terms.cost_s and terms.miss_s > 0 for terms in decision.terms)
    # More of it cached at the chosen one never makes that one the wrong choice, ties and heat aside.
    chosen = next(c for c in candidates if c.worker_id == decision.worker_id)
    chosen.num_cached_tokens = num_tokens
    again = choose(num_tokens, candidates, 1.0, RouterConfig(heat_price=0.0, tie_s=0.0))
    before = next(terms for terms in decision.terms if terms.worker_id == chosen.worker_id)
    after = next(terms for terms in again.terms if terms.worker_id == chosen.worker_id)
    assert after.miss_s <= before.miss_s and after.wait_s <= before.wait_s + 1e-9 + 0.256


def test_a_backlog_equals_a_sorted_list() -> None:
    rng = random.Random(5)
    backlog, entries = Backlog(), list[Pending]()
    for _ in range(3_000):
        action = rng.random()
        if action < 0.4 or not entries:
            lead_s = rng.choice([0.0, rng.random()])
            key = rng.choice([rng.random(), 0.5]) + lead_s
            entries.append(backlog.add(key, rng.randrange(1, 100), b"", lead_s=lead_s))
        elif action < 0.7:
            backlog.remove(entries.pop(rng.randrange(len(entries))))
        elif action < 0.8:
            backlog.advance(rng.randrange(150))
        entries.sort(key=lambda entry: (entry.key, entry.serial))
        key = rng.choice([rng.random(), 0.5])
        ahead = [entry.num_tokens for entry in entries if entry.key <= key]
        overtaken = [entry for entry in entries[len(ahead) :] if entry.key - entry.lead_s > key - 0.25]
        assert backlog.ahead(key, 0.25) == (sum(ahead), len(overtaken))
        assert (len(backlog), backlog.num_tokens) == (len(entries), sum(entry.num_tokens for entry in entries))
        assert all(entry.num_tokens >= 1 for entry in entries)


# ---- the rule in the core: what counts as cached, who is a candidate -------------------------------------------------


def test_siblings_of_a_prefix_that_is_still_being_computed_go_to_the_same_worker() -> None:
    bench = Bench()
    for i in range(4):
        bench.join(f"w{i}", max_requests=16)
    shared = list(range(400))
    bench.submit(b"first", [*shared, 1])
    [(home, _)] = bench.take()
    for i in range(5):
        bench.submit(b"sibling%d" % i, [*shared, 100 + i])
    assert {peer for peer, _ in bench.take()} == {home}
    # The control: another prefix goes elsewhere.
    bench.submit(b"other", list(range(1_000, 1_400)))
    assert home not in {peer for peer, _ in bench.take()}


@pytest.mark.parametrize("length", [100, 600])
def test_choices_of_one_prompt_go_to_one_worker_as_long_as_it_takes_more(length: int) -> None:
    bench = Bench()
    for i in range(3):
        bench.join(f"w{i}", max_requests=6)
    for i in range(8):
        bench.submit(b"choice-%d" % i, range(length))
    peers = [peer for peer, _ in bench.take()]
    assert len(set(peers[:6])) == 1
    assert len(set(peers[6:])) == 1
    assert peers[0] != peers[6]


def test_requests_stay_with_their_prefix_at_light_load_and_spill_when_it_is_overloaded() -> None:
    bench = Bench()
    for i in range(2):
        bench.join(f"w{i}", max_requests=64)
    shared = list(range(400))
    bench.report(b"w1", event_seq=1, stored=make_hashes(shared))
    bench.submit(b"light", [*shared, 1], max_tokens=1)
    assert [peer for peer, _ in bench.take()] == [b"w1"]
    bench.report(b"w1", output(b"light", 0, [1], "length"), event_seq=1)
    for i in range(30):
        bench.submit(b"r%d" % i, [*shared, *range(1_000 + 100 * i, 1_100 + 100 * i)])
    peers = [peer for peer, _ in bench.take()]
    assert peers[0] == b"w1"
    assert 3 <= peers.count(b"w0") <= 20


def test_workers_of_other_models_or_draining_are_no_candidates() -> None:
    bench = Bench()
    tokens = list(range(400))
    for worker_id, extra in (("other", {"model": "other"}), ("leaving", {}), ("free", {})):
        bench.join(worker_id, **extra)
        if worker_id != "free":
            bench.report(worker_id.encode(), event_seq=1, stored=make_hashes(tokens))
    bench.submit(b"r1", tokens)
    bench.report(b"leaving", output(b"r1", 0, [], "abort"), event_seq=1)  # hands it back: it is about to leave
    assert [peer for peer, _ in bench.take()] == [b"leaving", b"free"]
    *_, decision = [receipt.decision for receipt in bench.core.receipts.of(b"r1") or []]
    assert [terms.worker_id for terms in decision.terms] == ["free"]


def test_what_a_request_has_computed_counts_as_cached_only_as_long_as_it_is_there() -> None:
    bench = Bench()
    bench.join("w1")
    tokens = list(range(40))
    bench.submit(b"r1", tokens)
    bench.report(b"w1", output(b"r1", 0, [1], num_cached_tokens=0), event_seq=1, stored=make_hashes(tokens))
    bench.report(b"w1", event_seq=2, removed=make_hashes(tokens)[16:])  # while it decodes
    bench.submit(b"r2", tokens)
    [decision] = [receipt.decision for receipt in bench.core.receipts.of(b"r2") or []]
    assert decision.chosen.num_cached_tokens == BLOCK_SIZE


def test_a_cancelled_request_leaves_nothing_that_counts_as_cached() -> None:
    bench = Bench()
    bench.join("w1")
    tokens = list(range(40))
    bench.submit(b"r1", tokens)
    bench.core.cancel(Cancel(b"r1"))
    bench.report(b"w1", output(b"r1", 0, [], "abort"))
    bench.submit(b"r2", tokens)
    [decision] = [receipt.decision for receipt in bench.core.receipts.of(b"r2") or []]
    assert decision.chosen.num_cached_tokens == 0
