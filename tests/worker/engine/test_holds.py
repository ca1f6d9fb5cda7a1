"""Holds: what a waiting sequence will find in the cache is no victim, as long as anything else is."""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate, Quota
from kvasir.worker.engine.scheduler import EngineLimits, Plan, schedule
from kvasir.worker.engine.sequence import Sequence, make_sequence
from tests.engine_helpers import PUBLIC_SPACE, SIZE, Rig, Stream, expected_tokens, make_generate, make_prompt
from tests.engine_loads import run_random_load

_keys = count(1)


class HoldRig(Rig):
    """Counts what is held and let go, and allocations that a plan had promised and that failed."""

    def __init__(self, num_blocks: int = 64, *, holds: bool = True, **options: int) -> None:
        super().__init__(num_blocks, **options)
        self.holds = holds
        self.plans: list[Plan] = []
        self.num_broken_promises = 0
        plan, allocate = self.engine._schedule, self.engine._sequences._allocate

        def watch_plan() -> Plan:
            self.plans.append(plan())
            return self.plans[-1]

        def watch_allocate(sequence: Sequence, length: int, **options: bool) -> bool:
            is_done = allocate(sequence, length, **options)
            self.num_broken_promises += not is_done and sequence is not self.plans[-1].last_resort
            return is_done

        self.engine._schedule = watch_plan  # type: ignore[method-assign]
        self.engine._sequences._allocate = watch_allocate  # type: ignore[method-assign]

    def submit(self, command: Generate) -> Stream:
        stream = super().submit(command)
        if not self.holds:
            self.engine._sequences.waiting[-1].may_hold = False
        return stream

    def run_one(self, prompt: list[int], tenant: str = "a") -> None:
        self.submit(make_generate(prompt, 1, tenant=tenant, req_id=b"%d" % len(self.streams)))
        self.run()

    @property
    def num_held(self) -> int:
        return sum(len(plan.held) for plan in self.plans)

    @property
    def num_preempted(self) -> int:
        return self.engine.num_preempted

    @property
    def num_let_go(self) -> int:
        return sum(len(plan.let_go) for plan in self.plans)


def waited_through_decoding(*, holds: bool) -> HoldRig:
    """A pool of 32: 8 blocks that somebody waits for, 12 younger idle ones, and one that grows to 21 blocks."""
    rig = HoldRig(32, holds=holds, max_requests=1)
    rig.run_one(make_prompt(33))
    for i in range(3):
        rig.run_one(make_prompt(17, salt=1 + i))
    rig.submit(make_generate(make_prompt(4, salt=9), 80, req_id=b"long"))
    rig.step()
    rig.submit(make_generate(make_prompt(33), 5, req_id=b"waiting"))
    rig.run()
    return rig


def waited_through_admissions(*, holds: bool) -> HoldRig:
    """A pool of 40: 8 blocks that somebody waits for whose owner is at his cap, and a flood of another's prompts."""
    rig = HoldRig(40, holds=holds)
    rig.cache.set_quotas({"a": Quota(cap=20)})
    rig.run_one(make_prompt(33))
    rig.submit(make_generate(make_prompt(28, salt=1), 12, req_id=b"long"))
    rig.step()
    rig.submit(make_generate([*make_prompt(33), *make_prompt(19, salt=2)], 5, req_id=b"waiting"))
    for i in range(9):
        rig.submit(make_generate(make_prompt(17, salt=10 + i), 1, tenant="b", req_id=b"flood-%d" % i))
        rig.step()
    assert rig.streams[b"waiting"].num_cached is None, "it was to wait"
    rig.run()
    return rig


@pytest.mark.parametrize("scenario", [waited_through_decoding, waited_through_admissions])
def test_what_a_waiting_request_needs_survives_a_flood(scenario: object) -> None:
    rig = scenario(holds=True)  # type: ignore[operator]
    assert rig.streams[b"waiting"].num_cached == 32
    assert (rig.num_held, rig.num_let_go, rig.num_preempted) == (1, 0, 0)
    control = scenario(holds=False)  # type: ignore[operator]
    assert control.streams[b"waiting"].num_cached < 32, "the control: without a hold the flood was to take it"
    assert rig.streams[b"waiting"].token_ids == control.streams[b"waiting"].token_ids != []


