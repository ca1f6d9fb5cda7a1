"""The ledger and the core: rows before tokens, one settlement each, restarts, and a disk that is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.ledger.accounts import load_accounts
from kvasir.gateway.ledger.database import Batch, Database, DaySum, Row, open_ledger
from kvasir.gateway.ledger.writer import KEEP_DAYS, RETRY_EVERY_S, LedgerWriter
from kvasir.protocol.days import DAY_S
from kvasir.protocol.errors import StoreError
from kvasir.protocol.messages import Abort
from kvasir.protocol.terms import NO_TERMS, Budget, Price, Terms
from tests.core_helpers import Bench, RecordingSink, make_submit, output

pytestmark = pytest.mark.timeout(60)
NOON = 20_000 * DAY_S + DAY_S / 2.0
PRICE = Price(prompt=2_500, cached=250, output=10_000)


class Till:
    """A core with a ledger in `path` or at `url`, whose commits happen when a test says so."""

    url = ""
    opened: list[Database] = []

    def __init__(self, path: Path, **terms: Terms) -> None:
        self.database = open_ledger(path, self.url)
        self.opened.append(self.database)
        self.wall_s = NOON
        self.ledger = LedgerWriter(
            self.database, lambda bills, error: self.bench.core.reserved(bills, error), lambda: self.wall_s
        )
        self.billing = Billing(
            lambda payer: terms.get(payer, NO_TERMS), lambda model: PRICE, self.ledger, lambda: self.wall_s
        )
        load_accounts(self.database, self.billing.admission, self.wall_s)
        self.bench = Bench(billing=self.billing)
        self.bench.join()

    def commit(self) -> None:
        """Write all there is."""
        self.billing.tick()
        self.ledger.commit()

    def submit(self, req_id: bytes = b"r1", **extra: Any) -> RecordingSink:
        return self.bench.submit(req_id, key_id="key", **extra)

    def answer(self, req_id: bytes = b"r1", num: int = 3, *, num_cached: int = 0, sent: bool = True) -> None:
        """Have the worker answer with `num` tokens, all at once; the edge sends them and the end."""
        self.bench.report(b"w1", output(req_id, 0, range(num), "stop", num_cached_tokens=num_cached))
        if sent:
            self.bench.core.sent(req_id, num)
            self.bench.core.closed(req_id)

    def spent(self, payer: str = "alpha") -> int:
        return sum(day.spent_tokens for day in self.billing.admission.account(payer).days.values())


@pytest.fixture(autouse=True)
def kind_of_database(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs on SQLite and on PostgreSQL."""
    monkeypatch.setattr(Till, "url", url)
    yield
    while Till.opened:
        Till.opened.pop().close()


