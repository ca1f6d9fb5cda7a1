"""Workers that front another engine: what the core does and leaves undone for them."""

from __future__ import annotations

from typing import Any

import msgspec

from kvasir.protocol.messages import Bye, ClearTenant, Load, Pin, Quota, Quotas, Welcome
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.sampling import Constraint, Grammar, Sampling
from tests.core_helpers import BLOCK_SIZE, ROOT, Bench, make_hashes, make_request, make_submit, output

EVERYTHING = [
    "public_zone",
    "owners",
    "pins",
    "retention",
    "resumed_penalties",
    "resumed_draws",
    "resumed_grammars",
    "order",
]
UPSTREAM: dict[str, Any] = {"engine": "vllm", "lacks": EVERYTHING}


def test_a_worker_gets_the_root_of_its_models_chains() -> None:
    bench = Bench(root=lambda fingerprint, dtype: f"{fingerprint}/{dtype}".encode().ljust(16))

    bench.join("w1")

    assert [command.root for _, command in bench.take(Welcome)] == [b"f1/float32".ljust(16)]


def test_floors_pins_and_clearing_are_told_only_to_workers_that_can() -> None:
    bench = Bench()
    pin = Pin("p/0", b"\0" * 16, ROOT, b"h" * 16)
    bench.join("ours")
    bench.join("theirs", **UPSTREAM)

    bench.core.kv.set_quotas(lambda num_blocks: {"alpha": Quota(1)})
    bench.core.kv.set_pins(lambda model, worker_id: [pin])
    bench.core.kv.clear("alpha")
    bench.join("theirs too", **UPSTREAM)

    for kind in (Quotas, Pin, ClearTenant):
        assert {peer for peer, _ in bench.take(kind)} == {b"ours"}


def test_cached_tokens_are_predicted_in_whole_runs_of_the_engines_blocks() -> None:
    bench = Bench()
    tokens = list(range(10 * BLOCK_SIZE))
    hashes = split_hashes(make_hashes(tokens))
    bench.join("w1", hit_blocks=4)
    bench.report(b"w1", event_seq=1, stored=b"".join(hashes[:8]), load=Load())

    bench.submit(b"whole", tokens)  # 40 tokens, 8 of 10 blocks are there: two runs
    bench.submit(b"exact", tokens[: 8 * BLOCK_SIZE])  # its last token must be computed: one run

    for req_id, num_cached in ((b"whole", 8 * BLOCK_SIZE), (b"exact", 4 * BLOCK_SIZE)):
        [decision] = [receipt.decision for receipt in bench.core.receipts.of(req_id) or []]
        assert decision.chosen.num_cached_tokens == num_cached


def test_a_models_info_says_what_its_engine_lacks() -> None:
    bench = Bench()

    bench.join("w1", **UPSTREAM)
    info = bench.core.models()["demo"]

    assert (info.engine, info.lacks) == ("vllm", frozenset(EVERYTHING))


def test_an_engine_that_died_counts_as_a_death_and_one_that_left_does_not() -> None:
    for is_death in (True, False):
        bench = Bench()
        bench.join("w1")
        bench.join("w2")
        sink = bench.submit()
        [(first, _)] = bench.take()
        bench.report(first, output(b"r1", 0, [7]))

        bench.core.worker_report(first, Bye("gone", is_death))

        [(second, generate)] = bench.take()
        assert second != first and generate.attempt == 2 and sink.finished is None
        assert bench.core.statistics().totals.num_lost == {"exited" if is_death else "bye": 1}
        request = bench.core._requests.get(b"r1")
        assert request is not None and request.num_deaths == is_death


def test_a_request_that_looks_at_what_was_generated_ends_with_a_named_error_where_it_cannot_go_on() -> None:
    for sampling, what in (
        (Sampling(presence_penalty=0.5), "penalties"),
        (Sampling(frequency_penalty=-0.5), "penalties"),
        (Sampling(constraint=Constraint(grammar=Grammar("regex", "a+"))), "a grammar"),
        (Sampling(constraint=Constraint(min_tokens=3)), ""),
        (Sampling(repetition_penalty=1.2, temperature=0.0), ""),
    ):
        bench = Bench()
        bench.join("w1", **UPSTREAM)
        bench.join("w2", **UPSTREAM)
        submit, sink = make_submit(arrived=bench.now)
        bench.core.submit(msgspec.structs.replace(submit, sampling=sampling))
        [(first, _)] = bench.take()
        bench.report(first, output(b"r1", 0, [7]))

        bench.core.worker_report(first, Bye("gone", True))

        assert (sink.finished is not None) == bool(what)
        if sink.finished is not None:
            assert sink.finished.error is not None and what in sink.finished.error.message
            assert sink.finished.num_output_tokens == 1


def test_a_request_with_penalties_that_has_no_tokens_yet_goes_on() -> None:
    bench = Bench()
    bench.join("w1", **UPSTREAM)
    bench.join("w2", **UPSTREAM)
    submit, sink = make_submit(arrived=bench.now)
    bench.core.submit(msgspec.structs.replace(submit, sampling=Sampling(presence_penalty=1.0)))
    [(first, _)] = bench.take()

    bench.core.worker_report(first, Bye("gone", True))

    assert sink.finished is None and len(bench.take()) == 1


def test_the_receipt_says_when_the_rest_is_drawn_differently() -> None:
    for temperature, noted in ((1.0, True), (0.0, False)):
        bench = Bench()
        bench.join("w1", **UPSTREAM)
        bench.join("w2", **UPSTREAM)
        submit, _ = make_submit(arrived=bench.now)
        bench.core.submit(msgspec.structs.replace(submit, sampling=Sampling(temperature=temperature)))
        [(first, _)] = bench.take()
        bench.report(first, output(b"r1", 0, [7]))

        bench.core.worker_report(first, Bye("gone", True))

        decisions = [receipt.decision for receipt in bench.core.receipts.of(b"r1") or []]
        assert [bool(decision.note) for decision in decisions] == [False, noted]


def test_a_guess_of_what_was_cached_holds_until_the_engine_tells() -> None:
    bench = Bench()
    bench.join("w1", **UPSTREAM)
    sink = bench.submit()
    cut = bench.submit(b"r2")

    bench.report(b"w1", output(b"r1", 0, [7], guessed_cached_tokens=8), output(b"r2", 0, [7], guessed_cached_tokens=8))
    assert bench.core.statistics().workers[0].cached_tokens == 0, "a guess is no measurement"
    bench.report(b"w1", output(b"r1", 1, [8], "length", num_cached_tokens=4), output(b"r2", 1, [8], "length"))

    assert sink.finished.num_cached_tokens == 4
    assert cut.finished.num_cached_tokens == 8
    assert bench.core.statistics().workers[0].cached_tokens == 4


def test_the_first_attempts_number_stays_and_a_guess_never_replaces_it() -> None:
    request = make_request(make_submit()[0])

    request.found_cached(4)
    request.guess_cached(8)
    request.found_cached(6)

    assert request.num_cached_tokens == 4
