"""Carries out steps in this process: a model, the memory behind the block ids and a sampler behind one door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from kvasir.worker.engine.step import Mask, OutOfMemory, Sampled, SampleRow, SequenceSlice, StepBatch, StepResult


class StepModel(Protocol):
    """`worker.model.model.Model`, or a stand-in such as `worker.model.oracle_model.OracleModel`."""

    def forward(self, slices: list[SequenceSlice], kv: Any) -> Any:
        """Compute the tokens of `slices`, store their keys and values in `kv`, return their logits.

        Those are [sum of num_logits * num_draws, …], in the order of `slices`; the sampler may change them in place.
        Whatever is kept of sequences that are not among `slices` is dropped.

        Raises: OutOfMemory.
        """


class StepStore(Protocol):
    """The memory behind the block ids."""

    def zero(self, block_ids: Sequence[int]) -> None: ...

    def copy_block(self, src: int, dst: int) -> None: ...


Sampler = Callable[[Any, Sequence[SampleRow], Sequence[Mask]], Sequence[Sampled | None]]
"""Draws one token per row of logits; None where they are not finite. Raises: OutOfMemory."""


@dataclass(slots=True)
class _Step:
    """One step on its way: `result` or `error` once it is drawn."""

    rows: list[SampleRow]
    logits: Any = None
    result: StepResult | None = None
    error: OutOfMemory | None = None


class LocalExecutor:
    """`worker.engine.step.Executor` over a model of this process.

    `launch` computes, and draws for the step before if that is due; `collect` draws. A model on a device that computes
    beside Python has `worker.model.device_executor.DeviceExecutor`.
    """

    def __init__(self, model: StepModel, kv: StepStore, sampler: Sampler) -> None:
        self.model, self.kv, self.sampler = model, kv, sampler
        self._last = _Step([])

    def launch(self, batch: StepBatch) -> _Step:
        before, self._last = self._last, _Step(batch.rows)
        with suppress(OutOfMemory):  # which belongs to the step before
            self.collect(before)
        for src, dst in batch.copies:
            self.kv.copy_block(src, dst)
        if batch.zeroed:
            self.kv.zero(batch.zeroed)
        try:
            self._feed(batch.slices, before)
            self._last.logits = self.model.forward(batch.slices, self.kv)
        except OutOfMemory as error:
            self._last.error = error
        return self._last

    def collect(self, handle: _Step, masks: Sequence[Mask] = ()) -> StepResult:
        if handle.error is None and handle.result is None:
            try:
                drawn = self.sampler(handle.logits, handle.rows, masks) if handle.rows else []
                handle.result = StepResult(list(drawn))
            except OutOfMemory as error:
                handle.error = error
            handle.logits = None
        if handle.error is not None:
            raise handle.error
        assert handle.result is not None
        return handle.result

    def _feed(self, slices: Sequence[SequenceSlice], before: _Step) -> None:
        """Fill in the tokens that are draws of the step `before`."""
        fed = [piece for piece in slices if piece.drawn is not None]
        if fed:
            sampled = self.collect(before).sampled
            for piece in fed:
                assert piece.drawn is not None
                draw = sampled[piece.drawn]
                piece.token_ids = [draw.token_id if draw is not None else 0]