def test_a_hold_is_let_go_before_anybody_is_preempted_for_it() -> None:
    rig = HoldRig(20, max_requests=1)
    rig.run_one(make_prompt(33))
    long = rig.submit(make_generate(make_prompt(4, salt=9), 76, req_id=b"long"))  # fills the pool
    rig.step()
    waiting = rig.submit(make_generate(make_prompt(33), 5, req_id=b"waiting"))
    rig.run()
    assert (rig.num_held, rig.num_let_go, rig.num_preempted) == (1, 1, 0)
    assert long.token_ids == expected_tokens(make_prompt(4, salt=9), 76)
    assert waiting.token_ids == expected_tokens(make_prompt(33), 5)


def test_the_last_in_the_order_lets_go_for_the_first_and_nobody_else() -> None:
    rig = HoldRig(28, max_requests=3)
    prompts = [make_prompt(25, salt=i) for i in range(3)]
    for prompt in prompts:
        rig.run_one(prompt)  # 6 blocks of each stay
    for i in range(3):
        rig.submit(make_generate(make_prompt(4, salt=7 + i), 8, req_id=b"running-%d" % i))  # 3 blocks each
    rig.step()
    streams = [rig.submit(make_generate([*prompts[0], *make_prompt(43, salt=4)], 1, req_id=b"first"))]  # 17 blocks
    for i in (1, 2):
        rig.clock.now += 5
        streams.append(rig.submit(make_generate(prompts[i], 1, req_id=b"later-%d" % i)))
    rig.run()
    assert [s.req_id for plan in rig.plans for s in plan.let_go] == [b"later-2"]
    assert [stream.num_cached for stream in streams[:2]] == [24, 24]
    assert streams[2].num_cached < 24


def test_nobody_lets_go_for_others_what_is_within_his_floor() -> None:
    rig = HoldRig(14, max_requests=1)
    rig.cache.set_quotas({"b": Quota(floor=8)})
    rig.run_one(make_prompt(25), tenant="b")
    growing = rig.submit(make_generate(make_prompt(4, salt=1), 50, req_id=b"growing"))
    rig.step()
    waiting = rig.submit(make_generate(make_prompt(25), 1, tenant="b", req_id=b"waiting"))
    rig.run()
    assert (rig.num_held, rig.num_let_go, waiting.num_cached) == (1, 0, 24)
    assert growing.finish_reason == "error"


def test_a_last_resort_is_tried_with_what_others_hold() -> None:
    """Published blocks below those of an owner with a quota are not counted as room, but may be had."""
    rig = HoldRig(10, max_requests=2)
    rig.cache.set_quotas({"b": Quota(cap=8)})
    rig.submit(make_generate(make_prompt(13), 1, tenant="b", num_public=2, req_id=b"published"))
    rig.run()
    rig.run_one(make_prompt(13, salt=1))
    for i in range(2):
        rig.submit(make_generate(make_prompt(1, salt=2 + i), 3, req_id=b"running-%d" % i))
    rig.step()
    first = rig.submit(make_generate(make_prompt(35, salt=4), 1, req_id=b"first"))  # 9 blocks
    rig.clock.now += 5
    rig.submit(make_generate(make_prompt(13, salt=1), 1, req_id=b"later"))
    rig.run()
    assert [s.req_id for plan in rig.plans for s in plan.held] == [b"later"]
    assert any(plan.last_resort for plan in rig.plans)
    assert first.token_ids == expected_tokens(make_prompt(35, salt=4), 1)