def test_no_token_is_taken_in_before_its_row_is_on_disk(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        sink = till.submit()
        till.bench.report(b"w1", output(b"r1", 0, [1, 2], num_cached_tokens=4))
        till.bench.report(b"w1", output(b"r1", 2, [3], "stop"))
        assert sink.events == [] and till.database.rows() == []
        till.commit()
        assert sink.tokens == [1, 2, 3] and sink.finished is not None and sink.finished.reason == "stop"
        till.bench.core.check_integrity()
        [row] = till.database.rows()
        assert (row.id, row.tenant_id, row.key_id, row.settled_at) == (b"r1", "alpha", "key", None)

    main()


def test_a_row_is_settled_once_the_end_has_been_sent_and_summed_up_by_day(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        till.submit()
        till.commit()
        till.answer(num_cached=4, sent=False)
        till.commit()
        assert till.database.rows()[0].settled_at is None and till.database.days() == []
        till.bench.core.closed(b"r1")
        till.bench.core.closed(b"r1")
        till.commit()
        till.commit()
        cost = PRICE.cost(10, 4, 3)
        [row] = till.database.rows()
        assert row == Row(NOON, b"r1", "alpha", "key", "demo", NOON, "stop", 10, 4, 3, cost)
        assert till.database.days() == [DaySum(20_000, "alpha", "key", "demo", 1, 0, 10, 4, 3, cost)]
        assert till.billing.num_open == 0

    main()


def test_the_choices_of_an_api_request_are_one_row(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        choices = [make_submit(b"c%d" % index, key_id="key", counts_prompt=index == 0)[0] for index in range(3)]
        till.bench.core.submit(*choices)
        till.commit()
        for index in range(3):
            till.answer(b"c%d" % index, 2)
        till.commit()
        [row] = till.database.rows()
        assert (row.id, row.prompt_tokens, row.output_tokens, row.reason) == (b"c0", 10, 6, "stop")

    main()


def test_what_a_killed_gateway_left_running_is_settled_at_what_clients_had_been_sent(tmp_path: Path) -> None:
    def before() -> None:
        till = Till(tmp_path)
        for req_id in (b"streamed", b"whole", b"queued"):
            till.submit(req_id)
        till.commit()
        till.bench.report(b"w1", output(b"streamed", 0, [1, 2, 3], num_cached_tokens=4), output(b"whole", 0, [1, 2]))
        till.bench.core.sent(b"streamed", 2)
        till.commit()
        till.bench.core.sent(b"streamed", 3)  # not written any more
        till.database.close()

    def after() -> None:
        till = Till(tmp_path)
        rows = {
            row.id: (row.reason, row.prompt_tokens, row.cached_tokens, row.output_tokens)
            for row in till.database.rows()
        }
        assert rows == {b"streamed": ("lost", 10, 4, 2), b"whole": ("lost", 0, 0, 0), b"queued": ("lost", 0, 0, 0)}
        assert till.spent("alpha") == till.spent("key") == 12
        till.database.close()

    before()
    after()
    after()  # and not again


def test_budgets_go_on_after_a_restart_for_tenants_and_keys(tmp_path: Path) -> None:
    budget = Terms(budgets=(Budget("tokens", "month", 30),))

    def main(*, fits: bool) -> None:
        till = Till(tmp_path, key=budget)
        sink = till.submit()
        assert (sink.finished is None) == fits, sink.finished
        if fits:
            till.commit()
            till.answer(num=8)
            till.commit()
        elif sink.finished is not None and sink.finished.error is not None:
            assert sink.finished.error.code == "insufficient_quota"
            till.commit()
            assert sum(day.num_refused for day in till.database.days()) == 1
        till.database.close()

    main(fits=True)
    main(fits=False)


def test_a_budget_for_ever_counts_years_that_are_long_over(tmp_path: Path) -> None:
    till = Till(tmp_path)
    for years in (0, 1, 2):
        till.wall_s = NOON - years * 365 * DAY_S
        req_id = b"year%d" % years
        till.submit(req_id)
        till.commit()
        till.answer(req_id, 8)
        till.commit()
    till.database.close()
    till = Till(tmp_path, alpha=Terms(budgets=(Budget("tokens", "total", 3 * 18 + 17),)))
    refused = till.submit(b"one more").finished
    assert refused is not None and refused.error is not None and "17 tokens left" in refused.error.message
    till.database.close()


def test_a_bug_in_the_ledger_ends_what_waits_for_it_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    till = Till(tmp_path)
    monkeypatch.setattr(till.database, "write", lambda batch: 1 / 0)
    sink = till.submit()
    till.commit()
    assert sink.finished.error.code == "unavailable"
    assert "ZeroDivisionError" in capfd.readouterr().err
    monkeypatch.undo()
    till.commit()
    assert till.submit(b"again").finished is None


def test_cancelled_and_never_started_requests_settle_at_what_was_sent(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        till.submit(b"at once")
        till.bench.core.cancel(Cancel(b"at once", num_output_tokens=0))
        till.bench.core.closed(b"at once")
        till.submit(b"later")
        till.commit()
        till.bench.report(b"w1", output(b"later", 0, [1, 2, 3], num_cached_tokens=0))
        till.bench.core.cancel(Cancel(b"later", num_output_tokens=2))
        till.bench.core.closed(b"later")
        till.commit()
        rows = {row.id: (row.reason, row.prompt_tokens, row.output_tokens) for row in till.database.rows()}
        assert rows == {b"at once": ("abort", 0, 0), b"later": ("abort", 10, 2)}
        assert all(row.settled_at is not None for row in till.database.rows())

    main()


def test_a_request_that_moves_to_another_worker_before_its_row_is_written_loses_nothing(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        sink = till.submit()
        till.bench.report(b"w1", output(b"r1", 0, [7, 7]))
        till.bench.join("w2")
        till.bench.core.worker_lost("w1", "died")
        till.commit()
        assert sink.tokens == [] and till.bench.core.num_unfinished == 1
        till.bench.report(b"w2", output(b"r1", 0, [1, 2], "stop", attempt=2))
        assert sink.tokens == [1, 2]
        till.bench.core.check_integrity()

    main()


class FullDisk:
    """Makes a database refuse to write, as far as `allow` says."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self.has_spare = True
        real_write, real_use = database.write, database.use_spare

        def write(batch: Batch) -> None:
            if self.is_full:
                raise StoreError("ledger.db cannot be written (database or disk is full); make room on the disk")
            real_write(batch)

        def renew() -> None:
            if self.is_full or self.has_spare:
                raise StoreError("full") if self.is_full else AssertionError("not asked for")

        def use() -> None:
            if not self.has_spare:
                raise StoreError("full")
            self.is_full = False
            real_use()

        monkeypatch.setattr(database, "write", write)
        monkeypatch.setattr(database, "renew_spare", renew)
        monkeypatch.setattr(database, "use_spare", use)


def test_on_a_full_disk_what_is_new_is_refused_and_what_runs_finishes_and_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        till = Till(tmp_path)
        running = till.submit(b"running")
        till.commit()
        disk = FullDisk(till.database, monkeypatch)
        disk.is_full, disk.has_spare = True, False
        unlucky = till.submit(b"unlucky")
        till.bench.report(b"w1", output(b"unlucky", 0, [1], "stop"))
        till.commit()
        assert (unlucky.finished.error.code, unlucky.tokens) == ("unavailable", [])
        assert [command.req_id for _, command in till.bench.take(Abort)] == [b"unlucky"]
        refused = till.submit(b"refused")
        assert refused.finished.error.code == "unavailable" and refused.finished.error.retry_after_s == RETRY_EVERY_S
        till.answer(b"running", 3)
        assert running.finished.reason == "stop"
        till.commit()
        assert till.database.rows()[0].settled_at is None
        disk.has_spare = True  # somebody made a little room
        till.commit()
        [row] = till.database.rows()
        assert (row.id, row.output_tokens, row.settled_at) == (b"running", 3, NOON)
        assert till.submit(b"still").finished is not None
        monkeypatch.undo()
        till.commit()
        again = till.submit(b"again")
        till.commit()
        till.answer(b"again", 2)
        till.commit()
        assert again.tokens == [0, 1]
        [day] = till.database.days()
        assert (day.num_requests, day.output_tokens, day.num_refused) == (2, 5, 2)
        till.bench.core.check_integrity()

    main()


def test_refusals_on_a_full_disk_take_no_more_room_the_more_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    till = Till(tmp_path)
    disk = FullDisk(till.database, monkeypatch)
    disk.is_full, disk.has_spare = True, False
    for number in range(300):
        till.submit(b"%d" % number)
        till.commit()
    assert len(till.ledger._refused) == 0 and len(till.ledger._num_refused) == 1
    monkeypatch.undo()
    till.commit()
    assert [day.num_refused for day in till.database.days()] == [299]  # the first was admitted, and lost its row


def test_the_thread_writes_what_comes_and_the_rest_when_it_is_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        till = Till(tmp_path)
        token = trio.lowlevel.current_trio_token()
        till.ledger._tell = lambda bills, error: token.run_sync_soon(till.bench.core.reserved, bills, error)
        till.ledger.start()
        sinks = [till.submit(b"r%d" % index, max_tokens=4) for index in range(4)]
        for index in range(4):
            till.answer(b"r%d" % index, 2, sent=False)
        with trio.fail_after(10):
            while not all(sink.finished for sink in sinks):  # noqa: ASYNC110
                await trio.sleep(0.01)
        for index in range(4):
            till.bench.core.closed(b"r%d" % index)
        await trio.to_thread.run_sync(till.ledger.stop, 5)
        assert sum(row.settled_at is not None for row in till.database.rows()) == 4

    trio.run(main)


def test_rows_of_days_long_over_go_and_their_sums_stay(tmp_path: Path) -> None:
    def main() -> None:
        till = Till(tmp_path)
        for day in range(5):
            till.submit(b"day%d" % day)
            till.commit()
            till.answer(b"day%d" % day)
            till.wall_s += DAY_S
        till.submit(b"running")
        till.commit()
        till.ledger.drop_rows()
        kept = [row.id for row in till.database.rows()]
        assert kept == [*(b"day%d" % day for day in range(5 - KEEP_DAYS, 5)), b"running"]
        assert sum(day.num_requests for day in till.database.days()) == 5

    main()


@pytest.mark.parametrize("num", [1, 7, 8, 31, 33, 100])
def test_batches_of_any_size_are_written_whole(tmp_path: Path, url: str, num: int) -> None:
    database = open_ledger(tmp_path, url)
    rows = [Row(NOON + index, b"%d" % index, f"t{index % 3}", "k", "m") for index in range(num)]
    database.write(Batch(rows))
    settled = [Row(row.admitted_at, row.id, row.tenant_id, "k", "m", NOON, "stop", 5, 2, 1, 9) for row in rows]
    database.write(Batch((), settled))
    assert database.rows() == settled
    assert sum(day.num_requests for day in database.days()) == num
    database.close()
