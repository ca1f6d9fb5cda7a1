"""Who may begin, and how much of what it was granted it has used: limits and budgets, decided and booked in one step.

One `Bill` per API request, whatever its number of prompts and choices. `admit` takes from every meter and budget of
every payer (the tenant, and the key) or from none. An answer without `max_tokens` is granted `GRANT_TOKENS` at first,
then as much again whenever that is used up (`grow`); refused, it ends. What a request does not use goes back when it
ends (`settle`), so that budgets are hard and can be spent to the last token. No I/O; the caller brings both clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kvasir.gateway.core.accounts import Account, Day, window_end
from kvasir.gateway.core.api import Allowance, Finished, Standing, Submit
from kvasir.gateway.core.gcra import MINUTE_NS, Meter
from kvasir.gateway.core.promises import MAX_WAIT_S
from kvasir.protocol.days import day_number
from kvasir.protocol.errors import BadRequest, BudgetExceeded, KvasirError, RateLimited
from kvasir.protocol.sampling import Priority
from kvasir.protocol.terms import MONEY_UNITS, NO_TERMS, RANKS, Budget, Price, Terms

GRANT_TOKENS = 1_024
_NEWEST = 0.2  # weight of the newest request's stay in their mean
_SOON_S = 1.0  # when to try again what other running requests may give back
_UNBOUNDED = 1 << 60


Gauge = tuple[int, Meter, int]
"""One limit per minute that is in force: the place of its number in an `Amounts`, its meter, and how much it is."""
Amounts = tuple[int, int, int]
"""Of API requests, prompt tokens and output tokens."""
_KINDS = (("requests", None), ("prompt tokens", "prompt"), ("output tokens", "max_tokens"))


class Payer(msgspec.Struct, eq=False, gc=False):
    """A tenant or key on one day, under the terms that were in force: shared by all bills of that day."""

    payer_id: str
    account: Account
    day: Day
    terms: Terms
    gauges: tuple[Gauge, ...]


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What an API request asks for. `num_output`: of answers with a `max_tokens`; the others are `num_open_ended`.

    `num_least`: output tokens without which it cannot begin; an answer without an end of its own gets at least one.
    """

    num_prompt: int
    num_output: int
    num_open_ended: int
    num_least: int


_NOTHING = Ask(0, 0, 0, 0)


class Bill(msgspec.Struct, eq=False, gc=False):
    """One API request: who pays, at what price, and what it has come to. `admitted_at`: seconds since the epoch.

    `num_open`: requests of it that are running, or whose end its client has not been sent. `sent_*`: what its client
    has been sent so far. `is_written`: its row is on disk; `is_lost`: it could not be written.
    """

    bill_id: bytes
    tenant_id: str
    key_id: str
    model: str
    admitted_at: float
    price: Price
    payers: tuple[Payer, ...]
    req_ids: tuple[bytes, ...]
    num_unfinished: int
    num_open: int
    is_written: bool = False
    is_lost: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    sent_prompt: int = 0
    sent_cached: int = 0
    sent_output: int = 0
    reason: str = ""  # of the first of its answers that did not end well, else of the last

    def rank(self, asked: Priority | None) -> int:
        """Return a request's class, 0 the first: the tenant's, or a later one that the key or (`asked`) it names."""
        rank = RANKS[self.payers[0].terms.priority or "normal"]
        for priority in (self.payers[-1].terms.priority, asked):
            if priority is not None and RANKS[priority] > rank:
                rank = RANKS[priority]
        return rank

    @property
    def cost(self) -> int:
        return self.price.cost(self.prompt_tokens, self.cached_tokens, self.output_tokens)


class Share(msgspec.Struct, eq=False, gc=False):
    """What one request of a bill has reserved. `num_granted`: output tokens that it may deliver; it can never want
    more than `max_tokens`. `num_sent`: those that its client has been sent; `is_closed`: and the end of the answer."""

    bill: Bill
    num_prompt: int
    num_granted: int
    max_tokens: int
    num_cached: int = 0
    num_sent: int = 0
    is_finished: bool = False
    is_closed: bool = False


