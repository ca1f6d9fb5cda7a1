"""What an answer's headers say of limits, in the spelling that OpenAI's clients and proxies before them read."""

from __future__ import annotations

from math import ceil

from kvasir.gateway.core.api import Allowance, Standing
from kvasir.protocol.errors import BudgetExceeded, ErrorInfo

Headers = list[tuple[str, str]]


def standing_headers(standing: Standing | None) -> Headers:
    """Return `x-ratelimit-*` for what is left of a caller's limits; nothing for one without limits.

    `tokens` are those of prompts or of answers, whichever limit is nearer.
    """
    if standing is None:
        return []
    found: Headers = []
    for what, allowance in (("requests", standing.requests), ("tokens", standing.tokens)):
        if allowance is not None:
            found += _allowance_headers(what, allowance)
    return found


def retry_headers(info: ErrorInfo) -> Headers:
    """Return when a refused request may be sent again: in seconds, rounded up, and in milliseconds.

    Of a budget that is used up, clients are told not to try by themselves.
    """
    if info.code == BudgetExceeded.code:
        no_retry = [("x-should-retry", "false")]
        return no_retry if info.retry_after_s is None else [*no_retry, ("retry-after", str(ceil(info.retry_after_s)))]
    if info.retry_after_s is None:
        return []
    milliseconds = max(1, ceil(info.retry_after_s * 1_000))
    return [("retry-after", str(max(1, ceil(info.retry_after_s)))), ("retry-after-ms", str(milliseconds))]


def _allowance_headers(what: str, allowance: Allowance) -> Headers:
    return [
        (f"x-ratelimit-limit-{what}", str(allowance.limit)),
        (f"x-ratelimit-remaining-{what}", str(allowance.remaining)),
        (f"x-ratelimit-reset-{what}", _duration(allowance.reset_s)),
    ]


def _duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: 120ms, 4.5s, 1m0s."""
    if seconds < 1:
        return f"{ceil(seconds * 1_000)}ms"
    minutes, rest = divmod(ceil(seconds * 1_000) / 1_000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
