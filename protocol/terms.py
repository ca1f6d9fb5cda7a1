"""What an operator grants a tenant or one of its keys: limits per minute, budgets per window, prices of models.

Values only; `gateway/core/admission.py` decides by them. Money is counted in whole `MONEY_UNITS`: a price has four
decimals per million tokens, so that what one token costs is a whole number and sums are exact.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvasir.protocol.sampling import Priority

MONEY_UNITS = 10**10  # per unit of the operator's currency
MAX_COUNT = 10**15
Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Unit = Literal["tokens", "money"]
Window = Literal["day", "month", "total"]
"""Of a budget: a day or a month of the calendar in UTC, or for ever."""
Weight = Annotated[int, Meta(ge=1, le=100)]
RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}
"""In which order the classes come."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How fast a payer may ask. None: no limit. A whole minute's worth may come at once.

    `max_concurrent`: API requests that are being answered, each counted once, whatever its number of choices.
    """

    requests_per_min: Count | None = None
    prompt_tokens_per_min: Count | None = None
    output_tokens_per_min: Count | None = None
    max_concurrent: Count | None = None


class Budget(Struct, frozen=True, forbid_unknown_fields=True):
    """How much a payer may use in a window. `amount`: tokens (prompt and output), or `MONEY_UNITS`."""

    unit: Unit
    window: Window
    amount: Annotated[int, Meta(ge=0, le=MAX_COUNT * 1_000)]


class Price(Struct, frozen=True, forbid_unknown_fields=True):
    """What one token costs, in `MONEY_UNITS`: a price of 0.25 per million tokens is 2,500."""

    prompt: Annotated[int, Meta(ge=0, le=10**12)] = 0
    cached: Annotated[int, Meta(ge=0, le=10**12)] = 0
    output: Annotated[int, Meta(ge=0, le=10**12)] = 0

    def cost(self, num_prompt: int, num_cached: int, num_output: int) -> int:
        """Return what so many tokens come to; `num_cached` of the prompt's were found in a cache."""
        return (num_prompt - num_cached) * self.prompt + num_cached * self.cached + num_output * self.output


ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Aliases = Annotated[dict[ModelName, Annotated[list[ModelName], Meta(max_length=8)]], Meta(max_length=64)]
"""Names that a tenant may use for a model, each with the models it stands for: the first that has a worker."""


class Terms(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that is granted to one payer: a tenant, or one of its keys.

    `weight`, of a tenant: its part of what is computed, beside those of others. `priority`: the class of its requests,
    which may ask for a lower one. None: normal, or, of a key, its tenant's. `aliases`: of a tenant.
    """

    limits: Limits = Limits()
    budgets: tuple[Budget, ...] = ()
    weight: Weight = 1
    priority: Priority | None = None
    aliases: Aliases = {}


NO_TERMS = Terms()


class TermsChange(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an operator changes of a payer's terms. None leaves what it is for as it is, "none" lifts it.

    `budgets` take the place of those of their unit and window, once all of the units in `lifted` are gone. `aliases`
    take the place of those of their name; one for no model is gone.
    """

    requests_per_min: Count | Literal["none"] | None = None
    prompt_tokens_per_min: Count | Literal["none"] | None = None
    output_tokens_per_min: Count | Literal["none"] | None = None
    max_concurrent: Count | Literal["none"] | None = None
    budgets: Annotated[list[Budget], Meta(max_length=16)] = []
    lifted: Annotated[list[Unit], Meta(max_length=2)] = []
    weight: Weight | None = None
    priority: Priority | Literal["none"] | None = None
    aliases: Aliases = {}

    def apply(self, before: Terms) -> Terms:
        """Return `before`, changed."""
        limits = {name: getattr(before.limits, name) for name in Limits.__struct_fields__}
        for name in limits:
            value = getattr(self, name)
            if value is not None:
                limits[name] = None if value == "none" else value
        budgets = {(each.unit, each.window): each for each in before.budgets if each.unit not in self.lifted}
        budgets |= {(each.unit, each.window): each for each in self.budgets}
        weight, priority = self.weight or before.weight, self.priority or before.priority
        granted = tuple(budgets[key] for key in sorted(budgets))
        aliases = {name: models for name, models in (before.aliases | self.aliases).items() if models}
        after = Terms(Limits(**limits), granted, weight, None if priority == "none" else priority, aliases)
        return NO_TERMS if after == NO_TERMS else after
