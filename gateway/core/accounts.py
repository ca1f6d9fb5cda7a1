"""What one payer has used: its meters, its running requests, and its days. Pure state; `admission` decides.

A request belongs to the day on which it was admitted, also what it settles after midnight: its reservation is a claim
on that day, and on the month and for ever after. So a window is never charged for another one, whatever the wall clock
does, and what was granted in it stays granted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from kvasir.gateway.core.gcra import Meter
from kvasir.gateway.core.promises import Places
from kvasir.protocol.days import DAY_S, date_of_day
from kvasir.protocol.terms import Budget

MAX_DAYS = 100  # remembered one by one; of older ones only the sum


@dataclass(slots=True, eq=False)
class Day:
    """One day of one payer: what settled requests have spent, and running ones reserved, in tokens (prompt and output)
    and in money."""

    number: int  # of days since 1 January 1970, UTC
    spent_tokens: int = 0
    spent_money: int = 0
    reserved_tokens: int = 0
    reserved_money: int = 0
    month: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        day = date_of_day(self.number)
        self.month = day.year, day.month


@dataclass(slots=True, eq=False)
class Account:
    """One payer: a tenant, or one of its keys."""

    requests: Meter = field(default_factory=Meter)
    prompt_tokens: Meter = field(default_factory=Meter)
    output_tokens: Meter = field(default_factory=Meter)
    num_running: int = 0  # API requests
    mean_stay_s: float = 1.0  # of those
    places: Places = field(default_factory=Places)  # among them, where they are limited
    days: dict[int, Day] = field(default_factory=dict)
    tokens_before: int = 0  # spent before the first of `days`
    money_before: int = 0
    _newest: Day | None = None  # of `days`
    _elsewhere: dict[tuple[str, str], int] = field(default_factory=dict)
    """Used on all days but the newest of its windows, by unit and window: does not change while nothing is late."""

    def day(self, number: int) -> Day:
        """Return that day, made if it is new."""
        day = self.days.get(number)
        if day is None:
            day = self.days[number] = self._newest = Day(number)
            self._elsewhere.clear()
            if len(self.days) > MAX_DAYS:
                self._forget_a_day()
        return day

    def reserve(self, day: Day, num_tokens: int, money: int) -> None:
        """Book what a request that begins or goes on may come to."""
        day.reserved_tokens += num_tokens
        day.reserved_money += money
        if day is not self._newest:
            self._elsewhere.clear()

    def settle(self, day: Day, num_reserved: int, reserved_money: int, num_spent: int, spent_money: int) -> None:
        """Book what a request has come to in the place of what it had reserved."""
        day.reserved_tokens -= num_reserved
        day.reserved_money -= reserved_money
        day.spent_tokens += num_spent
        day.spent_money += spent_money
        if day is not self._newest:
            self._elsewhere.clear()

    def used(self, budget: Budget, day: Day) -> int:
        """Return what of `budget`'s unit is spent or reserved in its window around `day`."""
        own = day.spent_tokens + day.reserved_tokens
        if budget.unit != "tokens":
            own = day.spent_money + day.reserved_money
        if budget.window == "day":
            return own
        if day is not self._newest:
            return self.recount(budget, day)
        key = budget.unit, budget.window
        elsewhere = self._elsewhere.get(key)
        if elsewhere is None:
            elsewhere = self._elsewhere[key] = self.recount(budget, day) - own
        return own + elsewhere

    def recount(self, budget: Budget, day: Day, *, with_reserved: bool = True) -> int:
        """Return the same, counted anew, with what is reserved or without."""
        is_tokens, window, month = budget.unit == "tokens", budget.window, day.month
        used = 0 if window != "total" else self.tokens_before if is_tokens else self.money_before
        for each in (day,) if window == "day" else self.days.values():
            if window == "month" and each.month != month:
                continue
            if is_tokens:
                used += each.spent_tokens + each.reserved_tokens * with_reserved
            else:
                used += each.spent_money + each.reserved_money * with_reserved
        return used

    def check_integrity(self) -> None:
        """Assert that nothing is negative."""
        assert self.num_running >= 0
        for day in self.days.values():
            assert min(day.spent_tokens, day.spent_money, day.reserved_tokens, day.reserved_money) >= 0, day

    def _forget_a_day(self) -> None:
        """Fold the first day without running requests into `before`."""
        for number in sorted(self.days):
            day = self.days[number]
            if not day.reserved_tokens:
                self.tokens_before += day.spent_tokens
                self.money_before += day.spent_money
                del self.days[number]
                return


def window_end(budget: Budget, number: int) -> float | None:
    """Return when (seconds since the epoch) the window around a day is over; None: never."""
    if budget.window == "day":
        return float(number + 1) * DAY_S
    if budget.window == "month":
        day = date_of_day(number)
        year, month = divmod(day.year * 12 + day.month, 12)
        return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
    return None
