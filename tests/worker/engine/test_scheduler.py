"""The plan of a step: who computes what, in which order, and what happens when blocks run short."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from kvasir.cache.prefix_cache import PrefixCache
from kvasir.worker.engine.scheduler import EngineLimits, Plan, schedule
from kvasir.worker.engine.sequence import Sequence, make_sequence
from tests.engine_helpers import PUBLIC_SPACE, SIZE, Rig, expected_tokens, make_generate, make_prompt

LIMITS = EngineLimits(max_requests=8, max_step_tokens=16, max_context=1000)
RATE = 100.0
_keys = count(1)


def make_waiting(length: int, *, arrived: float = 0.0, salt: int | None = None) -> Sequence:
    key = next(_keys)
    return make_sequence(
        make_generate(make_prompt(length, salt=key if salt is None else salt), 100),
        key=key,
        now=arrived,
        public_namespace=PUBLIC_SPACE,
        block_size=SIZE,
        max_context=1000,
        vocab_size=4096,
        eos_token_ids=(),
    )


def make_running(cache: PrefixCache, length: int, num_computed: int, *, arrived: float = 0.0) -> Sequence:
    """A sequence of `length` tokens, of which `num_computed` are in blocks."""
    sequence = make_waiting(length, arrived=arrived)
    sequence.num_computed = num_computed
    num_blocks = sequence.num_missing_blocks(num_computed, SIZE)
    assert cache.allocate(sequence.chain, sequence.table, num_blocks) is not None
    return sequence


def plan_for(
    cache: PrefixCache,
    running: list[Sequence],
    waiting: list[Sequence],
    limits: EngineLimits = LIMITS,
    now: float = 0.0,
) -> Plan:
    return schedule(running, waiting, cache, limits, now, RATE)


def test_decodes_come_first_and_prefill_fills_the_rest_of_the_budget() -> None:
    cache = PrefixCache(32, SIZE)
    prefill, *decodes = make_running(cache, 40, 8), *(make_running(cache, 6, 5) for _ in range(3))
    plan = plan_for(cache, [prefill, *decodes], [])
    assert plan.work == [*((s, 1) for s in decodes), (prefill, 13)]
    assert plan.num_decodes == 3


def test_the_shortest_remaining_work_goes_first_in_slices_of_the_budget() -> None:
    cache = PrefixCache(64, SIZE)
    long, short, middle = (make_waiting(n) for n in (100, 5, 30))
    plan = plan_for(cache, [], [long, short, middle])
    assert plan.work == [(short, 5), (middle, 11)]
    assert plan.admitted == [short, middle]


def test_a_cold_long_prompt_under_way_does_not_stop_a_short_newcomer() -> None:
    cache = PrefixCache(64, SIZE)
    long, short = make_running(cache, 100, 16), make_waiting(6)
    assert plan_for(cache, [long], [short]).work == [(short, 6), (long, 10)]


def test_ageing_lets_a_long_prompt_pass_newcomers_in_the_end() -> None:
    cache = PrefixCache(64, SIZE)
    long = make_waiting(100, arrived=0.0)  # 1 s of work, worth 5 s of waiting
    for now, first in ((4.0, "newcomer"), (6.0, "long")):
        newcomer = make_waiting(4, arrived=now)
        plan = plan_for(cache, [], [newcomer, long], now=now)
        assert plan.work[0][0] is (long if first == "long" else newcomer)


def test_only_uncached_work_counts_for_the_order() -> None:
    rig = Rig()
    rig.submit(make_generate(make_prompt(60, salt=1), 1))
    rig.run()
    cached, shorter = make_waiting(60, salt=1), make_waiting(20, salt=2)
    plan = plan_for(rig.cache, [], [shorter, cached])
    assert plan.work == [(cached, 4), (shorter, 12)]


def test_no_more_run_at_a_time_than_allowed() -> None:
    cache = PrefixCache(64, SIZE)
    limits = EngineLimits(max_requests=2, max_step_tokens=64, max_context=1000)
    plan = plan_for(cache, [make_running(cache, 6, 5)], [make_waiting(4) for _ in range(3)], limits)
    assert len(plan.admitted) == 1


def test_admission_leaves_running_prefills_the_blocks_that_they_still_need() -> None:
    cache = PrefixCache(10, SIZE)
    prefill = make_running(cache, 32, 8)  # holds 2, needs 6 more: of 8 free ones 2 are left, 1 is kept for growth
    fits, not_any_more = make_waiting(4), make_waiting(5)
    assert plan_for(cache, [prefill], [not_any_more]).admitted == []
    assert plan_for(cache, [prefill], [fits]).admitted == [fits]


def test_nobody_overtakes_the_first_in_the_order_that_does_not_fit() -> None:
    cache = PrefixCache(10, SIZE)
    running = make_running(cache, 20, 19)
    big, small = make_waiting(28, arrived=0.0), make_waiting(4, arrived=99.0)
    assert plan_for(cache, [running], [small, big], now=100.0).admitted == []
    assert plan_for(cache, [running], [small], now=100.0).admitted == [small]


def test_idle_blocks_that_a_match_will_take_are_not_counted_as_room() -> None:
    rig = Rig(num_blocks=8)
    rig.submit(make_generate(make_prompt(24, salt=1), 1))
    rig.run()
    holder = make_running(rig.cache, 8, 7)  # takes the 2 free blocks; 6 idle ones are left
    same = make_waiting(24, salt=1)  # would match 5 of them and need 1 more: 6, and 1 must stay for the holder
    assert plan_for(rig.cache, [holder], [same]).admitted == []
    assert plan_for(rig.cache, [], [same]).admitted == [same]


def test_what_one_admission_takes_is_not_there_for_the_next() -> None:
    rig = Rig(num_blocks=8)
    rig.submit(make_generate(make_prompt(24, salt=1), 1))
    rig.run()
    same, other = make_waiting(24, salt=1), make_waiting(8)  # 5 idle and 1 new block; 2 more and 1 to grow
    assert plan_for(rig.cache, [], [same, other]).admitted == [same]


def test_what_a_fork_takes_is_not_there_for_the_next() -> None:
    for length, is_admitted in ((28, True), (29, False)):
        original, fork, other = make_waiting(6, salt=1), make_waiting(6, salt=1), make_waiting(length)
        plan = plan_for(PrefixCache(12, SIZE), [], [other, fork, original])  # 2 + 1 + 7 blocks, and 2 to grow
        assert plan.forks == {plan.admitted[0].key: [fork if plan.admitted[0] is original else original]}
        assert (other in plan.admitted) is is_admitted


def test_a_prefill_that_gets_its_blocks_in_this_step_needs_no_reserve_any_more() -> None:
    cache = PrefixCache(8, SIZE)
    prefill, newcomer = make_running(cache, 16, 8), make_waiting(8)  # 2 held, 2 taken now, 2 for the newcomer, 1 spare
    assert plan_for(cache, [prefill], [newcomer]).admitted == [newcomer]


def test_the_youngest_is_preempted_when_decodes_need_blocks() -> None:
    cache = PrefixCache(6, SIZE)
    old, middle, young = (make_running(cache, 9, 8, arrived=float(i)) for i in range(3))
    plan = plan_for(cache, [young, old, middle], [], now=3.0)
    assert plan.preempted == [young]
    assert plan.work == [(old, 1), (middle, 1)]


def test_preempting_counts_only_the_blocks_that_nobody_else_references() -> None:
    cache = PrefixCache(5, SIZE)
    old = make_running(cache, 9, 8)
    young = [make_waiting(6, arrived=1.0, salt=7), make_waiting(6, arrived=2.0, salt=7)]
    for sequence in young:  # the second finds the block of the first
        num_found = cache.match(sequence.chain, sequence.table, 1)
        assert cache.allocate(sequence.chain, sequence.table, 1 - num_found) is not None
        cache.insert(sequence.chain, sequence.table, 1)
        sequence.num_computed = SIZE
    assert young[0].table.block_ids == young[1].table.block_ids
    rest = make_running(cache, 9, 8)  # nothing is free
    assert cache.num_available == 0
    plan = plan_for(cache, [old, *young, rest], [], now=3.0)
    assert plan.preempted == [young[1], young[0], rest]  # the shared block comes with the second; 2 are needed
    assert plan.work == [(old, 1)]


def test_stalled_prefills_make_room_for_the_oldest_of_them() -> None:
    cache = PrefixCache(6, SIZE)
    old, young = make_running(cache, 20, 12, arrived=0.0), make_running(cache, 20, 12, arrived=1.0)
    assert cache.num_available == 0
    plan = plan_for(cache, [old, young], [], now=2.0)
    assert plan.preempted == [young]
    assert plan.work == [(old, 8)]


def test_a_chunk_shrinks_to_the_blocks_that_can_be_had() -> None:
    cache = PrefixCache(5, SIZE)
    a, b = make_running(cache, 30, 8), make_running(cache, 31, 6)
    assert plan_for(cache, [a, b], []).work == [(a, 4), (b, 2)]  # one free block for a; b fills its own


def test_newcomers_do_not_get_what_a_preemption_freed() -> None:
    cache = PrefixCache(8, SIZE)
    old, young = make_running(cache, 9, 8, arrived=0.0), make_running(cache, 24, 23, arrived=1.0)
    plan = plan_for(cache, [old, young], [make_waiting(4, arrived=2.0)], now=2.0)
    assert (plan.preempted, plan.admitted) == ([young], [])


def test_a_sequence_preempted_before_its_first_token_does_not_count_its_own_blocks_as_cached() -> None:
    rig = Rig(num_blocks=8, max_step_tokens=2)
    rig.submit(make_generate(make_prompt(8), 18, req_id=b"old"))
    while not rig.streams[b"old"].token_ids:
        rig.step()
    rig.clock.now += 1
    young = rig.submit(make_generate(make_prompt(14, salt=1), 4, req_id=b"young"))
    while not rig.engine.num_preempted:
        rig.step()
    assert young.token_ids == [], "it was to be preempted before its first token"
    rig.run()
    assert rig.cache.statistics().num_matched > 0, "it was to find its own blocks again"
    assert young.num_cached == 0
    assert young.token_ids == expected_tokens(make_prompt(14, salt=1), 4)


@given(
    st.integers(3, 14),
    st.lists(st.tuples(st.integers(2, 12), st.integers(0, 11), st.integers(0, 3)), max_size=5),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=4),
    st.integers(6, 30),
)
def test_every_plan_can_be_carried_out_and_leaves_nobody_stuck(
    num_blocks: int, holders: list[tuple[int, int, int]], newcomers: list[tuple[int, int]], budget: int
) -> None:
    cache = PrefixCache(num_blocks, SIZE)
    running = []
    for length, done, arrived in holders:
        num_computed = min(done, length - 1)
        if -(-num_computed // SIZE) <= cache.num_available:
            running.append(make_running(cache, length, num_computed, arrived=float(arrived)))
    waiting = [make_waiting(min(n, num_blocks * SIZE), arrived=float(t), salt=0) for n, t in newcomers]
    before = [(list(s.table.block_ids), s.num_computed) for s in running]
    limits = EngineLimits(max_requests=5, max_step_tokens=budget, max_context=num_blocks * SIZE)
    plan = plan_for(cache, running, waiting, limits, now=5.0)
    assert before == [(s.table.block_ids, s.num_computed) for s in running], "schedule changed something"
    assert sum(n for _, n in plan.work) <= budget
    assert all(n >= 1 for _, n in plan.work)
    assert len({s.key for s, _ in plan.work}) == len(plan.work)
    assert bool(plan.work) == bool(running or waiting)
    assert not {s.key for s, _ in plan.work} & {s.key for s in plan.preempted}
    for s in plan.preempted:
        cache.free(s.table)
    for s, n in plan.work:
        assert cache.allocate(s.chain, s.table, s.num_missing_blocks(s.num_computed + n, SIZE)) is not None
