"""A step between its launch and its collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvasir.cache.block_table import BlockTable
from kvasir.worker.engine.sequence import Sequence
from kvasir.worker.engine.step import SequenceSlice


@dataclass(slots=True)
class Share:
    """What a step computes of one sequence, and the forks that draw from the same logits.

    `table` is the sequence's table at launch. A sequence that has ended or was preempted has another one: what the
    step computed of it is nobody's then.
    """

    sequence: Sequence
    piece: SequenceSlice
    forks: list[Sequence]
    table: BlockTable

    @property
    def is_current(self) -> bool:
        return self.sequence.table is self.table


@dataclass(slots=True)
class Flight:
    """A step that was launched. `handle` is the executor's.

    `drawing` sequences are in the order of their draws, each with the position of its token; forks come before the
    sequence from whose logits they draw. The blocks of `leaving` tables are free when it is collected: until then it
    may write to them.
    """

    shares: list[Share]
    began: float  # engine's clock
    num_decodes: int
    num_prefill: int  # tokens
    handle: Any = None
    leaving: list[BlockTable] = field(default_factory=list)
    drawing: list[tuple[Sequence, int]] = field(init=False)

    def __post_init__(self) -> None:
        drawn_from = [share for share in self.shares if share.piece.num_logits]
        self.drawing = [(s, share.piece.end) for share in drawn_from for s in (*share.forks, share.sequence)]

    def names(self, sequence: Sequence) -> bool:
        """Return whether it computes anything in the blocks that `sequence` has now."""
        return any(share.table is sequence.table for share in self.shares)

    @property
    def must_be_known(self) -> bool:
        """Whether the next step cannot be planned before its draws are known.

        Forks take blocks over once their tokens are drawn. Grammars, penalties and constraints depend on the newest
        token, and nothing but plain draws is fed from step to step.
        """
        return any(share.forks for share in self.shares) or any(s.reads_output for s, _ in self.drawing)
