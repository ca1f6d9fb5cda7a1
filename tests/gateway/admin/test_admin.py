"""The admin actor over a real socket: effective at once and after a restart, and no secret where none belongs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zmq

from kvasir.cli import admin_client
from kvasir.gateway.admin.admin import Admin, decide, open_admin_link
from kvasir.gateway.core.misses import Miss
from kvasir.gateway.core.receipts import Receipt
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.lock import hold_lock
from kvasir.gateway.routing.router import Decision, Terms
from kvasir.gateway.tenants.directory import PublishedPrefix, TenantDirectory
from kvasir.gateway.tenants.store import DATABASE_NAME, open_store
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigurationError,
    Conflict,
    ConnectionLost,
    InvalidMessage,
    KvasirError,
    NotFound,
    StoreError,
    Unavailable,
)

pytestmark = pytest.mark.timeout(30)
ROOT = Path(__file__).resolve().parents[3]


class FakeHouse:
    """A gateway with one worker and nothing to do."""

    drained = False
    kv_changes = 0

    def __init__(self) -> None:
        self.cleared: list[str] = []
        self.ended: list[tuple[str, str]] = []
        self.forgotten: list[str] = []
        self.prewarmed: list[str | None] = []
        self.tokenised: list[str] = []
        self.names = ["demo-0"]
        self.upstreams: set[str] = set()
        self.num_blocks = 100

    def workers(self) -> list[records.WorkerInfo]:
        size = {"num_blocks": self.num_blocks, "num_free_blocks": 40}
        return [
            records.WorkerInfo(name, "demo", "ready", 7, **size, engine="vllm", lacks=["owners", "pins"])
            if name in self.upstreams
            else records.WorkerInfo(name, "demo", "ready", 7, **size)
            for name in self.names
        ]

    def models(self) -> list[records.ModelStatus]:
        return [records.ModelStatus("demo", "f00d", "float32", 2048, 1)]

    def usage(self) -> dict[str, records.UsageInfo]:
        return {}

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        return {"demo": len(prefix.text) // 16 * 16}

    def cache(self) -> list[records.CacheWorker]:
        return [
            records.CacheWorker("demo-0", "demo", 16, 100, 40, tenants=[records.CacheTenant("acme", num_blocks=60)])
        ]

    def kv_changed(self) -> None:
        self.kv_changes += 1

    def pinned_blocks(self, prefixes: Sequence[PublishedPrefix]) -> dict[str, int]:
        return {
            name: sum(len(prefix.text) // 16 for prefix in prefixes if prefix.is_pinned_on(name)) for name in self.names
        }

    async def tokenise(self, text: str) -> None:
        self.tokenised.append(text)

    def prefixes_changed(self, prewarm: str | None = None) -> None:
        self.prewarmed.append(prewarm)

    def saved_by_prefix(self) -> dict[str, Saving]:
        return {"sys": Saving(4, 4096)}

    def private_prefixes(self) -> list[records.PrivatePrefix]:
        return [records.PrivatePrefix("acme", "demo", 12_345, 17), records.PrivatePrefix("acme", "demo", 100, 1)]

    def end_requests(self, payer_id: str, reason: str) -> None:
        self.ended.append((payer_id, reason))

    def forget(self, payer_id: str) -> None:
        self.forgotten.append(payer_id)

    def bounds(self) -> dict[str, int]:
        return {"requests waiting": 10_000}

    def ledger_error(self) -> str:
        return ""

    def clear_kv(self, tenant_id: str) -> None:
        self.cleared.append(tenant_id)

    def endpoints(self) -> dict[str, str]:
        return {"http": "http://127.0.0.1:8000/v1"}

    def is_draining(self) -> bool:
        return self.drained

    def explain(self, request: str) -> list[dict[str, Any]] | None:
        chosen = Terms("demo-1", 0.25, 0.1, 0.1, 0, 0, 0.0, 1)
        terms = (Terms("demo-0", 0.5, 0.5, 0.2, 4, 1, 0.0, 3, is_guess=True), chosen)
        decision = Decision("demo-1", 7, terms, chosen, 0.0, 0.0, 0, note="is one of two")
        miss = Miss("routed_elsewhere", 4, "c0ffee" * 5, "demo-0", 0.5, 0.25)
        receipt = Receipt(decision, 0.5, 0.25, 12.0, num_cached_tokens=0, miss=miss)
        return msgspec.to_builtins([receipt]) if request == "known" else None

    def drain(self) -> None:
        self.drained = True


class Office:
    """The admin actor in a thread of its own, as a gateway runs it; `ask` is the command line's side."""

    def __init__(self, home: Path, url: str = "") -> None:
        self.home, self.url = home, url
        self.path = home / "run" / "admin" / "admin.sock"
        self.directory: TenantDirectory
        self.house = FakeHouse()
        self._ready = threading.Event()
        self._stop: Callable[[], None]
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        assert self._ready.wait(10)
        if self._failure:
            raise self._failure

    def ask(self, command: am.AdminCommand, reply: type[Any]) -> Any:
        return admin_client.ask(command, reply, path=self.path, timeout_s=10)

    def close(self) -> None:
        self._stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self._failure:
            raise self._failure

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._failure = error
        self._ready.set()

    async def _serve(self) -> None:
        store = open_store(self.home, self.url)
        context = zmq.Context()
        try:
            self.directory = TenantDirectory(store.secret, store.load())
            link = open_admin_link(context, f"ipc://{self.path}")
            admin = Admin(link, self.directory, store, self.house, version="1.2.3")
            async with trio.open_nursery() as nursery:
                await nursery.start(admin.run)
                token = trio.lowlevel.current_trio_token()
                self._stop = lambda: token.run_sync_soon(link.close)
                self._ready.set()
        finally:
            context.destroy(linger=0)
            store.close()


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


