"""Limits and budgets as decisions, and what the core does with them: refuse, cut, give back."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.gateway.core.admission import GRANT_TOKENS, Admission, Share
from kvasir.gateway.core.api import Cancel, Finished, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, BudgetExceeded, KvasirError, RateLimited
from kvasir.protocol.messages import Abort
from kvasir.protocol.terms import MONEY_UNITS, NO_TERMS, Budget, Limits, Price, Terms
from tests.core_helpers import Bench, make_submit, output

DAY_S = 86_400.0
MAY = 1_777_593_600.0  # 1 May 2026, 00:00 UTC
PRICE = Price(prompt=2_500, cached=250, output=10_000)


class Desk:
    """An admission with terms that a test sets, and clocks that stand still."""

    def __init__(self, *, price: Price = PRICE, wall_s: float = MAY, **terms: Terms) -> None:
        self.terms = dict(terms)
        self.admission = Admission(lambda payer: self.terms.get(payer, NO_TERMS), lambda model: price)
        self.now = 1000.0
        self.wall_s = wall_s
        self._number = 0

    def ask(self, *, num_prompt: int = 10, max_tokens: int = 8, **extra: Any) -> list[Share] | KvasirError:
        return self.admission.admit([self.submit(num_prompt, max_tokens, **extra)], self.now, self.wall_s)

    def submit(self, num_prompt: int = 10, max_tokens: int = 8, *, key: str = "key", **extra: Any) -> Submit:
        self._number += 1
        req_id = self._number.to_bytes(16, "little")
        return make_submit(req_id, range(num_prompt), max_tokens=max_tokens, key_id=key, **extra)[0]

    def one(self, **extra: Any) -> Share:
        shares = self.ask(**extra)
        assert isinstance(shares, list), shares
        return shares[0]

    def end(self, share: Share, num_output: int, *, num_prompt: int = 10, num_cached: int = 0) -> None:
        self.admission.settle(
            share, Finished(share.bill.bill_id, "stop", num_prompt, num_output, num_cached), self.wall_s
        )

    def used(self, payer: str = "alpha", *, unit: str = "tokens") -> tuple[int, int]:
        """Spent and reserved of the day."""
        day = self.admission.account(payer).day(int(self.wall_s // DAY_S))
        return getattr(day, f"spent_{unit}"), getattr(day, f"reserved_{unit}")


@pytest.mark.parametrize(
    ("limits", "num_fit"),
    [
        (Limits(requests_per_min=3), 3),
        (Limits(prompt_tokens_per_min=35), 3),
        (Limits(output_tokens_per_min=16), 2),
        (Limits(max_concurrent=4), 4),
    ],
)
@pytest.mark.parametrize("payer", ["alpha", "key"])
def test_each_limit_of_a_tenant_or_a_key_admits_what_fits_and_says_when_more_does(
    limits: Limits, num_fit: int, payer: str
) -> None:
    desk = Desk(**{payer: Terms(limits)})
    for _ in range(num_fit):
        desk.one()
    refused = desk.ask()
    assert isinstance(refused, RateLimited) and refused.retry_after_s
    if limits.max_concurrent is None:
        desk.now += refused.retry_after_s + 1e-6
        desk.one()


def test_a_refusal_takes_nothing_from_any_meter() -> None:
    desk = Desk(
        alpha=Terms(Limits(requests_per_min=100, prompt_tokens_per_min=1_000)), key=Terms(Limits(max_concurrent=1))
    )
    first = desk.one()
    before = desk.admission.standing("alpha", "key", desk.now)
    assert isinstance(desk.ask(), RateLimited)
    assert desk.admission.standing("alpha", "key", desk.now) == before
    desk.end(first, 8)
    desk.one()


@pytest.mark.parametrize(
    ("limits", "param"),
    [(Limits(prompt_tokens_per_min=9), "prompt"), (Limits(output_tokens_per_min=7), "max_tokens")],
)
def test_a_request_larger_than_a_whole_minute_s_worth_is_wrong_not_early(limits: Limits, param: str) -> None:
    refused = Desk(alpha=Terms(limits)).ask()
    assert isinstance(refused, BadRequest) and refused.param == param and "can never be served" in refused.message


def test_what_a_request_did_not_use_comes_back_when_it_ends() -> None:
    desk = Desk(alpha=Terms(Limits(output_tokens_per_min=100)))
    share = desk.one(max_tokens=100)
    assert isinstance(desk.ask(), RateLimited)
    desk.end(share, 30)
    assert isinstance(desk.ask(max_tokens=71), RateLimited)
    desk.one(max_tokens=70)


def test_the_choices_of_a_prompt_count_it_once_and_run_as_one_request() -> None:
    desk = Desk(alpha=Terms(Limits(requests_per_min=1, prompt_tokens_per_min=10, max_concurrent=1)))
    submits = [desk.submit(counts_prompt=index == 0) for index in range(4)]
    shares = desk.admission.admit(submits, desk.now, desk.wall_s)
    assert isinstance(shares, list)
    assert desk.used() == (0, 10 + 4 * 8)
    for share in shares:
        assert desk.admission.account("alpha").num_running == 1
        desk.end(share, 5, num_prompt=10)
    assert desk.used() == (10 + 4 * 5, 0) and desk.admission.account("alpha").num_running == 0
    assert (shares[0].bill.prompt_tokens, shares[0].bill.output_tokens) == (10, 20)


def test_an_open_ended_answer_is_granted_a_little_at_a_time_and_all_that_is_left_at_last() -> None:
    desk = Desk(alpha=Terms(budgets=(Budget("tokens", "total", 10 + GRANT_TOKENS + 300),)))
    share = desk.one(max_tokens=100_000, is_open_ended=True)
    assert share.num_granted == GRANT_TOKENS
    assert desk.admission.grow(share, GRANT_TOKENS, desk.now) == 300
    assert desk.admission.grow(share, GRANT_TOKENS, desk.now) == 0
    desk.end(share, share.num_granted)
    assert desk.used() == (10 + GRANT_TOKENS + 300, 0)
    assert isinstance(desk.ask(max_tokens=1), BudgetExceeded)


def test_what_others_have_reserved_is_told_from_what_is_spent() -> None:
    desk = Desk(alpha=Terms(budgets=(Budget("tokens", "day", 100),)))
    share = desk.one(max_tokens=80)
    refused = desk.ask(max_tokens=20)
    assert isinstance(refused, RateLimited) and "reserved by running requests" in refused.message
    desk.end(share, 80)
    refused = desk.ask(max_tokens=20)
    assert isinstance(refused, BudgetExceeded) and "10 tokens left" in refused.message
    assert refused.retry_after_s == DAY_S


def test_money_is_reserved_at_the_dearest_and_spent_by_what_was_cached() -> None:
    budget = 10 * PRICE.prompt + 8 * PRICE.output
    desk = Desk(alpha=Terms(budgets=(Budget("money", "month", budget),)))
    share = desk.one()
    assert desk.used(unit="money") == (0, budget)
    desk.end(share, 4, num_cached=6)
    assert desk.used(unit="money") == (4 * PRICE.prompt + 6 * PRICE.cached + 4 * PRICE.output, 0)
    assert share.bill.cost == desk.used(unit="money")[0]


def test_a_request_is_charged_to_the_day_on_which_it_was_admitted() -> None:
    desk = Desk(alpha=Terms(budgets=(Budget("tokens", "day", 18),)), wall_s=MAY + DAY_S - 1)
    over_midnight = desk.one()
    desk.wall_s += 2
    fresh = desk.one()
    desk.end(over_midnight, 8)
    assert desk.used() == (0, 18)
    desk.end(fresh, 8)
    assert isinstance(desk.ask(), BudgetExceeded)
    desk.wall_s -= 3600  # the clock is set back: the day before was used up, too
    assert isinstance(desk.ask(), BudgetExceeded)


def test_a_month_s_budget_is_the_sum_of_its_days_and_ends_with_it() -> None:
    desk = Desk(alpha=Terms(budgets=(Budget("tokens", "month", 40),)), wall_s=MAY + 29 * DAY_S)
    for _ in range(2):
        desk.end(desk.one(), 8)
        desk.wall_s += DAY_S
    assert desk.wall_s == MAY + 31 * DAY_S  # June
    desk.end(desk.one(), 8)
    desk.wall_s -= DAY_S
    refused = desk.ask()
    assert isinstance(refused, BudgetExceeded) and refused.retry_after_s == DAY_S


def test_a_changed_limit_is_in_force_with_the_next_request() -> None:
    desk = Desk(alpha=Terms(Limits(requests_per_min=1)))
    desk.one()
    assert isinstance(desk.ask(), RateLimited)
    desk.terms["alpha"] = NO_TERMS
    desk.one()
    assert desk.admission.standing("alpha", "key", desk.now) is None


def test_days_are_bounded_and_a_sum_is_kept_of_those_forgotten() -> None:
    desk = Desk(alpha=Terms(budgets=(Budget("tokens", "total", 18 * 150),)))
    for _ in range(150):
        desk.end(desk.one(), 8)
        desk.wall_s += DAY_S
    assert len(desk.admission.account("alpha").days) <= 101
    assert isinstance(desk.ask(), BudgetExceeded)


# ---- in the core -----------------------------------------------------------------------------------------------------


def make_bench(terms: Terms) -> Bench:
    billing = Billing(lambda payer: terms if payer == "alpha" else NO_TERMS, wall_clock=lambda: MAY)
    bench = Bench(billing=billing)
    bench.join()
    return bench


def test_a_limited_request_is_answered_with_its_error_and_never_queued() -> None:
    bench = make_bench(Terms(Limits(requests_per_min=1)))
    bench.submit(b"r1")
    refused = bench.submit(b"r2").finished
    assert refused.error.code == "rate_limit_exceeded" and refused.error.retry_after_s
    usage = bench.core.statistics().tenants["alpha"]
    assert (usage.num_requests, usage.num_refused, bench.core.num_unfinished) == (2, 1, 1)


def test_an_answer_is_cut_to_the_token_where_its_budget_ends_and_its_worker_told() -> None:
    bench = make_bench(Terms(budgets=(Budget("tokens", "total", 15),)))
    sink = bench.submit(b"r1", max_tokens=500, is_open_ended=True)
    bench.report(b"w1", output(b"r1", 0, [1, 2], num_cached_tokens=0))
    assert sink.finished is None
    bench.report(b"w1", output(b"r1", 2, [3, 4, 5, 6], num_cached_tokens=None))
    assert sink.finished.reason == "length" and sink.finished.error is None
    assert sink.tokens == [1, 2, 3, 4, 5] and sink.finished.num_output_tokens == 5
    assert [command.req_id for _, command in bench.take(Abort)] == [b"r1"]
    bench.report(b"w1", output(b"r1", 6, [], "abort"))
    assert bench.submit(b"r2", max_tokens=1).finished is not None


def test_a_cancelled_request_gives_its_place_and_its_reservation_back() -> None:
    bench = make_bench(Terms(Limits(max_concurrent=1), (Budget("tokens", "total", 20),)))
    bench.submit(b"r1")
    assert bench.submit(b"r2").finished is not None
    bench.core.cancel(Cancel(b"r1"))
    assert bench.submit(b"r3").finished is None


def test_a_request_that_the_queue_refuses_gives_its_reservation_back() -> None:
    bench = make_bench(Terms(Limits(max_concurrent=1)))
    assert bench.submit(b"r1", model="nothing").finished is not None
    assert bench.submit(b"r2").finished is None


def test_a_budget_s_money_units_are_what_the_price_says() -> None:
    assert PRICE.cost(1_000_000, 0, 0) == MONEY_UNITS // 4


def test_what_a_revoked_key_runs_and_has_waiting_ends_at_once_and_nothing_else() -> None:
    bench = Bench()
    bench.join(max_requests=2)
    sinks = {name: bench.submit(name.encode(), key_id=name[:2]) for name in ("k1-running", "k2-running", "k1-waiting")}
    bench.report(b"w1", output(b"k1-running", 0, [1, 2]))
    bench.core.end_requests("k1", AuthenticationFailed("this API key was revoked"))
    ends = {name: sink.finished for name, sink in sinks.items()}
    assert ends["k2-running"] is None
    for name in ("k1-running", "k1-waiting"):
        end = ends[name]
        assert end is not None and end.reason == "error" and end.error is not None
        assert end.error.code == "invalid_api_key"
    assert sinks["k1-running"].tokens == [1, 2]
    assert [command.req_id for _, command in bench.take(Abort)] == [b"k1-running"]
    bench.core.end_requests("alpha", AuthenticationFailed("this tenant was deleted"))
    assert bench.core.num_unfinished == 0
