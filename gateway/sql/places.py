"""Which database a place is in: a path is a SQLite file, a text the URL of a PostgreSQL database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvasir.gateway.sql.sql import Migrations, Sql
from kvasir.gateway.sql.sqlite import Sqlite, open_sqlite
from kvasir.protocol.errors import StoreError

Place = Path | str


def open_sql(place: Place, room: str, migrations: Migrations) -> Sql:
    """Open `room` for writing, alone: a new database is given its schema, an older schema is brought up to date.

    `place`: SQLite's file, or the URL of a PostgreSQL database, which all rooms share.

    Raises:
        StoreError: it cannot be used; says why, and what now.
    """
    if isinstance(place, Path):
        return open_sqlite(place, migrations)
    sql: Sql = _postgres().open_postgres(place, room, migrations)
    return sql


def open_reader(place: Place) -> Sql:
    """Open what another connection of this process may be writing to, for reading.

    Raises:
        StoreError: it cannot be read.
    """
    if isinstance(place, Path):
        return Sqlite(place, is_reader=True)
    sql: Sql = _postgres().Postgres(place)
    return sql


def _postgres() -> Any:
    try:
        from kvasir.gateway.sql import postgres
    except ImportError as error:
        raise StoreError(
            f"PostgreSQL needs one more package ({error}); install it: pip install 'kvasir-gateway[postgres]'"
        ) from None
    return postgres
