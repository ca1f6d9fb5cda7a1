"""Tenants, keys, published prefixes and the audit trail on disk: one SQLite file, the deployment's secret beside it.

Every change is one transaction with its audit row, synced to disk before `commit` returns (WAL, synchronous=FULL). The
caller holds the directory's lock (`gateway.lock`), so that nobody else writes. Secrets of keys never come here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from kvasir.gateway.sqlite import explained, transaction
from kvasir.gateway.tenants.directory import (
    ApiKey,
    Change,
    ModelPrice,
    PublishedPrefix,
    RemovePrefix,
    RemoveTenant,
    Tenant,
)
from kvasir.protocol.errors import StoreError
from kvasir.protocol.terms import NO_TERMS, Price, Terms

DATABASE_NAME = "kvasir.db"
SECRET_NAME = "secret"
DEPLOYMENT_SECRET_BYTES = 32

# Schema version n is what the first n entries make. Released entries are never edited, only followed by new ones.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT",
        """CREATE TABLE tenants (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE,
            status TEXT NOT NULL CHECK (status IN ('active', 'disabled')),
            sharing TEXT NOT NULL, allowed_models TEXT, created_at REAL NOT NULL) STRICT""",
        """CREATE TABLE api_keys (
            id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL REFERENCES tenants,
            digest BLOB NOT NULL CHECK (length(digest) = 32),
            label TEXT NOT NULL, created_at REAL NOT NULL, revoked_at REAL) STRICT""",
        """CREATE TABLE prefixes (
            name TEXT PRIMARY KEY, text TEXT NOT NULL, tenant_ids TEXT, created_at REAL NOT NULL) STRICT""",
        """CREATE TABLE audit (
            seq INTEGER PRIMARY KEY, time REAL NOT NULL, actor TEXT NOT NULL, command TEXT NOT NULL,
            subject TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, digest BLOB NOT NULL) STRICT""",
        "CREATE TRIGGER audit_is_not_edited BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'append only'); END",
        "CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'append only'); END",
    ),
    (
        "ALTER TABLE tenants ADD COLUMN kv_floor TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE tenants ADD COLUMN kv_cap TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE prefixes ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
    ),
    ("ALTER TABLE tenants ADD COLUMN cache_hint TEXT CHECK (cache_hint IN ('one_shot', 'open', 'closing'))",),
    ("ALTER TABLE prefixes ADD COLUMN pinned_on TEXT",),
    (
        "ALTER TABLE tenants ADD COLUMN terms TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE api_keys ADD COLUMN terms TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE api_keys ADD COLUMN expires_at REAL",
    ),
    ("CREATE TABLE prices (model TEXT PRIMARY KEY, price TEXT NOT NULL) STRICT",),
    (
        "ALTER TABLE api_keys ADD COLUMN old_digest BLOB NOT NULL DEFAULT x''",
        "ALTER TABLE api_keys ADD COLUMN old_until REAL",
        "CREATE TABLE former_tenants (id TEXT PRIMARY KEY, name TEXT NOT NULL, deleted_at REAL NOT NULL) STRICT",
    ),
)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to whom. `actor` is who the command line says it is; `before`/`after` are JSON without secrets."""

    time: float
    actor: str
    command: str
    subject: str
    before: str = "null"
    after: str = "null"
    seq: int = 0