class Admission:
    """All accounts. `terms` and `price` return what is in force now for a payer and for a model."""

    def __init__(self, terms: Callable[[str], Terms], price: Callable[[str], Price]) -> None:
        self._terms = terms
        self._price = price
        self._accounts: dict[str, Account] = {}
        self._payers: dict[tuple[str, str], tuple[Payer, ...]] = {}  # by tenant and key, as they last were

    def admit(self, submits: Sequence[Submit], now: float, wall_s: float) -> list[Share] | KvasirError:
        """Book the requests of one API request, or return why it is refused. One share per request."""
        first, ask, now_ns = submits[0], _ask(submits), int(now * 1e9)
        price, grant = self._price(first.model), GRANT_TOKENS
        payers = self._payers_of(first.tenant_id, first.key_id, day_number(wall_s))
        least_money = _dearest(price, ask.num_prompt, ask.num_least)
        for payer in payers:
            if payer.terms is not NO_TERMS:
                refusal = _limit_refusal(payer, first, ask, now_ns) or _budget_refusal(payer, ask, least_money, wall_s)
                if refusal is not None:
                    return refusal
                if ask.num_open_ended:
                    grant = min(grant, _output_left(payer, ask, price, now_ns) // ask.num_open_ended)
        granted = [min(submit.max_tokens, grant) if submit.is_open_ended else submit.max_tokens for submit in submits]
        num_output = sum(granted)
        money = _dearest(price, ask.num_prompt, num_output) if ask.num_open_ended else least_money
        for payer in payers:
            payer.account.num_running += 1
            payer.account.reserve(payer.day, ask.num_prompt + num_output, money)
            if ask.num_open_ended:
                _take(payer, (1, ask.num_prompt, num_output), now_ns)
            else:
                for _, meter, _ in payer.gauges:
                    meter.full_at = meter.next_at
        req_ids = tuple([submit.req_id for submit in submits])
        num = len(req_ids)
        bill = Bill(req_ids[0], first.tenant_id, first.key_id, first.model, wall_s, price, payers, req_ids, num, num)
        return [
            Share(bill, submit.num_prompt_tokens if submit.counts_prompt else 0, num, submit.max_tokens)
            for submit, num in zip(submits, granted, strict=True)
        ]

    def grow(self, share: Share, wanted: int, now: float) -> int:
        """Grant up to `wanted` more output tokens and return how many; 0: nothing is left."""
        bill, now_ns = share.bill, int(now * 1e9)
        for payer in bill.payers:
            terms = self._terms(payer.payer_id)
            if terms is not NO_TERMS:
                wanted = min(wanted, _output_left(payer, _NOTHING, bill.price, now_ns, terms))
        if wanted <= 0:
            return 0
        for payer in bill.payers:
            _take(payer, (0, 0, wanted), now_ns)
            payer.account.reserve(payer.day, wanted, _dearest(bill.price, 0, wanted))
        share.num_granted += wanted
        return wanted

    def settle(self, share: Share, end: Finished, wall_s: float) -> None:
        """Book what a request has come to and give back the rest of what it had reserved."""
        bill, price = share.bill, share.bill.price
        num_prompt = min(end.num_prompt_tokens, share.num_prompt)
        num_cached = min(end.num_cached_tokens, num_prompt)
        num_output = end.num_output_tokens
        bill.num_unfinished -= 1
        bill.prompt_tokens += num_prompt
        bill.cached_tokens += num_cached
        bill.output_tokens += num_output
        if bill.reason in ("", "stop", "length"):
            bill.reason = end.reason
        reserved = _dearest(price, share.num_prompt, share.num_granted)
        spent = price.cost(num_prompt, num_cached, num_output)
        for payer in bill.payers:
            payer.account.settle(
                payer.day, share.num_prompt + share.num_granted, reserved, num_prompt + num_output, spent
            )
            if payer.gauges:
                _put_back(payer, (0, share.num_prompt, share.num_granted), (0, num_prompt, num_output))
            if not bill.num_unfinished:
                payer.account.num_running -= 1
                stay_s = min(max(0.0, wall_s - bill.admitted_at), MAX_WAIT_S)  # the wall clock may jump
                payer.account.mean_stay_s += _NEWEST * (stay_s - payer.account.mean_stay_s)

    def standing(self, tenant_id: str, key_id: str, now: float) -> Standing | None:
        """Return what is left of a caller's limits, of tenant and key the nearer one; None: it has no limits."""
        now_ns = int(now * 1e9)
        requests: list[Allowance] = []
        tokens: list[Allowance] = []
        for payer_id in filter(None, (tenant_id, key_id)):
            limits = self._terms(payer_id).limits
            account = self._accounts.get(payer_id)
            for found, kind in ((requests, "requests"), (tokens, "prompt_tokens"), (tokens, "output_tokens")):
                per_min = getattr(limits, f"{kind}_per_min")
                if per_min is not None:
                    meter = Meter() if account is None else getattr(account, kind)
                    reset_s = max(0, meter.full_at - now_ns) / 1e9
                    found.append(Allowance(per_min, meter.available(per_min, now_ns), reset_s))
        if not requests and not tokens:
            return None
        return Standing(
            *(min(found, key=lambda a: a.remaining / a.limit, default=None) for found in (requests, tokens))
        )

    def account(self, payer_id: str) -> Account:
        """Return a payer's account, made if it is new."""
        account = self._accounts.get(payer_id)
        if account is None:
            account = self._accounts[payer_id] = Account()
        return account

    def forget(self, payer_id: str) -> None:
        """Drop the account of a payer that is gone."""
        self._accounts.pop(payer_id, None)
        self._payers = {caller: payers for caller, payers in self._payers.items() if payer_id not in caller}

    def _payers_of(self, tenant_id: str, key_id: str, number: int) -> tuple[Payer, ...]:
        """Return who pays for a request of that day, under the terms that are in force."""
        terms, payers = self._terms, self._payers.get((tenant_id, key_id))
        if payers is not None and payers[0].day.number == number:
            for payer in payers:
                if terms(payer.payer_id) is not payer.terms:
                    break
            else:
                return payers
        made = []
        for payer_id in filter(None, (tenant_id, key_id)):
            account = self.account(payer_id)
            granted = terms(payer_id)
            made.append(Payer(payer_id, account, account.day(number), granted, _gauges(account, granted)))
        payers = self._payers[tenant_id, key_id] = tuple(made)
        return payers


def _ask(submits: Sequence[Submit]) -> Ask:
    num_prompt = num_output = num_open_ended = 0
    for submit in submits:
        if submit.counts_prompt:
            num_prompt += submit.num_prompt_tokens
        if submit.is_open_ended:
            num_open_ended += 1
        else:
            num_output += submit.max_tokens
    return Ask(num_prompt, num_output, num_open_ended, num_output + num_open_ended)


def _gauges(account: Account, terms: Terms) -> tuple[Gauge, ...]:
    limits = terms.limits
    per_min = limits.requests_per_min, limits.prompt_tokens_per_min, limits.output_tokens_per_min
    meters = account.requests, account.prompt_tokens, account.output_tokens
    limited = enumerate(zip(meters, per_min, strict=True))
    return tuple((kind, meter, num) for kind, (meter, num) in limited if num is not None)


def _limit_refusal(payer: Payer, first: Submit, ask: Ask, now: int) -> KvasirError | None:
    """Return why a limit refuses what is asked for. If none does, each meter's `next_at` is set."""
    account, max_concurrent = payer.account, payer.terms.limits.max_concurrent
    if max_concurrent is not None:
        places, stay_s, now_s = account.places, account.mean_stay_s, now / 1e9
        if not places.is_free(first, account.num_running, max_concurrent, stay_s, now_s):
            wait_s = places.promise_s(first, max_concurrent, stay_s, now_s)
            text = f"{max_concurrent} requests may run at once and do, or are about to; try again in {wait_s:.1f} s"
            return RateLimited(text, retry_after_s=wait_s)
    amounts = 1, ask.num_prompt, ask.num_least
    for kind, meter, per_min in payer.gauges:
        num = amounts[kind]
        meter.next_at = meter.after(num, per_min, now)
        if meter.next_at + meter.kept_ns(first, num, per_min, now) <= now + MINUTE_NS:
            continue
        what, param = _KINDS[kind]
        if num > per_min:
            text = f"this request asks for {num} {what}, and {per_min} are allowed per minute; it can never be served"
            return BadRequest(f"{text}: make it smaller", param=param)
        wait_s = meter.promise_s(first, num, per_min, now)
        text = f"the limit of {per_min} {what} per minute is reached; try again in {wait_s:.1f} s"
        return RateLimited(text, param=param, retry_after_s=wait_s)
    return None


def _budget_refusal(payer: Payer, ask: Ask, money: int, wall_s: float) -> KvasirError | None:
    """Return why a budget does not allow what is asked for, which comes to `money` at most."""
    account, day = payer.account, payer.day
    for budget in payer.terms.budgets:
        least = ask.num_prompt + ask.num_least if budget.unit == "tokens" else money
        if account.used(budget, day) + least <= budget.amount:
            continue
        spent = account.recount(budget, day, with_reserved=False)
        what = f"the budget of {_amount(budget, budget.amount)} {_PER[budget.window]}"
        if spent + least <= budget.amount:
            text = f"{what} is reserved by running requests, which may give some of it back; try again in a moment"
            return RateLimited(text, retry_after_s=_SOON_S)
        text = f"{what} has {_amount(budget, max(0, budget.amount - spent))} left, too little for this request"
        end = window_end(budget, day.number)
        if end is None:
            return BudgetExceeded(f"{text}; ask the operator for more")
        return BudgetExceeded(f"{text}; wait for the next {budget.window}", retry_after_s=max(1.0, end - wall_s))
    return None


def _output_left(payer: Payer, ask: Ask, price: Price, now: int, terms: Terms | None = None) -> int:
    """Return how many output tokens may still be granted beside what is asked for, under other `terms` if given."""
    left, terms = _UNBOUNDED, terms or payer.terms
    if terms.limits.output_tokens_per_min is not None:
        left = payer.account.output_tokens.available(terms.limits.output_tokens_per_min, now) - ask.num_output
    for budget in terms.budgets:
        rest = budget.amount - payer.account.used(budget, payer.day)
        if budget.unit == "tokens":
            left = min(left, rest - ask.num_prompt - ask.num_output)
        elif price.output:
            left = min(left, (rest - _dearest(price, ask.num_prompt, ask.num_output)) // price.output)
        elif rest < 0:
            left = 0
    return max(0, left)


def _dearest(price: Price, num_prompt: int, num_output: int) -> int:
    """Return the most that so many tokens can come to, whatever is found in a cache."""
    return num_prompt * max(price.prompt, price.cached) + num_output * price.output


def _take(payer: Payer, amounts: Amounts, now: int) -> None:
    for kind, meter, per_min in payer.gauges:
        if amounts[kind]:
            meter.take(amounts[kind], per_min, now)


def _put_back(payer: Payer, taken: Amounts, used: Amounts) -> None:
    """Give what was not used back to the meters."""
    for kind, meter, per_min in payer.gauges:
        unused = taken[kind] - used[kind]
        if unused > 0:
            meter.put_back(unused, taken[kind], per_min)


def _amount(budget: Budget, amount: int) -> str:
    return f"{amount} tokens" if budget.unit == "tokens" else f"{amount / MONEY_UNITS:.4f}"


_PER = {"day": "per day", "month": "per month", "total": "in all"}
