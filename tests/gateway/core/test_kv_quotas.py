"""Floors, caps and pins on their way: command line words to blocks, disk, the core's commands, a worker process."""

from __future__ import annotations

import json
import sqlite3
from itertools import chain
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.admin.metrics import render_metrics
from kvasir.gateway.core.savings import Saving
from kvasir.gateway.edges.openai_requests import read_completion
from kvasir.gateway.tenants.directory import PublishedPrefix, Tenant
from kvasir.gateway.tenants.quotas import check_kv_quotas, check_kv_size, kv_blocks, kv_quotas
from kvasir.gateway.tenants.store import DATABASE_NAME, MIGRATIONS, open_store
from kvasir.protocol import admin_messages as am
from kvasir.protocol.errors import BadRequest, NotFound
from kvasir.protocol.messages import ClearTenant, KvAccount, KvAccounts, Pin, Quota, Quotas, Unpin, Welcome
from kvasir.protocol.prefix import hash_prompt
from kvasir.protocol.sampling import RetentionHint
from kvasir.protocol.tokens import pack_tokens
from tests.core_helpers import BLOCK_SIZE, Bench, make_submit, output
from tests.engine_helpers import PUBLIC_SPACE, ROOT, SIZE, Rig, make_generate, make_prompt
from tests.gateway.admin.test_admin import Office, home, open_office  # noqa: F401 a fixture
from tests.worker.test_worker_process import open_gateway


@pytest.mark.parametrize("text", ["", "none", "0", "0%", " none "])
def test_nothing_is_no_quota(text: str) -> None:
    assert check_kv_size(text, "kv_floor") == ""


@pytest.mark.parametrize("text", ["0", "0%", "00.0%"])
def test_a_cap_of_nothing_is_refused_rather_than_taken_for_no_cap(text: str) -> None:
    with pytest.raises(BadRequest, match="give none to lift it, or disable the tenant"):
        check_kv_size(text, "kv_cap")


@pytest.mark.parametrize(
    ("text", "num_blocks"), [("20", 20), ("20.5%", 205), ("99.99%", 999), ("100%", 1000), ("20 %", 200)]
)
def test_sizes_are_blocks_or_shares_rounded_down(text: str, num_blocks: int) -> None:
    assert kv_blocks(check_kv_size(text, "kv_cap"), 1000) == num_blocks


@pytest.mark.parametrize("text", ["-1", "1e3", "101%", "ten", "%", "5%%", "1.5"])
def test_what_is_no_size_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"kv_cap .* is no size"):
        check_kv_size(text, "kv_cap")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(10, 100_000))
def test_shares_that_fit_as_shares_fit_as_blocks_of_any_pool(shares: list[int], num_blocks: int) -> None:
    tenants = [Tenant(f"t{i}", f"t{i}", kv_floor=f"{share}%") for i, share in enumerate(shares)]
    if sum(shares) > 100:
        with pytest.raises(BadRequest, match="in all do not fit"):
            check_kv_quotas(tenants, {"w": num_blocks})
    else:
        check_kv_quotas(tenants, {"w": num_blocks})
        assert sum(quota.floor for quota in kv_quotas(tenants, num_blocks).values()) <= num_blocks


def test_a_share_of_less_than_a_block_is_no_floor_and_a_cap_of_one() -> None:
    check_kv_quotas(tenants := [Tenant(f"t{i}", f"t{i}", kv_floor="9%", kv_cap="9%") for i in range(11)], {"w": 10})
    assert kv_quotas(tenants, 10)[tenants[0].id] == Quota(0, 1)


def test_floors_in_blocks_are_checked_against_every_worker() -> None:
    tenants = [Tenant("a", "a", kv_floor="50%"), Tenant("b", "b", kv_floor="60")]
    check_kv_quotas(tenants, {"large": 1000, "just": 120})
    with pytest.raises(BadRequest, match="110 blocks in all do not fit worker small, which has 100"):
        check_kv_quotas(tenants, {"large": 1000, "small": 100})
    with pytest.raises(BadRequest, match="floor 30% is above the cap 20"):
        check_kv_quotas([Tenant("a", "a", kv_floor="30%", kv_cap="20")], {"large": 1000})


