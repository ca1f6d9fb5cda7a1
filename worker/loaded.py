"""What a start yields, whatever computes: the engine is put together from it."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Executor, Grammars
from kvasir.worker.speculation.draft_model import DraftModel


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory and what goes with it. `is_ahead`: the device computes beside Python, which plans the next
    step meanwhile."""

    executor: Executor
    num_blocks: int
    bytes_per_block: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    limits: EngineLimits
    fingerprint: str
    dtype: str
    device: str
    attention: str = ""
    grammars: Grammars | None = None
    is_ahead: bool = False
    draft_model: DraftModel | None = None
