"""The store: what was committed is there, what was not is not, and what cannot be read is explained."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.tenants.directory import (
    ApiKey,
    ModelPrice,
    PublishedPrefix,
    RemovePrefix,
    RemoveTenant,
    Tenant,
    TenantDirectory,
    issue_key,
)
from kvasir.gateway.tenants.store import DATABASE_NAME, MIGRATIONS, SECRET_NAME, AuditEntry, Store, open_store
from kvasir.protocol.errors import StoreError
from kvasir.protocol.terms import Budget, Limits, Price, Terms

ROOT = Path(__file__).resolve().parents[3]
ENTRY = AuditEntry(1.0, "tester", "tenant_create", "x")


@pytest.fixture
def store(tmp_path: Path, url: str) -> Iterator[Store]:
    store = open_store(tmp_path, url)
    yield store
    store.close()


def reopen(store: Store) -> Store:
    store.close()
    return open_store(store.state_dir, store.url)


def test_records_survive_a_restart_as_they_were(store: Store) -> None:
    terms = Terms(Limits(max_concurrent=3), (Budget("tokens", "day", 7),), 2, "low", {"gpt": ["demo"]})
    tenant = Tenant("t1", "acme", "disabled", "group:g", frozenset({"b", "a"}), 12.5, "20%", "512", "closing", terms)
    key, text = issue_key(store.secret, "t1", "läbel", 3.0)
    key = replace(key, expires_at=9e9, terms=Terms(weight=3), old_digest=bytes(range(32)), old_until=5.0)
    prefix = PublishedPrefix("p", "téxt\n", frozenset({"t1"}), 4.0, True, frozenset({"demo-1"}))
    everything = [tenant, key, prefix, RemoveTenant("t0", "gone", 2.0), ModelPrice("demo", Price(1, 2, 3))]
    store.write(everything, ENTRY)
    store = reopen(store)
    assert store.load() == everything
    with pytest.raises(Exception, match="disabled"):
        TenantDirectory(store.secret, store.load()).authenticate(text)
    store.close()


names = st.sampled_from("abcd")
changes = st.one_of(
    st.builds(
        lambda i, s, g, m, h: Tenant(i, "name-" + i, s, g, m, 1.0, cache_hint=h),
        names,
        st.sampled_from(["active", "disabled"]),
        st.sampled_from(["private", "group:g"]),
        st.none() | st.frozensets(names),
        st.sampled_from([None, "one_shot", "open", "closing"]),
    ),
    st.builds(
        lambda i, t, r: ApiKey(i + t, t, (i + t).encode() * 16, "", 1.0, r), names, names, st.none() | st.just(2.0)
    ),
    st.builds(
        lambda n, t, a, w: PublishedPrefix(n, t, a, 1.0, pinned=w is not None, pinned_on=w),
        names,
        st.text(st.characters(exclude_categories=["Cs"])),
        st.none() | st.frozensets(names),
        st.none() | st.frozensets(names),
    ),
    st.builds(RemovePrefix, names),
)


@settings(max_examples=30)
@given(st.lists(changes, max_size=20))
def test_the_file_and_the_directory_agree_after_any_changes(history) -> None:
    home = Path(tempfile.mkdtemp())
    try:
        store = open_store(home)
        directory = TenantDirectory(store.secret)
        for change in history:
            try:
                store.write([change], ENTRY)
            except StoreError:
                assert isinstance(change, ApiKey) and change.tenant_id not in directory._tenants
            else:
                directory.apply(change)
        store = reopen(store)
        again = TenantDirectory(store.secret, store.load())
        assert again.tenants() == directory.tenants()
        for tenant in directory.tenants():
            key = lambda record: record.id  # noqa: E731
            assert sorted(again.keys_of(tenant.id), key=key) == sorted(directory.keys_of(tenant.id), key=key)
        assert {prefix.name: prefix for prefix in again.prefixes} == {p.name: p for p in directory.prefixes}
        assert store.verify_audit() == len(store.audit())
        store.close()
    finally:
        shutil.rmtree(home)


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    with pytest.raises(StoreError):
        store.write([Tenant("t1", "acme"), ApiKey("k", "nobody", bytes(32))], ENTRY)
    assert store.load() == [] and store.audit() == []
    store.write([Tenant("t1", "acme")], ENTRY)
    with pytest.raises(StoreError):
        store.write([Tenant("t2", "acme")], ENTRY)
    assert len(store.load()) == 1 and store.verify_audit() == 1


def test_an_altered_audit_row_is_found_and_rows_are_append_only(store: Store) -> None:
    for number in range(5):
        store.write([Tenant(str(number), f"t{number}")], ENTRY)
    assert store.verify_audit() == 5
    for statement in ("UPDATE audit SET actor = 'nobody' WHERE seq = 3", "DELETE FROM audit WHERE seq = 3"):
        with pytest.raises(StoreError, match="append only"), store._sql.transaction():
            store._sql.run(statement)
    with store._sql.transaction():
        store._sql.run(f"DROP TRIGGER audit_is_not_edited{' ON audit' if store.url else ''}")
        store._sql.run("UPDATE audit SET actor = 'nobody' WHERE seq = 3")
    with pytest.raises(StoreError, match="row 3"):
        store.verify_audit()


COMMITTER = """
import sys
from pathlib import Path
from kvasir.gateway.tenants.store import AuditEntry, open_store
from kvasir.gateway.tenants.directory import Tenant, issue_key
store = open_store(Path(sys.argv[1]), sys.argv[2])
for number in range(100_000):
    key, _ = issue_key(store.secret, f"t{number}", "", 1.0)
    store.write([Tenant(f"t{number}", f"tenant-{number}"), key], AuditEntry(1.0, "x", "create", str(number)))
    print(number, flush=True)
