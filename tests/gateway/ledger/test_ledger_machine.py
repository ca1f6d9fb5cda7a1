"""A random machine over the core's billing and the ledger on disk: whatever happens, no budget is overdrawn.

Operations: requests of several keys come, stream, grow, end, are cancelled; commits succeed or fail; edges send and
close; the gateway is killed at any point and starts again; the wall clock jumps by hours. Beside it runs a plain count
of what clients were sent.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.core.admission import Share
from kvasir.gateway.core.api import Finished, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.ledger.accounts import load_accounts
from kvasir.gateway.ledger.database import Batch, open_ledger
from kvasir.gateway.ledger.writer import LedgerWriter
from kvasir.protocol.days import day_number
from kvasir.protocol.errors import KvasirError, StoreError
from kvasir.protocol.terms import NO_TERMS, Budget, Limits, Price, Terms
from tests.core_helpers import make_submit

pytestmark = pytest.mark.timeout(300)
NUM_STEPS = int(os.environ.get("LEDGER_STEPS", "4000"))  # a soak asks for a million
START = 20_000 * 86_400.0 + 80_000  # late in the evening
PRICE = Price(prompt=7, cached=2, output=31)
KEYS = {"k1": "alpha", "k2": "alpha", "k3": "beta"}
TERMS = {
    "alpha": Terms(Limits(max_concurrent=6), (Budget("tokens", "day", 60_000), Budget("money", "total", 9_000_000))),
    "k1": Terms(Limits(output_tokens_per_min=20_000), (Budget("tokens", "month", 50_000),)),
    "k2": Terms(budgets=(Budget("money", "day", 700_000),)),
}


class Running:
    """One request as the machine follows it."""

    def __init__(self, submit: Submit, share: Share) -> None:
        self.submit, self.share = submit, share
        self.num_delivered = self.num_sent = 0
        self.end: Finished | None = None


class Machine:
    """The gateway's books, and a plain count beside them."""

    def __init__(self, seed: int, folder: Path, url: str) -> None:
        self.rng = random.Random(seed)
        self.folder, self.url = folder, url
        self.now, self.wall_s = 0.0, START
        self.num_requests = self.num_admitted = self.num_killed = 0
        self.told: dict[bytes, tuple[int, int, int]] = {}  # ended and closed: exact prompt, cached and output tokens
        self.sent: dict[bytes, tuple[int, int]] = {}  # killed: prompt and output tokens that had been sent
        self.start()

    def start(self) -> None:
        self.database = open_ledger(self.folder, self.url)
        self.is_full = False
        real_write = self.database.write

        def write(batch: Batch) -> None:
            if self.is_full:
                raise StoreError("the disk is full")
            real_write(batch)

        def renew() -> None:
            if self.is_full:
                raise StoreError("the disk is full")

        self.database.write = write  # type: ignore[method-assign]
        self.database.renew_spare = renew  # type: ignore[method-assign]
        self.ledger = LedgerWriter(self.database, self._written, lambda: self.wall_s)
        self.billing = Billing(
            lambda payer: TERMS.get(payer, NO_TERMS), lambda model: PRICE, self.ledger, lambda: self.wall_s
        )
        load_accounts(self.database, self.billing.admission, self.wall_s)
        self.running: dict[bytes, Running] = {}

    def _written(self, bills, error: KvasirError | None) -> None:
        for bill in bills:
            bill.is_written = True
            if error is not None:
                for req_id in bill.req_ids:
                    if (one := self.running.get(req_id)) is not None and one.end is None:
                        self._finish(one, "error")
                        self._close(one)

    # ---- operations ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        rng = self.rng
        self.now += rng.random() * 2
        self.wall_s += rng.random() * 60
        kind = rng.choices(
            ["come", "deliver", "end", "cancel", "close", "commit", "jump", "kill", "full"],
            [20, 40, 12, 3, 15, 12, 0.3, 0.3, 0.5],
        )[0]
        getattr(self, f"_{kind}")()

    def _come(self) -> None:
        rng = self.rng
        key = rng.choice(list(KEYS))
        num_prompt, max_tokens = rng.randrange(1, 400), rng.choice([1, 30, 700, 5_000])
        submits = []
        for index in range(rng.choice([1, 1, 1, 3])):
            req_id = rng.randbytes(16)
            submit, _ = make_submit(
                req_id,
                range(num_prompt),
                tenant=KEYS[key],
                key_id=key,
                max_tokens=max_tokens,
                is_open_ended=max_tokens > 1_000,
                counts_prompt=index == 0,
            )
            submits.append(submit)
        self.num_requests += 1
        shares = self.billing.admit(submits, self.now)
        if isinstance(shares, KvasirError):
            return
        self.num_admitted += 1
        for submit, share in zip(submits, shares, strict=True):
            self.running[submit.req_id] = Running(submit, share)
        self.billing.enter(shares)

    def _one(self, *, ended: bool = False) -> Running | None:
        found = [one for one in self.running.values() if (one.end is not None) == ended]
        return self.rng.choice(found) if found else None

    def _deliver(self) -> None:
        one = self._one()
        if one is None or not one.share.bill.is_written:
            return
        num = min(one.num_delivered + self.rng.randrange(1, 900), one.submit.max_tokens)
        one.share.num_cached = one.submit.num_prompt_tokens // 3
        is_covered = num <= one.share.num_granted or self.billing.cover(one.share, num, self.now)
        one.num_delivered = num if is_covered else one.share.num_granted
        if self.rng.random() < 0.8:
            one.num_sent = one.num_delivered
            self.billing.sent(one.submit.req_id, one.num_sent)
        if not is_covered:
            self._finish(one, "length")

    def _end(self) -> None:
        if (one := self._one()) is not None and one.share.bill.is_written:
            self._finish(one, "stop")

    def _cancel(self) -> None:
        if (one := self._one()) is not None:
            one.num_delivered = one.num_sent
            self._finish(one, "abort")
            self._close(one)

    def _close(self, one: Running | None = None) -> None:
        one = one or self._one(ended=True)
        if one is not None and one.end is not None:
            self.billing.closed(one.submit.req_id)
            del self.running[one.submit.req_id]
            self._tell(one)

    def _tell(self, one: Running) -> None:
        bill_id = one.share.bill.bill_id
        before = self.told.get(bill_id, (0, 0, 0))
        prompt = min(one.end.num_prompt_tokens, one.share.num_prompt)
        cached = min(one.end.num_cached_tokens, prompt)
        self.told[bill_id] = before[0] + prompt, before[1] + cached, before[2] + one.end.num_output_tokens

    def _finish(self, one: Running, reason: str) -> None:
        prompt = one.submit.num_prompt_tokens if one.num_delivered else 0
        one.end = Finished(one.submit.req_id, reason, prompt, one.num_delivered, prompt // 3)
        self.billing.finished(one.share, one.end)

    def _commit(self) -> None:
        self.billing.tick()
        self.ledger.commit()

    def _jump(self) -> None:
        self.wall_s += self.rng.choice([-3_600.0, 3_600.0, 86_400.0])

    def _full(self) -> None:
        self.is_full = not self.is_full

    def _kill(self) -> None:
        """The process is gone, with everything that was not committed."""
        self.num_killed += 1
        for one in self.running.values():
            bill_id, before = one.share.bill.bill_id, self.sent.get(one.share.bill.bill_id, (0, 0))
            prompt = one.share.num_prompt if one.num_sent else 0
            self.sent[bill_id] = before[0] + prompt, before[1] + one.num_sent
        self.database.close()
        self.start()

    # ---- what must hold ------------------------------------------------------------------------------------------

    def check(self) -> None:
        admission = self.billing.admission
        for payer_id, account in admission._accounts.items():
            account.check_integrity()
            for budget in TERMS.get(payer_id, NO_TERMS).budgets:
                for day in account.days.values():
                    assert account.used(budget, day) <= budget.amount, f"{payer_id} has overdrawn {budget}"
                    assert account.used(budget, day) == account.recount(budget, day)

    def check_at_rest(self) -> None:
        """End everything, commit, and compare the ledger with the plain count."""
        self.is_full = False
        for one in list(self.running.values()):
            if one.end is None:
                one.num_delivered = one.num_sent
                self._finish(one, "abort")
            self._close(one)
        self._commit()
        self._commit()
        self.check()
        for _, account in self.billing.admission._accounts.items():
            assert account.num_running == 0
            for day in account.days.values():
                assert (day.reserved_tokens, day.reserved_money) == (0, 0), "something is reserved at rest"
        rows = self.database.rows()
        assert len({row.id for row in rows}) == len(rows)
        for row in rows:
            assert row.settled_at is not None, "a row was left running"
            told, sent = self.told.get(row.id, (0, 0, 0)), self.sent.get(row.id, (0, 0))
            assert row.prompt_tokens <= told[0] + sent[0] and row.output_tokens <= told[2] + sent[1], "billed too much"
            if row.reason != "lost":
                assert (row.prompt_tokens, row.cached_tokens, row.output_tokens) == told
                assert row.cost == PRICE.cost(*told)
        for payer_id, budgets in ((payer, terms.budgets) for payer, terms in TERMS.items()):
            mine = [row for row in rows if payer_id in (row.tenant_id, row.key_id)]
            for budget in budgets:
                if budget.window == "day":
                    for number in {day_number(row.admitted_at) for row in mine}:
                        of_day = [row for row in mine if day_number(row.admitted_at) == number]
                        assert sum(map(budget_use[budget.unit], of_day)) <= budget.amount
                elif budget.window == "total":
                    assert sum(map(budget_use[budget.unit], mine)) <= budget.amount
        days = self.database.days()
        assert sum(day.num_requests for day in days) == len(rows)
        assert sum(day.cost for day in days) == sum(row.cost for row in rows)
        assert sum(day.output_tokens for day in days) == sum(row.output_tokens for row in rows)
        self.database.close()


budget_use = {"tokens": lambda row: row.prompt_tokens + row.output_tokens, "money": lambda row: row.cost}


def run_machine(seed: int, num_steps: int, url: str = "") -> Machine:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:
        machine = Machine(seed, Path(folder), url)
        for number in range(num_steps):
            machine.step()
            if number % 16 == 0:
                machine.check()
        machine.check_at_rest()
    return machine


@given(st.integers(0, 2**32), st.integers(1, 250))
@settings(max_examples=25)
def test_no_budget_is_overdrawn_and_every_row_is_settled_once(seed: int, num_steps: int) -> None:
    run_machine(seed, num_steps)


def test_a_long_run_sees_every_kind_of_trouble(url: str) -> None:
    machine = run_machine(11, NUM_STEPS, url)
    assert machine.num_killed > 3 and machine.num_admitted > NUM_STEPS / 40
    assert machine.num_requests > machine.num_admitted, "no budget was ever reached"
