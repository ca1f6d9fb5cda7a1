"""SQLite as this gateway uses it: transactions, and errors that say which file, what is wrong, and what now."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvasir.gateway.sql.sql import Migrations
from kvasir.protocol.errors import StoreError

CHECKED_BYTES = 64 << 20  # a larger file is not read through at every start
SPARE_BYTES = 1 << 20
ROOM_BYTES = 6 << 20  # the WAL takes four before it is copied into the file
_NEEDS_ACCESS = "the gateway's user needs read and write access to it and its directory"


class Sqlite:
    """A `Sql` over one file. The caller holds the directory's lock (`gateway.lock`), so that nobody else writes."""

    def __init__(self, path: Path, *, is_reader: bool = False) -> None:
        self.name = str(path)
        self._spare = path.with_suffix(".spare")
        with explained(path):
            if is_reader:
                target = f"{path.resolve().as_uri()}?mode=ro"
            else:
                target = path.resolve().as_uri()
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite says "unable to open" for every reason
            self.connection = sqlite3.connect(
                target, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
            )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.reading():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # an error may have ended the transaction by itself
                    self.connection.execute("ROLLBACK")
                raise

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.name)

    def run(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(statement, values)

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        self.connection.executemany(statement, rows)

    def renew_spare(self) -> None:
        fresh = self._spare.with_suffix(".fresh")  # beside the old one: if there is room for both, there is some for us
        with explained(self.name):
            try:
                if shutil.disk_usage(fresh.parent).free < ROOM_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                fresh.write_bytes(os.urandom(SPARE_BYTES))  # zeros may take no room
                fresh.replace(self._spare)
            finally:
                fresh.unlink(missing_ok=True)
            self.connection.execute("PRAGMA wal_autocheckpoint = 1000")

    def use_spare(self) -> None:
        with explained(self.name):
            # All writes go to the WAL first. Copied from there into the file they would need their room twice.
            self.connection.execute("PRAGMA wal_autocheckpoint = 0")
            self._spare.unlink(missing_ok=True)

    def close(self) -> None:
        self.connection.close()


def open_sqlite(path: Path, migrations: Migrations) -> Sqlite:
    """See `sql.open_sql`."""
    sql = Sqlite(path)
    try:
        with sql.reading():
            _prepare(sql, migrations)
    except BaseException:
        sql.close()
        raise
    return sql


def copy_sqlite(path: Path, copy: Path) -> None:
    """Write a copy to `copy`, which does not exist, while another connection may write. Blocking.

    Raises:
        StoreError: it cannot be written.
    """
    with contextlib.closing(Sqlite(path, is_reader=True)) as sql, explained(copy):
        sql.run("VACUUM INTO ?", (str(copy),))


def _prepare(sql: Sqlite, migrations: Migrations) -> None:
    version = sql.run("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise StoreError(
            f"{sql.name} has schema version {version}, this gateway knows up to {len(migrations)}; "
            "start the newer gateway that wrote it or restore an older backup"
        )
    if version == 0 and sql.run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"{sql.name} is a database of something else; move it away or choose another state directory")
    if Path(sql.name).stat().st_size <= CHECKED_BYTES and sql.run("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise StoreError(f"{sql.name} is damaged; restore a backup")
    sql.run("PRAGMA journal_mode = WAL")
    sql.run("PRAGMA synchronous = FULL")
    sql.run("PRAGMA foreign_keys = ON")
    # Always writes something: a read-only file or a full disk is noticed at the start, not at the first change.
    with sql.transaction():
        for statements in migrations[version:]:
            for statement in statements:
                sql.run(statement)
        sql.run(f"PRAGMA user_version = {len(migrations)}")


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn what SQLite and the system say into a `StoreError`: which file, what, what now."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, msgspec.MsgspecError) as error:
        said = str(error)
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the primary code
            case sqlite3.SQLITE_NOTADB:
                text = "is not a SQLite database; move it away or choose another state directory"
            case sqlite3.SQLITE_CORRUPT:
                text = f"is damaged ({said}); restore a backup"
            case sqlite3.SQLITE_READONLY:
                text = f"cannot be written ({said}); {_NEEDS_ACCESS}"
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                text = "is locked by another process; stop whatever has it open"
            case sqlite3.SQLITE_FULL:
                text = f"cannot be written ({said}); make room on the disk"
            case _ if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                text = f"cannot be written ({error.strerror}); make room on the disk"
            case _ if isinstance(error, OSError):
                text = f"cannot be written ({error.strerror}); {_NEEDS_ACCESS}"
            case _ if isinstance(error, (ValueError, msgspec.MsgspecError)):
                text = f"is damaged ({said}); restore a backup"
            case _:
                text = f"cannot be used: {said}; check the disk and the file"
        raise StoreError(f"{path} {text}") from None
