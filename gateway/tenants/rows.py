"""Tenants, keys, published prefixes and prices as rows of the database, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec

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
from kvasir.protocol.terms import NO_TERMS, Price, Terms

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


def read_records(sql: Sql) -> list[Change]:
    """Return every record: tenants, then keys, prefixes, former tenants and prices."""
    query = sql.run
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


def write_record(sql: Sql, change: Change) -> None:
    """Write one change, in the transaction that is open."""
    if isinstance(change, RemoveTenant):
        sql.run("DELETE FROM api_keys WHERE tenant_id = ?", (change.id,))
        sql.run("DELETE FROM tenants WHERE id = ?", (change.id,))
    sql.run(*_written(change))


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
