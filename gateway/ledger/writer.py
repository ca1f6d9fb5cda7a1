"""The ledger's thread: takes what the core books and writes it, one commit at a time.

A request does not wait for its row: it is queued and computed meanwhile, and only its first token does. So a commit is
hidden behind the prefill. A commit costs some 0.2 ms of CPU however many rows it has: under load they begin
`COMMIT_EVERY_S` apart and carry what has gathered, while a lone request's begins at once.

The core's thread only appends to deques, which both threads may touch at any time. What was settled is taken before
what is new: then every settled row is there already, or in the same commit.

When the disk is full, what is new is refused (503) and what runs goes on: what it came to is written into room that was
put aside, or kept until there is some.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.gateway.core.admission import Bill
from kvasir.gateway.ledger.database import Batch, Database, DaySum, Row
from kvasir.gateway.log import log
from kvasir.protocol.days import DAY_S, day_number
from kvasir.protocol.errors import KvasirError, StoreError, Unavailable

COMMIT_EVERY_S = 0.01
RETRY_EVERY_S = 1.0
DROP_EVERY_S = 60.0
KEEP_DAYS = 2  # rows of so many days that are over are kept one by one

Tell = Callable[[Sequence[Bill], KvasirError | None], None]


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """`num_waiting`: rows, new and changed, that the next commit writes."""

    is_writable: bool
    num_commits: int
    num_waiting: int


class LedgerWriter:
    """A `Ledger`. `tell` is called on the writer's thread with bills whose rows are on disk, or cannot be written."""

    def __init__(
        self, database: Database, tell: Tell, wall_clock: Callable[[], float] = time.time, *, keep_days: int = KEEP_DAYS
    ) -> None:
        self._database = database
        self._tell = tell
        self._wall_clock = wall_clock
        self._keep_days = keep_days
        self._new: deque[Bill] = deque()
        self._settled: deque[Row] = deque()
        self._saved: deque[Row] = deque()
        self._refused: deque[tuple[int, str, str, str]] = deque()
        self._num_refused: Counter[tuple[int, str, str, str]] = Counter()  # taken, and not written yet
        self._error: StoreError | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._dropped_at = 0.0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self.num_commits = 0

    # ---- the core's side -----------------------------------------------------------------------------------------

    def refusal(self) -> KvasirError | None:
        """Return why nothing new may begin, None while rows can be written."""
        if self._error is None:
            return None
        return Unavailable(f"the ledger cannot be written: {self._error.message}", retry_after_s=RETRY_EVERY_S)

    def reserve(self, bill: Bill) -> None:
        """Have a row written for `bill` with the next commit."""
        self._new.append(bill)
        if not self._wake.is_set():  # which costs less than to set it once more
            self._wake.set()

    def save(self, bills: Sequence[Bill]) -> None:
        """Have written what running `bills` have been sent so far."""
        for bill in bills:
            self._saved.append(_row(bill, bill.sent_prompt, bill.sent_cached, bill.sent_output))
        self._wake.set()

    def settle(self, bill: Bill) -> None:
        """Have written what `bill` has come to, with the next commit."""
        if not bill.is_lost:
            now = self._wall_clock()
            self._settled.append(_row(bill, bill.prompt_tokens, bill.cached_tokens, bill.output_tokens, now))

    def refused(self, tenant_id: str, key_id: str, model: str) -> None:
        """Count an API request that was refused; written with the next commit."""
        self._refused.append((day_number(self._wall_clock()), tenant_id, key_id, model))

    def statistics(self) -> LedgerStatistics:
        """Return the counters."""
        num_waiting = len(self._new) + len(self._saved) + len(self._settled)
        return LedgerStatistics(self._error is None, self.num_commits, num_waiting)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Have what is left written and the thread ended. Blocks for at most `timeout_s`. Idempotent."""
        if not self._thread.is_alive():
            return
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout_s)
        left = len(self._settled)
        if left:
            log("ledger_incomplete", rows=left, remedy="the next start settles them at their last counts")

    def commit(self) -> None:
        """Write what has gathered in one transaction, and tell of the rows that are on disk, or cannot be."""
        if self._error is not None:
            self._try_again()
        counts = {row.id: row for row in _take(self._saved)}
        settled = _take(self._settled)
        counts.update((row.id, row) for row in settled)
        self._num_refused.update(_take(self._refused))
        new = _take(self._new)
        if not (counts or self._num_refused or new):
            return
        try:
            if self._error is not None:
                raise self._error
            refused = [DaySum(*key, num_refused=count) for key, count in self._num_refused.items()]
            self._write(Batch([_new_row(bill) for bill in new], list(counts.values()), refused))
            self._num_refused.clear()
        except Exception as error:  # whatever it is: requests wait for this thread
            self._close(error)
            lost = {bill.bill_id for bill in new}  # they have no row, and their requests end with an error
            for bill in new:
                bill.is_lost = True
            self._settled.extendleft(row for row in reversed(settled) if row.id not in lost)
        if new:
            self._tell(new, self.refusal())

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(RETRY_EVERY_S)
            self._wake.clear()
            began = time.monotonic()
            self.commit()
            if self._error is None and began - self._dropped_at >= DROP_EVERY_S:
                self.drop_rows()
            every_s = COMMIT_EVERY_S if self._error is None else RETRY_EVERY_S
            self._stopping.wait(max(0.0, began + every_s - time.monotonic()))
        self.commit()

    def _try_again(self) -> None:
        """See whether rows can be written again. If not, settle what has ended in the room that was put aside."""
        try:
            self._database.renew_spare()
        except Exception:
            settled = _take(self._settled)
            if settled:
                try:
                    self._database.use_spare()
                    self._write(Batch((), settled))
                except Exception:
                    self._settled.extendleft(reversed(settled))
        else:
            self._error = None
            log("ledger_open")

    def _close(self, error: Exception) -> None:
        if not isinstance(error, StoreError):
            log("bug", where="ledger", trace="".join(traceback.format_exception(error)))
            error = StoreError("the ledger has failed; the gateway's log says how")
        if self._error is None:
            log("ledger_closed", error=error.message, advice="new requests are refused until it can be written")
        self._error = error

    def _write(self, batch: Batch) -> None:
        self._database.write(batch)
        self.num_commits += 1

    def drop_rows(self) -> None:
        """Drop some thousand rows that are old enough, and come back soon if there may be more."""
        before = (day_number(self._wall_clock()) - self._keep_days) * DAY_S
        try:
            num = self._database.drop_rows(before)
        except StoreError as error:
            log("ledger_rows_stay", error=error.message)
            num = 0
        if not num:
            self._dropped_at = time.monotonic()


def _take(waiting: deque[Any]) -> list[Any]:
    """Take out what waits now; the other thread may append meanwhile."""
    return [waiting.popleft() for _ in range(len(waiting))]


def _new_row(bill: Bill) -> Row:
    return Row(bill.admitted_at, bill.bill_id, bill.tenant_id, bill.key_id, bill.model)


def _row(bill: Bill, num_prompt: int, num_cached: int, num_output: int, settled_at: float | None = None) -> Row:
    cost = bill.price.cost(num_prompt, num_cached, num_output)
    reason = bill.reason if settled_at is not None else ""
    counts = num_prompt, num_cached, num_output, cost
    return Row(bill.admitted_at, bill.bill_id, bill.tenant_id, bill.key_id, bill.model, settled_at, reason, *counts)
