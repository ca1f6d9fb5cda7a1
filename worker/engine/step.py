"""What the engine says to an executor in one step, without torch: the seam between deciding and computing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvasir.protocol.sampling import Constraint, Sampling


@dataclass(slots=True)
class SequenceSlice:
    """One sequence's share of a step. Tokens 0..start-1 of the sequence are in the KV store already."""

    seq_key: int  # stable while the sequence runs
    token_ids: list[int]  # the tokens to compute now: a chunk of the prompt, or the last token and drafts after it
    start: int  # position of token_ids[0]
    block_table: list[int]  # covers start + len(token_ids) tokens; may be longer
    num_logits: int  # logits for the last n of token_ids: all when decoding; 0 for a chunk that is not the last
    num_draws: int = 1  # how often those are returned: once for each sequence that draws from them
    drawn: int | None = None  # the one token to compute is this draw of the step before; `token_ids` does not have it

    @property
    def end(self) -> int:
        """Number of tokens in the KV store after the step."""
        return self.start + len(self.token_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether it goes on from what is in the store by one token, or by one and drafts."""
        return len(self.token_ids) <= max(1, self.num_logits)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one draw needs. `position` is the absolute position that the drawn token will have; `stop_token_ids` would
    end the sequence. `counts`: how often each token id is in the output, 0 for those that are only in the prompt; empty
    where no penalty asks.
    """

    params: Sampling
    position: int
    output_ids: Sequence[int]
    counts: Mapping[int, int] = field(default_factory=dict)
    stop_token_ids: Collection[int] = ()


Mask = bytes | None
"""Which tokens a row may draw: one bit for each token id, the lowest first; None: all."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token; `logprob` and `top_logprobs` (most likely first) only where asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def asks_for_counts(params: Sampling) -> bool:
    """Return whether a penalty of `params` depends on which tokens there have been."""
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


class OutOfMemory(Exception):
    """Raised by an executor that lacks the memory for a step. What it wrote of that step is not used."""


@dataclass(slots=True)
class StepBatch:
    """One step for an executor, plain data: copy blocks, zero others, then compute `slices`, then draw for `rows`.

    `rows` are in the order of the slices' logits. Without slices nothing is computed, and the executor lets go what it
    keeps of sequences. `has_masks`: what the rows may draw comes only with `collect`.
    """

    copies: list[tuple[int, int]]  # (source, target), one after the other
    zeroed: list[int]
    slices: list[SequenceSlice]
    rows: list[SampleRow]
    has_masks: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has come to. `sampled`: a draw for each row, None where the logits are not finite. `seconds` that a
    device took, where it has a clock of its own."""

    sampled: list[Sampled | None]
    seconds: float | None = None


class Executor(Protocol):
    """Carries out one step after another, see `worker.engine.executor`. All that the engine knows of a model."""

    def launch(self, batch: StepBatch) -> Any:
        """Begin a step and return a handle for `collect`. It may still be computed when this returns.

        One more may be launched before it is collected, and have its draws as tokens. A draw that has come to nothing
        counts as token 0.
        """

    def collect(self, handle: Any, masks: Sequence[Mask] = ()) -> StepResult:
        """Return the result, in the order of launches. `masks`, if the batch has any: what each row may draw.

        Raises: OutOfMemory, with the copies made and the blocks zeroed. A step that has draws of that one as tokens
            raises it, too.
        """


class Matcher(Protocol):
    """Holds one answer to its grammar, see `worker.grammars.answer_matcher`."""

    error: str

    @property
    def is_ready(self) -> bool:
        """Whether its grammar is compiled, or will never be (`error`)."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow the tokens accepted."""

    def accept(self, token_id: int) -> None:
        """Take the next token. One that does not match is an `error`."""

    def masks(self, draft_ids: Sequence[int] = ()) -> list[Mask]:
        """Return which token may come next, and which after each of `draft_ids`, None: any, since the drafts end before
        it; None for the first: an `error`."""


class Grammars(Protocol):
    """`worker.grammars.grammars.Grammars`: what takes long, compiling, happens in its thread."""

    def open(self, tenant: str, constraint: Constraint, output_ids: Sequence[int]) -> Any:
        """Return the `Matcher` of an answer that begins with `output_ids`; it may be ready only later."""
