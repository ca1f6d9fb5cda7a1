"""The one door between engine and model: what passes it is plain data, and in which order it is carried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from kvasir.protocol.sampling import Sampling
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.step import Mask, SequenceSlice, StepBatch, StepResult
from tests.engine_helpers import Rig, Stream, make_generate, make_prompt

BATCHES, RESULTS = msgspec.msgpack.Decoder(StepBatch), msgspec.msgpack.Decoder(StepResult)


class DistantExecutor:
    """Knows of every step only what bytes can tell it, and tells its results in bytes."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.num_copies = 0

    def launch(self, batch: StepBatch) -> Any:
        told = BATCHES.decode(msgspec.msgpack.encode(batch))
        self.num_copies += len(told.copies)
        return self._executor.launch(told)

    def collect(self, handle: Any, masks: Sequence[Mask] = ()) -> StepResult:
        return RESULTS.decode(msgspec.msgpack.encode(self._executor.collect(handle, masks)))


def run(rig: Rig) -> list[Stream]:
    streams = []
    for i in range(12):
        penalised = {"repetition_penalty": 1.2, "frequency_penalty": 0.5} if i % 3 == 0 else {}
        sampling = Sampling(temperature=float(i % 2), seed=i, logprobs=2, logit_bias={5: 1.0}, **penalised)
        prompt = make_prompt(7 + i // 3 * 9, salt=i // 3)  # threes share a prompt: forks
        streams.append(rig.submit(make_generate(prompt, 20, req_id=b"%d" % i, sampling=sampling, stop_token_ids=[1])))
    rig.run()
    return streams


def test_an_executor_that_is_told_in_bytes_gives_the_same_streams() -> None:
    near, far = Rig(num_blocks=24), Rig(num_blocks=24)
    far.engine._executor = distant = DistantExecutor(far.executor)
    assert run(far) == run(near)
    assert distant.num_copies > 0 and far.engine.num_preempted > 0, "nothing was forked or preempted"


def test_a_block_is_copied_before_it_is_zeroed_for_somebody_else() -> None:
    """A fork's original may end, and its block go to another tenant, before the next step."""
    rig = Rig()
    rig.kv.data[3], rig.kv.data[4] = 33, 44
    slices = [SequenceSlice(1, [7], 0, [5], 0)]
    rig.executor.launch(StepBatch([(3, 8), (4, 3)], [4], slices, []))
    assert (rig.kv.data[8] == 33).all() and (rig.kv.data[3] == 44).all() and (rig.kv.data[4] == 0).all()


@pytest.mark.parametrize("num_empty", [1, 3])
def test_the_executor_is_told_once_when_there_is_nothing_left_to_compute(num_empty: int) -> None:
    rig = Rig()
    for i in range(2):
        rig.submit(make_generate(make_prompt(9), 3, req_id=b"%d" % i))
        rig.run()
        for _ in range(num_empty):
            rig.step()
    assert rig.model.num_rests == 2
