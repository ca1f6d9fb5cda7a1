"""The loop that launches a step ahead beside its plain twin, which collects every step before it plans the next."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from kvasir.cache.events import Stored
from kvasir.protocol.messages import Generate
from kvasir.protocol.sampling import Constraint, Sampling
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.step import Mask, OutOfMemory, SequenceSlice, StepBatch, StepResult
from kvasir.worker.model.oracle_model import OracleStore
from tests.engine_helpers import SIZE, Rig, Stream, expected_tokens, make_generate, make_prompt

BATCHES = msgspec.msgpack.Decoder(StepBatch)
KINDS = ("at once", "late")
SICK = 4090


class LateExecutor:
    """Computes a step when its result is asked for, from what it was told in bytes at its launch."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self._untouched: list[bytes] = []
        self._handles: list[Any] = []

    def launch(self, batch: StepBatch) -> int:
        self._untouched.append(msgspec.msgpack.encode(batch))
        return len(self._untouched) - 1

    def collect(self, handle: int, masks: Sequence[Mask] = ()) -> StepResult:
        while len(self._handles) <= handle:
            batch = BATCHES.decode(self._untouched[len(self._handles)])
            self._handles.append(self._executor.launch(batch))
        return self._executor.collect(self._handles[handle], masks)


class AheadRig(Rig):
    """Remembers every block that was ever stored, with all tokens up to it."""

    def __init__(self, kind: str | None, **options: int) -> None:
        super().__init__(is_ahead=kind is not None, **options)
        if kind == "late":
            self.engine._executor = LateExecutor(self.executor)
        self.engine.on_blocks = self._on_blocks
        self.tokens_up_to: dict[bytes, list[int]] = {}
        self.order: list[bytes] = []
        self.num_ahead = 0

    def step(self) -> Any:
        report = super().step()
        self.num_ahead += len(self.engine._flights)
        return report

    def _on_blocks(self, stored: list[Stored], removed: bytes) -> None:
        for block in (block for entry in stored for block in entry.blocks()):
            before = self.tokens_up_to[block.parent] if block.parent else []  # KeyError: a child before its parent
            self.tokens_up_to[block.hashes] = before + unpack_tokens(block.tokens)
            self.order.append(block.hashes)

    def order_per_chain(self, chains: Sequence[list[int]]) -> list[list[bytes]]:
        """Return for each of `chains` the blocks of it that were stored, in that order."""
        found = []
        for tokens in chains:
            mine = [
                digest for digest in self.order if tokens[: len(self.tokens_up_to[digest])] == self.tokens_up_to[digest]
            ]
            found.append(mine)
        return found


@dataclass
class Load:
    """Requests, and what happens to them when they have so many tokens: the same for both loops."""

    commands: list[tuple[Generate, list[int]]] = field(default_factory=list)
    aborts: dict[bytes, int] = field(default_factory=dict)
    stop_ids: dict[bytes, int] = field(default_factory=dict)


def make_load(dice: random.Random, count: int) -> Load:
    load = Load()
    prompts = [make_prompt(dice.randrange(1, 30), salt=salt) for salt in range(5)]
    for i in range(count):
        req_id, prompt = b"%d" % i, dice.choice(prompts) + make_prompt(dice.choice([0, 0, 3]), salt=i)
        options: dict[str, Any] = {"seed": i % 7, "temperature": dice.choice([0.0, 1.0])}
        if dice.random() < 0.1:
            options["repetition_penalty"] = 1.3  # the oracle draws the same with it: the loop must wait all the same
        if dice.random() < 0.1:
            options["constraint"] = Constraint(min_tokens=2)
        if dice.random() < 0.1:
            prompt = [*prompt, SICK]
        sampling, max_tokens = Sampling(**options), dice.randrange(1, 14)
        stop = expected_tokens(prompt, max_tokens, sampling)[-1] if dice.random() < 0.3 else None
        if dice.random() < 0.15:
            load.aborts[req_id] = dice.randrange(max_tokens)
        command = make_generate(
            prompt,
            max_tokens if stop is None else max_tokens + 5,
            req_id=req_id,
            tenant=dice.choice("ab"),
            sampling=sampling,
            stop_token_ids=[] if stop is None else [stop],
            deadline_s=dice.choice([None, None, None, 3.0]),
        )
        load.commands.append((command, prompt))
    return load