class Store:
    """The open database. Made by `open_store`; one caller at a time (`commit` sees to that among its own)."""

    def __init__(self, path: Path, connection: sqlite3.Connection, secret: bytes) -> None:
        self._path = path
        self._connection = connection
        self._secret = secret
        self._limiter = trio.CapacityLimiter(1)

    @property
    def secret(self) -> bytes:
        """The deployment's secret: roots, namespaces and key digests are keyed with it."""
        return self._secret

    async def commit(self, changes: Sequence[Change], entry: AuditEntry) -> None:
        """Write `changes` and their audit row, all or nothing, from a worker thread.

        Cancelled before it starts or not at all: when it has begun, it ends and returns.

        Raises:
            StoreError: nothing was written.
        """
        await trio.to_thread.run_sync(functools.partial(self.write, changes, entry), limiter=self._limiter)

    def write(self, changes: Sequence[Change], entry: AuditEntry) -> None:
        """Write `changes` and their audit row, all or nothing; on disk when it returns.

        Raises:
            StoreError: nothing was written.
        """
        with explained(self._path), transaction(self._connection) as connection:
            for change in changes:
                if isinstance(change, RemoveTenant):
                    connection.execute("DELETE FROM api_keys WHERE tenant_id = ?", (change.id,))
                    connection.execute("DELETE FROM tenants WHERE id = ?", (change.id,))
                statement, values = _upsert(change)
                connection.execute(statement, values)
            row = connection.execute("SELECT seq, digest FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
            seq, digest = (row[0] + 1, row[1]) if row else (1, b"")
            entry = replace(entry, seq=seq)
            fields = (entry.time, entry.actor, entry.command, entry.subject, entry.before, entry.after)
            connection.execute(
                "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (seq, *fields, _chain(self._secret, digest, entry))
            )

    def load(self) -> list[Change]:
        """Return every record: tenants, then keys and prefixes.

        Raises:
            StoreError: the database cannot be read.
        """
        with explained(self._path):
            query = self._connection.execute
            records: list[Change] = []
            for row in query(
                "SELECT id, name, status, sharing, allowed_models, created_at, kv_floor, kv_cap, cache_hint, terms "
                "FROM tenants ORDER BY rowid"
            ):
                tenant_id, name, status, sharing, models, created_at, *settings, terms = row
                tenant = Tenant(tenant_id, name, status, sharing, _parse_set(models), created_at, *settings)
                records.append(replace(tenant, terms=_parse_terms(terms)))
            for row in query(
                "SELECT id, tenant_id, digest, label, created_at, revoked_at, expires_at, terms, old_digest, old_until "
                "FROM api_keys ORDER BY rowid"
            ):
                *fields, terms, old_digest, old_until = row
                key = replace(ApiKey(*fields), old_digest=old_digest, old_until=old_until)
                records.append(replace(key, terms=_parse_terms(terms)))
            for row in query(
                "SELECT name, text, tenant_ids, created_at, pinned, pinned_on FROM prefixes ORDER BY created_at, rowid"
            ):
                name, text, tenant_ids, created_at, pinned, workers = row
                tenants, pinned_on = _parse_set(tenant_ids), _parse_set(workers)
                records.append(PublishedPrefix(name, text, tenants, created_at, bool(pinned), pinned_on))
            records += [RemoveTenant(*row) for row in query("SELECT id, name, deleted_at FROM former_tenants")]
            for model, price in query("SELECT model, price FROM prices ORDER BY model"):
                records.append(ModelPrice(model, msgspec.json.decode(price, type=Price)))
            return records

    def audit(self, last: int = 1000) -> list[AuditEntry]:
        """Return the last audit rows, oldest first."""
        with explained(self._path):
            rows = self._connection.execute(
                "SELECT time, actor, command, subject, before, after, seq FROM audit ORDER BY seq DESC LIMIT ?", (last,)
            ).fetchall()
            return [AuditEntry(*row) for row in reversed(rows)]

    def verify_audit(self) -> int:
        """Walk the whole chain and return its length. Rows cut off the end are not noticed, anything else is.

        Raises:
            StoreError: a row was changed, inserted or taken out; says which.
        """
        digest, expected = b"", 0
        with explained(self._path):
            rows = self._connection.execute(
                "SELECT time, actor, command, subject, before, after, seq, digest FROM audit ORDER BY seq"
            ).fetchall()
        for *fields, stored in rows:
            expected += 1
            entry = AuditEntry(*fields)
            digest = _chain(self._secret, digest, entry)
            if entry.seq != expected or digest != stored:
                raise StoreError(f"the audit trail in {self._path} was altered at row {entry.seq}; restore a backup")
        return expected

    @property
    def state_dir(self) -> Path:
        """Where the database and the secret are."""
        return self._path.parent

    def backup(self, path: Path) -> None:
        """Write a copy to `path`, which does not exist.

        Raises:
            StoreError: it cannot be written.
        """
        with explained(path), contextlib.closing(sqlite3.connect(self._path, timeout=5.0)) as connection:
            connection.execute("VACUUM INTO ?", (str(path),))

    def close(self) -> None:
        self._connection.close()


def open_store(state_dir: Path) -> Store:
    """Open the store in `state_dir`, which exists; a new one is made, an older schema is brought up to date.

    Raises:
        StoreError: directory missing, file unreadable, read-only, no database or not ours, damaged, of a newer
            schema, or made with another deployment secret.
    """
    if not state_dir.is_dir():
        raise StoreError(f"the state directory {state_dir} does not exist; create it or choose another")
    path = state_dir / DATABASE_NAME
    secret = _load_secret(state_dir / SECRET_NAME, is_new=not path.exists())
    with explained(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite alone says "unable to open" for every reason
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        with explained(path):
            _prepare(path, connection, secret)
    except BaseException:
        connection.close()
        raise
    return Store(path, connection, secret)


def _load_secret(path: Path, *, is_new: bool) -> bytes:
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        if not is_new:
            raise StoreError(
                f"{path} is missing, and the database beside it was made with it; restore it from a backup"
            ) from None
        secret = secrets.token_bytes(DEPLOYMENT_SECRET_BYTES)
        _write_durably(path, secret)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; it must be readable by the gateway's user") from None
    if len(secret) != DEPLOYMENT_SECRET_BYTES:
        raise StoreError(f"{path} holds {len(secret)} bytes instead of {DEPLOYMENT_SECRET_BYTES}; restore a backup")
    return secret


def _write_durably(path: Path, content: bytes) -> None:
    """Make the file whole or not at all, readable by its owner only."""
    temporary = path.with_suffix(".new")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the directory writable") from None


def _prepare(path: Path, connection: sqlite3.Connection, secret: bytes) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} has schema version {version}, this gateway knows up to {len(MIGRATIONS)}; "
            "start the newer gateway that wrote it or restore an older backup"
        )
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"{path} is a database of something else; move it away or choose another state directory")
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise StoreError(f"{path} is damaged; restore a backup")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    # Always writes something: a read-only file or a full disk is noticed at the start, not at the first change.
    with transaction(connection):
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        mark = hashlib.blake2b(key=secret, digest_size=16, person=b"kvasir-secret").digest()
        row = connection.execute("SELECT value FROM meta WHERE name = 'secret_mark'").fetchone()
        if row is not None and row[0] != mark:
            raise StoreError(f"{path} was made with another deployment secret than {SECRET_NAME} beside it; restore it")
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('secret_mark', ?)", (mark,))


