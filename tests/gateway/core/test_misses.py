"""Why a prompt was not cached: causes injected one by one, and every one named rightly."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from kvasir.gateway.core.api import PromptParts
from kvasir.gateway.core.misses import Miss, Prompts
from kvasir.protocol.messages import Load
from kvasir.protocol.prefix import HASH_BYTES
from tests.core_helpers import BLOCK_SIZE, Bench, make_hashes, make_submit, output

OTHER = b"o" * 16


def make_parts(system: str, tools: str, *messages: str) -> PromptParts:
    return PromptParts(system.encode(), tools.encode(), tuple(text.encode() for text in messages))


@dataclass
class Talk:
    """Two workers, one conversation of which the first turn was computed on w1, and what changes before the second."""

    rng: random.Random
    bench: Bench = field(init=False)
    first: list[int] = field(init=False)
    second: list[int] = field(init=False)
    parts: PromptParts = field(init=False)
    changed: dict[str, Any] = field(default_factory=dict)
    seq: int = 1

    def __post_init__(self) -> None:
        rng, bench = self.rng, Bench()
        self.bench = bench
        for worker_id in ("w1", "w2"):
            bench.join(worker_id, max_requests=8)
        self.first = [rng.randrange(1_000) for _ in range(rng.randrange(40, 120))]
        self.second = [*self.first, *(rng.randrange(1_000) for _ in range(rng.randrange(8, 60)))]
        bench.submit(b"first", self.first, parts=make_parts("be kind", "[a]", "hello"))
        [(peer, _)] = bench.take()
        assert peer == b"w1"
        self.answer(b"w1", b"first", 0, stored=make_hashes(self.first))
        self.parts = make_parts("be kind", "[a]", "hello", "hi", "what is new?")

    def answer(self, peer: bytes, req_id: bytes, num_cached: int, *, stored: bytes = b"", removed: bytes = b"") -> None:
        self.bench.report(
            peer,
            output(req_id, 0, [1], "stop", num_cached_tokens=num_cached),
            event_seq=self.seq if peer == b"w1" else 0,
            stored=stored,
            removed=removed,
        )

    def evict(self, num_kept: int) -> None:
        self.seq += 1
        self.bench.report(b"w1", event_seq=self.seq, removed=make_hashes(self.first)[num_kept * HASH_BYTES :])

    def miss(self, num_cached: int) -> Miss | None:
        """Send the second turn and have its worker find `num_cached` tokens."""
        bench = self.bench
        bench.submit(b"second", self.second, **{"parts": self.parts, **self.changed})
        [(peer, _)] = bench.take()
        self.answer(peer, b"second", num_cached)
        [receipt] = bench.core.receipts.of(b"second") or []
        assert receipt.num_cached_tokens == num_cached
        return receipt.miss

    @property
    def num_first(self) -> int:
        return len(self.first) // BLOCK_SIZE * BLOCK_SIZE


def never_seen(talk: Talk) -> Miss | None:
    talk.parts = make_parts("be kind", "[a]", "something else")
    talk.second = [5_000 + token for token in talk.second]
    return talk.miss(0)


def another_tenants(talk: Talk) -> Miss | None:
    talk.changed = {"tenant": "beta", "namespace": OTHER, "prefix_hashes": make_hashes(talk.second, OTHER)}
    return talk.miss(0)


def model_changed(talk: Talk) -> Miss | None:
    talk.bench.join("w3", model="larger", fingerprint="f2")
    root = b"R" * 16
    talk.changed = {"model": "larger", "root": root}
    return talk.miss(0)


def weights_changed(talk: Talk) -> Miss | None:
    talk.changed = {"root": b"R" * 16, "prefix_hashes": make_hashes(talk.second, OTHER)}
    return talk.miss(0)


def namespace_changed(talk: Talk) -> Miss | None:
    talk.changed = {"namespace": OTHER, "prefix_hashes": make_hashes(talk.second, OTHER)}
    return talk.miss(0)


def system_changed(talk: Talk) -> Miss | None:
    talk.parts = msgspec.structs.replace(talk.parts, system=b"be terse")
    talk.second[talk.rng.randrange(len(talk.first) - BLOCK_SIZE)] = 7_777
    return talk.miss(0)


def tools_changed(talk: Talk) -> Miss | None:
    talk.parts = msgspec.structs.replace(talk.parts, tools=b"[a, b]")
    talk.second[talk.rng.randrange(len(talk.first) - BLOCK_SIZE)] = 7_777
    return talk.miss(0)


def messages_changed(talk: Talk) -> Miss | None:
    bench = talk.bench
    bench.submit(b"middle", talk.second, parts=talk.parts)
    [(peer, _)] = bench.take()
    talk.seq += 1
    talk.answer(peer, b"middle", talk.num_first, stored=make_hashes(talk.second)[talk.num_first // 4 * HASH_BYTES :])
    talk.parts = make_parts("be kind", "[a]", "hello", "hi", "what is old?", "nothing", "and new?")
    talk.second = [*talk.second[: len(talk.first)], *range(3_000, 3_100)]
    return talk.miss(talk.num_first)


def tokens_changed(talk: Talk) -> Miss | None:
    talk.second[talk.rng.randrange(len(talk.first) - BLOCK_SIZE)] = 7_777
    return talk.miss(0)


def evicted(talk: Talk) -> Miss | None:
    num_kept = talk.rng.randrange(len(talk.first) // BLOCK_SIZE)
    talk.evict(num_kept)
    talk.bench.now += 3.0
    return talk.miss(num_kept * BLOCK_SIZE)


def evicted_without_parts(talk: Talk) -> Miss | None:
    talk.changed = {"parts": None}
    return evicted(talk)


def routed_elsewhere(talk: Talk) -> Miss | None:
    bench = talk.bench
    for i in range(8):  # w1 is full of long answers, and w2 is free
        bench.submit(b"busy%d" % i, [*talk.first[:20], 9_000 + i] if i else talk.first, max_tokens=50)
        bench.now += 100.0
        bench.report(b"w1", output(b"busy%d" % i, 0, [1]), event_seq=talk.seq)
    bench.take()
    [worker] = [worker for worker in bench.core._fleet.by_id.values() if worker.worker_id == "w1"]
    worker._mean_stay_s = 1_000.0
    return talk.miss(0)


def worker_left(talk: Talk) -> Miss | None:
    talk.bench.core.worker_lost("w1", "its power failed")
    return talk.miss(0)


CASES: list[tuple[str, Callable[[Talk], Miss | None]]] = [
    ("never_seen", never_seen),
    ("never_seen", another_tenants),
    ("model_changed", model_changed),
    ("model_changed", weights_changed),
    ("namespace_changed", namespace_changed),
    ("system_changed", system_changed),
    ("tools_changed", tools_changed),
    ("messages_changed", messages_changed),
    ("tokens_changed", tokens_changed),
    ("evicted", evicted),
    ("evicted", evicted_without_parts),
    ("routed_elsewhere", routed_elsewhere),
    ("worker_left", worker_left),
]


@pytest.mark.parametrize(("cause", "inject"), CASES, ids=[inject.__name__ for _, inject in CASES])
def test_every_injected_cause_is_named_rightly(cause: str, inject: Callable[[Talk], Miss | None]) -> None:
    for seed in range(12):  # 13 cases: 156 in all
        talk = Talk(random.Random(seed))
        miss = inject(talk)
        assert miss is not None, seed
        assert miss.cause == cause, seed
        if cause == "never_seen":
            assert (miss.num_tokens, miss.previous) == (len(talk.second), "")
        else:
            assert 0 < miss.num_tokens <= len(talk.second)
            assert bytes.fromhex(miss.previous) in (b"first", b"middle", b"busy0")
        if cause in ("evicted", "worker_left"):
            assert miss.worker_id == "w1"
        if cause == "evicted":
            assert miss.evicted_s_ago == pytest.approx(3.0)
        if cause == "routed_elsewhere":
            assert miss.worker_id == "w1"
            assert miss.cost_s is not None and miss.chosen_cost_s is not None and miss.cost_s > miss.chosen_cost_s


def test_a_prompt_is_compared_with_the_one_that_its_client_names() -> None:
    talk = Talk(random.Random(1))
    core = talk.bench.core

    def changed(**other: Any) -> object:
        submit, _ = make_submit(b"second", other.pop("tokens", talk.second), **{"parts": talk.parts, **other})
        return core.change(submit, other.pop("previous", b"first"))

    assert changed() is None
    assert changed(parts=msgspec.structs.replace(talk.parts, tools=b"[b]")) == ("tools_changed", talk.num_first)
    assert changed(parts=make_parts("be kind", "[a]", "hi")) == ("messages_changed", talk.num_first)
    assert changed(model="larger") == ("model_changed", talk.num_first)
    assert core.change(make_submit(b"second", talk.second)[0], b"unknown") == ("previous_not_found", 0)
    assert changed(tenant="beta") == ("previous_not_found", 0), "another tenant's prompt is not found"


def test_what_was_found_needs_no_reason() -> None:
    for seed in range(12):
        talk = Talk(random.Random(seed))
        assert talk.miss(talk.num_first) is None


def test_another_tenants_prompt_is_never_the_one_before() -> None:
    prompts = Prompts()
    tokens: Sequence[int] = range(40)
    ours, _ = make_submit(b"ours", tokens, tenant="alpha", parts=make_parts("s", "t", "hello"))
    theirs, _ = make_submit(b"theirs", tokens, tenant="beta", parts=make_parts("s", "t", "hello"))
    prompts.add(theirs, "w1")
    assert prompts.previous(ours) is None
    prompts.add(ours, "w1")
    found = prompts.previous(ours)
    assert found is not None and found[0].req_id == b"ours"


def test_old_prompts_are_forgotten_with_all_their_keys() -> None:
    prompts = Prompts(max_prompts=3)
    for i in range(10):
        submit, _ = make_submit(b"r%d" % i, range(40 * i, 40 * i + 40), parts=make_parts("s", "t", *map(str, range(i))))
        prompts.add(submit, "w1")
    assert (len(prompts), len(prompts._prompts)) == (3, 3)
    assert set(prompts._by_key.values()) <= set(prompts._prompts.values())
    assert prompts.previous(make_submit(b"old", range(40))[0]) is None
    assert prompts.previous(make_submit(b"new", range(360, 420))[0]) is not None


def test_receipts_tell_how_long_a_request_waited_and_what_for() -> None:
    bench = Bench()
    for worker_id in ("w1", "w2"):
        bench.join(worker_id, max_requests=1)
    shared = list(range(900))
    bench.report(b"w1", event_seq=1, stored=make_hashes(shared), load=Load(num_prefill_tokens=100, step_s=1.0))
    bench.submit(b"r0", [*shared, 1])
    bench.now += 1.0
    bench.submit(b"r1", [*shared, 2])
    bench.now += 0.25
    bench.report(b"w1", output(b"r0", 0, [1], "stop", num_cached_tokens=900), event_seq=1)
    [receipt] = bench.core.receipts.of(b"r1") or []
    assert (receipt.waited_s, receipt.held_s) == (pytest.approx(0.25), pytest.approx(0.25))
    assert receipt.decision.worker_id == "w1"
    assert bench.core.receipts.of(b"r0")[0].held_s == 0.0  # type: ignore[index]
