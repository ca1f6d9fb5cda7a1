"""Where budgets go on from after a start: what the ledger says that every tenant and key has spent."""

from __future__ import annotations

from kvasir.gateway.core.admission import Admission
from kvasir.gateway.ledger.database import Database
from kvasir.gateway.log import log
from kvasir.protocol.days import day_number

RECENT_DAYS = 62  # two months, whatever the clock does around midnight of their ends


def load_accounts(database: Database, admission: Admission, now: float) -> None:
    """Settle what a dead gateway has left running, and book all that is spent.

    Raises:
        StoreError: the ledger cannot be read or written.
    """
    num_lost = database.recover(now)
    if num_lost:
        log("ledger_recovered", rows=num_lost, settled="at their last counts")
    first = day_number(now) - RECENT_DAYS
    for tenant_id, key_id, num_tokens, cost in database.used_before(first):
        for payer_id in filter(None, (tenant_id, key_id)):
            account = admission.account(payer_id)
            account.tokens_before += num_tokens
            account.money_before += cost
    for used in database.days(first):
        for payer_id in filter(None, (used.tenant_id, used.key_id)):
            day = admission.account(payer_id).day(used.day)
            day.spent_tokens += used.prompt_tokens + used.output_tokens
            day.spent_money += used.cost