def test_pinned_blocks_leave_less_for_floors() -> None:
    tenants = [Tenant("a", "a", kv_floor="60")]
    check_kv_quotas(tenants, {"w1": 100, "w2": 100}, {"w1": 40})
    with pytest.raises(BadRequest, match="floors of 60 blocks in all and 41 pinned blocks do not fit worker w2"):
        check_kv_quotas(tenants, {"w1": 100, "w2": 100}, {"w1": 40, "w2": 41})


def test_quotas_and_pins_are_set_audited_and_survive_a_restart(home: Path) -> None:  # noqa: F811
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        office.ask(am.PrefixPublish(name="sys", text="x" * 40), am.PrefixReply)
        assert office.ask(am.TenantSet(name="acme", kv_floor="20%", kv_cap="50"), am.Done).changed
        assert not office.ask(am.TenantSet(name="acme", kv_floor="20%"), am.Done).changed
        assert office.house.kv_changes == 1
        assert office.ask(am.PrefixPin(name="sys", prewarm=True), am.Done).changed
        assert office.house.prewarmed == [None, "sys"]
        with pytest.raises(BadRequest, match="above the cap"):
            office.ask(am.TenantSet(name="acme", kv_floor="60"), am.Done)
        with pytest.raises(NotFound):
            office.ask(am.PrefixPin(name="nope"), am.Done)
        office.ask(am.CacheClear(tenant="acme"), am.Done)
        assert office.house.cleared == [office.directory.tenant("acme").id]
        shown = office.ask(am.CacheQuery(), am.CacheReply)
        assert (shown.prefixes[0].name, shown.prefixes[0].pinned, shown.workers[0].id) == ("sys", True, "demo-0")
    with open_office(home) as office:
        tenant = office.ask(am.TenantShow(name="acme"), am.TenantReply).tenant
        assert (tenant.kv_floor, tenant.kv_cap) == ("20%", "50")
        assert office.ask(am.PrefixList(), am.PrefixesReply).prefixes[0].pinned
        office.ask(am.TenantSet(name="acme", kv_floor="none", kv_cap="none"), am.Done)
        assert office.directory.tenant("acme").kv_cap == ""


def test_a_pin_on_chosen_workers_is_replaced_by_the_next_kept_over_a_restart_and_lifted_everywhere(home: Path) -> None:  # noqa: F811
    def shown(office: Office) -> list[tuple[bool, list[str] | None]]:
        listed = office.ask(am.PrefixList(), am.PrefixesReply).prefixes[0]
        cached = office.ask(am.CacheQuery(), am.CacheReply).prefixes[0]
        assert (listed.pinned, listed.pinned_on) == (cached.pinned, cached.pinned_on)
        return listed.pinned, listed.pinned_on

    with open_office(home) as office:
        office.ask(am.PrefixPublish(name="sys", text="x" * 40), am.PrefixReply)
        office.house.names = ["demo-0", "demo-1"]
        for workers in (["demo-1", "demo-0"], ["demo-1"]):
            assert office.ask(am.PrefixPin(name="sys", workers=workers), am.Done).changed
            assert shown(office) == (True, sorted(workers))
        assert not office.ask(am.PrefixPin(name="sys", workers=["demo-1"]), am.Done).changed
    with open_office(home) as office:
        assert shown(office) == (True, ["demo-1"])
        with pytest.raises(NotFound, match=r"no worker is called 'demo-7'; those there are: demo-0\."):
            office.ask(am.PrefixPin(name="sys", workers=["demo-0", "demo-7"]), am.Done)
        assert office.ask(am.PrefixPin(name="sys", workers=["demo-0", "demo-1"]), am.Done).changed, "one is away, known"
        office.ask(am.PrefixPublish(name="sys", text="y" * 40, replace=True), am.PrefixReply)
        assert shown(office) == (True, ["demo-0", "demo-1"]), "another text, pinned where the one before was"
        assert office.ask(am.PrefixPin(name="sys"), am.Done).changed
        assert shown(office) == (True, None)
        office.ask(am.PrefixPin(name="sys", workers=["demo-0"]), am.Done)
        assert office.ask(am.PrefixPin(name="sys", pinned=False), am.Done).changed
        assert shown(office) == (False, None)


