"""What only a ledger in a file can meet: a full disk, a file that is none, a copy."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.ledger.database import Batch, Row, open_ledger
from kvasir.gateway.sql.sqlite import copy_sqlite
from kvasir.protocol.errors import StoreError
from tests.gateway.ledger.test_ledger import NOON, Till

ROOT = Path(__file__).resolve().parents[3]


def fill_the_disk(folder: Path) -> None:
    """Run a ledger in `folder`, on a disk of its own, until that is full and while it is, then with room again."""
    till = Till(folder)
    till.bench.join("w2", max_requests=2_000, num_blocks=10_000)
    number = 0

    def come(num_requests: int) -> list[bytes]:
        nonlocal number
        first, number = number, number + num_requests
        found = [b"%d" % each for each in range(first, number)]
        return [req_id for req_id in found if till.submit(req_id, max_tokens=4).finished is None]

    def end(requests: list[bytes]) -> None:
        for req_id in requests:
            till.bench.core.cancel(Cancel(req_id, num_output_tokens=0))
            till.bench.core.closed(req_id)

    def serve(num_rounds: int) -> None:
        for _ in range(num_rounds):
            requests = come(20)
            till.commit()
            end(requests)

    serve(150)
    running = come(600)
    till.commit()
    with (folder / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(max(0, shutil.disk_usage(folder).free - (200 << 10))))
    serve(400)
    assert till.ledger.refusal() is not None, "the disk was never full"
    for start in range(0, 600, 50):
        end(running[start : start + 50])
        till.commit()
    till.commit()
    assert till.ledger.statistics().num_waiting == 0, "what ended on the full disk waits in memory"
    assert all(row.settled_at is not None for row in till.database.rows())
    (folder / "filler").unlink()
    serve(3)
    till.commit()
    assert till.ledger.refusal() is None
    rows, days = till.database.rows(), till.database.days()
    assert len(rows) == sum(day.num_requests for day in days), "a row was lost or counted twice"


def test_on_a_disk_that_is_really_full_everything_that_ends_is_settled(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=12m tmpfs {tmp_path} && echo mounted && exec {sys.executable} -c "$1"'
    code = f"from {__name__} import *; fill_the_disk(Path({str(tmp_path)!r}))"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("needs util-linux")
    if "mounted" not in done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ledger_closed") == 1, "it opens and closes again and again"


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
