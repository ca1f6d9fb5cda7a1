"""Tenants, keys, published prefixes and the audit trail, in SQLite or PostgreSQL; the deployment's secret in a file.

Every change is one transaction with its audit row, on disk before `commit` returns. Secrets of keys never come here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from kvasir.gateway.sql.places import open_sql
from kvasir.gateway.sql.sql import Sql
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

    def __init__(self, state_dir: Path, url: str, sql: Sql, secret: bytes) -> None:
        self.state_dir = state_dir  # where the secret is, and the databases unless they have an URL
        self.url = url  # PostgreSQL's; empty: SQLite
        self._sql = sql
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
        with self._sql.transaction():
            for change in changes:
                if isinstance(change, RemoveTenant):
                    self._sql.run("DELETE FROM api_keys WHERE tenant_id = ?", (change.id,))
                    self._sql.run("DELETE FROM tenants WHERE id = ?", (change.id,))
                self._sql.run(*_written(change))
            row = self._sql.run("SELECT seq, digest FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
            seq, digest = (row[0] + 1, row[1]) if row else (1, b"")
            entry = replace(entry, seq=seq)
            fields = (entry.time, entry.actor, entry.command, entry.subject, entry.before, entry.after)
            self._sql.run(
                "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (seq, *fields, _chain(self._secret, digest, entry))
            )

    def load(self) -> list[Change]:
        """Return every record: tenants, then keys and prefixes.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._sql.reading():
            query = self._sql.run
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
        with self._sql.reading():
            rows = self._sql.run(
                "SELECT time, actor, command, subject, before, after, seq FROM audit ORDER BY seq DESC LIMIT ?", (last,)
            ).fetchall()
            return [AuditEntry(*row) for row in reversed(rows)]

    def verify_audit(self) -> int:
        """Walk the whole chain and return its length. Rows cut off the end are not noticed, anything else is.

        Raises:
            StoreError: a row was changed, inserted or taken out; says which.
        """
        digest, expected = b"", 0
        with self._sql.reading():
            rows = self._sql.run(
                "SELECT time, actor, command, subject, before, after, seq, digest FROM audit ORDER BY seq"
            ).fetchall()
        for *fields, stored in rows:
            expected += 1
            entry = AuditEntry(*fields)
            digest = _chain(self._secret, digest, entry)
            if entry.seq != expected or digest != stored:
                raise StoreError(
                    f"the audit trail in {self._sql.name} was altered at row {entry.seq}; restore a backup"
                )
        return expected

    def close(self) -> None:
        self._sql.close()


def open_store(state_dir: Path, url: str = "") -> Store:
    """Open the store at `url`, else in `state_dir`, which exists; it is made, or brought up to date, as need be.

    Raises:
        StoreError: directory missing; database unreadable, read-only, not ours, damaged, of a newer schema, in use by
            another gateway, away, or made with another deployment secret.
    """
    if not state_dir.is_dir():
        raise StoreError(f"the state directory {state_dir} does not exist; create it or choose another")
    sql = open_sql(url or state_dir / DATABASE_NAME, "tenants", MIGRATIONS)
    try:
        with sql.transaction():
            found = sql.run("SELECT value FROM meta WHERE name = 'secret_mark'").fetchone()
            secret = _load_secret(state_dir / SECRET_NAME, is_new=found is None)
            mark = hashlib.blake2b(key=secret, digest_size=16, person=b"kvasir-secret").digest()
            if found is None:
                sql.run("INSERT INTO meta VALUES ('secret_mark', ?)", (mark,))
            elif found[0] != mark:
                raise StoreError(f"{sql.name} was made with another deployment secret than {SECRET_NAME}; restore it")
    except BaseException:
        sql.close()
        raise
    return Store(state_dir, url, sql, secret)


def _load_secret(path: Path, *, is_new: bool) -> bytes:
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        if not is_new:
            raise StoreError(
                f"{path} is missing, and the database was made with it; restore it from a backup"
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


def _written(change: Change) -> tuple[str, tuple[Any, ...]]:
    """Return the statement that writes a change, and its values."""
    match change:
        case Tenant():
            return _put(
                "tenants",
                id=change.id,
                name=change.name,
                status=change.status,
                sharing=change.sharing,
                allowed_models=_dump_set(change.allowed_models),
                created_at=change.created_at,
                kv_floor=change.kv_floor,
                kv_cap=change.kv_cap,
                cache_hint=change.cache_hint,
                terms=_dump_terms(change.terms),
            )
        case ApiKey():
            return _put(
                "api_keys",
                id=change.id,
                tenant_id=change.tenant_id,
                digest=change.digest,
                label=change.label,
                created_at=change.created_at,
                revoked_at=change.revoked_at,
                expires_at=change.expires_at,
                terms=_dump_terms(change.terms),
                old_digest=change.old_digest,
                old_until=change.old_until,
            )
        case PublishedPrefix():
            return _put(
                "prefixes",
                name=change.name,
                text=change.text,
                tenant_ids=_dump_set(change.tenant_ids),
                created_at=change.created_at,
                pinned=int(change.pinned),
                pinned_on=_dump_set(change.pinned_on),
            )
        case RemovePrefix():
            return "DELETE FROM prefixes WHERE name = ?", (change.name,)
        case RemoveTenant():
            return "INSERT INTO former_tenants VALUES (?, ?, ?)", (change.id, change.name, change.deleted_at)
        case ModelPrice(model, None):
            return "DELETE FROM prices WHERE model = ?", (model,)
        case ModelPrice():
            return _put("prices", model=change.model, price=msgspec.json.encode(change.price).decode())


def _put(table: str, **columns: Any) -> tuple[str, tuple[Any, ...]]:
    """Return what writes a row whose first column is its key, in the place of the row of that key."""
    key, *others = columns
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
        f"ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}",
        tuple(columns.values()),
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
