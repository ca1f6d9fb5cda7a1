"""The index audits itself: injected drift is found and mended, what has a reason is no drift."""

from __future__ import annotations

import random

import pytest

from kvasir.gateway.core.worker import Worker
from kvasir.gateway.routing.audit import MIN_INTERVAL_S
from kvasir.protocol.messages import Resync, Snapshot, StepReport
from kvasir.protocol.prefix import HASH_BYTES, split_hashes
from tests.core_helpers import BLOCK_SIZE, Bench, make_hashes, output


class Cache:
    """What one worker really holds, its events, and what becomes of them on the way to the gateway."""

    def __init__(self, bench: Bench, peer: bytes = b"w1") -> None:
        self.bench, self.peer = bench, peer
        self.resident: set[bytes] = set()
        self.event_seq = self.num_requests = self.step = 0
        bench.join(peer.decode(), max_requests=8)

    @property
    def worker(self) -> Worker:
        [worker] = [w for w in self.bench.core._fleet.by_id.values() if w.peer == self.peer]
        return worker

    def event(self, stored: bytes = b"", removed: bytes = b"") -> StepReport:
        self.resident = (self.resident - set(split_hashes(removed))) | set(split_hashes(stored))
        self.event_seq += 1
        return StepReport(0, self.event_seq, self.worker.load, [], stored, removed)

    def deliver(self, *reports: StepReport) -> None:
        for report in reports:
            self.step += 1
            report.step = self.step
            self.bench.core.worker_report(self.peer, report)

    def num_cached(self, tokens: list[int]) -> int:
        hashes = split_hashes(make_hashes(tokens))[: (len(tokens) - 1) // BLOCK_SIZE]
        return next((i for i, digest in enumerate(hashes) if digest not in self.resident), len(hashes))

    def serve(self, tokens: list[int]) -> bool:
        """Send a prompt and compute it; return whether what was found had been predicted."""
        self.num_requests += 1
        req_id = b"request-%d" % self.num_requests
        self.bench.submit(req_id, tokens)
        self.bench.take()
        found = self.num_cached(tokens)
        new = b"".join(h for h in split_hashes(make_hashes(tokens)) if h not in self.resident)
        done = self.event(new) if new else StepReport(0, self.event_seq, self.worker.load, [])
        done.outputs = [output(req_id, 0, [1], "stop", num_cached_tokens=found * BLOCK_SIZE)]
        self.deliver(done)
        [receipt] = self.bench.core.receipts.of(req_id) or []
        return receipt.decision.chosen.num_cached_tokens == receipt.num_cached_tokens

    def answer_resync(self) -> bool:
        """Send a snapshot if one was asked for."""
        asked = bool(self.bench.take(Resync))
        if asked:
            self.bench.core.worker_report(self.peer, Snapshot(self.event_seq, b"".join(self.resident)))
        return asked


@pytest.fixture
def cache() -> Cache:
    return Cache(Bench())


def prompt(seed: int, length: int = 100) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1_000) for _ in range(length)]


@pytest.mark.parametrize("injected", ["lost", "doubled", "reordered"])
def test_wrong_events_are_found_at_once_the_decision_says_so_and_a_snapshot_mends_it(
    cache: Cache, injected: str
) -> None:
    first, second = cache.event(make_hashes(prompt(1))), cache.event(make_hashes(prompt(2)))
    match injected:
        case "lost":
            cache.deliver(second)
        case "doubled":
            cache.deliver(first, first)
        case _:
            cache.deliver(second, first)
    assert not cache.worker.index.in_sync
    cache.bench.submit(b"guess", [*prompt(1), 5])
    [receipt] = cache.bench.core.receipts.of(b"guess") or []
    assert receipt.decision.chosen.is_guess and receipt.decision.chosen.num_cached_tokens == 0
    assert cache.answer_resync()
    cache.deliver(StepReport(0, cache.event_seq, cache.worker.load, [output(b"guess", 0, [], "abort")]))
    cache.worker.state = "ready"
    for seed in (1, 2):
        assert cache.serve([*prompt(seed), 7])
    assert cache.worker.index.in_sync and not cache.answer_resync()