@contextmanager
def open_office(home: Path, url: str = "") -> Iterator[Office]:
    office = Office(home, url)
    try:
        yield office
    finally:
        office.close()


def test_a_key_works_at_once_and_after_a_restart_until_it_is_revoked(home: Path) -> None:
    with open_office(home) as office:
        tenant = office.ask(am.TenantCreate(name="acme", group="g", allowed_models=["demo"]), am.TenantReply).tenant
        created = office.ask(am.KeyCreate(tenant="acme", label="laptop"), am.KeyCreated)
        assert office.directory.authenticate(created.key).tenant.id == tenant.id
    with open_office(home) as office:
        known = office.directory.authenticate(created.key).tenant
        assert (known.id, known.scope, known.allowed_models) == (tenant.id, ("group", "g"), frozenset({"demo"}))
        assert office.ask(am.KeyRevoke(key_id=created.id), am.Done).changed
        with pytest.raises(AuthenticationFailed):
            office.directory.authenticate(created.key)
        assert not office.ask(am.KeyRevoke(key_id=created.key), am.Done).changed
    with open_office(home) as office:
        with pytest.raises(AuthenticationFailed):
            office.directory.authenticate(created.key)
        [shown] = office.ask(am.KeyList(tenant="acme"), am.KeysReply).keys
        assert shown.label == "laptop" and shown.revoked_at is not None


def test_a_tenant_is_disabled_and_enabled_at_once(home: Path) -> None:
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        key = office.ask(am.KeyCreate(tenant="acme"), am.KeyCreated).key
        for active in (False, True):
            assert office.ask(am.TenantSetStatus(name="acme", active=active), am.Done).changed
            assert not office.ask(am.TenantSetStatus(name="acme", active=active), am.Done).changed
            if active:
                office.directory.authenticate(key)
            else:
                with pytest.raises(AuthenticationFailed, match="disabled"):
                    office.directory.authenticate(key)


