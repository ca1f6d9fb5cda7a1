"""What only a ledger in a file can meet: a full disk, a file that is none, a copy."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.ledger.database import Batch, Row, open_ledger
from kvasir.gateway.sql.sqlite import copy_sqlite
from kvasir.protocol.errors import StoreError
from tests.gateway.ledger.test_ledger import NOON, Till


def test_the_spare_room_is_enough_to_settle_what_runs_when_sqlite_itself_says_that_it_is_full(tmp_path: Path) -> None:
    till = Till(tmp_path)
    sql = till.database._sql.connection  # type: ignore[attr-defined]
    running = [b"%d" % number for number in range(200)]
    till.bench.join("w2", max_requests=400, num_blocks=10_000)
    for req_id in running:
        till.submit(req_id, max_tokens=4)
    till.commit()
    sql.execute(f"PRAGMA max_page_count = {sql.execute('PRAGMA page_count').fetchone()[0]}")
    for number in range(20_000):  # until the file is full
        till.submit(b"x%d" % number)
        till.bench.core.cancel(Cancel(b"x%d" % number, num_output_tokens=0))
        till.bench.core.closed(b"x%d" % number)
        if number % 50 == 0:
            till.commit()
        if till.ledger.refusal() is not None:
            break
    assert till.ledger.refusal() is not None
    for req_id in running:
        till.bench.core.cancel(Cancel(req_id, num_output_tokens=0))
        till.bench.core.closed(req_id)
    till.commit()
    rows = {row.id: row.settled_at for row in till.database.rows()}
    assert all(rows[req_id] is not None for req_id in running)
    sql.execute("PRAGMA max_page_count = 1000000")
    till.commit()
    assert till.ledger.refusal() is None


def test_a_ledger_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(StoreError, match="schema version 99"):
        open_ledger(tmp_path)
    (tmp_path / "ledger.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a SQLite database"):
        open_ledger(tmp_path)


def test_a_backup_is_a_ledger_that_opens(tmp_path: Path) -> None:
    database = open_ledger(tmp_path)
    database.write(Batch([Row(NOON, b"1", "t", "k", "m")]))
    (tmp_path / "copy").mkdir()
    copy_sqlite(tmp_path / "ledger.db", tmp_path / "copy" / "ledger.db")
    database.close()
    copy = open_ledger(tmp_path / "copy")
    assert [row.id for row in copy.rows()] == [b"1"]
    copy.close()
