"""One answer against its grammar: which tokens may come next, and when it is complete."""

from __future__ import annotations

from collections.abc import Iterable

from llguidance import LLMatcher

from kvasir.protocol.grammars import plain
from kvasir.protocol.messages import ReasoningBudget


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
        is_first, self._is_first = self._is_first, False
        if self._reasoning is not None:
            if self._is_reasoning:
                self._is_reasoning = token_id != self._reasoning.end
                return
            if is_first and token_id == self._reasoning.start:
                self._is_reasoning = True
                return
        if not self._matcher.consume_token(token_id):
            text = plain(self._matcher.get_error())
            self.error = f"token {token_id} does not match the grammar, or that has become too complex: {text}"

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
