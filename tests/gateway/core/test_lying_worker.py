"""Whatever workers report, as long as it is a message: the core keeps its books, fails no request by a bug of its own,
and every request ends once."""

from __future__ import annotations

import math
from random import Random

import pytest

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.core.notices import Broken
from kvasir.gateway.core.worker import Worker
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import InvalidMessage
from kvasir.protocol.messages import (
    REPORTS,
    Drafts,
    KvAccount,
    KvAccounts,
    Load,
    Output,
    Report,
    Snapshot,
    StepReport,
    TokenLogprobs,
)
from kvasir.protocol.tokens import pack_tokens
from tests.core_helpers import Bench, make_hashes

COUNTS = (0, 1, 2, 7, 64, 1000, 1 << 16, 1 << 31, 1 << 53)
SECONDS = (0.0, 5e-324, 1e-9, 0.01, 1.0, 1e9)
HASHES = [make_hashes([start + n for n in range(4)]) for start in range(20)]


def lie(random: Random, worker: Worker, step: int) -> Report:
    def count() -> int:
        return random.choice(COUNTS)

    def hashes() -> bytes:
        return b"".join(random.choices(HASHES, k=random.randint(0, 6)))

    def output(req_id: bytes, attempt: int, seq: int) -> Output:
        return Output(
            req_id,
            attempt if random.random() < 0.8 else count(),
            seq if random.random() < 0.8 else count(),
            pack_tokens(random.choices((1, 2, 99, (1 << 32) - 1), k=random.choice((0, 1, 1, 9)))),
            random.choice((None, None, None, "stop", "length", "abort", "error", "deadline")),
            num_cached_tokens=random.choice((None, 0, 4, count())),
            guessed_cached_tokens=random.choice((None, None, count())),
            logprobs=[TokenLogprobs(math.nan)] * random.choice((0, 1)),
            num_extra_tokens=min(count(), 1 << 16),
        )

    kind = random.random()
    if kind < 0.1:
        return Snapshot(count(), hashes())
    if kind < 0.15:
        return KvAccounts([KvAccount("alpha", count(), random.choice(SECONDS), count(), count())], count())
    outputs = [
        output(req_id, attempt.request.attempt, attempt.request.num_delivered)
        for req_id, attempt in list(worker.in_flight.items())[:3]
    ]
    drafts = [Drafts(f"proposer {random.randint(0, 99)}", count(), count(), count())] * random.choice((0, 1, 8))
    load = Load(*[count() for _ in range(5)], random.choice(SECONDS), drafts)
    event_seq = random.choice((worker.index._event_seq, min(worker.index._event_seq + 1, 1 << 53), count()))
    return StepReport(random.choice((step, count())), event_seq, load, outputs, hashes(), hashes())


@pytest.mark.parametrize("seed", range(40))
def test_lies_fail_no_request_by_a_bug_and_leave_the_books_right(seed: int) -> None:
    random, bench = Random(seed), Bench()
    kinds = ({}, {"lacks": ["order"]}, {"hit_blocks": 1024}, {"num_blocks": 1 << 60, "max_context": 1 << 62})
    peers = [bench.join(f"w{number}", **random.choice(kinds)) for number in range(3)]
    num_submitted = 0
    for step in range(80):
        bench.now += random.choice((0.0, 0.001, 0.05, 0.2))
        peer = random.choice(peers)
        worker = bench.core._fleet.by_peer.get(peer)
        if random.random() < 0.3:
            num_submitted += 1
            tokens = [random.randint(0, 99) for _ in range(random.choice((1, 10, 200)))]
            bench.submit(b"r%d" % num_submitted, tokens, tenant=random.choice("abc"), vocab_size=100)
        elif random.random() < 0.1:
            bench.core.cancel(Cancel(b"r%d" % random.randint(0, num_submitted)))
        elif worker is None:
            bench.join(peer.decode(), incarnation=b"i%d" % step)
        else:
            bench.core.worker_report(peer, REPORTS.decode(encode(lie(random, worker, step))))
            assert len(worker.drafts) <= 8
        bench.settle()
        for model in bench.core._requests.models.values():
            assert all(abs(tenant.charged) < 1 << 32 for tenant in model.queue._tenants.values())
    for _ in range(300):  # nobody reports any more
        bench.now += 1.0
        bench.core.tick()
        bench.settle()
    assert not [notice for notice in bench.notices if isinstance(notice, Broken)]
    assert all(sink.finished is not None for sink in bench.sinks.values())


@pytest.mark.parametrize("load", [Load(step_s=math.inf), Load(step_s=math.nan), Load(step_s=1e300)])
def test_times_beyond_all_sense_are_no_messages(load: Load) -> None:
    with pytest.raises(InvalidMessage):
        REPORTS.decode(encode(StepReport(1, 0, load)))
