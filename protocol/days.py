"""Days as numbers, counted in UTC since 1 January 1970: what budgets, ledger and bills go by."""

from __future__ import annotations

from datetime import date

DAY_S = 86_400
MIN_DAY, MAX_DAY = -719_162, 2_932_896  # of the years 1 and 9999
_EPOCH = date(1970, 1, 1).toordinal()


def day_number(wall_s: float) -> int:
    """Return the day that a time, in seconds since the epoch, lies in."""
    return int(wall_s // DAY_S)


def day_of_date(day: date) -> int:
    """Return the number of a day."""
    return day.toordinal() - _EPOCH


def date_of_day(number: int) -> date:
    """Return the date of a day, which prints as "2026-01-31"."""
    return date.fromordinal(number + _EPOCH)