def run(rig: AheadRig, load: Load, dice: random.Random, *, out_of_memory: bool) -> list[Stream]:
    """Submit what `load` has, a few at a time, and step until all is answered."""
    forward = rig.model.forward

    def fail_at_times(slices: list[SequenceSlice], kv: OracleStore) -> list[int]:
        rig.model.max_tokens = 3 if dice.random() < 0.03 else 1 << 30
        return forward(slices, kv)

    if out_of_memory:
        rig.model.forward = fail_at_times  # type: ignore[method-assign]
    rig.model.sick_token = SICK
    streams: list[Stream] = []
    coming = iter(load.commands)

    def steps() -> Iterator[None]:
        for command, _ in coming:
            streams.append(rig.submit(command))
            yield from [None] * dice.randrange(4)
        while rig.engine.has_work:
            yield None

    for num_steps, _ in enumerate(steps()):
        assert num_steps < 5000
        rig.clock.now += 0.1
        rig.step()
        for req_id, count in load.aborts.items():
            stream = rig.streams.get(req_id)
            if stream is not None and len(stream.token_ids) >= count:
                rig.engine.abort(req_id, 1)
    assert rig.cache.num_available == rig.cache.pool.num_blocks, "blocks were not given back"
    return streams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [14, 24, 200])
def test_both_loops_give_every_sequence_the_same_tokens_and_publish_nothing_else(kind: str, num_blocks: int) -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    for seed in range(4):
        load = make_load(random.Random(seed), 40)
        options = {"num_blocks": num_blocks, "max_requests": 6, "max_step_tokens": 12}
        plain, ahead = AheadRig(None, **options), AheadRig(kind, **options)
        told = [run(rig, load, random.Random(seed), out_of_memory=seed % 2 == 1) for rig in (plain, ahead)]
        assert plain.num_ahead == 0 < ahead.num_ahead
        for (command, prompt), *both in zip(load.commands, *told, strict=True):
            for stream in both:
                assert stream.token_ids == expected_tokens(prompt, len(stream.token_ids), command.sampling)
            reasons = {stream.finish_reason for stream in both}
            if reasons <= {"length", "stop"}:
                assert both[0].token_ids == both[1].token_ids and len(reasons) == 1
            assert SICK not in prompt or not reasons & {"length", "stop"}
            counts[both[1].finish_reason or ""] += 1
        for rig, streams in zip((plain, ahead), told, strict=True):
            given = [prompt + stream.token_ids for (_, prompt), stream in zip(load.commands, streams, strict=True)]
            for tokens in rig.tokens_up_to.values():
                assert any(tokens == whole[: len(tokens)] for whole in given), "published, and no client's"
        counts["preempted"] += ahead.engine.num_preempted
        counts["out of memory"] += ahead.engine.num_out_of_memory
        counts["forked"] += ahead.engine.num_forked
    assert min(counts[name] for name in ("length", "stop", "abort", "error", "forked", "out of memory")) > 0, counts
    assert counts["preempted"] > 0 or num_blocks == 200
    assert counts["deadline"] > 0 or num_blocks > 14


