"""Limits, budgets and prices as they are typed and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import wraps
from typing import Any, Literal, TypeVar, get_args

import click

from kvasir.protocol.sampling import Priority
from kvasir.protocol.terms import MAX_COUNT, MONEY_UNITS, Budget, Terms, TermsChange, Unit, Window

F = TypeVar("F", bound=Callable[..., Any])
Lift = Literal["none"]
"""What lifts a limit."""
_BUDGET = "AMOUNT/WINDOW|none"
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
        with_terms = click.option(flag, name, metavar="N|none", type=parse_count, help=f"At most so many {text}.")(
            with_terms
        )
    with_terms = click.option(
        "--priority",
        type=click.Choice([*get_args(Priority), "none"]),
        help="The class of its requests: higher ones come first; they may ask for a lower one.",
    )(with_terms)
    with_terms = click.option(
        "--money-budget",
        "money_budgets",
        metavar=_BUDGET,
        type=parse_money_budget,
        multiple=True,
        help="At most so much money per day, month or in total, by `kvasir price`: 250/month.",
    )(with_terms)
    return click.option(
        "--token-budget",
        "token_budgets",
        metavar=_BUDGET,
        type=parse_token_budget,
        multiple=True,
        help="At most so many tokens per day, month or in total: 5M/month. Repeatable.",
    )(with_terms)  # type: ignore[return-value]


def parse_count(text: str) -> int | Lift:
    """Return a whole number, with k, M or G for short, or "none".

    Raises:
        click.BadParameter: it is neither, as with all that follow.
    """
    found = _COUNT.fullmatch(text.strip())
    if text == "none":
        return "none"
    number = Decimal(found[1]) * _UNITS[found[2]] if found else Decimal(0)
    if not 1 <= number <= MAX_COUNT or number != int(number):
        raise click.BadParameter(
            f"{text!r} is no whole number from 1; give one such as 600, 20k or 1.5M, or none to lift it"
        )
    return int(number)


def parse_duration(text: str) -> float | Lift:
    """Return a length of time in seconds, or "none"."""
    found = _DURATION.fullmatch(text.strip())
    if text == "none":
        return "none"
    if not found:
        raise click.BadParameter(f"{text!r} is no length of time; give one such as 90d, 12h or 30min, or none")
    return float(found[1]) * _SECONDS[found[2]]


def parse_token_budget(text: str) -> Budget | Lift:
    """Return a budget in tokens given as AMOUNT/WINDOW, or "none"."""
    return "none" if text == "none" else Budget("tokens", *_split_budget(text, parse_count, "5M"))


def parse_money_budget(text: str) -> Budget | Lift:
    """Return a budget in money given as AMOUNT/WINDOW, or "none"."""
    return "none" if text == "none" else Budget("money", *_split_budget(text, parse_money, "250"))


def _split_budget(text: str, parse: Callable[[str], Any], example: str) -> tuple[Any, Any]:
    amount, _, window = text.partition("/")
    if window not in get_args(Window) or amount == "none":
        raise click.BadParameter(f"{text!r} is no budget; give one such as {example}/month, or none to lift it")
    return window, parse(amount)


def parse_alias(text: str) -> tuple[str, list[str]]:
    """Return a name and the models it stands for, given as NAME=MODEL,MODEL... or NAME=none."""
    name, _, models = text.partition("=")
    if not name or not all(models.split(",")):
        raise click.BadParameter(f"{text!r} is no alias; give one such as gpt-4o=qwen, or gpt-4o=none to lift it")
    return name, [] if models == "none" else models.split(",")


def parse_money(text: str) -> int:
    """Return an amount of money in `MONEY_UNITS`."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("nan")
    units = amount * MONEY_UNITS
    if not amount.is_finite() or not 0 <= amount <= 10**8 or units != int(units):
        raise click.BadParameter(f"{text!r} is no amount of money; give one such as 250 or 12.50")
    return int(units)


def parse_price(text: str) -> int:
    """Return the price of one token in `MONEY_UNITS`, given that of a million in at most four decimals."""
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
