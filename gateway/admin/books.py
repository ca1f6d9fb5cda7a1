"""What the operator reads and copies, on threads: usage from the ledger, the audit trail, backups."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from kvasir.gateway.ledger.database import LEDGER_NAME, DaySum, read_days
from kvasir.gateway.sql.sqlite import copy_sqlite
from kvasir.gateway.tenants.directory import TenantDirectory
from kvasir.gateway.tenants.store import DATABASE_NAME, SECRET_NAME, Store
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.days import MAX_DAY, MIN_DAY, date_of_day, day_number
from kvasir.protocol.errors import BadRequest, NotFound, StoreError

T = TypeVar("T")


class Books:
    """Reads the state directory of `store`; names come from `directory`."""

    def __init__(self, store: Store, directory: TenantDirectory) -> None:
        self._store = store
        self._directory = directory

    async def usage(self, query: am.UsageQuery, now: float) -> am.UsageReply:
        """Return what was used, summed up as `query` wants it, as far as it has been settled.

        Raises:
            BadRequest: the first day is after the last.
            NotFound: no such tenant or key.
            StoreError: the ledger cannot be read.
        """
        first = day_number(now) - 30 if query.first_day is None else query.first_day
        last = day_number(now) if query.last_day is None else query.last_day
        if first > last:
            span = f"{date_of_day(first)} is after {date_of_day(last)}"
            raise BadRequest(f"{span}: no day is between them; give an earlier first day or a later last one")
        wanted = None if query.tenant is None else self._tenant_ids(query.tenant)
        days = await self._days(first, last)
        if query.key is not None and not any(day.key_id == query.key for day in days):
            await self._check_key(query.key)
        sums: dict[tuple[str, ...], records.UsageRow] = {}
        for day in days:
            if (wanted is None or day.tenant_id in wanted) and query.key in (None, day.key_id):
                key = self._group(day, query.by)
                row = sums.get(key)
                if row is None:
                    row = sums[key] = records.UsageRow(*key)
                for name in records.UsageRow.__struct_fields__[4:]:
                    setattr(row, name, getattr(row, name) + getattr(day, name))
        return am.UsageReply([sums[key] for key in sorted(sums)], first, last)

    async def audit(self, last: int) -> am.AuditReply:
        """Return the last rows of the audit trail, oldest first."""
        entries = await self._on_thread(lambda: self._store.audit(last))
        return am.AuditReply(
            [
                records.AuditRow(
                    e.seq, e.time, e.actor, e.command, e.subject, json.loads(e.before), json.loads(e.after)
                )
                for e in entries
            ]
        )

    async def verify(self) -> am.AuditVerified:
        """Walk the audit trail.

        Raises:
            StoreError: a row was changed, inserted or taken out; says which.
        """
        return am.AuditVerified(await self._on_thread(self._store.verify_audit))

    async def backup(self, folder: Path) -> None:
        """Copy databases and secret into `folder`, which is made and belongs to this user alone.

        Raises:
            BadRequest: the folder is there already, or no absolute path.
            StoreError: it cannot be written.
        """
        if not folder.is_absolute():
            raise BadRequest(f"{folder} is no absolute path; the gateway may run elsewhere", param="folder")
        if self._store.url:
            secret = self._store.state_dir / SECRET_NAME
            raise BadRequest(f"the database is PostgreSQL; copy it with pg_dump, and {secret} with it", param="folder")
        await self._on_thread(lambda: self._copy(folder))

    def _copy(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise BadRequest(f"{folder} is there already; name a new folder", param="folder") from None
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error.strerror}; name a folder the gateway may write") from None
        try:
            for name in (DATABASE_NAME, LEDGER_NAME):
                if (self._store.state_dir / name).exists():
                    copy_sqlite(self._store.state_dir / name, folder / name)
            shutil.copyfile(self._store.state_dir / SECRET_NAME, folder / SECRET_NAME)
            for name in (DATABASE_NAME, LEDGER_NAME, SECRET_NAME):
                if (folder / name).exists():
                    os.chmod(folder / name, 0o600)
        except (OSError, StoreError) as error:
            shutil.rmtree(folder, ignore_errors=True)  # half a backup is none
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot write {folder}: {error.strerror}") from None

    def _tenant_ids(self, name: str) -> set[str]:
        """Return the ids of the tenant of that name, and of deleted ones that had it."""
        found = {tenant_id for tenant_id, former in self._directory.former_tenants.items() if former == name}
        found |= {tenant.id for tenant in self._directory.tenants() if tenant.name == name}
        if not found:
            raise NotFound(f"no tenant is or was called {name[:80]!r}; `kvasir tenant list` shows those there are")
        return found

    async def _check_key(self, key_id: str) -> None:
        """Refuse a key that neither is there nor, since deleted with its tenant, ever was used."""
        try:
            self._directory.key(key_id)
        except NotFound:
            if not any(day.key_id == key_id for day in await self._days(MIN_DAY, MAX_DAY)):
                raise

    async def _days(self, first: int, last: int) -> list[DaySum]:
        return await self._on_thread(lambda: read_days(self._store.state_dir, self._store.url, first, last))

    def _group(self, day: DaySum, by: str) -> tuple[str, str, str, str]:
        """Return tenant, key, model and day, those that are summed over empty."""
        name = self._directory.name_of(day.tenant_id)
        date = date_of_day(day.day).isoformat() if by == "day" else ""
        return name, day.key_id if by == "key" else "", day.model if by == "model" else "", date

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call)
