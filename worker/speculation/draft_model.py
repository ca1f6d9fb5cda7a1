"""Drafts from a smaller model with the same tokenizer, which runs ahead of the one that answers.

Its keys and values have a pool of their own, with the same block ids: what block n of a sequence's table holds for one
model, block n holds for the other. So who may read a block, who shares it and when it goes is decided once, by the
prefix cache, for both pools. (vLLM lets the layers of a draft model share the block tables, too.) What the draft model
has computed is told by prefix hashes: a block whose content has changed since has another one. It is cleared before
anything is written to it anew.

A draft is drawn as the token will be, with the same noise, penalties and grammar, so that wherever the two models are
of the same mind the draft holds, at any temperature. What did not hold is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol

from msgspec import structs

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.worker.engine.step import (
    Executor,
    Mask,
    Matcher,
    OutOfMemory,
    Sampled,
    SampleRow,
    SequenceSlice,
    StepBatch,
)

_MAX_DECODED = 8  # tokens that are computed as when decoding; more are a chunk


class Running(Protocol):
    """What there is to know of a `worker.engine.sequence.Sequence`; its blocks hold all but the last of its tokens."""

    key: int
    chain: Chain
    table: BlockTable
    matcher: Matcher | None
    stop_token_ids: frozenset[int]

    @property
    def num_known(self) -> int: ...

    def tokens(self, start: int, end: int) -> list[int]: ...

    def row(self, position: int, draft_ids: Sequence[int] = ()) -> SampleRow: ...


@dataclass(slots=True, eq=False)
class Lead:
    """How far the draft model has come with one sequence. The blocks of `table` hold its first `num_held` tokens, and
    after them `ahead_ids`, which may or may not come. `work` was done for it, in tokens of the engine's model."""

    sequence: Running
    table: BlockTable | None = None
    num_held: int = 0
    num_marked: int = 0  # blocks known to be computed
    ahead_ids: list[int] = field(default_factory=list)
    work: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """`num_tokens` of a sequence to compute: all that are known if drafts are to come. Those are `num_drafts` at most,
    whose blocks are in its table. `draft_ids` are set by `DraftModel.run`."""

    lead: Lead
    num_tokens: int
    num_drafts: int
    draft_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Round:
    """One forward pass: the sequences that drafted, the tokens computed, and how long it took."""

    num_drafting: int
    num_tokens: int
    seconds: float