@pytest.mark.parametrize("kind", KINDS)
def test_both_loops_store_the_blocks_of_a_chain_in_the_same_order(kind: str) -> None:
    prompts = [make_prompt(5 + 3 * i, salt=i // 3) for i in range(12)]
    orders = []
    for rig in (AheadRig(None, num_blocks=300), AheadRig(kind, num_blocks=300)):
        streams = [rig.submit(make_generate(p, 2 + 5 * (i % 4), req_id=b"%d" % i)) for i, p in enumerate(prompts)]
        rig.run()
        chains = [prompt + stream.token_ids for prompt, stream in zip(prompts, streams, strict=True)]
        orders.append(rig.order_per_chain(chains))
        assert [len(order) for order in orders[-1]] == [(len(tokens) - 1) // SIZE for tokens in chains]
    assert orders[0] == orders[1]


def test_a_token_too_many_is_computed_and_not_given() -> None:
    prompt = make_prompt(9)
    stop = expected_tokens(prompt, 4)[-1]
    rig = AheadRig("at once")
    stream = rig.submit(make_generate(prompt, 20, stop_token_ids=[stop]))
    rig.run()
    assert stream.token_ids == expected_tokens(prompt, 4) and stream.finish_reason == "stop"
    positions = [piece.end for step in rig.model.steps for piece in step]
    assert max(positions) == 9 + 4, "no step was launched ahead"


def test_a_known_end_costs_no_token_too_many() -> None:
    rig, prompt = AheadRig("at once"), make_prompt(9)
    rig.submit(make_generate(prompt, 4))
    rig.run()
    assert max(piece.end for step in rig.model.steps for piece in step) == 9 + 3


def test_blocks_of_an_aborted_sequence_are_free_when_its_last_step_is_collected() -> None:
    rig = AheadRig("late")
    rig.submit(make_generate(make_prompt(33), 20))
    rig.step()
    rig.engine.abort(b"r", 1)
    assert rig.cache.num_available < 64, "a step under way writes to them"
    rig.step()
    assert rig.cache.num_available == 64 and not rig.engine.has_work


def test_what_is_dropped_while_a_step_is_under_way_is_waited_for() -> None:
    rig = AheadRig("late")
    rig.submit(make_generate(make_prompt(33), 20))
    rig.step()
    rig.engine.drop_all()
    rig.engine.check_integrity()
    assert rig.cache.num_available == 64 and not rig.engine.has_work


def test_penalties_forks_and_constraints_wait_for_the_newest_token() -> None:
    for sampling in (Sampling(frequency_penalty=0.5), Sampling(constraint=Constraint(min_tokens=3))):
        rig = AheadRig("late")
        rig.submit(make_generate(make_prompt(9), 6, sampling=sampling))
        rig.run()
        assert rig.num_ahead == 0


def test_a_step_that_is_fed_by_one_that_failed_fails_as_well() -> None:
    rig = Rig()
    rig.model.max_tokens = 3
    handles = [
        rig.executor.launch(StepBatch([], [], [SequenceSlice(1, [5, 6, 7, 8], 0, [0], 1)], [])),
        rig.executor.launch(StepBatch([], [], [SequenceSlice(1, [0], 4, [0, 1], 1, drawn=0)], [])),
    ]
    for handle in handles:
        with pytest.raises(OutOfMemory):
            rig.executor.collect(handle)


@pytest.mark.parametrize("length", range(5, 13))
def test_no_sequence_is_preempted_for_blocks_that_are_free_when_the_step_under_way_is_collected(length: int) -> None:
    stopped, other = make_prompt(9), make_prompt(length, salt=1)
    stop = expected_tokens(stopped, 4)[-1]

    def num_preempted(kind: str | None, num_blocks: int) -> int:
        rig = AheadRig(kind, num_blocks=num_blocks)
        rig.submit(make_generate(stopped, 12, req_id=b"stopped", stop_token_ids=[stop]))
        rig.submit(make_generate(other, 12, req_id=b"other"))
        rig.run()
        return rig.engine.num_preempted

    smallest = next(num_blocks for num_blocks in range(7, 20) if not num_preempted(None, num_blocks))
    assert num_preempted("late", smallest) == 0
