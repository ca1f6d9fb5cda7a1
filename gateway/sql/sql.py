"""Where a gateway keeps its books: SQLite files in its state directory, or PostgreSQL by URL.

A statement is written once, in what both understand, with `?` for values. Schemas are written in SQLite's words;
`postgres.py` translates their types.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Migrations = Sequence[Sequence[str]]  # schema version n is what the first n entries make


class Rows(Protocol):
    """What a statement has found, row by row; `rowcount`: how many rows it changed."""

    @property
    def rowcount(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


class Sql(Protocol):
    """An open database. One caller at a time, from any thread. `name` is for messages and holds no password."""

    name: str

    def transaction(self) -> AbstractContextManager[None]:
        """Begin a transaction that writes; commit it at the end of the block, or undo it.

        Raises:
            StoreError: nothing was written; or, if the connection broke in the commit, perhaps all of it.
        """

    def reading(self) -> AbstractContextManager[None]:
        """Explain what goes wrong in the block, which reads.

        Raises:
            StoreError: it cannot be read.
        """

    def run(self, statement: str, values: Sequence[Any] = ()) -> Rows:
        """Run one statement inside one of the blocks above."""

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement that returns nothing once for each of `rows`."""

    def renew_spare(self) -> None:
        """Have room put aside on the disk, if this process writes to it: what is written until `use_spare` lies beside.

        Raises:
            StoreError: there is no room, or none to work with beside it.
        """

    def use_spare(self) -> None:
        """Give up the room that was put aside, so that little can be written on a full disk until `renew_spare`."""

    def close(self) -> None: ...
