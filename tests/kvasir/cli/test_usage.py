"""Usage, prices, audit, backup, and what becomes of tenants and keys, from the command line."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from kvasir.gateway.ledger.database import Batch, Row, open_ledger
from kvasir.gateway.tenants.directory import TenantDirectory
from kvasir.gateway.tenants.store import DATABASE_NAME, open_store
from kvasir.protocol.days import DAY_S
from kvasir.protocol.errors import AuthenticationFailed, StoreError
from kvasir.protocol.terms import MONEY_UNITS, Price
from tests.gateway.admin.test_admin import Office, open_office
from tests.kvasir.cli.test_cli import assert_one_line, home, kvasir, kvasir_json, office
from tests.postgres import Postgres

__all__ = ["home", "office"]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def write_usage(
    office: Office, tenant: str, key: str, *, model: str = "demo", days_ago: float = 0, num: int = 1
) -> None:
    """Have the ledger say that a tenant used 1,000 prompt tokens, 400 cached, and 200 of output, `num` times."""
    tenant_id = office.directory.tenant(tenant).id
    when = time.time() - days_ago * DAY_S
    database = open_ledger(office.home, office.url)
    rows = [Row(when + index / 1e3, b"%f-%d" % (when, index), tenant_id, key, model) for index in range(num)]
    database.write(Batch(rows))
    done = [Row(r.admitted_at, r.id, tenant_id, key, model, when, "stop", 1_000, 400, 200, 3_500_000) for r in rows]
    database.write(Batch((), done))
    database.close()


def test_a_bill_by_tenant_key_model_and_day(office: Office, capsys: Any) -> None:
    for name in ("acme", "globex"):
        kvasir(capsys, "tenant", "create", name)
    write_usage(office, "acme", "k1", num=3)
    write_usage(office, "acme", "k2", model="large", days_ago=3)
    write_usage(office, "globex", "k3")
    write_usage(office, "globex", "k3", days_ago=50)
    rows = kvasir_json(capsys, "usage")["rows"]
    assert [(row["tenant"], row["num_requests"], row["cached_tokens"], row["output_tokens"]) for row in rows] == [
        ("acme", 4, 1_600, 800),
        ("globex", 1, 400, 200),
    ]
    by_model = kvasir_json(capsys, "usage", "--tenant", "acme", "--by", "model")["rows"]
    assert [(row["model"], row["prompt_tokens"], row["cost"]) for row in by_model] == [
        ("demo", 3_000, 10_500_000),
        ("large", 1_000, 3_500_000),
    ]
    assert [row["num_requests"] for row in kvasir_json(capsys, "usage", "--key", "k1", "--by", "key")["rows"]] == [3]
    dates = [row["day"] for row in kvasir_json(capsys, "usage", "--by", "day", "--tenant", "acme")["rows"]]
    assert len(dates) == 2 and dates == sorted(dates)
    old = kvasir_json(capsys, "usage", "--since", "2020-01-01", "--tenant", "globex")["rows"]
    assert old[0]["num_requests"] == 2
    shown = kvasir(capsys, "usage", "--by", "model")[0]
    assert "large" in shown and "40 %" in shown and "all" in shown
    table = list(csv.DictReader(io.StringIO(kvasir(capsys, "usage", "--by", "model", "--csv")[0])))
    assert [row["money"] for row in table] == ["0.00105", "0.00035", "0.00035"] and table[0]["tenant"] == "acme"
    assert "nothing was used" in kvasir(capsys, "usage", "--until", "2020-01-01", "--since", "2020-01-01")[0]
    assert_one_line(kvasir(capsys, "usage", "--tenant", "nobody", code=2)[1], "nobody")
    assert_one_line(
        kvasir(capsys, "usage", "--key", "kv_nonsense_verysecret", code=2)[1], "no key has the id 'nonsense'"
    )
    assert kvasir_json(capsys, "usage", "--key", "k3", "--until", "2020-01-01", "--since", "2020-01-01")["rows"] == []
    assert_one_line(kvasir(capsys, "usage", "--since", "2020-01-02", "--until", "2020-01-01", code=2)[1], "is after")
    unused = kvasir_json(capsys, "key", "create", "acme")
    assert "nothing was used" in kvasir(capsys, "usage", "--key", unused["key"])[0]
    assert_one_line(kvasir(capsys, "usage", "--csv", "--json", code=2)[1], "--csv")
    assert_one_line(kvasir(capsys, "usage", "--since", "yesterday", code=2)[1], "2026-01-31")


def test_prices_are_set_listed_and_removed_and_survive(office: Office, capsys: Any) -> None:
    kvasir(capsys, "price", "set", "demo", "--prompt", "0.25", "--cached", "0.025", "--output", "1")
    expected = Price(MONEY_UNITS // 4 // 10**6, 250, 10_000)
    assert office.directory.price("demo") == expected
    assert (
        "already" in kvasir(capsys, "price", "set", "demo", "--prompt", ".25", "--cached", ".025", "--output", "1")[0]
    )
    shown = kvasir(capsys, "price", "list")[0]
    assert "0.25" in shown and "0.025" in shown
    kvasir(capsys, "price", "set", "other", "--prompt", "2", "--output", "8")
    assert office.directory.price("other").cached == office.directory.price("other").prompt
    office.close()
    again = Office(office.home)
    try:
        assert again.directory.price("demo") == expected
        kvasir(capsys, "price", "remove", "demo")
        assert again.directory.price("demo") == Price()
        assert_one_line(kvasir(capsys, "price", "remove", "demo", code=2)[1], "no price")
    finally:
        again.close()
        office.close = lambda: None  # type: ignore[method-assign]


def test_a_renamed_tenant_keeps_id_keys_and_usage(office: Office, capsys: Any) -> None:
    tenant_id = kvasir(capsys, "tenant", "create", "acme")[0].strip()
    key = kvasir_json(capsys, "key", "create", "acme")
    write_usage(office, "acme", key["id"])
    kvasir(capsys, "tenant", "rename", "acme", "acme-labs")
    caller = office.directory.authenticate(key["key"])
    assert (caller.tenant.id, caller.tenant.name) == (tenant_id, "acme-labs")
    assert kvasir_json(capsys, "usage")["rows"][0]["tenant"] == "acme-labs"
    assert_one_line(kvasir(capsys, "tenant", "show", "acme", code=2)[1], "acme")
    kvasir(capsys, "tenant", "create", "acme")
    assert_one_line(kvasir(capsys, "tenant", "rename", "acme", "acme-labs", code=2)[1], "exists already")
    assert_one_line(kvasir(capsys, "tenant", "rename", "acme", "No Name", code=2)[1], "lower-case")


def test_a_deleted_tenant_is_gone_with_its_keys_and_its_bill_stays(office: Office, capsys: Any) -> None:
    tenant_id = kvasir(capsys, "tenant", "create", "acme")[0].strip()
    key = kvasir_json(capsys, "key", "create", "acme")
    write_usage(office, "acme", key["id"])
    assert_one_line(kvasir(capsys, "tenant", "delete", "acme", code=2)[1], "--yes")
    assert office.directory.authenticate(key["key"])
    kvasir(capsys, "tenant", "delete", "acme", "--yes")
    with pytest.raises(AuthenticationFailed):
        office.directory.authenticate(key["key"])
    assert [payer for payer, _ in office.house.ended] == [tenant_id] and office.house.cleared == [tenant_id]
    assert office.house.forgotten == [tenant_id, key["id"]]
    assert kvasir_json(capsys, "tenant", "list")["tenants"] == []
    assert kvasir_json(capsys, "usage", "--tenant", "acme")["rows"][0]["num_requests"] == 1
    assert kvasir(capsys, "tenant", "create", "acme")[0].strip() != tenant_id
    office.close()
    again = Office(office.home)
    try:
        assert [tenant.id == tenant_id for tenant in again.directory.tenants()] == [False]
        assert kvasir_json(capsys, "usage", "--tenant", "acme")["rows"][0]["num_requests"] == 1
    finally:
        again.close()
        office.close = lambda: None  # type: ignore[method-assign]


def test_a_rotated_key_keeps_its_id_and_the_old_secret_works_for_the_overlap(office: Office, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    first = kvasir_json(capsys, "key", "create", "acme", "--token-budget", "100/day")
    second = kvasir_json(capsys, "key", "rotate", first["key"], "--overlap", "1h")
    assert second["id"] == first["id"] and second["key"] != first["key"]
    for key in (first, second):
        assert office.directory.authenticate(key["key"]).key_id == first["id"]
    assert office.directory.terms(first["id"]).budgets[0].amount == 100
    third = kvasir_json(capsys, "key", "rotate", first["id"], "--overlap", "none")
    for key in (first, second):
        with pytest.raises(AuthenticationFailed):
            office.directory.authenticate(key["key"])
    kvasir(capsys, "key", "revoke", third["id"])
    with pytest.raises(AuthenticationFailed):
        office.directory.authenticate(third["key"])
    assert [payer for payer, _ in office.house.ended] == [first["id"]]
    assert_one_line(kvasir(capsys, "key", "rotate", first["id"], code=2)[1], "kvasir key create")


def test_disabling_a_tenant_ends_what_it_runs(office: Office, capsys: Any) -> None:
    tenant_id = kvasir(capsys, "tenant", "create", "acme")[0].strip()
    kvasir(capsys, "tenant", "disable", "acme")
    kvasir(capsys, "tenant", "enable", "acme")
    assert [payer for payer, _ in office.house.ended] == [tenant_id]


def test_the_audit_trail_is_shown_and_an_altered_row_is_named(office: Office, home: Path, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    key = kvasir_json(capsys, "key", "create", "acme")
    kvasir(capsys, "tenant", "set", "acme", "--requests-per-min", "5")
    rows = kvasir_json(capsys, "audit", "log")["rows"]
    assert [row["command"] for row in rows] == ["tenant_create", "key_create", "tenant_set"]
    assert rows[2]["before"]["terms"] == {} and rows[2]["after"]["terms"] == {"limits": {"requests_per_min": 5}}
    assert key["key"].rpartition("_")[2] not in json.dumps(rows)
    assert "tenant_set" in kvasir(capsys, "audit", "log", "--last", "1")[0]
    assert "3 rows" in kvasir(capsys, "audit", "verify")[0]
    with sqlite3.connect(office.home / DATABASE_NAME) as raw:
        raw.execute("DROP TRIGGER audit_is_not_edited")
        raw.execute("UPDATE audit SET subject = 'globex' WHERE seq = 2")
    raw.close()
    assert_one_line(kvasir(capsys, "audit", "verify", code=2)[1], "row 2")


def test_a_backup_is_a_state_directory_that_works(office: Office, home: Path, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    key = kvasir_json(capsys, "key", "create", "acme")
    write_usage(office, "acme", key["id"])
    kvasir(capsys, "backup", str(home / "copy"))
    assert (home / "copy").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (home / "copy").iterdir())
    store = open_store(home / "copy")
    assert TenantDirectory(store.secret, store.load()).authenticate(key["key"]).tenant.name == "acme"
    assert store.verify_audit() == 2
    store.close()
    ledger = open_ledger(home / "copy")
    assert [day.output_tokens for day in ledger.days()] == [200]
    ledger.close()
    assert_one_line(kvasir(capsys, "backup", str(home / "copy"), code=2)[1], "there already")
    assert_one_line(kvasir(capsys, "backup", "/proc/copy", code=2)[1], "/proc/copy")
    assert kvasir_json(capsys, "audit", "log")["rows"][-1]["command"] == "backup"


def test_the_books_are_kept_in_postgresql_too(home: Path, postgres: Postgres, capsys: Any) -> None:
    with open_office(home, postgres.new_url()) as office:
        kvasir(capsys, "tenant", "create", "acme")
        write_usage(office, "acme", kvasir_json(capsys, "key", "create", "acme")["id"])
        assert [row["output_tokens"] for row in kvasir_json(capsys, "usage")["rows"]] == [200]
        assert "2 rows" in kvasir(capsys, "audit", "verify")[0]
        refused = kvasir(capsys, "backup", str(home / "copy"), code=2)[1]
        assert_one_line(refused, "pg_dump", str(home / "secret"))
        assert not (home / "copy").exists()


def test_half_a_backup_is_taken_away(office: Office, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full; make room")

    monkeypatch.setattr("kvasir.gateway.admin.books.copy_sqlite", full)
    kvasir(capsys, "tenant", "create", "acme")
    write_usage(office, "acme", "k")
    assert_one_line(kvasir(capsys, "backup", str(home / "copy"), code=2)[1], "disk is full")
    assert not (home / "copy").exists()


def test_status_says_what_is_held_at_most(office: Office, capsys: Any) -> None:
    assert "at most 10000 requests waiting" in kvasir(capsys, "status")[0]
