"""Floors, caps, pins and shared prefills through the engine, over the oracle model: every token is checked."""

from __future__ import annotations

import random

from kvasir.protocol.messages import Quota
from tests.engine_helpers import SIZE, Rig, expected_tokens, make_generate, make_prompt


def num_computed(rig: Rig) -> int:
    return sum(len(piece.token_ids) for step in rig.model.steps for piece in step)


def test_requests_that_come_together_with_the_same_new_prefix_compute_it_once() -> None:
    rig = Rig(num_blocks=128, max_step_tokens=24)
    common = make_prompt(80)
    prompts = [common + make_prompt(6, salt=i + 1) for i in range(8)]
    streams = [rig.submit(make_generate(p, 4, req_id=bytes([i + 1]))) for i, p in enumerate(prompts)]
    rig.run()
    assert [s.token_ids for s in streams] == [expected_tokens(p, 4) for p in prompts]
    assert sorted(s.num_cached or 0 for s in streams) == [0] + [80] * 7
    assert num_computed(rig) < 80 + 8 * (6 + 4 + SIZE)
    assert rig.cache.statistics().num_duplicates == 0


def test_who_waits_for_a_shared_prefix_does_so_for_a_bounded_time() -> None:
    rig = Rig(num_blocks=128, max_step_tokens=8)
    prompt = make_prompt(200)
    rig.submit(make_generate(prompt, 1, req_id=b"leader"))
    rig.step()
    rig.submit(make_generate([*prompt[:60], 1], 1, req_id=b"led"))
    rig.step()
    assert len(rig.engine._sequences.waiting) == 1
    rig.clock.now += 11.0
    rig.step()
    assert not rig.engine._sequences.waiting, "it was to go ahead on its own"
    rig.run()


def test_who_was_led_goes_on_alone_when_its_leader_is_aborted() -> None:
    rig = Rig(num_blocks=64, max_step_tokens=8)
    prompt = make_prompt(60)
    rig.submit(make_generate(prompt, 1, req_id=b"leader"))
    led = rig.submit(make_generate([*prompt, 1], 4, req_id=b"led"))
    rig.step()
    rig.engine.abort(b"leader", 1)
    rig.run()
    assert led.token_ids == expected_tokens([*prompt, 1], 4)


def test_equal_prompts_of_two_tenants_do_not_wait_for_each_other() -> None:
    rig = Rig(num_blocks=64, max_step_tokens=64)
    for tenant in ("a", "b"):
        rig.submit(make_generate(make_prompt(20), 1, tenant=tenant, req_id=tenant.encode()))
    rig.step()
    assert num_computed(rig) == 40
    rig.run()


def test_a_tenant_at_its_cap_does_not_hold_up_others() -> None:
    rig = Rig(num_blocks=40)
    rig.cache.set_quotas({"a": Quota(cap=8)})
    long = [rig.submit(make_generate(make_prompt(20, salt=i), 8, req_id=bytes([i + 1]))) for i in range(5)]
    other = rig.submit(make_generate(make_prompt(20, salt=9), 2, tenant="b", req_id=b"other"))
    for _ in range(3):
        rig.step()
        assert next(s for s in rig.cache.accounts() if s.tenant == "a").num_held <= 8
    assert other.finish_reason == "length"
    rig.run()
    assert [s.token_ids for s in long] == [expected_tokens(make_prompt(20, salt=i), 8) for i in range(5)]


def test_a_shortage_under_the_cap_is_met_by_preempting_the_same_tenant() -> None:
    rig = Rig(num_blocks=40)
    rig.cache.set_quotas({"a": Quota(cap=9)})
    mine = [rig.submit(make_generate(make_prompt(12, salt=i), 20, req_id=bytes([i + 1]))) for i in range(2)]
    other = rig.submit(make_generate(make_prompt(12, salt=9), 60, tenant="b", req_id=b"other"))
    rig.run()
    assert rig.engine.num_preempted > 0
    assert [s.token_ids for s in mine] == [expected_tokens(make_prompt(12, salt=i), 20) for i in range(2)]
    assert other.token_ids == expected_tokens(make_prompt(12, salt=9), 60)


def test_a_prompt_that_can_never_fit_under_the_cap_ends_with_a_clear_error() -> None:
    rig = Rig(num_blocks=40)
    rig.cache.set_quotas({"a": Quota(cap=4)})
    too_long = rig.submit(make_generate(make_prompt(20), 1, req_id=b"1"))
    grows = rig.submit(make_generate(make_prompt(8, salt=1), 40, req_id=b"2"))
    public = rig.submit(make_generate(make_prompt(20, salt=2), 1, req_id=b"3", num_public=4))
    rig.run()
    assert too_long.finish_reason == "error"
    assert "cap is 4" in too_long.error
    assert (grows.finish_reason, len(grows.token_ids)) == ("error", 9)
    assert public.finish_reason == "length"


