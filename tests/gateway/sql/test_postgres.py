"""PostgreSQL: a server that goes away and comes back, and connections that break in the worst moment."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'kvasir-gateway[postgres]'")
import psycopg

from kvasir.gateway.ledger.database import open_ledger, read_days
from kvasir.gateway.sql import postgres as module
from kvasir.gateway.tenants.directory import PublishedPrefix, Tenant
from kvasir.gateway.tenants.store import AuditEntry, open_store
from kvasir.protocol.errors import StoreError
from tests.gateway.ledger.test_ledger import Till
from tests.postgres import Postgres

ENTRY = AuditEntry(1.0, "tester", "tenant_create", "x")


@pytest.fixture
def address(postgres: Postgres) -> str:
    """The URL of an empty database."""
    return postgres.new_url()


@pytest.fixture
def till(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Till]:
    monkeypatch.setattr(Till, "url", address)
    till = Till(tmp_path)
    yield till
    till.database.close()


@contextlib.contextmanager
def away(postgres: Postgres) -> Iterator[None]:
    """The server is down for the length of the block."""
    postgres.stop()
    try:
        yield
    finally:
        postgres.start()


def settled(till: Till) -> dict[bytes, tuple[str, int]]:
    """Return reason and output tokens of all rows, which must be settled and summed up once."""
    rows = till.database.rows()
    assert all(row.settled_at is not None for row in rows)
    assert sum(day.num_requests for day in till.database.days()) == len(rows)
    assert sum(day.output_tokens for day in till.database.days()) == sum(row.output_tokens for row in rows)
    return {row.id: (row.reason, row.output_tokens) for row in rows}


def test_a_server_that_is_restarted_between_two_commits_is_not_even_noticed(till: Till, postgres: Postgres) -> None:
    till.submit()
    till.commit()
    with away(postgres):
        pass
    sink = till.submit(b"r2")
    till.commit()
    till.answer()
    till.answer(b"r2")
    till.commit()
    assert sink.finished.error is None
    assert settled(till) == {b"r1": ("stop", 3), b"r2": ("stop", 3)}


def test_while_the_server_is_away_new_requests_are_refused_and_what_runs_finishes_and_settles_later(
    till: Till, postgres: Postgres
) -> None:
    running = till.submit(b"running")
    till.commit()
    with away(postgres):
        caught = till.submit(b"caught")  # its row could not be written
        till.commit()
        assert caught.finished is not None and caught.finished.error is not None
        assert caught.finished.error.code == "unavailable"
        refused = till.submit(b"refused").finished
        assert refused is not None and refused.error is not None and "cannot be used" in refused.error.message
        till.answer(b"running")
        assert running.finished.reason == "stop"
        till.commit()
    till.commit()
    assert till.ledger.refusal() is None
    assert settled(till) == {b"running": ("stop", 3)}
    till.submit(b"after")
    till.commit()
    till.answer(b"after")
    till.commit()
    assert settled(till)[b"after"] == ("stop", 3)


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_connection_that_breaks_in_a_commit_settles_every_row_once_whether_it_was_committed_or_not(
    till: Till, monkeypatch: pytest.MonkeyPatch, *, is_committed: bool
) -> None:
    till.submit(b"ended")
    till.commit()
    till.answer(b"ended")
    sql: Any = till.database._sql
    real_run = sql.run

    def run(statement: str, values: Any = ()) -> Any:
        if statement != "COMMIT":
            return real_run(statement, values)
        if is_committed:
            real_run("COMMIT")
        sql.close()
        raise psycopg.OperationalError("the connection broke")

    monkeypatch.setattr(sql, "run", run)
    caught = till.submit(b"caught")
    till.commit()
    assert caught.finished is not None and caught.finished.error is not None
    monkeypatch.undo()
    till.commit()
    expected = {b"ended": ("stop", 3)} | ({b"caught": ("lost", 0)} if is_committed else {})
    assert settled(till) == expected
    till.commit()
    assert settled(till) == expected


def test_a_server_that_hangs_is_away_until_it_goes_on(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = till.database._sql.run("SELECT pg_backend_pid()").fetchone()[0]
    monkeypatch.setattr(module, "ANSWER_S", 0.3)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=r"no answer within 0\.3 s"), till.database._sql.transaction():
            pass
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    till.submit()
    till.commit()
    assert [row.id for row in till.database.rows()] == [b"r1"]


def test_the_server_gives_up_a_statement_that_takes_too_long(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STATEMENT_S", 0.1)
    store = open_store(tmp_path, address)
    with pytest.raises(StoreError, match="statement timeout"), store._sql.transaction():
        store._sql.run("SELECT pg_sleep(60)")
    store.write([Tenant("t1", "acme")], ENTRY)
    store.close()


def test_one_gateway_at_a_time_has_a_database(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_WAIT", "10ms")
    store, ledger = open_store(tmp_path, address), open_ledger(tmp_path, address)
    for open_again in (open_store, open_ledger):
        with pytest.raises(StoreError, match="in use by another gateway"):
            open_again(tmp_path, address)
    assert read_days(tmp_path, address, 0, 10) == []  # a reader needs no lock
    store.close()
    ledger.close()
    open_store(tmp_path, address).close()
    open_ledger(tmp_path, address).close()


def test_tenants_are_there_again_after_the_server_was_away(tmp_path: Path, address: str, postgres: Postgres) -> None:
    store = open_store(tmp_path, address)
    store.write([Tenant("t1", "acme")], ENTRY)
    with away(postgres):
        with pytest.raises(StoreError, match="cannot be used"):
            store.write([Tenant("t2", "globex")], ENTRY)
        with pytest.raises(StoreError, match="cannot be used"):
            store.load()
    store.write([Tenant("t3", "initech")], ENTRY)
    assert [record.name for record in store.load()] == ["acme", "initech"] and store.verify_audit() == 2
    store.close()


def test_what_postgresql_cannot_hold_is_refused(tmp_path: Path, address: str) -> None:
    store = open_store(tmp_path, address)
    with pytest.raises(StoreError, match="NUL"):
        store.write([PublishedPrefix("p", "a\0b")], ENTRY)
    assert store.load() == []
    store.close()


def test_a_newer_schema_is_refused(tmp_path: Path, address: str) -> None:
    open_store(tmp_path, address).close()
    with psycopg.connect(address) as raw:
        raw.execute("UPDATE kvasir_schema SET version = 99")
    raw.close()
    with pytest.raises(StoreError, match="schema version 99 of tenants"):
        open_store(tmp_path, address)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:sesame@/db?host=/nowhere", "correct --database"),
        ("postgresql://me:sesame@[nonsense", "no URL"),
        ("sqlite:sesame", "no URL"),
    ],
)
def test_an_url_that_leads_nowhere_is_explained_without_its_password(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        open_store(tmp_path, url)
    assert "sesame" not in caught.value.message
