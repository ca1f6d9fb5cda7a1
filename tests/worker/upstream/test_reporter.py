"""What an upstream's figures become in step reports, and which of two views of its cache is told."""

from __future__ import annotations

import pytest

from kvasir.protocol.messages import Output
from kvasir.protocol.prefix import extend_chain, split_hashes
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream.cached import LATE_EVENT_S, CachedBlocks
from kvasir.worker.upstream.kv_wire import Batch, Stored
from kvasir.worker.upstream.reporter import MIN_RATE_TOKENS, Reporter
from kvasir.worker.upstream.vllm import Metrics

ROOT, NAMESPACE = b"r" * 16, b"n" * 16


class Rig:
    def __init__(self, ratio: int = 2) -> None:
        self.now = 100.0
        self.cached = CachedBlocks(ROOT, 4, ratio, 10, None)
        self.reporter = Reporter(self.cached, 20, lambda: self.now, lambda: None)


def chain(num_tokens: int) -> bytes:
    return extend_chain(ROOT, NAMESPACE, pack_tokens(range(num_tokens)), 4)


def metrics(*progress: str, usage: float = 0.0, running: int = 0) -> Metrics:
    return Metrics("1.0", 8, 10, running, 0, usage, progress)


def test_the_step_counter_grows_only_with_what_the_engine_does() -> None:
    rig = Rig()
    assert rig.reporter.take().step == 0
    rig.reporter.add(Output(b"r", 1, 0, finish_reason="abort"))
    assert rig.reporter.take().step == 0, "a stream that was cut says nothing of the engine"
    rig.reporter.decoded(1)
    assert rig.reporter.take().step == 1
    rig.reporter.observe(metrics("1", "0"))
    assert rig.reporter.take().step == 2, "its figures moved"
    rig.reporter.observe(metrics("1", "0"))
    assert rig.reporter.take().step == 2, "they did not move"
    rig.reporter.prefilled(100, rig.now)
    assert rig.reporter.take().step == 3


def test_load_is_the_engines_own_and_free_blocks_follow_its_usage() -> None:
    rig = Rig()
    assert rig.reporter.take().load.num_free_blocks == 20
    rig.reporter.observe(metrics("1", usage=0.25, running=3))
    load = rig.reporter.take().load
    assert (load.num_running, load.num_free_blocks) == (3, 15)


def test_a_prompts_time_begins_when_the_one_before_it_was_through() -> None:
    rig = Rig()
    rig.now = 101.0
    rig.reporter.prefilled(1000, sent_at=100.0)
    load = rig.reporter.take().load
    assert (load.num_prefill_tokens, load.step_s) == (1000, 1.0)
    rig.now = 101.5
    rig.reporter.prefilled(500, sent_at=100.0)
    rig.reporter.decoded(3)
    load = rig.reporter.take().load
    assert (load.num_prefill_tokens, load.step_s, load.num_decode_tokens) == (500, 0.5, 0)


def test_first_tokens_of_one_step_come_in_any_order_and_a_prompts_time_ends_with_its_own() -> None:
    rig = Rig()
    rig.now = 100.5
    rig.reporter.prefilled(10, sent_at=100.001)  # it shares what the first one computes, and is told of before it
    rig.reporter.take()
    rig.now = 100.51
    rig.reporter.prefilled(1000, sent_at=100.0)
    load = rig.reporter.take().load
    assert (load.num_prefill_tokens, load.step_s) == (1000, pytest.approx(0.51))


def test_a_prompt_that_was_cached_says_nothing_of_the_prefill_rate() -> None:
    rig = Rig()
    rig.now = 100.1
    rig.reporter.prefilled(MIN_RATE_TOKENS - 1, sent_at=100.0)
    load = rig.reporter.take().load
    assert (load.num_prefill_tokens, load.step_s) == (MIN_RATE_TOKENS - 1, 0.0)
    rig.reporter.prefilled(MIN_RATE_TOKENS, sent_at=100.0)
    assert rig.reporter.take().load.step_s > 0.0


def test_a_decode_round_is_the_time_between_two_reports_of_tokens_and_a_pause_is_none() -> None:
    rig = Rig()
    rig.reporter.decoded(4)
    rig.reporter.take()
    rig.now += 0.03
    rig.reporter.decoded(4)
    load = rig.reporter.take().load
    assert load.num_decode_tokens == 4 and load.step_s == pytest.approx(0.03)
    rig.now += 5.0
    rig.reporter.decoded(4)
    assert rig.reporter.take().load.step_s == 0.0


def test_events_are_numbered_and_a_snapshot_continues_them() -> None:
    rig = Rig()
    rig.cached.computed(chain(16))
    first = rig.reporter.take()
    assert first.event_seq == 1 and set(split_hashes(first.stored)) == set(split_hashes(chain(16)))
    assert rig.reporter.take().event_seq == 1, "nothing new, no number"
    rig.cached.is_exact = True
    snapshot = rig.reporter.snapshot()
    assert (snapshot.event_seq, snapshot.hashes) == (1, b""), "the events have told of nothing yet"
    event = Stored([7], None, pack_tokens(range(8)), 8, NAMESPACE.hex(), 1, None, "GPU", 0, True)
    rig.cached.followed.apply(Batch(1.0, [event]))
    assert rig.reporter.take().event_seq == 2


def test_prompts_are_cached_in_whole_blocks_of_the_upstreams_and_never_to_the_last_token() -> None:
    rig = Rig()
    rig.cached.computed(chain(20))  # five of our blocks: two whole ones of the upstream's
    for num_tokens, num_cached in ((20, 16), (17, 16), (16, 8), (9, 8), (8, 0), (1, 0)):
        assert rig.cached.num_leading_tokens(chain(num_tokens), num_tokens) == num_cached


def test_what_prompts_before_it_are_computing_will_be_cached_when_its_turn_comes() -> None:
    rig = Rig()
    rig.cached.computed(chain(8))
    longer = chain(20)
    assert rig.cached.num_leading_tokens(longer, 20) == 8
    other = extend_chain(ROOT, b"o" * 16, pack_tokens(range(20)), 4)
    for coming, expected in (([other], 8), ([other, chain(19)], 16), ([chain(14)], 8), ([longer], 16)):
        assert rig.cached.num_leading_tokens(longer, 20, coming) == expected
    assert rig.cached.num_leading_tokens(longer, 16, [longer]) == 8, "the last token is computed always"


def test_the_last_block_of_an_answer_counts_before_its_event_has_come_but_not_for_ever() -> None:
    rig = Rig()
    rig.cached.is_exact = True
    rig.cached.answered(chain(16), 6, rig.now)
    stored, _ = rig.cached.resident.take()
    assert set(split_hashes(stored)) == set(split_hashes(chain(16))[2:]), "the block that the answer has filled"
    rig.cached.followed.expire(rig.now + LATE_EVENT_S + 0.1)
    gained, lost = rig.cached.resident.take()
    assert gained == b"" and set(split_hashes(lost)) == set(split_hashes(stored))
    rig.cached.answered(chain(16), 16, rig.now)
    assert rig.cached.resident.take()[0] == b"", "the prompt's own blocks are told of by events, before the first token"
