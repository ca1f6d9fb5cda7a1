"""Limits, budgets and prices as they are typed and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import wraps
from typing import Any, TypeVar, get_args

import click

from kvasir.protocol.messages import Priority
from kvasir.protocol.terms import MAX_COUNT, MONEY_UNITS, Budget, Terms, TermsChange, Unit, Window

F = TypeVar("F", bound=Callable[..., Any])
PRICE_TOKENS = 1_000_000  # what a price is for
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)")
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(min|h|d|s)")
_SECONDS = {"s": 1, "min": 60, "h": 3_600, "d": 86_400}
_LIMITS = {
    "requests_per_min": "requests per minute",
    "prompt_tokens_per_min": "prompt tokens per minute",
    "output_tokens_per_min": "output tokens per minute",
    "max_concurrent": "requests running at once",
}


class CountType(click.ParamType[Any]):
    """A whole number, with k, M or G for short, or "none"."""

    name = "N|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _COUNT.fullmatch(str(value).strip())
        if str(value) == "none":
            return "none"
        number = Decimal(found[1]) * _UNITS[found[2]] if found else Decimal(0)
        if not 1 <= number <= MAX_COUNT or number != int(number):
            self.fail(f"{value!r} is no whole number from 1; give one such as 600, 20k or 1.5M, or none to lift it")
        return int(number)


class DurationType(click.ParamType[Any]):
    """A length of time in seconds, or "none"."""

    name = "TIME|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _DURATION.fullmatch(str(value).strip())
        if str(value) == "none":
            return "none"
        if not found:
            self.fail(f"{value!r} is no length of time; give one such as 90d, 12h or 30min, or none")
        return float(found[1]) * _SECONDS[found[2]]


class BudgetType(click.ParamType[Any]):
    """AMOUNT/WINDOW, or "none"."""

    name = "AMOUNT/WINDOW|none"

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "none":
            return "none"
        amount, _, window = str(value).partition("/")
        if window not in get_args(Window):
            self.fail(f"{value!r} says no window; give one such as {'5M' if self.unit == 'tokens' else '250'}/month")
        if self.unit == "tokens":
            return Budget("tokens", window, CountType().convert(amount, param, ctx))  # type: ignore[arg-type]
        return Budget("money", window, parse_money(amount))  # type: ignore[arg-type]


class AliasType(click.ParamType[Any]):
    """NAME=MODEL,MODEL..., or NAME=none."""

    name = "NAME=MODEL,...|NAME=none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, _, models = str(value).partition("=")
        if not name or not all(models.split(",")):
            self.fail(f"{value!r} is no alias; give one such as gpt-4o=qwen, or gpt-4o=none to lift it")
        return name, [] if models == "none" else models.split(",")


def terms_options(command: F) -> F:
    """Add the options of limits, budgets and classes to a command, which gets them as `terms`, a `TermsChange`."""

    @wraps(command)
    def with_terms(*args: Any, **options: Any) -> Any:
        limits = {name: options.pop(name) for name in _LIMITS}
        typed: dict[Unit, Any] = {"tokens": options.pop("token_budgets"), "money": options.pop("money_budgets")}
        budgets = [budget for each in typed.values() for budget in each if budget != "none"]
        lifted: list[Unit] = [unit for unit, each in typed.items() if "none" in each]
        terms = TermsChange(**limits, budgets=budgets, lifted=lifted, priority=options.pop("priority"))
        return command(*args, terms=terms, **options)

    for name, text in reversed(_LIMITS.items()):
        flag = f"--{name.replace('_', '-')}"
        with_terms = click.option(flag, name, type=CountType(), help=f"At most so many {text}.")(with_terms)
    with_terms = click.option(
        "--priority",
        type=click.Choice([*get_args(Priority), "none"]),
        help="The class of its requests: higher ones come first; they may ask for a lower one.",
    )(with_terms)
    with_terms = click.option(
        "--money-budget",
        "money_budgets",
        type=BudgetType("money"),
        multiple=True,
        help="At most so much money per day, month or in total, by `kvasir price`: 250/month.",
    )(with_terms)
    return click.option(
        "--token-budget",
        "token_budgets",
        type=BudgetType("tokens"),
        multiple=True,
        help="At most so many tokens per day, month or in total: 5M/month. Repeatable.",
    )(with_terms)  # type: ignore[return-value]


def parse_money(text: str) -> int:
    """Return an amount of money in `MONEY_UNITS`.

    Raises:
        click.BadParameter: it is none.
    """
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("nan")
    units = amount * MONEY_UNITS
    if not amount.is_finite() or not 0 <= amount <= 10**8 or units != int(units):
        raise click.BadParameter(f"{text!r} is no amount of money; give one such as 250 or 12.50")
    return int(units)


def parse_price(text: str) -> int:
    """Return the price of one token in `MONEY_UNITS`, given that of a million.

    Raises:
        click.BadParameter: it is none, or finer than four decimals.
    """
    units = parse_money(text)
    if units % PRICE_TOKENS:
        raise click.BadParameter(f"a price per million tokens has at most four decimals, not {text}")
    return units // PRICE_TOKENS


def money(units: int) -> str:
    """Return an amount of money as it is shown: two decimals, or four where that is nothing."""
    amount = units / MONEY_UNITS
    return f"{amount:.2f}" if amount >= 1 or not units else f"{amount:.4f}"


def price_text(units: int) -> str:
    """Return the price of a million tokens, given that of one."""
    return f"{Decimal(units * PRICE_TOKENS) / MONEY_UNITS:f}"


def terms_lines(terms: Terms) -> list[tuple[str, str]]:
    """Return what is granted as facts to show; nothing where that is nothing special."""
    limits = [
        f"{getattr(terms.limits, name)} {text}"
        for name, text in _LIMITS.items()
        if getattr(terms.limits, name) is not None
    ]
    budgets = [budget_text(budget) for budget in terms.budgets]
    queue = [f"weight {terms.weight}"] * (terms.weight != 1) + [f"{terms.priority} priority"] * bool(terms.priority)
    aliases = [f"{name} is {' or '.join(models)}" for name, models in sorted(terms.aliases.items())]
    facts = ("limits", limits), ("budgets", budgets), ("queue", queue), ("aliases", aliases)
    return [(name, ", ".join(parts)) for name, parts in facts if parts]


def budget_text(budget: Budget) -> str:
    """Return a budget in words."""
    amount = f"{budget.amount} tokens" if budget.unit == "tokens" else money(budget.amount)
    return f"{amount} {'in all' if budget.window == 'total' else 'per ' + budget.window}"