def test_prefixes_are_published_listed_replaced_and_removed(home: Path) -> None:
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        publish = am.PrefixPublish(name="sys", text="x" * 40, tenants=["acme"])
        first = office.ask(publish, am.PrefixReply)
        assert first.changed and first.prefix.public_tokens == {"demo": 32}
        assert not office.ask(publish, am.PrefixReply).changed
        with pytest.raises(Conflict, match="--replace"):
            office.ask(am.PrefixPublish(name="sys", text="other"), am.PrefixReply)
        assert office.ask(am.PrefixPublish(name="sys", text="other", replace=True), am.PrefixReply).changed
        assert office.house.tokenised[-1] == "other"
        assert office.directory.prefixes[0].text == "other"
    with open_office(home) as office:
        [shown] = office.ask(am.PrefixList(), am.PrefixesReply).prefixes
        assert (shown.name, shown.tenants, shown.num_chars) == ("sys", None, 5)
        office.ask(am.PrefixRemove(name="sys"), am.Done)
        assert office.directory.prefixes == ()


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        (am.TenantCreate(name="acme"), Conflict, "exists already"),
        (am.TenantCreate(name="Acme"), BadRequest, "lower-case"),
        (am.TenantCreate(name="x", group="A B"), BadRequest, "group name"),
        (am.TenantShow(name="nobody"), NotFound, "nobody"),
        (am.KeyCreate(tenant="nobody"), NotFound, "nobody"),
        (am.KeyRevoke(key_id="nokey"), NotFound, "nokey"),
        (am.PrefixPublish(name="p", text=" \n"), BadRequest, "empty"),
        (am.PrefixPublish(name="p", text="x", tenants=["nobody"]), NotFound, "nobody"),
        (am.PrefixRemove(name="p"), NotFound, "kvasir prefix list"),
        (am.ExplainQuery(request="unknown"), NotFound, "unknown"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else "",
)
def test_a_refused_command_says_why_and_changes_nothing(home: Path, command: Any, error: Any, words: str) -> None:
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        with pytest.raises(error, match=words):
            office.ask(command, am.Done)
    store = open_store(home)
    assert len(store.load()) == store.verify_audit() == 1
    store.close()


def test_no_secret_is_in_any_listing_the_audit_the_log_or_the_database(home: Path, capfd: Any) -> None:
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        created = [office.ask(am.KeyCreate(tenant="acme", label=f"k{i}"), am.KeyCreated) for i in range(3)]
        office.ask(am.PrefixPublish(name="sys", text="canary text " * 10), am.PrefixReply)
        office.ask(am.KeyRevoke(key_id=created[0].key), am.Done)
        with pytest.raises(NotFound) as refused:
            office.ask(am.KeyRevoke(key_id="kv_none_" + "ab" * 32), am.Done)
        shown = [
            office.ask(am.TenantList(), am.TenantsReply),
            office.ask(am.TenantShow(name="acme"), am.TenantReply),
            office.ask(am.KeyList(), am.KeysReply),
            office.ask(am.PrefixList(), am.PrefixesReply),
            office.ask(am.StatusQuery(), am.StatusReply),
        ]
    store = open_store(home)
    audit = store.audit()
    assert store.verify_audit() == len(audit) == 6
    store.close()
    seen = repr(shown) + repr(audit) + refused.value.message + "".join(capfd.readouterr())
    raw = b"".join(path.read_bytes() for path in home.iterdir() if path.name.startswith(DATABASE_NAME))
    for canary in [key.key.rpartition("_")[2] for key in created] + ["ab" * 32]:
        assert canary not in seen and canary.encode() not in raw
    assert "canary text" not in seen  # what tenants may not see belongs in no log either
    assert [entry.command for entry in audit][:2] == ["tenant_create", "key_create"]
    assert f"pid {os.getpid()}" in audit[0].actor
    names = ["id", "name", "status", "sharing", "allowed_models", "kv_floor", "kv_cap", "cache_hint", "terms"]
    assert json.loads(audit[0].before) is None and list(json.loads(audit[0].after)) == names


def test_status_explain_and_drain_reach_the_house(home: Path) -> None:
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        status = office.ask(am.StatusQuery(), am.StatusReply)
        assert status.workers == FakeHouse().workers() and status.models == FakeHouse().models()
        assert [tenant.name for tenant in status.tenants] == ["acme"]
        assert (status.pid, status.version, status.draining) == (os.getpid(), "1.2.3", False)
        assert (
            office.ask(am.ExplainQuery(request="known"), am.ExplainReply).receipts[0]["decision"]["worker_id"]
            == "demo-1"
        )
        office.ask(am.DrainGateway(), am.Done)
        assert office.house.drained


