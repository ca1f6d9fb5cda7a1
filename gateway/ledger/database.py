"""The ledger on disk: a row per API request and sums per day, in SQLite or PostgreSQL.

Synchronous, one caller at a time.

A row is keyed by when its request was admitted and by the request's id, so that rows are appended and not scattered.
`settled_at` is null while the request runs: what the gateway finds so when it starts ended with the gateway before it,
and is settled at its last count. Sums per day are written in the same transaction as the rows they sum up, so that
old rows can go without being read. `mark` says since when requests that may still run were admitted: an index of those
would cost as much as the rows. It is moved on now and then, and back whenever it must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from kvasir.gateway.sql.places import open_reader, open_sql
from kvasir.gateway.sql.sql import Sql
from kvasir.protocol.days import day_number

LEDGER_NAME = "ledger.db"
MARK_EVERY_S = 10.0

# Schema version n is what the first n entries make. Released entries are never edited, only followed by new ones.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            admitted_at REAL NOT NULL, id BLOB NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL,
            model TEXT NOT NULL, settled_at REAL, reason TEXT NOT NULL DEFAULT '',
            prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
            output_tokens INTEGER NOT NULL DEFAULT 0, cost INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (admitted_at, id)) STRICT, WITHOUT ROWID""",
        "CREATE TABLE mark (running_since REAL NOT NULL) STRICT",
        "INSERT INTO mark VALUES (0.0)",
        """CREATE TABLE days (
            day INTEGER NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL,
            num_requests INTEGER NOT NULL DEFAULT 0, num_refused INTEGER NOT NULL DEFAULT 0,
            prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
            output_tokens INTEGER NOT NULL DEFAULT 0, cost INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (day, tenant_id, key_id, model)) STRICT, WITHOUT ROWID""",
        "CREATE TABLE spare (room BLOB NOT NULL) STRICT",
    ),
    ("DROP TABLE spare",),
)


class Row(msgspec.Struct, frozen=True, gc=False):
    """One API request as far as it has come. `settled_at` None: it runs. Times are seconds since the epoch."""

    admitted_at: float
    id: bytes
    tenant_id: str
    key_id: str
    model: str
    settled_at: float | None = None
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0


class DaySum(msgspec.Struct, gc=False):
    """What one key of one tenant used of one model on one day (its number since 1 January 1970, UTC)."""

    day: int
    tenant_id: str
    key_id: str
    model: str
    num_requests: int = 0
    num_refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0


class Batch(msgspec.Struct, frozen=True):
    """What one transaction writes: new rows, then new counts of rows, then sums that count refusals."""

    new: Sequence[Row] = ()
    updated: Sequence[Row] = ()
    refused: Sequence[DaySum] = ()