def test_a_hold_is_taken_once_and_again_only_when_more_becomes_resident() -> None:
    rig = HoldRig(64, max_requests=2)
    rig.run_one(make_prompt(9))
    matches = 0
    match = rig.cache.match

    def counted(*args: object, **options: object) -> int:
        nonlocal matches
        matches += 1
        return match(*args, **options)  # type: ignore[arg-type]

    busy = [make_generate(make_prompt(5, salt=i), 60, req_id=b"busy-%d" % i) for i in range(2)]
    for command in busy:
        rig.submit(command)
    rig.step()
    waiting = rig.submit(make_generate(make_prompt(33), 5, req_id=b"waiting"))
    rig.cache.match = counted  # type: ignore[method-assign]
    for _ in range(20):
        rig.step()
    assert matches == 1
    assert len(rig.engine._sequences.waiting[0].hold.block_ids) == 2
    rig.engine.abort(b"busy-0", 1)
    longer = rig.submit(make_generate(make_prompt(33)[:25], 1, req_id=b"longer"))  # less to compute: it goes first
    while longer.finish_reason is None:
        rig.step()
    rig.step()
    assert waiting.num_cached is None or waiting.num_cached == 24
    rig.run()
    assert waiting.num_cached == 24


def test_a_collision_that_hides_blocks_does_not_make_a_hold_try_again_and_again() -> None:
    rig = HoldRig(64, max_requests=1)
    rig.run_one(make_prompt(9))
    rig.submit(make_generate(make_prompt(5, salt=1), 20, req_id=b"busy"))
    rig.step()
    command = make_generate(make_prompt(9, salt=2), 1, req_id=b"waiting")
    command.prefix_hashes = make_generate(make_prompt(9)).prefix_hashes
    rig.submit(command)
    rig.run()
    assert rig.num_held == 1


def test_hits_of_who_held_are_counted_once() -> None:
    looked_up, hits = [], []
    for holds in (True, False):
        rig = HoldRig(64, holds=holds, max_requests=1)
        rig.run_one(make_prompt(33))
        rig.submit(make_generate(make_prompt(5, salt=1), 9, req_id=b"busy"))
        rig.step()
        rig.submit(make_generate(make_prompt(33), 5, req_id=b"waiting"))
        rig.run()
        assert rig.num_held == holds
        [account] = rig.cache.accounts()
        looked_up.append(account.num_looked_up)
        hits.append(account.num_hits)
    assert looked_up[0] == looked_up[1] > hits[0] == hits[1] == 8


@pytest.mark.parametrize("end", ["abort", "deadline", "drop", "hand back"])
def test_who_ends_while_it_holds_gives_everything_back(end: str) -> None:
    rig = HoldRig(64, max_requests=1)
    rig.run_one(make_prompt(33))
    rig.submit(make_generate(make_prompt(5, salt=1), 9, req_id=b"busy"))
    rig.step()
    rig.submit(make_generate(make_prompt(33), 5, req_id=b"waiting", deadline_s=5.0))
    rig.step()
    assert rig.engine._sequences.waiting[0].hold.block_ids
    match end:
        case "abort":
            rig.engine.abort(b"waiting", 1)
        case "deadline":
            rig.clock.now += 6.0
        case "drop":
            rig.engine.drop_all()
        case "hand back":
            rig.engine.abort_all("the worker leaves")
    rig.run()
    assert rig.cache.num_available == 64


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("has_quotas", [False, True])
def test_random_loads_over_tiny_pools_finish_with_holds(has_quotas: bool, is_ahead: bool) -> None:
    rigs = []
    for seed in range(8):
        dice = random.Random(seed)
        options = {"max_requests": dice.choice([2, 3, 6]), "max_step_tokens": dice.choice([6, 24])}
        rigs.append(HoldRig(dice.choice([14, 20, 32]), is_ahead=is_ahead, **options))
        run_random_load(rigs[-1], dice, 60, has_quotas=has_quotas)
    for name in ("num_held", "num_let_go", "num_preempted"):
        assert sum(getattr(rig, name) for rig in rigs) > 8
    assert has_quotas or not any(rig.num_broken_promises for rig in rigs)


# ---- plans


def make_waiting(prompt: list[int], arrived: float) -> Sequence:
    return make_sequence(
        make_generate(prompt, 100),
        key=next(_keys),
        now=arrived,
        public_namespace=PUBLIC_SPACE,
        block_size=SIZE,
        max_context=1000,
        vocab_size=4096,
        eos_token_ids=(),
    )