def test_a_request_that_floors_and_pins_leave_no_room_for_ends_with_a_clear_error() -> None:
    rig = Rig(num_blocks=10)
    rig.cache.set_quotas({"b": Quota(floor=6)})
    rig.submit(make_generate(make_prompt(24), 1, tenant="b", req_id=b"1"))
    rig.run()
    large = rig.submit(make_generate(make_prompt(20), 1, req_id=b"2"))
    small = rig.submit(make_generate(make_prompt(8), 1, req_id=b"3"))
    rig.run()
    assert (large.finish_reason, small.finish_reason) == ("error", "length")
    assert "floors" in large.error


def test_nobody_is_preempted_for_others_within_his_floor() -> None:
    rig = Rig(num_blocks=12)
    rig.cache.set_quotas({"b": Quota(floor=6)})
    rig.clock.now += 1
    old = rig.submit(make_generate(make_prompt(16), 20, req_id=b"old"))
    rig.step()
    rig.clock.now += 1
    young = rig.submit(make_generate(make_prompt(12, salt=1), 12, tenant="b", req_id=b"young"))
    rig.run()
    ends = [o.req_id for report in rig.reports for o in report.outputs if o.finish_reason]
    assert ends == [b"young", b"old"]
    assert rig.engine.num_preempted > 0
    assert old.token_ids == expected_tokens(make_prompt(16), len(old.token_ids))
    assert old.finish_reason == "error", "what is left beside the floor cannot hold it"
    assert young.token_ids == expected_tokens(make_prompt(12, salt=1), 12)


def flooded(floor: int, num_flooders: int) -> float:
    """The hit rate of a tenant with 8 prompts of 6 blocks, beside prompts that never come twice."""
    rig, rng = Rig(num_blocks=96), random.Random(5)
    rig.cache.set_quotas({"victim": Quota(floor=floor)})
    asked = cached = serial = 0
    for turn in range(80):
        for _ in range(12 if num_flooders else 0):
            serial += 1
            tenant = f"flood-{serial % num_flooders}"
            rig.submit(make_generate(make_prompt(16, salt=1000 + serial), 2, tenant=tenant, req_id=b"f%d" % serial))
        prompt = make_prompt(25, salt=rng.randrange(8))
        stream = rig.submit(make_generate(prompt, 2, tenant="victim", req_id=b"v%d" % turn))
        rig.run()
        assert stream.token_ids == expected_tokens(prompt, 2)
        if turn >= 30:
            asked, cached = asked + 24, cached + (stream.num_cached or 0)
    return cached / asked


def test_a_floor_keeps_a_tenants_hits_through_a_flood_in_the_engine() -> None:
    alone = flooded(0, 0)
    assert flooded(56, 8) >= 0.95 * alone
    assert flooded(0, 8) < 0.5 * alone, "the control: without a floor the flood was to win"


def test_random_tenants_under_random_quotas_all_get_their_tokens_or_a_reason() -> None:
    rng = random.Random(11)
    for round_ in range(12):
        rig = Rig(num_blocks=rng.randrange(12, 30), max_step_tokens=rng.choice([8, 32]))
        wanted = {}
        for i in range(25):
            tenant, prompt = rng.choice("abc"), make_prompt(rng.randrange(1, 40), salt=rng.randrange(6))
            num_public = rng.randrange(3) if len(prompt) >= 2 * SIZE else 0
            command = make_generate(
                prompt, rng.randrange(1, 20), tenant=tenant, num_public=num_public, req_id=b"%d" % i
            )
            wanted[command.req_id] = (prompt, rig.submit(command), command.max_tokens)
            if rng.random() < 0.3:
                quota = {t: Quota(rng.randrange(4), rng.choice([None, 6, 12])) for t in "abc"}
                rig.cache.set_quotas(quota)
            for _ in range(rng.randrange(4)):
                rig.clock.now += 0.3
                rig.step()
                rig.engine.check_integrity()
        rig.run()
        for prompt, stream, num_tokens in wanted.values():
            expected = expected_tokens(prompt, num_tokens)
            assert stream.token_ids == expected[: len(stream.token_ids)], f"round {round_}"
            assert stream.finish_reason in ("length", "error")
            assert stream.finish_reason == "length" or "KV" in stream.error