def test_pins_are_refused_where_the_engine_cannot_and_its_pool_bounds_no_floors(home: Path) -> None:  # noqa: F811
    with open_office(home) as office:
        office.ask(am.PrefixPublish(name="sys", text="x" * 40), am.PrefixReply)
        office.house.names, office.house.upstreams = ["demo-0", "demo-1"], {"demo-1"}
        with pytest.raises(BadRequest, match="worker 'demo-1' fronts vllm, which cannot pin prefixes"):
            office.ask(am.PrefixPin(name="sys", workers=["demo-1"]), am.Done)
        assert office.ask(am.PrefixPin(name="sys"), am.Done).changed, "one of all workers can"
        office.ask(am.PrefixPin(name="sys", pinned=False), am.Done)
        office.house.upstreams.add("demo-0")
        with pytest.raises(BadRequest, match="cannot pin prefixes"):
            office.ask(am.PrefixPin(name="sys"), am.Done)
        office.ask(am.TenantCreate(name="alpha"), am.TenantReply)
        assert office.ask(am.TenantSet(name="alpha", kv_floor="500"), am.Done).changed, (
            "larger than the upstreams' pools"
        )


def test_pins_and_floors_that_do_not_fit_together_are_refused_whichever_comes_last(home: Path) -> None:  # noqa: F811
    with open_office(home) as office:  # one worker of 100 blocks; 16 characters are one
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        office.ask(am.PrefixPublish(name="sys", text="x" * 16 * 50), am.PrefixReply)
        office.ask(am.PrefixPin(name="sys"), am.Done)
        with pytest.raises(BadRequest, match="51 blocks in all and 50 pinned blocks do not fit worker demo-0"):
            office.ask(am.TenantSet(name="acme", kv_floor="51"), am.Done)
        office.ask(am.TenantSet(name="acme", kv_floor="50"), am.Done)
        with pytest.raises(BadRequest, match="and 51 pinned blocks"):
            office.ask(am.PrefixPublish(name="sys", text="x" * 16 * 51, replace=True), am.PrefixReply)
        office.ask(am.PrefixPin(name="sys", pinned=False), am.Done)
        office.ask(am.TenantSet(name="acme", kv_floor="51"), am.Done)
        with pytest.raises(BadRequest, match="and 50 pinned blocks"):
            office.ask(am.PrefixPin(name="sys"), am.Done)
        assert not office.directory.prefixes[0].pinned


def test_what_does_not_fit_any_more_stands_in_nobodys_way(home: Path) -> None:  # noqa: F811
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        office.ask(am.PrefixPublish(name="sys", text="x" * 16 * 50), am.PrefixReply)
        office.ask(am.PrefixPin(name="sys"), am.Done)
        office.ask(am.TenantSet(name="acme", kv_floor="50"), am.Done)
        office.house.num_blocks = 60  # a smaller worker has taken the place of the one before
        office.ask(am.TenantSet(name="acme", cache_hint="open"), am.Done)
        office.ask(am.PrefixPublish(name="other", text="y" * 16 * 50), am.PrefixReply)
        office.ask(am.PrefixPin(name="sys", pinned=False), am.Done)
        with pytest.raises(BadRequest, match="and 50 pinned blocks do not fit worker demo-0, which has 60"):
            office.ask(am.PrefixPin(name="other"), am.Done)