def run_in(cache: PrefixCache, s: Sequence, num_computed: int) -> bool:
    """Let `s` compute up to `num_computed` tokens; False if there is no room."""
    matched = cache.match(s.chain, s.table, num_computed // SIZE)
    if cache.allocate(s.chain, s.table, s.num_missing_blocks(num_computed, SIZE)) is None:
        cache.free(s.table)
        return False
    s.num_computed = max(num_computed, matched * SIZE)
    cache.insert(s.chain, s.table, s.num_computed // SIZE)
    return True


def test_what_an_admitted_one_shares_with_a_hold_is_not_room_for_the_next() -> None:
    prompt = make_prompt(13)
    for num_blocks, is_admitted in ((7, True), (6, False)):
        cache = PrefixCache(num_blocks, SIZE)
        past = make_waiting(prompt, 0.0)
        assert run_in(cache, past, 12)
        cache.free(past.table)
        sharing, other = make_waiting([*prompt[:12], 1], 0.0), make_waiting(make_prompt(8, salt=1), 1.0)
        holder = make_waiting(prompt, 5.0)
        cache.match(holder.chain, holder.hold, 3, again=True)
        limits = EngineLimits(max_requests=5, max_step_tokens=64, max_context=100)
        plan = schedule([], [holder, other, sharing], cache, limits, 10.0, 100.0)
        assert plan.admitted[0] is sharing
        assert (other in plan.admitted) is is_admitted


PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 30))


@settings(max_examples=400)
@given(
    st.integers(6, 24),
    st.lists(PROMPTS, max_size=4),
    st.lists(st.tuples(PROMPTS, st.integers(1, 40)), max_size=4),
    st.lists(st.tuples(PROMPTS, st.booleans()), min_size=1, max_size=5),
    st.integers(6, 40),
)
def test_every_plan_with_holds_can_be_carried_out(
    num_blocks: int,
    past: list[tuple[int, int]],
    present: list[tuple[tuple[int, int], int]],
    future: list[tuple[tuple[int, int], bool]],
    budget: int,
) -> None:
    cache = PrefixCache(num_blocks, SIZE)
    longest = num_blocks * SIZE - 1
    for salt, length in past:
        s = make_waiting(make_prompt(min(length, longest), salt), 0.0)
        if run_in(cache, s, s.num_tokens):
            cache.free(s.table)
    running, waiting = [], []
    for i, ((salt, length), num_computed) in enumerate(present):
        s = make_waiting(make_prompt(min(length, longest), salt), float(i))
        if run_in(cache, s, min(num_computed, s.num_tokens - 1)):
            running.append(s)
    for i, ((salt, length), holds) in enumerate(future):
        s = make_waiting(make_prompt(min(length, longest), salt), 1.5 * i)
        if holds:
            cache.match(s.chain, s.hold, (s.num_tokens - 1) // SIZE, again=True)
        waiting.append(s)
    limits = EngineLimits(max_requests=5, max_step_tokens=budget, max_context=num_blocks * SIZE)
    plan = schedule(running, waiting, cache, limits, 10.0, 100.0)
    assert plan.work
    is_held = any(s.hold.block_ids for s in waiting if s not in plan.let_go and s not in plan.admitted)
    is_stalled = len(plan.work) < len(running) and sum(n for _, n in plan.work) < budget
    assert not is_held or not (plan.preempted or is_stalled), "holds go first"
    assert not {s.key for s in plan.let_go} & {s.key for s in plan.held}, "let go is for good"
    for s in plan.let_go:
        cache.free(s.hold)
    for s in plan.preempted:
        cache.free(s.table)
    for s in plan.admitted:
        s.num_computed = SIZE * cache.match(s.chain, s.table, (s.num_tokens - 1) // SIZE)
        cache.free(s.hold)
    for s in plan.held:
        hold, s.hold = s.hold, type(s.hold)()
        cache.match(s.chain, s.hold, (s.num_tokens - 1) // SIZE, again=True)
        cache.free(hold)
    for s, num_tokens in plan.work:
        num_missing = s.num_missing_blocks(s.num_computed + num_tokens, SIZE)
        assert cache.allocate(s.chain, s.table, num_missing) is not None
    for forks in plan.forks.values():
        for s in forks:
            assert cache.allocate(s.chain, s.table, bool(s.num_tokens % SIZE)) is not None
