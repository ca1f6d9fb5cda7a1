"""PostgreSQL as this gateway uses it: one connection a room, which comes back by itself after the server was away.

The first thing a connection does is to take its room's advisory lock. The server drops it with the connection, so one
gateway at a time writes, and one that was killed is out of the way at once. A pooler that shares connections between
transactions (PgBouncer's default) breaks that: connect to the server itself.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.numeric import Int8Dumper

from kvasir.gateway.sql.sql import Migrations
from kvasir.protocol.errors import StoreError

STATEMENT_S = 5.0  # the server gives up a statement that takes longer, and with it the lock of a gateway that is gone
ANSWER_S = 6.0  # a server that has not answered by then hangs: its connection is closed
_DEFAULTS = {"connect_timeout": "5", "tcp_user_timeout": "5000", "application_name": "kvasir"}
_LOCK_IDS = {"tenants": 0x6B76_0001, "ledger": 0x6B76_0002}
_LOCK_WAIT = "3s"  # the server may need a moment to see that the gateway before us is gone


class Postgres:
    """A `Sql` over one connection. `room` empty: it only reads, and takes no lock."""

    def __init__(self, url: str, room: str = "") -> None:
        try:
            settings = {**_DEFAULTS, **conninfo_to_dict(url)}
        except psycopg.ProgrammingError:  # its text may hold the password
            raise StoreError("--database is no URL of PostgreSQL's; try postgresql://USER@HOST:5432/NAME") from None
        shown = {name: settings.get(name, "") for name in ("host", "port", "dbname")}
        self._settings = make_conninfo("", **settings)
        self.name = "the database postgresql://{host}:{port}/{dbname}".format(**shown)
        self._room = room
        self._connecting = threading.Lock()
        self._connection: _Connection | None = None
        with self.reading():
            pass

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.reading():
            try:
                self.run("BEGIN")
            except psycopg.OperationalError:  # it broke while nobody used it, and nothing has been written yet
                self._connect()
                self.run("BEGIN")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                with contextlib.suppress(psycopg.Error):
                    self.run("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        try:
            self._connect()
            yield
        except psycopg.errors.LockNotAvailable:
            raise StoreError(f"{self.name} is in use by another gateway; stop that one or name another") from None
        except psycopg.errors.DiskFull as error:
            raise StoreError(f"{self.name} has no room: {_line(error)}; make room on its disk") from None
        except psycopg.OperationalError as error:
            raise StoreError(f"{self.name} cannot be used: {_line(error)}; start it, or correct --database") from None
        except psycopg.Error as error:
            raise StoreError(f"{self.name} refused a statement: {_line(error)}; its log may say more") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise StoreError(f"{self.name} is damaged ({_line(error)}); restore a backup") from None

    def run(self, statement: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        assert self._connection is not None
        return self._connection.execute(_translated(statement), values or None)

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        assert self._connection is not None
        with self._connection.cursor() as cursor:
            cursor.executemany(_translated(statement), rows)

    def renew_spare(self) -> None:
        """Nothing: the disk is the server's."""

    def use_spare(self) -> None:
        """Nothing."""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> None:
        """Have a connection that was alive when last used, and our lock."""
        with self._connecting:
            if self._connection is not None and not self._connection.closed:
                return
            connection = _Connection.connect(self._settings, autocommit=True)
            try:
                connection.adapters.register_dumper(int, Int8Dumper)  # one type for all: statements stay prepared
                connection.execute(f"SET synchronous_commit = on; SET statement_timeout = '{STATEMENT_S}s'")
                if self._room:
                    connection.execute(f"SET lock_timeout = '{_LOCK_WAIT}'")
                    connection.execute(f"SELECT pg_advisory_lock({_LOCK_IDS[self._room]})")
            except BaseException:
                connection.close()
                raise
            self._connection = connection


class _Connection(psycopg.Connection[Any]):
    """One whose every wait for the server has a deadline. What has not answered by then is closed."""

    def wait(self, gen: Generator[Any, Any, Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, timeout=ANSWER_S if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {ANSWER_S:g} s") from None


def open_postgres(url: str, room: str, migrations: Migrations) -> Postgres:
    """See `sql.open_sql`."""
    sql = Postgres(url, room)
    try:
        with sql.transaction():
            _prepare(sql, room, migrations)
    except BaseException:
        sql.close()
        raise
    return sql


def _prepare(sql: Postgres, room: str, migrations: Migrations) -> None:
    sql.run("SELECT pg_advisory_xact_lock(?)", (_LOCK_IDS["tenants"] - 1,))  # rooms share what follows
    sql.run("CREATE TABLE IF NOT EXISTS kvasir_schema (room TEXT PRIMARY KEY, version BIGINT NOT NULL)")
    sql.run(_APPEND_ONLY)
    found = sql.run("SELECT version FROM kvasir_schema WHERE room = ?", (room,)).fetchone()
    version = found[0] if found else 0
    if version > len(migrations):
        raise StoreError(
            f"{sql.name} has schema version {version} of {room}, this gateway knows up to {len(migrations)}; "
            "start the newer gateway that wrote it or restore an older backup"
        )
    for statements in migrations[version:]:
        for statement in statements:
            sql.run(_translated_schema(statement))
    sql.run(
        "INSERT INTO kvasir_schema VALUES (?, ?) ON CONFLICT (room) DO UPDATE SET version = excluded.version",
        (room, len(migrations)),
    )


_APPEND_ONLY = """CREATE OR REPLACE FUNCTION kvasir_append_only() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'append only'; END $$"""
_IN_POSTGRES = (
    (r"\)\s*STRICT, WITHOUT ROWID$", ")"),
    (r"\)\s*STRICT$", ", rowid BIGINT GENERATED ALWAYS AS IDENTITY)"),
    (r"\bREAL\b", "DOUBLE PRECISION"),
    (r"\bBLOB\b", "BYTEA"),
    (r"\bINTEGER\b", "BIGINT"),
    (r"\bx''", "''"),
    (r"BEGIN SELECT RAISE\(ABORT, 'append only'\); END$", "EXECUTE FUNCTION kvasir_append_only()"),
)


def _translated_schema(statement: str) -> str:
    """Return a statement of a schema, written for SQLite, in PostgreSQL's words."""
    for pattern, replacement in _IN_POSTGRES:
        statement = re.sub(pattern, replacement, statement)
    return statement


@functools.cache
def _translated(statement: str) -> bytes:
    return statement.replace("?", "%s").encode()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
