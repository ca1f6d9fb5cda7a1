"""One answer against its grammar: which tokens may come next, and when it is complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llguidance import LLMatcher

from kvasir.protocol.grammars import plain
from kvasir.protocol.sampling import ReasoningBudget


class AnswerMatcher:
    """Its state follows from the grammar and the tokens accepted, and from nothing else: a request goes on elsewhere
    from its prompt and what was delivered.

    Reasoning is free, but it does not end the answer; what comes after it has to match. It is no use before `begin`.
    `error`: why no further token can be accepted.
    """

    def __init__(self, reasoning: ReasoningBudget | None, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self._reasoning = reasoning
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._matcher: LLMatcher | None = None
        self._is_reasoning = reasoning is not None and reasoning.start is None
        self._is_first = True
        self.is_ready = False
        self.error = ""

    def begin(self, matcher: LLMatcher, output_ids: Iterable[int]) -> None:
        """Match by `matcher`, which is this answer's own from now on, what was delivered before."""
        self._matcher = matcher
        for token_id in output_ids:
            self.accept(token_id)
        self.is_ready = True

    def fail(self, error: str) -> None:
        """There is nothing to match by."""
        self.error = error
        self.is_ready = True

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return not self._is_reasoning and not self.error and self._matcher is not None and self._matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Take the next token. One that does not match is an `error`."""
        if self.error:
            return
        assert self._matcher is not None
        is_free, self._is_first = self._is_free(token_id), False
        if is_free and self._reasoning is not None:
            self._is_reasoning = token_id != self._reasoning.end
        elif not self._matcher.consume_token(token_id):
            text = plain(self._matcher.get_error())
            self.error = f"token {token_id} does not match the grammar, or that has become too complex: {text}"

    def _is_free(self, token_id: int) -> bool:
        """Return whether the next token is reasoning, or begins it."""
        reasoning = self._reasoning
        return self._is_reasoning or (reasoning is not None and self._is_first and token_id == reasoning.start)

    def masks(self, draft_ids: Sequence[int] = ()) -> list[bytes | None]:
        """Return the masks of the next token and of those after each of `draft_ids`; the state stays what it is.

        Some 20 microseconds each: a thread would cost more than it saves. None: an `error` if it is the first, else any
        token, since the drafts end before it.
        """
        masks = [self.mask()]
        if not draft_ids or masks[0] is None:
            return masks + [None] * len(draft_ids)
        before = self._is_reasoning, self._is_first
        num_consumed = 0
        for token_id in draft_ids:
            mask = masks[-1]
            if mask is None or self.is_complete or not mask[token_id >> 3] >> (token_id & 7) & 1:
                break
            is_free = self._is_free(token_id)
            self.accept(token_id)
            num_consumed += not (is_free or self.error)
            masks.append(None if self.error or self.is_complete else self.mask())
        assert self._matcher is not None
        self._matcher.rollback(num_consumed)
        self._is_reasoning, self._is_first = before
        self.error = ""
        return masks + [None] * (1 + len(draft_ids) - len(masks))

    def mask(self) -> bytes | None:
        """Return one bit for each token id, the lowest first, set where that token may come next; None: an `error`."""
        if self.error:
            return None
        assert self._matcher is not None
        if self._is_reasoning:
            bits = bytearray(b"\xff" * (-(-self._vocab_size // 32) * 4))
            for token_id in self._eos_token_ids:
                bits[token_id >> 3] &= ~(1 << (token_id & 7))
            return bytes(bits)
        mask = self._matcher.compute_bitmask()[: -(-self._vocab_size // 32) * 4]
        if self._matcher.is_error():
            self.error = f"the grammar has become too complex: {plain(self._matcher.get_error())}"
            return None
        if self._is_first and self._reasoning is not None and self._reasoning.start is not None:
            bits, start = bytearray(mask), self._reasoning.start
            bits[start >> 3] |= 1 << (start & 7)
            return bytes(bits)
        return mask
