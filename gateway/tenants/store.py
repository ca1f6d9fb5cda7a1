"""Tenants, keys, published prefixes and the audit trail, in SQLite or PostgreSQL; the deployment's secret in a file.

Every change is one transaction with its audit row, on disk before `commit` returns. Secrets of keys never come here.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from kvasir.gateway.sql.places import open_sql
from kvasir.gateway.sql.sql import Sql
from kvasir.gateway.tenants.directory import Change
from kvasir.gateway.tenants.rows import MIGRATIONS, read_records, write_record
from kvasir.gateway.tenants.secret import load_secret
from kvasir.protocol.errors import StoreError

DATABASE_NAME = "kvasir.db"
SECRET_NAME = "secret"


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
                write_record(self._sql, change)
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
            return read_records(self._sql)

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
            secret = load_secret(state_dir / SECRET_NAME, is_new=found is None)
            mark = hashlib.blake2b(key=secret, digest_size=16, person=b"kvasir-secret").digest()
            if found is None:
                sql.run("INSERT INTO meta VALUES ('secret_mark', ?)", (mark,))
            elif found[0] != mark:
                raise StoreError(f"{sql.name} was made with another deployment secret than {SECRET_NAME}; restore it")
    except BaseException:
        sql.close()
        raise
    return Store(state_dir, url, sql, secret)


def _chain(secret: bytes, previous: bytes, entry: AuditEntry) -> bytes:
    """Return a row's digest: keyed, over the digest before it and its own fields."""
    fields = [entry.seq, entry.time, entry.actor, entry.command, entry.subject, entry.before, entry.after]
    content = previous + json.dumps(fields).encode()
    return hashlib.blake2b(content, key=secret, digest_size=32, person=b"kvasir-audit").digest()
