"""A thousand clients at once on one budget: none of it is overdrawn, and nearly all of it can be spent."""

from __future__ import annotations

import random

import pytest

from kvasir.gateway.core.api import Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.requests import QueueConfig
from kvasir.protocol.terms import NO_TERMS, Budget, Price, Terms
from tests.core_helpers import Bench, RecordingSink, make_submit, output

NUM_CLIENTS = 1_000
BUDGET_TOKENS = 600_000


@pytest.mark.parametrize("unit", ["tokens", "money"])
@pytest.mark.parametrize("open_ended_share", [0.0, 0.5, 1.0])
def test_a_thousand_clients_spend_one_budget_to_nearly_the_last_token(unit: str, open_ended_share: float) -> None:
    price = Price(prompt=1, cached=1, output=1)
    budget = Budget("tokens" if unit == "tokens" else "money", "month", BUDGET_TOKENS)
    billing = Billing(lambda payer: Terms(budgets=(budget,)) if payer == "alpha" else NO_TERMS, lambda model: price)
    bench = Bench(billing=billing, queue=QueueConfig(window_s=1_000.0))  # whatever has a credit is sent
    bench.join(max_requests=NUM_CLIENTS, num_blocks=100_000, max_context=50_000)
    rng = random.Random(3)
    waiting = [str(number).encode() for number in range(NUM_CLIENTS)]  # clients, each with one request at a time
    running: dict[bytes, tuple[Submit, RecordingSink, int]] = {}
    num_asked = num_tried_again = told = 0
    while waiting or running:
        if waiting and (rng.random() < 0.9 or not running):
            client = waiting.pop(rng.randrange(len(waiting)))
            num_asked += 1
            is_open_ended = rng.random() < open_ended_share
            num_prompt, max_tokens = rng.randrange(10, 60), 20_000 if is_open_ended else rng.randrange(100, 1_500)
            submit, sink = make_submit(
                client + b"-%d" % num_asked, range(num_prompt), max_tokens=max_tokens, is_open_ended=is_open_ended
            )
            bench.core.submit(submit)
            if sink.finished is None:
                running[client] = submit, sink, rng.randrange(1, min(max_tokens, 900))
            elif sink.finished.error is not None and sink.finished.error.code == "rate_limit_exceeded":
                num_tried_again += 1
                waiting.append(client)  # as it was told: others may give some back
        else:
            client = rng.choice(list(running))
            submit, sink, num_output = running.pop(client)
            bench.report(b"w1", output(submit.req_id, 0, [1] * num_output, "stop", num_cached_tokens=0))
            assert sink.finished.error is None
            told += submit.num_prompt_tokens + sink.finished.num_output_tokens
            waiting.append(client)
            account = billing.admission.account("alpha")
            [day] = account.days.values()
            assert account.used(budget, day) <= BUDGET_TOKENS, "overdrawn"
    assert told == day.spent_tokens <= BUDGET_TOKENS
    assert told >= 0.95 * BUDGET_TOKENS, f"only {told / BUDGET_TOKENS:.1%} could be spent"
    assert (day.reserved_tokens, day.reserved_money, account.num_running) == (0, 0, 0)
