"""Classes of requests: who may have which, and that a higher one is sent first and passes the others on its worker."""

from __future__ import annotations

import itertools

import pytest

from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.rates import DEFAULT_PREFILL_TOKENS_PER_S
from kvasir.gateway.core.requests import QueueConfig
from kvasir.gateway.core.tenant_queue import CLASS_S
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.messages import Generate
from kvasir.protocol.sampling import Priority
from kvasir.protocol.terms import NO_TERMS, RANKS, Terms, TermsChange
from tests.core_helpers import Bench, make_submit, output


@pytest.mark.parametrize(
    ("tenant", "key", "asked", "given"),
    [
        (None, None, None, "normal"),
        (None, None, "high", "normal"),
        (None, None, "low", "low"),
        ("high", None, None, "high"),
        ("high", "normal", None, "normal"),
        ("high", "low", "high", "low"),
        ("high", None, "normal", "normal"),
        ("low", "high", "high", "low"),
    ],
)
def test_a_request_has_its_tenants_class_or_a_lower_one_that_its_key_or_it_itself_names(
    tenant: Priority | None, key: Priority | None, asked: Priority | None, given: Priority
) -> None:
    terms = {"alpha": Terms(priority=tenant), "k": Terms(priority=key)}
    submit, _ = make_submit(key_id="k", priority=asked)
    shares = Billing(lambda payer: terms.get(payer, NO_TERMS)).admit([submit], 0.0)
    assert not isinstance(shares, KvasirError)
    assert shares[0].bill.rank(submit.priority) == RANKS[given]


def test_of_what_waits_the_highest_class_is_sent_first_and_says_so_to_the_worker() -> None:
    terms = {"gold": Terms(priority="high"), "bulk": Terms(priority="low")}
    bench = Bench(billing=Billing(lambda payer: terms.get(payer, NO_TERMS)))
    bench.join(max_requests=1)
    bench.submit(b"first")
    for req_id, tenant in ((b"low", "bulk"), (b"normal", "alpha"), (b"high", "gold")):
        bench.submit(req_id, tenant=tenant)
    leads = {}
    for req_id in (b"first", b"high", b"normal", b"low"):
        [(_, command)] = bench.take(Generate)
        assert command.req_id == req_id
        leads[req_id] = command.lead
        bench.report(b"w1", output(req_id, 0, [1], "stop", num_cached_tokens=0))
    assert leads[b"high"] < leads[b"normal"] - CLASS_S < leads[b"low"] - 2 * CLASS_S


def test_while_a_higher_class_comes_engines_that_compute_as_requests_come_get_little_of_lower_ones() -> None:
    terms = {"gold": Terms(priority="high"), "bulk": Terms(priority="low")}
    bench = Bench(billing=Billing(lambda payer: terms.get(payer, NO_TERMS)))
    bench.join(lacks=["order"], max_requests=9, max_context=9_000, num_blocks=9_000)
    num_tokens = int(DEFAULT_PREFILL_TOKENS_PER_S) // 4
    fresh = itertools.count(step=num_tokens)

    def num_sent(num: int, tenant: str) -> int:
        for i in range(num):
            start = next(fresh)
            bench.submit(b"%s-%d" % (tenant.encode(), i), range(start, start + num_tokens), tenant=tenant)
        return len(bench.take(Generate))

    assert num_sent(1, "gold") == 1
    assert num_sent(3, "bulk") == 1, "a quarter of a second was there already"
    for req_id in (b"gold-0", b"bulk-0"):
        bench.report(b"w1", output(req_id, 0, [1], "stop", num_cached_tokens=0))
    assert [command.req_id for _, command in bench.take(Generate)] == [b"bulk-1", b"bulk-2"]
    bench.pass_time(QueueConfig().class_s)
    assert num_sent(3, "bulk2") == 3, "no request of a higher class has come for long"


def test_terms_are_changed_one_by_one_and_lifted() -> None:
    terms = TermsChange(weight=4, priority="high").apply(NO_TERMS)
    assert terms == Terms(weight=4, priority="high")
    assert TermsChange(requests_per_min=5).apply(terms).weight == 4
    assert TermsChange(weight=1, priority="none").apply(terms) is NO_TERMS