"""


@pytest.mark.parametrize("num_seen", [1, 7, 40])
def test_what_was_committed_survives_kill_9_in_mid_commit(tmp_path: Path, url: str, num_seen: int) -> None:
    command = [sys.executable, "-c", COMMITTER, str(tmp_path), url]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    with process.stdout as lines:
        for _ in range(num_seen):
            acknowledged = int(lines.readline())
        process.send_signal(signal.SIGKILL)
        rest = lines.read().splitlines()
    process.wait(10)
    acknowledged = int(rest[-1]) if rest else acknowledged
    store = open_store(tmp_path, url)
    records = store.load()
    tenants = [record.id for record in records if isinstance(record, Tenant)]
    owners = [record.tenant_id for record in records if isinstance(record, ApiKey)]
    assert tenants == owners == [f"t{number}" for number in range(len(tenants))]
    assert len(tenants) in (acknowledged + 1, acknowledged + 2)  # the one in flight may have made it
    assert store.verify_audit() == len(tenants)
    store.close()


def test_secret_and_database_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert (tmp_path / SECRET_NAME).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / DATABASE_NAME).stat().st_mode & 0o777 == 0o600
    assert len(store.secret) == 32
    store.close()


def test_the_secret_is_made_once_and_is_not_in_the_database(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    secret = store.secret
    _, text = issue_key(secret, "t1", "", 1.0)
    store.write([Tenant("t1", "acme"), issue_key(secret, "t1", "", 1.0)[0]], ENTRY)
    store = reopen(store)
    assert store.secret == secret
    store.close()
    content = (tmp_path / DATABASE_NAME).read_bytes()
    assert secret not in content and text.rpartition("_")[2].encode() not in content


def assert_explained(state_dir: Path, *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(state_dir)
    for word in words:
        assert word in caught.value.message
    assert "\n" not in caught.value.message and ";" in caught.value.message  # ...; what now


def test_a_missing_directory_is_explained(tmp_path: Path) -> None:
    assert_explained(tmp_path / "nowhere", "nowhere", "does not exist")


@pytest.mark.parametrize("content", [b"hello, I am no database. " * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_explained(tmp_path: Path, content: bytes) -> None:
    open_store(tmp_path).close()
    (tmp_path / DATABASE_NAME).write_bytes(content)
    assert_explained(tmp_path, DATABASE_NAME)


def test_a_damaged_database_is_explained(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write([PublishedPrefix("p", "x" * 100_000)], ENTRY)
    store.close()
    path = tmp_path / DATABASE_NAME
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_explained(tmp_path, "damaged")


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as raw:
        raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    raw.close()
    before = (tmp_path / DATABASE_NAME).read_bytes()
    assert_explained(tmp_path, f"schema version {len(MIGRATIONS) + 1}", f"up to {len(MIGRATIONS)}", "newer gateway")
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / DATABASE_NAME).unlink()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as raw:
        raw.execute("CREATE TABLE songs (name TEXT)")
    raw.close()
    assert_explained(tmp_path, "something else")


def test_a_lost_or_exchanged_secret_is_noticed(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / SECRET_NAME).write_bytes(b"x" * 32)
    assert_explained(tmp_path, "another deployment secret")
    (tmp_path / SECRET_NAME).write_bytes(b"short")
    assert_explained(tmp_path, "5 bytes")
    (tmp_path / SECRET_NAME).unlink()
    assert_explained(tmp_path, SECRET_NAME, "missing")


def test_an_unreadable_and_a_read_only_file_are_explained() -> None:
    home = Path(tempfile.mkdtemp())
    nobody = 65534
    try:
        open_store(home).close()
        path = home / DATABASE_NAME
        if os.geteuid() == 0:  # root may do anything: become somebody who may not
            for inside in (home, *home.iterdir()):
                os.chown(inside, nobody, nobody)
            os.seteuid(nobody)
        path.chmod(0o400)
        assert_explained(home, "cannot be written", DATABASE_NAME)
        path.chmod(0o000)
        assert_explained(home, "cannot be written", "ermission")
        path.chmod(0o600)
        (home / SECRET_NAME).chmod(0o000)
        assert_explained(home, SECRET_NAME, "ermission")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(home)


def test_a_locked_database_is_explained_and_nothing_is_lost(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store._sql.run("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process"):
        store.write([Tenant("t1", "acme")], ENTRY)
    other.execute("ROLLBACK")
    other.close()
    store.write([Tenant("t1", "acme")], ENTRY)
    assert len(store.load()) == 1
    store.close()