def test_a_bug_in_a_command_is_told_and_ends_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_office(home) as office:
        for command in (am.Backup(folder="/nul\0"), am.TenantList()):
            monkeypatch.setattr(office.house, "usage", lambda: 1 // 0)
            with pytest.raises(KvasirError, match="its log says how"):
                office.ask(command, am.Done)
        monkeypatch.undo()
        assert office.ask(am.TenantList(), am.TenantsReply).tenants == []


def test_garbage_is_answered_with_an_error_and_harms_nobody(home: Path) -> None:
    with open_office(home) as office:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"ipc://{office.path}")
        for frames in ([b"\xc1 garbage"], [b"", b"two frames"], [msgspec.msgpack.encode({"type": "no_such_command"})]):
            dealer.send_multipart(frames)
            assert dealer.poll(5000)
            reply = am.ADMIN_REPLIES.decode(dealer.recv())
            assert isinstance(reply, am.AdminFailed) and reply.error.code in ("invalid_message", "invalid_request")
        context.destroy(linger=0)
        assert office.ask(am.StatusQuery(), am.StatusReply).version == "1.2.3"


def test_a_failed_commit_is_answered_and_not_put_in_force(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full; make room")

    with open_office(home) as office:
        monkeypatch.setattr("kvasir.gateway.tenants.store.Store.write", full)
        with pytest.raises(StoreError, match="disk is full"):
            office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        monkeypatch.undo()
        assert office.ask(am.TenantList(), am.TenantsReply).tenants == []
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)


def test_only_the_owner_may_open_the_socket(home: Path) -> None:
    with open_office(home) as office:
        assert office.path.stat().st_mode & 0o777 == 0o600
        assert office.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_socket_left_by_a_dead_gateway_is_taken_over(home: Path) -> None:
    code = (
        "import sys, zmq, os, signal; s = zmq.Context().socket(zmq.ROUTER); s.bind(sys.argv[1]);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (home / "run" / "admin").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code, f"ipc://{home}/run/admin/admin.sock"], timeout=20, check=False)
    assert (home / "run" / "admin" / "admin.sock").exists()
    with pytest.raises(ConnectionLost, match="kvasir up"):
        admin_client.ask(am.StatusQuery(), am.StatusReply, path=home / "run" / "admin" / "admin.sock", timeout_s=5)
    with open_office(home) as office:
        assert office.ask(am.StatusQuery(), am.StatusReply).version == "1.2.3"


HOLDER = """
import sys
from pathlib import Path
from kvasir.gateway.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_gateway_is_refused_by_name_and_a_killed_one_leaves_the_lock(home: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match=rf"process {holder.pid}\) is running on {home}"), hold_lock(home):
            pass
        holder.kill()
        holder.wait(10)
    with hold_lock(home):
        assert (home / "gateway.lock").read_text() == f"{os.getpid()}\n"
    with hold_lock(home):
        pass


def test_a_silent_gateway_is_not_waited_for_for_ever(home: Path) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{home}/admin.sock")
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"does not answer for 0\.2 s"):
        admin_client.ask(am.StatusQuery(), am.StatusReply, path=home / "admin.sock", timeout_s=0.2)
    assert time.monotonic() - begun < 5
    context.destroy(linger=0)


def test_deciding_changes_nothing_by_itself() -> None:
    directory = TenantDirectory(bytes(32))
    verdict = decide(directory, am.TenantCreate(name="acme"), 1.0, FakeHouse())
    assert len(verdict.changes) == 1 and directory.tenants() == []
    with pytest.raises(BadRequest):
        decide(directory, am.StatusQuery(), 1.0, FakeHouse())


def test_replies_of_the_wrong_kind_are_noticed(home: Path) -> None:
    with open_office(home) as office, pytest.raises(InvalidMessage, match="another version"):
        office.ask(am.TenantList(), am.KeysReply)
