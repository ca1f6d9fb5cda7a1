"""The admin actor: the operator's commands, one at a time, decided by a pure function and carried out here.

Order of every change: decide, commit to disk with its audit row, put in force in the directory, answer. A command that
is refused, or whose commit fails, has changed nothing.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
import zmq

from kvasir.gateway.admin.accounts import decide_key, decide_price, decide_tenant, tenant_infos
from kvasir.gateway.admin.books import Books
from kvasir.gateway.admin.prefixes import cache_prefix, decide_prefix
from kvasir.gateway.admin.verdict import Verdict
from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.log import log
from kvasir.gateway.tenants.directory import TenantDirectory
from kvasir.gateway.tenants.store import AuditEntry, Store
from kvasir.protocol import admin_messages as am
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import BadRequest, KvasirError, NotFound
from kvasir.protocol.link import Link, LinkBusy, LinkClosed, PeerGone, open_router
from kvasir.protocol.profile import LinkProfile


def open_admin_link(context: zmq.Context[Any], endpoint: str) -> Link:
    """Return a ROUTER on the admin socket, whose file only this user may open.

    A socket file that a dead gateway left is replaced; the caller holds the directory's lock (`gateway.lock`).

    Raises:
        ConfigurationError: it cannot be bound.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mask = os.umask(0o177)  # the file is never open to others, not even between bind and chmod
    try:
        link = open_router(context, [endpoint], LinkProfile(max_frame_bytes=am.MAX_ADMIN_FRAME_BYTES, high_water=100))
    finally:
        os.umask(mask)
    path.chmod(0o600)
    return link


class Admin:
    """Serves the admin socket over `link`; owns the only way in which `directory` and `store` change."""

    def __init__(
        self,
        link: Link,
        directory: TenantDirectory,
        store: Store,
        gateway: Gateway,
        *,
        version: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._directory = directory
        self._store = store
        self._books = Books(store, directory)
        self._gateway = gateway
        self._version = version
        self._clock = clock
        self._started = clock()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer commands until the link is closed. Cancellation: a change that has begun is finished first."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._link.run)
            task_status.started()
            try:
                while True:
                    for frames in await self._link.receive(1):
                        await self._answer(frames)
            except LinkClosed:
                nursery.cancel_scope.cancel()

    async def _answer(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise BadRequest(f"a command is one frame, not {len(frames) - 1}; use the `kvasir` command line")
            reply = await self.carry_out(am.ADMIN_COMMANDS.decode(frames[1]))
        except KvasirError as error:
            reply = am.AdminFailed(error.info())
        except Exception as bug:  # an operator's command ends nobody's requests
            log("bug", where="admin", trace="".join(traceback.format_exception(bug)))
            reply = am.AdminFailed(KvasirError("the gateway failed on this command; its log says how").info())
        try:
            self._link.send_nowait([frames[0], encode(reply)])
        except (PeerGone, LinkBusy):
            log("admin_reply_undeliverable", reply=type(reply).__name__)  # the command line has given up waiting

    async def carry_out(self, command: am.AnyCommand) -> am.AnyReply:
        """Decide `command`, commit and apply its changes, return the answer.

        Raises:
            KvasirError: refused or not committed; nothing has changed.
        """
        name = str(command.__struct_config__.tag)
        if isinstance(command, am.PrefixPublish):
            await self._gateway.tokenise(command.text)
        match command:
            case am.StatusQuery():
                return self._status()
            case am.ExplainQuery():
                receipts = self._gateway.explain(command.request)
                if receipts is None:
                    raise NotFound(f"no request {command.request!r} is known; only the last ones are remembered")
                return am.ExplainReply(command.request, receipts)
            case am.CacheQuery():
                return self._cache()
            case am.CacheClear():
                tenant = self._directory.tenant(command.tenant)
                self._gateway.clear_kv(tenant.id)
                log("admin", command=name, subject=tenant.name, actor=command.actor)
                return am.Done()
            case am.DrainGateway():
                log("admin", command=name, actor=command.actor)
                self._gateway.drain()
                return am.Done()
            case am.UsageQuery():
                return await self._books.usage(command, self._clock())
            case am.AuditQuery():
                return await self._books.audit(command.last)
            case am.AuditVerify():
                return await self._books.verify()
            case am.Backup():
                await self._books.backup(Path(command.folder))
                entry = AuditEntry(self._clock(), command.actor, name, command.folder)
                await self._store.commit((), entry)
                log("admin", command=name, subject=command.folder, actor=command.actor)
                return am.Done()
            case _:
                verdict = decide(self._directory, command, self._clock(), self._gateway)
        if verdict.changes:
            before, after = json.dumps(verdict.before), json.dumps(verdict.after)
            entry = AuditEntry(self._clock(), command.actor, name, verdict.subject, before, after)
            await self._store.commit(verdict.changes, entry)
            for change in verdict.changes:
                self._directory.apply(change)
            log("admin", command=name, subject=verdict.subject, actor=command.actor)
        if verdict.effect is not None:
            verdict.effect()
        return verdict.reply

    def _cache(self) -> am.CacheReply:
        savings = self._gateway.saved_by_prefix()
        prefixes = [cache_prefix(prefix, savings.get(prefix.name, Saving())) for prefix in self._directory.prefixes]
        most_first = sorted(prefixes, key=lambda prefix: -prefix.saved_tokens)
        return am.CacheReply(self._gateway.cache(), most_first, self._gateway.private_prefixes())

    def _status(self) -> am.StatusReply:
        return am.StatusReply(
            workers=self._gateway.workers(),
            models=self._gateway.models(),
            tenants=tenant_infos(self._directory, self._gateway),
            pid=os.getpid(),
            version=self._version,
            uptime_s=self._clock() - self._started,
            draining=self._gateway.is_draining(),
            endpoints=self._gateway.endpoints(),
            bounds=self._gateway.bounds(),
            ledger_error=self._gateway.ledger_error(),
        )


def decide(directory: TenantDirectory, command: am.AnyCommand, now: float, gateway: Gateway) -> Verdict:
    """Return what `command` about tenants, keys, prices or prefixes comes to. Changes nothing; draws keys and ids.

    `gateway` is asked for the workers in which floors and pins must fit, and for what is shown beside records.

    Raises:
        BadRequest, NotFound, Conflict: refused; says what now.
    """
    if isinstance(command, am.PrefixCommand):
        return decide_prefix(directory, command, now, gateway)
    if isinstance(command, am.KeyCommand):
        return decide_key(directory, command, now, gateway)
    if isinstance(command, am.PriceCommand):
        return decide_price(directory, command)
    if isinstance(command, am.TenantCommand):
        return decide_tenant(directory, command, now, gateway)
    raise BadRequest(f"{type(command).__name__} is no command about tenants, keys, prices or prefixes")
