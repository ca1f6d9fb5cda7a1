"""Carries out steps on a device that computes beside Python: what can be queued is queued, and only `collect` waits.

The draws of a step stay on the device, and are the next step's tokens there. So the device goes from one step to the
next by itself, while the engine collects the one and plans the one after. A step with masks waits for them to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import Mask, OutOfMemory, SampleRow, SequenceSlice, StepBatch, StepResult
from kvasir.worker.model.draws import Race, race
from kvasir.worker.model.memory import memory_errors
from kvasir.worker.model.sampling import Draws, start_draws

Forward = Callable[[list[SequenceSlice], KvStore, Tensor | None], Tensor]


@dataclass(slots=True)
class _Step:
    """One step on its way: `draws` unless it has masks; `error` if it was not computed."""

    rows: list[SampleRow]
    began: torch.cuda.Event | None
    logits: Tensor | None = None
    draws: Draws | None = None
    error: OutOfMemory | None = None


class DeviceExecutor:
    """`worker.engine.step.Executor` over `forward`, `worker.model.model.Model`'s or what stands in for it.

    `race` is that of its draws (`worker.model.draws`).
    """

    def __init__(self, forward: Forward, kv: KvStore, race: Race = race) -> None:
        self._forward, self._kv, self._race = forward, kv, race
        self._last = _Step([], None)

    def launch(self, batch: StepBatch) -> _Step:
        before, self._last = self._last, _Step(batch.rows, self._event())
        step = self._last
        is_fed = any(piece.drawn is not None for piece in batch.slices)
        try:
            with memory_errors():
                for src, dst in batch.copies:
                    self._kv.copy_block(src, dst)
                if batch.zeroed:
                    self._kv.zero(batch.zeroed)
            if is_fed and before.error is not None:
                raise before.error
            drawn = before.draws.ids if is_fed and before.draws is not None else None
            step.logits = self._forward(batch.slices, self._kv, drawn)
            if not batch.has_masks:
                step.draws, step.logits = start_draws(step.logits, batch.rows, (), self._race), None
        except OutOfMemory as error:
            step.error = error
        return step

    def collect(self, handle: _Step, masks: Sequence[Mask] = ()) -> StepResult:
        if handle.error is None and handle.draws is None:
            assert handle.logits is not None
            try:
                handle.draws, handle.logits = start_draws(handle.logits, handle.rows, masks, self._race), None
            except OutOfMemory as error:
                handle.error = error
        if handle.error is not None:
            raise handle.error
        assert handle.draws is not None
        sampled = handle.draws.read()
        ended = handle.draws.readback.event
        if handle.began is None or ended is None:
            return StepResult(sampled)
        return StepResult(sampled, handle.began.elapsed_time(ended) / 1e3)

    def _event(self) -> torch.cuda.Event | None:
        """Return the time at which the device comes to what is queued next."""
        if self._kv.data.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
