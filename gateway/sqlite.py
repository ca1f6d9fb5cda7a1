"""SQLite as this gateway uses it: transactions, and errors that say which file, what is wrong, and what now."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvasir.protocol.errors import StoreError

_NEEDS_ACCESS = "the gateway's user needs read and write access to it and its directory"


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Begin a transaction that writes; commit it at the end of the block, or undo it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # an error may have ended the transaction by itself
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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
            case _ if isinstance(error, OSError):
                text = f"cannot be written ({error.strerror}); {_NEEDS_ACCESS}"
            case _ if isinstance(error, (ValueError, msgspec.MsgspecError)):
                text = f"is damaged ({said}); restore a backup"
            case _:
                text = f"cannot be used: {said}; check the disk and the file"
        raise StoreError(f"{path} {text}") from None
