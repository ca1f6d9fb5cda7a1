"""A step between its launch and its collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvasir.cache.block_table import BlockTable
from kvasir.worker.engine.sequence import Sequence
from kvasir.worker.engine.step import Mask, SequenceSlice


@dataclass(slots=True)
class Share:
    """What a step computes of one sequence, and the forks that draw from the same logits.

    `table` is the sequence's table at launch. A sequence that has ended or was preempted has another one: what the
    step computed of it is nobody's then. When it decodes, there are blocks for `num_free` drafts.
    """

    sequence: Sequence
    piece: SequenceSlice
    forks: list[Sequence]
    table: BlockTable
    is_decode: bool
    num_free: int
    draft_ids: list[int] = field(default_factory=list)  # the last of the piece's tokens

    def add_drafts(self, draft_ids: list[int]) -> None:
        """Let `draft_ids` be computed after the last token, with their logits."""
        self.draft_ids = draft_ids
        self.piece.num_logits += len(draft_ids)
        self.piece.token_ids += draft_ids

    @property
    def is_current(self) -> bool:
        return self.sequence.table is self.table


@dataclass(slots=True)
class Flight:
    """A step that was launched. `handle` is the executor's.

    `drawing` has the sequence of each draw, the position of its token, and the drafts before it: first the forks, then
    the sequence from whose logits they draw, once and after each of its drafts. The blocks of `leaving` tables are free
    when it is collected: until then it may write to them.
    """

    shares: list[Share]
    began: float  # engine's clock
    num_decodes: int
    num_prefill: int  # tokens
    draft_s: float = 0.0  # that a draft model took before it
    handle: Any = None
    leaving: list[BlockTable] = field(default_factory=list)
    drawing: list[tuple[Sequence, int, list[int]]] = field(default_factory=list)
    num_drafts: int = 0

    def __post_init__(self) -> None:
        for share in self.shares:
            if share.piece.num_logits:
                drafts, position = share.draft_ids, share.piece.end - len(share.draft_ids)
                self.drawing += [(fork, position, []) for fork in share.forks]
                self.drawing += [(share.sequence, position + i, drafts[:i]) for i in range(len(drafts) + 1)]
                self.num_drafts += len(drafts)

    def names(self, sequence: Sequence) -> bool:
        """Return whether it computes anything in the blocks that `sequence` has now."""
        return any(share.table is sequence.table for share in self.shares)

    @property
    def must_be_known(self) -> bool:
        """Whether the next step cannot be planned before its draws are known.

        Forks take blocks over once their tokens are drawn. Grammars, penalties, constraints and drafts depend on the
        newest token, and nothing but plain draws is fed from step to step.
        """
        return (
            self.num_drafts > 0
            or any(share.forks for share in self.shares)
            or any(s.reads_output for s, *_ in self.drawing)
        )

    def masks(self) -> list[Mask]:
        """Return what each draw may be, where grammars say that; empty where none does.

        None for a sequence whose grammar has become too complex: it ends, whatever is drawn.
        """
        if all(s.matcher is None for s, *_ in self.drawing):
            return []
        masks: list[Mask] = []
        for share in self.shares:
            if share.piece.num_logits:
                for s, draft_ids in (*((fork, []) for fork in share.forks), (share.sequence, share.draft_ids)):
                    masks += [None] * (1 + len(draft_ids)) if s.matcher is None else s.matcher.masks(draft_ids)
        return masks
