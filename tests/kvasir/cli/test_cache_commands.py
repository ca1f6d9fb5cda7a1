"""Floors, caps, pins and `kvasir cache` on a live system of two tenants and real text."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvasir import Client
from tests.box import Box, open_box

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
NUM_BLOCKS_AT_LEAST = 64
SYSTEM = "You are a careful Python programmer who answers with short functions and explains nothing. " * 8


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with open_box(workers=1, worker_args="--kv-memory 8M") as box:
        yield box


def client(box: Box, tenant: str) -> Client:
    return Client(box.client_endpoint, box.key(tenant), timeout_s=60)


def worker(box: Box) -> dict[str, Any]:
    return box.json("cache", "show")["workers"][0]  # type: ignore[no-any-return]


def held(box: Box, tenant: str) -> int:
    return sum(t["num_blocks"] for t in worker(box)["tenants"] if t["tenant"] == tenant)


def eventually(condition: Callable[[], bool]) -> None:
    """Accounts come once a second: wait until they show it."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fill(box: Box, tenant: str, num_prompts: int, salt: int = 0) -> None:
    with client(box, tenant) as api:
        for i in range(num_prompts):
            api.generate([(7 * i + 31 * j + salt) % 500 + 3 for j in range(256)], max_tokens=1)


def test_a_cap_takes_effect_at_once_and_a_clear_empties(box: Box) -> None:
    fill(box, "alpha", 8)
    eventually(lambda: held(box, "alpha") >= NUM_BLOCKS_AT_LEAST)
    box.kvasir("tenant", "set", "alpha", "--kv-cap", "20")
    eventually(lambda: held(box, "alpha") <= 20)
    shown = box.json("tenant", "show", "alpha")["tenant"]
    assert (shown["kv_floor"], shown["kv_cap"]) == ("", "20")
    box.kvasir("tenant", "set", "alpha", "--kv-cap", "none")
    box.kvasir("cache", "clear", "--tenant", "alpha")
    eventually(lambda: held(box, "alpha") == 0)


def test_memory_held_is_told_in_the_bytes_of_the_pool(box: Box) -> None:
    fill(box, "alpha", 1)
    eventually(lambda: any(tenant["block_s"] > 0 for tenant in worker(box)["tenants"]))
    pool = worker(box)
    tenant = next(tenant for tenant in pool["tenants"] if tenant["block_s"] > 0)
    pool_bytes = tenant["byte_s"] / tenant["block_s"] * pool["num_blocks"]
    assert 0.99 < pool_bytes / (8 << 20) <= 1.0, "--kv-memory 8M, in whole blocks"
    assert "byte·s" in box.kvasir("cache", "show").stdout


def test_floors_that_do_not_fit_together_are_refused(box: Box) -> None:
    box.key("alpha"), box.key("beta")
    box.kvasir("tenant", "set", "alpha", "--kv-floor", "60%")
    refused = box.kvasir("tenant", "set", "beta", "--kv-floor", "50%", check=False)
    assert refused.returncode == 2
    assert "110 % in all do not fit" in refused.stderr
    box.kvasir("tenant", "set", "alpha", "--kv-floor", "none")


def test_a_flood_leaves_what_a_floor_protects(box: Box) -> None:
    pool = worker(box)["num_blocks"]
    box.key("beta")
    box.kvasir("tenant", "set", "beta", "--kv-floor", "64")
    fill(box, "beta", 4)
    fill(box, "alpha", pool // 16 + 8, salt=211)
    eventually(lambda: any(t["evicted_own"] > 0 for t in worker(box)["tenants"] if t["tenant"] == "alpha"))
    with client(box, "beta") as beta:
        usage = beta.generate([(31 * j) % 500 + 3 for j in range(256)], max_tokens=1).usage
    assert usage.cached_tokens >= 240
    box.kvasir("tenant", "set", "beta", "--kv-floor", "none")


def test_a_prefix_is_prewarmed_pinned_shared_shown_and_let_go(box: Box, tmp_path) -> None:
    (tmp_path / "system.txt").write_text(SYSTEM)
    box.kvasir("prefix", "publish", "coder", "--file", str(tmp_path / "system.txt"))
    box.kvasir("prefix", "pin", "coder", "--prewarm")
    eventually(lambda: worker(box)["num_pinned"] > 10)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Reverse a list."}]
    with client(box, "alpha") as alpha, client(box, "beta") as beta:
        assert alpha.chat(messages, max_tokens=4).usage.cached_tokens > 50, "it was to be computed already"
        assert beta.chat(messages, max_tokens=4).usage.cached_tokens > 50
    shown = box.kvasir("cache", "show").stdout
    assert "coder" in shown
    assert "pinned" in shown
    assert SYSTEM[:30] in shown
    assert "Reverse a list" not in shown
    [prefix] = box.json("cache", "show")["prefixes"]
    assert prefix["saved_tokens"] > 100
    box.kvasir("prefix", "unpin", "coder")
    eventually(lambda: worker(box)["num_pinned"] == 0)


def test_a_pin_on_one_worker_stays_there_over_its_restart_and_ends_with_unpin(tmp_path) -> None:
    (tmp_path / "system.txt").write_text(SYSTEM)
    with open_box(workers=2, worker_args="--kv-memory 8M") as box:

        def pinned() -> dict[str, int]:
            return {pool["id"]: pool["num_pinned"] for pool in box.json("cache", "show")["workers"]}

        box.kvasir("prefix", "publish", "coder", "--file", str(tmp_path / "system.txt"))
        refused = box.kvasir("prefix", "pin", "coder", "--worker", "demo-9", check=False)
        assert "'demo-9'; those there are: demo-0, demo-1" in refused.stderr
        box.kvasir("prefix", "pin", "coder", "--worker", "demo-1", "--prewarm")
        eventually(lambda: pinned().get("demo-1", 0) > 10)
        assert pinned()["demo-0"] == 0
        num_told = box.log().count("prefix=coder/0")
        os.kill(next(worker["pid"] for worker in box.workers() if worker["id"] == "demo-1"), signal.SIGKILL)
        eventually(lambda: box.log().count("prefix=coder/0") > num_told)
        box.wait_for_workers(2)
        box.kvasir("prefix", "pin", "coder", "--worker", "demo-1", "--prewarm")
        eventually(lambda: pinned().get("demo-1", 0) > 10)
        box.kvasir("prefix", "unpin", "coder")
        eventually(lambda: pinned() == {"demo-0": 0, "demo-1": 0})