def test_blocks_that_the_index_only_believes_in_are_drift(cache: Cache) -> None:
    for seed in range(8):
        assert cache.serve(prompt(seed))
    cache.resident -= set(split_hashes(make_hashes(prompt(3))))  # gone, and nobody has said so
    cache.bench.now += MIN_INTERVAL_S
    assert not cache.serve([*prompt(3), 5])
    assert cache.worker.counters.drift_tokens == 100
    assert cache.answer_resync()
    assert all(cache.serve([*prompt(seed), 6]) for seed in range(8))
    assert cache.worker.counters.drift_tokens == 100


def test_blocks_that_the_index_does_not_know_of_are_drift(cache: Cache) -> None:
    cache.resident |= set(split_hashes(make_hashes(prompt(1))))  # there, and nobody has said so
    cache.bench.now += MIN_INTERVAL_S
    assert not cache.serve([*prompt(1), 5])
    assert cache.worker.counters.drift_tokens == 100
    assert cache.answer_resync()
    assert cache.serve([*prompt(1), 6])


def test_what_was_evicted_or_stored_while_a_request_waited_is_no_drift(cache: Cache) -> None:
    cache.bench.now += MIN_INTERVAL_S
    assert cache.serve(prompt(1))
    tokens = [*prompt(1), 5, 6, 7, 8]
    cache.bench.submit(b"waits", tokens)
    cache.bench.now += 1.0
    cache.deliver(cache.event(removed=make_hashes(prompt(1))[2 * HASH_BYTES :]))
    done = cache.event(b"".join(h for h in split_hashes(make_hashes(tokens)) if h not in cache.resident))
    done.outputs = [output(b"waits", 0, [1], "stop", num_cached_tokens=2 * BLOCK_SIZE)]
    cache.deliver(done)
    other = prompt(9)
    cache.bench.submit(b"other", [*other, 1, 2])
    cache.deliver(cache.event(make_hashes(other)))  # an answer elsewhere came to the same tokens
    cache.deliver(
        StepReport(0, cache.event_seq, cache.worker.load, [output(b"other", 0, [1], "stop", num_cached_tokens=100)])
    )
    assert cache.worker.counters.mispredicted_tokens > 0
    assert (cache.worker.counters.drift_tokens, cache.answer_resync()) == (0, False)


def test_a_little_drift_is_only_counted_and_snapshots_are_not_asked_for_all_the_time(cache: Cache) -> None:
    for seed in range(8):
        cache.serve(prompt(seed))
    cache.resident.discard(split_hashes(make_hashes(prompt(3)))[-1])
    cache.bench.now += MIN_INTERVAL_S
    assert not cache.serve([*prompt(3), 5])
    assert (cache.worker.counters.drift_tokens, cache.answer_resync()) == (BLOCK_SIZE, False)
    num_asked = 0
    for i in range(50):  # an engine that never tells
        cache.resident -= set(split_hashes(make_hashes(prompt(i % 8))))
        cache.bench.now += 0.5
        cache.serve([*prompt(i % 8), 5])
        num_asked += cache.answer_resync()
    assert 1 <= num_asked <= 3
    assert cache.bench.core.statistics().totals.num_resyncs == num_asked


def test_predicted_is_actual_while_prompts_come_and_go(cache: Cache) -> None:
    rng, num_right = random.Random(5), 0
    talks = [prompt(seed, 40) for seed in range(12)]
    for _ in range(600):
        talk = rng.choice(talks)
        talk += [rng.randrange(1_000) for _ in range(rng.randrange(1, 12))]
        if len(talk) > 300:
            del talk[40:]
        num_right += cache.serve(talk)
        if rng.random() < 0.3 and cache.resident:  # the leaves of one conversation go
            hashes = split_hashes(make_hashes(rng.choice(talks)))
            gone = [h for h in hashes[rng.randrange(len(hashes)) :] if h in cache.resident]
            if gone:
                cache.deliver(cache.event(removed=b"".join(gone)))
        cache.bench.now += 0.1
    assert num_right == 600
    assert cache.worker.counters.drift_tokens == 0