class Database:
    """The open ledger. Made by `open_ledger`."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._running: dict[bytes, float] = {}  # admitted at, by id
        self._mark: float | None = None  # as it is on disk for sure
        self._is_in_doubt = (
            False  # the last transaction failed; if its connection broke, it may be on disk all the same
        )
        self._given_up: list[Row] = []  # rows that were new in it: nobody settles them any more

    def write(self, batch: Batch) -> None:
        """Write `batch`, all or nothing; on disk when it returns.

        Raises:
            StoreError: nothing was written, as far as the caller need know: its new rows count as not written, and what
                it settled may be given again with another batch.
        """
        new = [(row.admitted_at, row.id, row.tenant_id, row.key_id, row.model) for row in batch.new]
        updated = [*self._given_up, *batch.updated]
        mark = self._next_mark([row.admitted_at for row in (*self._given_up, *batch.new)])
        try:
            with self._sql.transaction():
                if mark != self._mark:
                    self._sql.run("UPDATE mark SET running_since = ?", (mark,))
                self._sql.run_many(_INSERT, new)
                if self._is_in_doubt:
                    updated = [row for row in updated if self._sql.run(_RUNS, (row.admitted_at, row.id)).fetchone()]
                self._update(updated, batch.refused)
        except BaseException:
            self._is_in_doubt, self._mark = True, None
            self._given_up += [
                msgspec.structs.replace(row, settled_at=row.admitted_at, reason="lost") for row in batch.new
            ]
            raise
        self._is_in_doubt, self._mark = False, mark
        self._given_up.clear()
        for row in batch.new:
            self._running[row.id] = row.admitted_at
        for row in batch.updated:
            if row.settled_at is not None:
                self._running.pop(row.id, None)

    def recover(self, now: float) -> int:
        """Settle the rows that a dead gateway has left running, at their last counts. Return how many there were.

        Raises:
            StoreError: nothing was written.
        """
        with self._sql.transaction():
            where = "admitted_at >= (SELECT running_since FROM mark) AND settled_at IS NULL"
            query = f"SELECT {', '.join(_ROW)} FROM requests WHERE {where}"
            found = self._sql.run(query).fetchall()
            rows = [msgspec.structs.replace(Row(*fields), settled_at=now, reason="lost") for fields in found]
            self._update(rows, ())
            return len(rows)

    def _update(self, rows: Sequence[Row], refused: Sequence[DaySum]) -> None:
        self._sql.run_many(
            _UPDATE,
            [
                (r.settled_at, r.reason, r.prompt_tokens, r.cached_tokens, r.output_tokens, r.cost, r.admitted_at, r.id)
                for r in rows
            ],
        )
        self._sql.run_many(_ADD, [[getattr(day, name) for name in _DAY] for day in (*_sums(rows), *refused)])

    def _next_mark(self, new: Sequence[float]) -> float | None:
        """Return what the mark is to be when requests that were admitted then begin: no later than any that runs."""
        if not new:
            return self._mark
        if self._mark is not None and self._mark <= min(new) < self._mark + MARK_EVERY_S:
            return self._mark
        return min([*new, *self._running.values()])

    def days(self, first: int = 0) -> list[DaySum]:
        """Return the sums of all days from `first` on, oldest first.

        Raises:
            StoreError: it cannot be read.
        """
        with self._sql.reading():
            query = f"{_DAYS} WHERE day >= ? ORDER BY day"
            return [DaySum(*fields) for fields in self._sql.run(query, (first,))]

    def used_before(self, first: int) -> list[tuple[str, str, int, int]]:
        """Return tenant, key, tokens and cost of all that was used before the day `first`.

        Raises:
            StoreError: it cannot be read.
        """
        with self._sql.reading():
            return self._sql.run(
                "SELECT tenant_id, key_id, CAST(sum(prompt_tokens + output_tokens) AS BIGINT), "
                "CAST(sum(cost) AS BIGINT) FROM days WHERE day < ? GROUP BY tenant_id, key_id",
                (first,),
            ).fetchall()

    def rows(self) -> list[Row]:
        """Return all rows that are kept, oldest first. For tests and the curious."""
        with self._sql.reading():
            query = f"SELECT {', '.join(_ROW)} FROM requests ORDER BY admitted_at, id"
            return [Row(*fields) for fields in self._sql.run(query)]

    def drop_rows(self, before: float, limit: int = 5_000) -> int:
        """Drop up to `limit` settled rows of requests admitted before that time, oldest first; return how many went.

        Their sums stay.

        Raises:
            StoreError: nothing was dropped.
        """
        with self._sql.transaction():
            done = self._sql.run(
                "DELETE FROM requests WHERE (admitted_at, id) IN (SELECT admitted_at, id FROM requests "
                "WHERE admitted_at < ? AND settled_at IS NOT NULL ORDER BY admitted_at LIMIT ?)",
                (before, limit),
            )
            return done.rowcount

    def use_spare(self) -> None:
        """Give up the room that was put aside, for rows that must be settled on a full disk."""
        self._sql.use_spare()

    def renew_spare(self) -> None:
        """Have room put aside, and see that something can be written.

        Raises:
            StoreError: there is no room, or the database cannot be used.
        """
        self._sql.renew_spare()
        with self._sql.transaction():
            self._sql.run("UPDATE mark SET running_since = running_since")

    def close(self) -> None:
        self._sql.close()


def open_ledger(state_dir: Path, url: str = "") -> Database:
    """Open the ledger at `url` or in `state_dir`; a new one is made, an older schema is brought up to date.

    Raises:
        StoreError: unreadable, read-only, no ledger, damaged, of a newer schema, in use, away, or the disk is full.
    """
    database = Database(open_sql(url or state_dir / LEDGER_NAME, "ledger", MIGRATIONS))
    try:
        database.renew_spare()
    except BaseException:
        database.close()
        raise
    return database


def read_days(state_dir: Path, url: str, first: int, last: int) -> list[DaySum]:
    """Return the sums of the days from `first` to `last`, oldest first, while another thread may write. Blocking.

    Raises:
        StoreError: it cannot be read.
    """
    place = url or state_dir / LEDGER_NAME
    if isinstance(place, Path) and not place.exists():
        return []
    with closing(open_reader(place)) as sql, sql.reading():
        rows = sql.run(f"{_DAYS} WHERE day BETWEEN ? AND ? ORDER BY day", (first, last))
        return [DaySum(*fields) for fields in rows]


_ROW = Row.__struct_fields__
_DAY = DaySum.__struct_fields__
_DAYS = f"SELECT {', '.join(_DAY)} FROM days"
_INSERT = "INSERT INTO requests (admitted_at, id, tenant_id, key_id, model) VALUES (?, ?, ?, ?, ?)"
_UPDATE = (
    "UPDATE requests SET settled_at = ?, reason = ?, prompt_tokens = ?, cached_tokens = ?, output_tokens = ?, cost = ? "
    "WHERE admitted_at = ? AND id = ? AND settled_at IS NULL"
)
_RUNS = "SELECT 1 FROM requests WHERE admitted_at = ? AND id = ? AND settled_at IS NULL"
_ADD = (
    f"INSERT INTO days ({', '.join(_DAY)}) VALUES ({', '.join('?' * len(_DAY))}) "
    "ON CONFLICT (day, tenant_id, key_id, model) DO UPDATE SET "
    + ", ".join(f"{name} = days.{name} + excluded.{name}" for name in _DAY[4:])
)


def _sums(rows: Iterable[Row]) -> list[DaySum]:
    """Return what those of `rows` that are settled add to the sums per day."""
    sums: dict[tuple[int, str, str, str], DaySum] = {}
    for row in rows:
        if row.settled_at is None:
            continue
        key = day_number(row.admitted_at), row.tenant_id, row.key_id, row.model
        day = sums.get(key)
        if day is None:
            day = sums[key] = DaySum(*key)
        day.num_requests += 1
        day.prompt_tokens += row.prompt_tokens
        day.cached_tokens += row.cached_tokens
        day.output_tokens += row.output_tokens
        day.cost += row.cost
    return list(sums.values())
