"""Tenants, keys, published prefixes and prices as rows of the database, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

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

T = TypeVar("T")

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


# Tables whose columns are the fields of a record, by the same names; the first is the key.
_TABLES: dict[type, str] = {Tenant: "tenants", ApiKey: "api_keys", PublishedPrefix: "prefixes", ModelPrice: "prices"}


def read_records(sql: Sql) -> list[Change]:
    """Return every record: tenants, then keys, prefixes, former tenants and prices."""
    former = sql.run("SELECT id, name, deleted_at FROM former_tenants")
    return [
        *_read(sql, Tenant, "rowid"),
        *_read(sql, ApiKey, "rowid"),
        *_read(sql, PublishedPrefix, "created_at, rowid"),
        *[RemoveTenant(*row) for row in former],
        *_read(sql, ModelPrice, "model"),
    ]


def write_record(sql: Sql, change: Change) -> None:
    """Write one change, in the transaction that is open."""
    match change:
        case RemovePrefix():
            sql.run("DELETE FROM prefixes WHERE name = ?", (change.name,))
        case RemoveTenant():
            sql.run("DELETE FROM api_keys WHERE tenant_id = ?", (change.id,))
            sql.run("DELETE FROM tenants WHERE id = ?", (change.id,))
            sql.run("INSERT INTO former_tenants VALUES (?, ?, ?)", (change.id, change.name, change.deleted_at))
        case ModelPrice(model, None):
            sql.run("DELETE FROM prices WHERE model = ?", (model,))
        case _:
            _write(sql, change)


def _read(sql: Sql, kind: type[T], order: str) -> Iterator[T]:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for row in sql.run(f"SELECT {', '.join(names)} FROM {_TABLES[kind]} ORDER BY {order}").fetchall():
        yield kind(*[_PARSED.get(name, _same)(value) for name, value in zip(names, row, strict=True)])


def _write(sql: Sql, record: Tenant | ApiKey | PublishedPrefix | ModelPrice) -> None:
    """Write a row, in the place of the row of its key if there is one."""
    key, *others = names = [field.name for field in fields(record)]
    sql.run(
        f"INSERT INTO {_TABLES[type(record)]} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
        f"ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}",
        [_dumped(getattr(record, name)) for name in names],
    )


def _dumped(value: Any) -> Any:
    """Return a field's value as its column has it."""
    match value:
        case frozenset():
            return json.dumps(sorted(value))
        case Terms() | Price():
            return msgspec.json.encode(value).decode()
        case bool():
            return int(value)
    return value


def _parse_set(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(json.loads(text))


def _parse_terms(text: str) -> Terms:
    terms = msgspec.json.decode(text, type=Terms)
    return NO_TERMS if terms == NO_TERMS else terms


def _same(value: Any) -> Any:
    return value


_PARSED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("allowed_models", "tenant_ids", "pinned_on"), _parse_set),
    "terms": _parse_terms,
    "pinned": bool,
    "price": msgspec.json.Decoder(Price).decode,
}