class DraftModel:
    """Runs over `executor`, whose store has at least the blocks of the engine's pool.

    `vocab_size` is the smaller of both models', `window` the draft model's longest sequence, `token_work` what one of
    its tokens takes, in tokens of the engine's model.
    """

    name = "model"

    def __init__(
        self,
        executor: Executor,
        num_blocks: int,
        block_size: int,
        *,
        vocab_size: int,
        window: int,
        token_work: float,
        clock: Callable[[], float],
    ) -> None:
        self._executor, self._clock = executor, clock
        self._size, self._vocab_size, self.window = block_size, vocab_size, window
        self._token_work = token_work
        self._computed = [b""] * num_blocks  # the prefix hash of what each block holds whole

    def backlog(self, lead: Lead) -> int:
        """Return how many known tokens have to be computed before the first draft: 1 or 2 where there were drafts in
        the step before."""
        self._catch_up(lead)
        return lead.sequence.num_known - lead.num_held

    def run(self, jobs: Sequence[Job]) -> list[Round]:
        """Compute what `jobs` say, in rounds: every one that goes on drafts one token more in each.

        A job that shares blocks to compute with one before it is not done: in the next step, it will find them.
        """
        rounds: list[Round] = []
        going: list[Job] = []
        written: set[int] = set()
        for job in jobs:
            block_ids = self._written(job)
            if written.isdisjoint(block_ids) and self._is_readable(job):
                written |= block_ids
                going.append(job)
        try:
            while going:
                began = self._clock()
                is_first = not rounds
                pieces = [self._piece(job) for job in going]
                sampled = self._compute(going, pieces, is_first)
                for job, piece in zip(going, pieces, strict=True):
                    job.lead.work += self._token_work * len(piece.token_ids)
                    self._hold(job, piece)
                going = [job for job, draw in zip(going, sampled, strict=True) if self._accept(job, draw)]
                num_drafting = sum(draw is not None for draw in sampled)
                num_tokens = sum(len(piece.token_ids) for piece in pieces)
                rounds.append(Round(num_drafting, num_tokens, self._clock() - began))
        except OutOfMemory:
            pass  # what was computed before stands
        return rounds

    def rest(self) -> None:
        """Let the executor drop what it keeps of sequences."""
        self._executor.collect(self._executor.launch(StepBatch([], [], [], [])))

    def _catch_up(self, lead: Lead) -> None:
        """Find out what is held now: of what was drafted, and of what others have computed."""
        sequence, size = lead.sequence, self._size
        if lead.table is not sequence.table:
            lead.table, lead.num_held, lead.num_marked, lead.ahead_ids = sequence.table, 0, 0, []
        if lead.ahead_ids:
            actual_ids = sequence.tokens(lead.num_held, lead.num_held + len(lead.ahead_ids))
            pairs = zip(lead.ahead_ids, actual_ids, strict=False)
            lead.num_held += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            lead.ahead_ids = []
        self._mark(lead)
        hashes, block_ids = sequence.chain.hashes, sequence.table.block_ids
        end = min(len(hashes), len(block_ids), (sequence.num_known - 1) // size)
        if lead.num_marked * size <= lead.num_held < (lead.num_marked + 1) * size:
            while lead.num_marked < end and self._computed[block_ids[lead.num_marked]] == hashes[lead.num_marked]:
                lead.num_marked += 1
            lead.num_held = max(lead.num_held, lead.num_marked * size)

    def _mark(self, lead: Lead) -> None:
        """Note the blocks that hold known tokens alone."""
        hashes, block_ids = lead.sequence.chain.hashes, lead.sequence.table.block_ids
        for i in range(lead.num_marked, min(len(hashes), lead.num_held // self._size)):
            self._computed[block_ids[i]] = hashes[i]
            lead.num_marked = i + 1

    def _written(self, job: Job) -> set[int]:
        """Return the blocks that the known tokens of `job` go to."""
        start, table = job.lead.num_held, job.lead.sequence.table
        return {*table.block_ids[start // self._size : -(-(start + job.num_tokens) // self._size)]}

    def _is_readable(self, job: Job) -> bool:
        """Return whether the draft model knows the tokens to compute."""
        lead = job.lead
        return max(lead.sequence.tokens(lead.num_held, lead.sequence.num_known)) < self._vocab_size

    def _piece(self, job: Job) -> SequenceSlice:
        """Return what `job` computes next: known tokens, then its newest draft."""
        lead, sequence = job.lead, job.lead.sequence
        if job.draft_ids:
            start, token_ids = lead.num_held + len(lead.ahead_ids), job.draft_ids[-1:]
        else:
            start = lead.num_held
            token_ids = sequence.tokens(start, start + job.num_tokens)
        num_logits = 0
        if job.num_drafts:  # few tokens with all their logits count as decoding
            num_logits = len(token_ids) if len(token_ids) <= _MAX_DECODED else 1
        return SequenceSlice(sequence.key, token_ids, start, sequence.table.block_ids, num_logits)

    def _compute(self, jobs: list[Job], pieces: list[SequenceSlice], is_first: bool) -> list[Sampled | None]:
        """Compute `pieces` and return the draw after the last token of each, None where there is none."""
        rows: list[SampleRow] = []
        masks: list[Mask] = []
        for job, piece in zip(jobs, pieces, strict=True):
            if piece.num_logits:
                sequence = job.lead.sequence
                rows += [_plain(sequence.row(piece.end, job.draft_ids))] * piece.num_logits
                mask = None if sequence.matcher is None else sequence.matcher.masks(job.draft_ids)[-1]
                masks += [None] * (piece.num_logits - 1) + [mask]
        has_masks = any(mask is not None for mask in masks)
        zeroed = [block_id for piece in pieces for block_id in self._begun(piece)]
        batch = StepBatch([], zeroed, pieces, rows, has_masks)
        draws = iter(self._executor.collect(self._executor.launch(batch), masks if has_masks else ()).sampled)
        return [([None] + [next(draws) for _ in range(piece.num_logits)])[-1] for piece in pieces]

    def _begun(self, piece: SequenceSlice) -> list[int]:
        """Return the blocks whose first token is in `piece`. What they held is of no use any more."""
        block_ids = piece.block_table[-(-piece.start // self._size) : -(-piece.end // self._size)]
        for block_id in block_ids:
            self._computed[block_id] = b""
        return block_ids

    def _hold(self, job: Job, piece: SequenceSlice) -> None:
        if job.draft_ids:
            job.lead.ahead_ids += piece.token_ids
        else:
            job.lead.num_held = piece.end
            self._mark(job.lead)

    def _accept(self, job: Job, draw: Sampled | None) -> bool:
        """Take a draft; return whether more may follow."""
        if draw is None or draw.token_id >= self._vocab_size:
            return False
        job.draft_ids.append(draw.token_id)
        return len(job.draft_ids) < job.num_drafts and draw.token_id not in job.lead.sequence.stop_token_ids


def _plain(row: SampleRow) -> SampleRow:
    """Return `row` without the log probabilities that nobody will see."""
    return row if row.params.logprobs is None else replace(row, params=structs.replace(row.params, logprobs=None))
