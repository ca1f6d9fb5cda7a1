"""What the engine says to a model and a sampler in one step, without torch: the seam between deciding and computing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvasir.protocol.messages import Constraint, Sampling


@dataclass(slots=True)
class SequenceSlice:
    """One sequence's share of a step. Tokens 0..start-1 of the sequence are in the KV store already."""

    seq_key: int  # stable while the sequence runs
    token_ids: list[int]  # the tokens to compute now: one for decode, a chunk for prefill
    start: int  # position of token_ids[0]
    block_table: list[int]  # covers start + len(token_ids) tokens; may be longer
    num_logits: int  # logits for the last n of token_ids; 0 for a chunk that is not the last
    num_draws: int = 1  # how often those are returned: once for each sequence that draws from them

    @property
    def end(self) -> int:
        """Number of tokens in the KV store after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one draw needs. `position` is the absolute position that the drawn token will have; `stop_token_ids` would
    end the sequence. `counts`: how often each token id is in the output, 0 for those that are only in the prompt; empty
    where no penalty asks. `allowed`: one bit for each token id, the lowest first, set where it may be drawn; None: all.
    """

    params: Sampling
    position: int
    output_ids: Sequence[int]
    counts: Mapping[int, int] = field(default_factory=dict)
    stop_token_ids: Collection[int] = ()
    allowed: bytes | None = None


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
    """Raised by a model or sampler that lacks the memory for a step. What it wrote of that step is not used."""


class StepModel(Protocol):
    """`worker.model.model.Model`, or a stand-in such as `worker.model.oracle_model.OracleModel`."""

    def forward(self, slices: list[SequenceSlice], kv: Any) -> Any:
        """Compute the tokens of `slices`, store their keys and values in `kv`, return their logits.

        Those are [sum of num_logits * num_draws, …], in the order of `slices`; the sampler may change them in place.

        Raises: OutOfMemory.
        """

    def forget(self, seq_key: int) -> None:
        """Drop what is kept for a sequence that finished, was preempted or aborted."""


class StepStore(Protocol):
    """The memory behind the block ids, as far as the engine touches it."""

    def zero(self, block_ids: Sequence[int]) -> None: ...

    def copy_block(self, src: int, dst: int) -> None: ...


Sampler = Callable[[Any, Sequence[SampleRow]], Sequence[Sampled | None]]
"""Draws one token per row of logits; None where they are not finite. Raises: OutOfMemory."""


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


class Grammars(Protocol):
    """`worker.grammars.grammars.Grammars`: what takes long, compiling, happens in its thread."""

    def open(self, tenant: str, constraint: Constraint, output_ids: Sequence[int]) -> Any:
        """Return the `Matcher` of an answer that begins with `output_ids`; it may be ready only later."""

    def masks(self, matchers: Sequence[Any]) -> Sequence[bytes | None]:
        """Return what each matcher allows next, as `SampleRow.allowed`; None: an `error`."""
