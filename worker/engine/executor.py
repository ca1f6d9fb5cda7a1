"""Carries out steps in this process: a model, the memory behind the block ids and a sampler behind one door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvasir.worker.engine.step import Mask, Sampled, SampleRow, SequenceSlice, StepBatch, StepResult


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
class LocalExecutor:
    """`worker.engine.step.Executor` over a model of this process."""

    model: StepModel
    kv: StepStore
    sampler: Sampler

    def launch(self, batch: StepBatch) -> tuple[Any, list[SampleRow]]:
        for src, dst in batch.copies:
            self.kv.copy_block(src, dst)
        if batch.zeroed:
            self.kv.zero(batch.zeroed)
        return self.model.forward(batch.slices, self.kv), batch.rows

    def collect(self, handle: tuple[Any, list[SampleRow]], masks: Sequence[Mask] = ()) -> StepResult:
        logits, rows = handle
        return StepResult(list(self.sampler(logits, rows, masks)) if rows else [])