def test_a_default_hint_is_set_shown_audited_kept_and_lifted(home: Path) -> None:  # noqa: F811
    with open_office(home) as office:
        office.ask(am.TenantCreate(name="acme"), am.TenantReply)
        assert office.ask(am.TenantSet(name="acme", cache_hint="one_shot"), am.Done).changed
        assert not office.ask(am.TenantSet(name="acme", cache_hint="one_shot"), am.Done).changed
        office.ask(am.TenantSet(name="acme", kv_cap="50"), am.Done)
        assert office.directory.tenant("acme").cache_hint == "one_shot", "what is not named stays as it is"
    with open_office(home) as office:
        assert office.ask(am.TenantShow(name="acme"), am.TenantReply).tenant.cache_hint == "one_shot"
        assert office.ask(am.TenantList(), am.TenantsReply).tenants[0].cache_hint == "one_shot"
        office.ask(am.TenantSet(name="acme", cache_hint="none"), am.Done)
        assert office.directory.tenant("acme").cache_hint is None
    store = open_store(home)
    hints = [json.loads(entry.after)["cache_hint"] for entry in store.audit()]
    store.close()
    assert hints == [None, "one_shot", "one_shot", None]


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_a_store_of_any_older_schema_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as raw:
        for (table,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            raw.execute(f"DROP TABLE {table}")
        for statement in chain.from_iterable(MIGRATIONS[:version]):
            raw.execute(statement)
        raw.execute(
            "INSERT INTO tenants (id, name, status, sharing, created_at) "
            "VALUES ('t1', 'acme', 'active', 'private', 1.0)"
        )
        raw.execute("INSERT INTO prefixes (name, text, created_at) VALUES ('sys', 'text', 1.0)")
        raw.execute(f"PRAGMA user_version = {version}")
    raw.close()
    store = open_store(tmp_path)
    assert store.load() == [Tenant("t1", "acme", created_at=1.0), PublishedPrefix("sys", "text", created_at=1.0)]
    store.close()


# ---- core


def test_quotas_reach_workers_that_are_there_and_those_that_join_in_blocks_of_their_pools() -> None:
    bench = Bench()
    first = bench.join("w1", num_blocks=100)
    bench.core.kv.set_quotas(lambda num_blocks: {"a": Quota(num_blocks // 5)})
    second = bench.join("w2", num_blocks=1000)
    assert bench.take(Quotas) == [(first, Quotas({"a": Quota(20)})), (second, Quotas({"a": Quota(200)}))]
    assert bench.take(Welcome)[-1][0] == second
    bench.core.kv.set_quotas(lambda _: {})
    assert bench.take(Quotas) == [(first, Quotas({})), (second, Quotas({}))]
    bench.core.kv.clear("a")
    assert [peer for peer, _ in bench.take(ClearTenant)] == [first, second]


def test_a_worker_that_cannot_be_told_is_lost_and_its_requests_go_on() -> None:
    bench = Bench()
    first = bench.join("w1")
    bench.submit(b"r1")
    assert [peer for peer, _ in bench.take()] == [first]
    second = bench.join("w2")
    bench.dead.add(first)
    bench.core.kv.set_quotas(lambda _: {"a": Quota(1)})
    assert [peer for peer, _ in bench.take()] == [second]


def test_pins_are_told_once_again_when_they_change_and_taken_back() -> None:
    bench = Bench()
    pins = [Pin("sys/0", b"", b"r" * 16, b"1" * 16)]
    bench.core.kv.set_pins(lambda *_: pins)
    peer = bench.join("w1")
    assert bench.take(Pin) == [(peer, pins[0])]
    bench.core.kv.set_pins(lambda *_: pins)
    assert bench.take(Pin) == []
    pins[0] = Pin("sys/0", b"", b"r" * 16, b"2" * 16)
    bench.core.kv.set_pins(lambda *_: pins)
    assert len(bench.take(Pin)) == 1
    bench.core.kv.set_pins(lambda *_: pins, prewarm="sys")
    assert bench.take(Pin)[0][1].prewarm
    pins.clear()
    bench.core.kv.set_pins(lambda *_: pins)
    assert bench.take(Unpin) == [(peer, Unpin("sys/0"))]


def test_a_worker_is_told_the_pins_that_are_its_own_also_when_it_comes_back() -> None:
    bench = Bench()
    pins = {"w1": [Pin("sys/0", b"", b"r" * 16, b"1" * 16)], "w2": []}
    bench.core.kv.set_pins(lambda model, worker_id: pins[worker_id])
    first, second = bench.join("w1"), bench.join("w2")
    assert bench.take(Pin) == [(first, pins["w1"][0])]
    again = bench.join("w1", peer=b"again")
    assert bench.take(Pin) == [(again, pins["w1"][0])]
    pins["w1"], pins["w2"] = pins["w2"], pins["w1"]
    bench.core.kv.set_pins(lambda model, worker_id: pins[worker_id])
    assert (bench.take(Unpin), bench.take(Pin)) == ([(again, Unpin("sys/0"))], [(second, pins["w2"][0])])


def test_accounts_and_what_published_prefixes_save_can_be_seen() -> None:
    bench = Bench()
    peer = bench.join("w1", bytes_per_block=1 << 14)
    bench.core.worker_report(peer, KvAccounts([KvAccount("t1", num_held=7, block_s=2.5, num_caused=3)], num_pinned=2))
    [cache] = bench.core.statistics().caches
    [owner] = cache.tenants
    assert (cache.id, cache.num_pinned, owner.tenant, owner.num_blocks, owner.caused) == ("w1", 2, "t1", 7, 3)
    text = render_metrics(bench.core.statistics(), None).decode()
    assert 'kvasir_kv_blocks{worker="w1",tenant="t1"} 7\n' in text
    assert 'kvasir_kv_block_seconds_total{worker="w1",tenant="t1"} 2.5\n' in text
    assert f'kvasir_kv_byte_seconds_total{{worker="w1",tenant="t1"}} {2.5 * (1 << 14)}\n' in text
    assert 'kvasir_worker_pinned_blocks{worker="w1",model="demo"} 2\n' in text


def test_what_published_prefixes_save_is_counted_by_their_last_block() -> None:
    bench = Bench()
    peer = bench.join("w1")
    tokens = tuple(range(3 * BLOCK_SIZE))
    for req_id, num_cached in ((b"r1", 3 * BLOCK_SIZE - 1), (b"r2", BLOCK_SIZE)):
        submit, _ = make_submit(req_id, tokens, arrived=bench.now)
        submit = msgspec.structs.replace(submit, num_public_tokens=2 * BLOCK_SIZE)
        bench.core.submit(submit)
        bench.report(peer, output(req_id, 0, [1], "length", num_cached_tokens=num_cached))
    digest = submit.prefix_hashes[16:32]
    assert bench.core.savings.published == {("demo", digest): Saving(2, 3 * BLOCK_SIZE)}
    assert bench.core.savings.top_private(10) == [], "less than a block after the published zone is nobody's"


# ---- worker


def make_pin(tokens: list[int], name: str = "sys/0", *, prewarm: bool = False) -> Pin:
    packed = pack_tokens(tokens)
    return Pin(name, packed, ROOT, hash_prompt(ROOT, PUBLIC_SPACE, PUBLIC_SPACE, packed, len(tokens), SIZE), prewarm)


def test_a_pinned_prefix_is_kept_from_when_somebody_computes_it() -> None:
    rig = Rig(num_blocks=12)
    prefix = make_prompt(4 * SIZE)
    assert rig.engine.pin(make_pin(prefix)) == 0
    rig.submit(make_generate([*prefix, 1], 1, num_public=4, req_id=b"1"))
    while rig.engine.has_work:
        rig.step()
    assert rig.engine.kv_accounts().num_pinned == 4
    for salt in range(4):
        rig.submit(make_generate(make_prompt(28, salt=salt + 1), 1, tenant="b", req_id=b"f%d" % salt))
        while rig.engine.has_work:
            rig.step()
    again = rig.submit(make_generate([*prefix, 2], 1, tenant="c", num_public=4, req_id=b"2"))
    while rig.engine.has_work:
        rig.step()
    assert again.num_cached == 4 * SIZE
    rig.engine.unpin("sys/0")
    assert rig.engine.kv_accounts().num_pinned == 0


def test_prewarming_computes_a_prefix_and_nobody_hears_of_it() -> None:
    rig = Rig(num_blocks=12)
    prefix = make_prompt(4 * SIZE)
    rig.engine.pin(make_pin(prefix, prewarm=True))
    while rig.engine.has_work:
        assert rig.step().outputs == []
    assert rig.engine.kv_accounts().num_pinned == 4
    first = rig.submit(make_generate([*prefix, 1], 1, num_public=4, req_id=b"1"))
    while rig.engine.has_work:
        rig.step()
    assert first.num_cached == 4 * SIZE


def test_a_pin_that_contradicts_itself_is_refused() -> None:
    pin = make_pin(make_prompt(2 * SIZE))
    pin.prefix_hashes = pin.prefix_hashes[:16]
    with pytest.raises(BadRequest, match="cannot be pinned: 1 prefix hashes for 2"):
        Rig().engine.pin(pin)


def test_a_worker_process_keeps_quotas_reports_accounts_and_clears() -> None:
    with open_gateway() as gateway:
        gateway.welcome()
        gateway.send(Quotas({"a": Quota(2, 4)}))
        gateway.send(Quotas({"a": Quota(1 << 40)}))  # fits no pool: the ones before stay
        gateway.send(make_generate(make_prompt(40), 2, req_id=b"long"))
        assert "cap is 4" in gateway.finish(b"long").error
        gateway.send(make_generate(make_prompt(9), 2, req_id=b"short"))
        assert gateway.finish(b"short").finish_reason == "length"
        gateway.receive_until(lambda r: isinstance(r, KvAccounts) and any(a.num_held == 2 for a in r.accounts))
        gateway.send(ClearTenant("a"))
        gateway.receive_until(lambda r: isinstance(r, KvAccounts) and all(a.num_held == 0 for a in r.accounts))
        assert "quotas_refused" in gateway.log()


def test_a_new_session_begins_without_the_pins_and_quotas_of_the_one_before() -> None:
    rig = Rig(num_blocks=12)
    prefix = make_prompt(4 * SIZE)
    rig.engine.pin(make_pin(prefix, prewarm=True))
    rig.engine.set_quotas(Quotas({"a": Quota(1, 2)}))
    while rig.engine.has_work:
        rig.step()
    assert rig.engine.kv_accounts().num_pinned == 4
    rig.engine.drop_all()
    assert rig.engine.kv_accounts().num_pinned == 0, "unpinned meanwhile, for all the worker knows"
    rig.submit(make_generate(make_prompt(4 * SIZE, salt=1), 1, tenant="a", req_id=b"1"))
    while rig.engine.has_work:
        assert not any(output.error for output in rig.step().outputs), "its cap may have been lifted"
    assert rig.engine.pin(make_pin(prefix)) == 4, "pinned again it is still there"


# ---- hints


def test_hints_travel_from_the_body_of_a_request_to_its_sequence() -> None:
    body = {
        "model": "demo",
        "prompt": "x",
        "cache_hint": "one_shot",
        "retention": [{"start": 5, "end": 9, "priority": 90, "duration_s": 60}],
    }
    [request] = read_completion(msgspec.json.encode(body)).requests
    assert (request.cache_hint, request.retention) == ("one_shot", [RetentionHint(5, 9, 90, 60.0)])
    rig = Rig()
    rig.cache.set_quotas({"a": Quota(floor=4)})
    hints = {"cache_hint": request.cache_hint, "retention": request.retention}
    for tenant in ("a", "b"):
        prompt = make_prompt(9, salt=ord(tenant))
        rig.submit(make_generate(prompt, 2, tenant=tenant, req_id=tenant.encode(), **hints))
        table = rig.engine._sequences.by_id[tenant.encode(), 1].table
        assert (table.hint, table.retention) == ("one_shot", (RetentionHint(5, 9, 90, 60.0),))
        while rig.engine.has_work:
            rig.step()
    priorities = {(run.owner, run.start, run.end): run.priority for run in rig.cache._tree}
    assert priorities == {("a", 0, 1): 35, ("a", 1, 2): 90, ("b", 0, 2): 35}, "only within a quota of one's own"


@pytest.mark.parametrize("field", [{"cache_hint": "for ever"}, {"retention": [{"priority": 101}]}])
def test_hints_that_make_no_sense_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        read_completion(msgspec.json.encode({"model": "demo", "prompt": "x", **field}))
