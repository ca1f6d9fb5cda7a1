"""Limits and budgets on the command line: what is typed, what is shown, what is in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from kvasir.cli.terms import (
    money,
    parse_count,
    parse_duration,
    parse_money_budget,
    parse_price,
    parse_token_budget,
    price_text,
)
from kvasir.protocol.errors import AuthenticationFailed
from kvasir.protocol.terms import MONEY_UNITS, NO_TERMS, Budget, Limits, Terms, TermsChange
from tests.gateway.admin.test_admin import Office
from tests.kvasir.cli.test_cli import assert_one_line, home, kvasir, kvasir_json, office

__all__ = ["home", "office"]
pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "600", 600),
        (parse_count, "1.5M", 1_500_000),
        (parse_count, "none", "none"),
        (parse_duration, "90d", 90 * 86_400.0),
        (parse_duration, "30min", 1_800.0),
        (parse_token_budget, "5M/month", Budget("tokens", "month", 5_000_000)),
        (parse_money_budget, "12.50/total", Budget("money", "total", 125 * MONEY_UNITS // 10)),
    ],
)
def test_what_is_typed_is_understood(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_count, text) for text in ("0", "-1", "1.5", "x", "1T", "", "1e9")),
        *((parse_duration, text) for text in ("90", "d", "-1d", "1y")),
        *((parse_token_budget, text) for text in ("5M", "5M/year", "0/day", "x/day", "none/day")),
        *((parse_money_budget, text) for text in ("-1/day", "nan/day", "inf/total", "1e30/day", "0.00000000001/day")),
    ],
)
def test_what_makes_no_sense_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse(text)


def test_the_help_names_what_may_be_typed(capsys: Any) -> None:
    shown = kvasir(capsys, "tenant", "set", "--help")[0]
    assert "N|none" in shown and "=none" in shown and "NONE" not in shown  # which is not understood


@pytest.mark.parametrize("text", ["0.25", "0.0375", "12", "0"])
def test_a_price_comes_back_as_it_was_typed(text: str) -> None:
    assert float(price_text(parse_price(text))) == float(text)


def test_a_price_finer_than_money_is_counted_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="four decimals"):
        parse_price("0.00001")


def test_money_is_shown_with_the_digits_that_say_something() -> None:
    assert [money(units) for units in (0, MONEY_UNITS // 400, 5 * MONEY_UNITS // 2)] == ["0.00", "0.0025", "2.50"]


def test_a_change_keeps_what_it_does_not_name_and_lifts_what_it_says() -> None:
    month, day = Budget("tokens", "month", 9), Budget("money", "day", 5)
    before = Terms(Limits(requests_per_min=5, max_concurrent=2), (day, month))
    after = TermsChange(max_concurrent="none", budgets=[Budget("tokens", "month", 10)]).apply(before)
    assert after == Terms(Limits(requests_per_min=5), (day, Budget("tokens", "month", 10)))
    assert (
        TermsChange(lifted=["tokens", "money"], requests_per_min="none", max_concurrent="none").apply(before)
        is NO_TERMS
    )


def test_limits_and_budgets_are_in_force_and_shown_and_survive_a_restart(office: Office, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    key = kvasir_json(capsys, "key", "create", "acme", "--max-concurrent", "2", "--expires", "30d")
    typed = ("--requests-per-min", "600", "--token-budget", "5M/month", "--money-budget", "250/month")
    kvasir(capsys, "tenant", "set", "acme", *typed)
    tenant = office.directory.tenant("acme")
    assert office.directory.terms(tenant.id).limits == Limits(requests_per_min=600)
    assert office.directory.terms(key["id"]) == Terms(Limits(max_concurrent=2))
    shown = kvasir(capsys, "tenant", "show", "acme")[0]
    assert "600 requests per minute" in shown and "5000000 tokens per month" in shown and "250.00 per month" in shown
    assert "29 d left" in shown and "2 requests running at once" in shown
    assert kvasir_json(capsys, "tenant", "show", "acme")["tenant"]["terms"]["limits"] == {"requests_per_min": 600}
    kvasir(capsys, "tenant", "set", "acme", "--token-budget", "none", "--requests-per-min", "none")
    assert [budget.unit for budget in office.directory.terms(tenant.id).budgets] == ["money"]
    office.close()
    again = Office(office.home)
    try:
        assert again.directory.terms(tenant.id) == office.directory.terms(tenant.id)
        assert again.directory.terms(key["id"]) == office.directory.terms(key["id"])
    finally:
        again.close()
        office.close = lambda: None  # type: ignore[method-assign]


def test_a_key_expires_on_its_day_and_says_so(office: Office, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    key = kvasir_json(capsys, "key", "create", "acme")
    kvasir(capsys, "key", "set", key["key"], "--expires", "0s")
    with pytest.raises(AuthenticationFailed, match="expired"):
        office.directory.authenticate(key["key"])
    assert "expired" in kvasir(capsys, "key", "list")[0]
    kvasir(capsys, "key", "set", key["id"], "--expires", "none")
    assert office.directory.authenticate(key["key"]).key_id == key["id"]
    kvasir(capsys, "key", "revoke", key["id"])
    assert_one_line(kvasir(capsys, "key", "set", key["id"], "--max-concurrent", "1", code=2)[1], "revoked for good")


def test_terms_are_refused_on_the_command_line_in_one_line(office: Office, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    for typed in (["--requests-per-min", "many"], ["--token-budget", "5M"], ["--money-budget", "x/day"]):
        assert_one_line(kvasir(capsys, "tenant", "set", "acme", *typed, code=2)[1], typed[0])


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "160")
    yield