def _upsert(change: Change) -> tuple[str, tuple[Any, ...]]:
    match change:
        case Tenant():
            return (
                "INSERT INTO tenants "
                "(id, name, status, sharing, allowed_models, created_at, kv_floor, kv_cap, cache_hint, terms) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET name = excluded.name, "
                "status = excluded.status, sharing = excluded.sharing, allowed_models = excluded.allowed_models, "
                "kv_floor = excluded.kv_floor, kv_cap = excluded.kv_cap, cache_hint = excluded.cache_hint, "
                "terms = excluded.terms",
                (
                    change.id,
                    change.name,
                    change.status,
                    change.sharing,
                    _dump_set(change.allowed_models),
                    change.created_at,
                    change.kv_floor,
                    change.kv_cap,
                    change.cache_hint,
                    _dump_terms(change.terms),
                ),
            )
        case ApiKey():
            return (
                "INSERT OR REPLACE INTO api_keys (id, tenant_id, digest, label, created_at, revoked_at, expires_at, "
                "terms, old_digest, old_until) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    change.id,
                    change.tenant_id,
                    change.digest,
                    change.label,
                    change.created_at,
                    change.revoked_at,
                    change.expires_at,
                    _dump_terms(change.terms),
                    change.old_digest,
                    change.old_until,
                ),
            )
        case PublishedPrefix():
            return (
                "INSERT OR REPLACE INTO prefixes (name, text, tenant_ids, created_at, pinned, pinned_on) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    change.name,
                    change.text,
                    _dump_set(change.tenant_ids),
                    change.created_at,
                    change.pinned,
                    _dump_set(change.pinned_on),
                ),
            )
        case RemovePrefix():
            return "DELETE FROM prefixes WHERE name = ?", (change.name,)
        case RemoveTenant():
            return "INSERT INTO former_tenants VALUES (?, ?, ?)", (change.id, change.name, change.deleted_at)
        case ModelPrice(model, None):
            return "DELETE FROM prices WHERE model = ?", (model,)
        case ModelPrice():
            return "INSERT OR REPLACE INTO prices VALUES (?, ?)", (
                change.model,
                msgspec.json.encode(change.price).decode(),
            )


def _dump_set(items: frozenset[str] | None) -> str | None:
    return None if items is None else json.dumps(sorted(items))


def _parse_set(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(json.loads(text))


def _dump_terms(terms: Terms) -> str:
    return msgspec.json.encode(terms).decode()


def _parse_terms(text: str) -> Terms:
    terms = msgspec.json.decode(text, type=Terms)
    return NO_TERMS if terms == NO_TERMS else terms


def _chain(secret: bytes, previous: bytes, entry: AuditEntry) -> bytes:
    """Return a row's digest: keyed, over the digest before it and its own fields."""
    fields = [entry.seq, entry.time, entry.actor, entry.command, entry.subject, entry.before, entry.after]
    content = previous + json.dumps(fields).encode()
    return hashlib.blake2b(content, key=secret, digest_size=32, person=b"kvasir-audit").digest()
