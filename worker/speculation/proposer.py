"""What proposes tokens, and what it is told: the seam between guessing and checking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """A request as a proposer sees it. `output_ids` grows while it runs. A request that `leaves_nothing` is not to be
    remembered."""

    tenant: str
    namespace: bytes
    prompt_ids: list[int]
    output_ids: list[int]
    leaves_nothing: bool = False

    def tokens(self, start: int, end: int) -> list[int]:
        """Return the token ids at positions start..end-1."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:end] + self.output_ids[: max(0, end - num_prompt)]


@dataclass(frozen=True, slots=True)
class Draft:
    """The tokens that may come next. `match`: how many tokens before them speak for them; more is surer."""

    token_ids: Sequence[int] = ()
    match: int = 0


class Reader(Protocol):
    """Follows one request."""

    def propose(self, limit: int) -> Draft:
        """Return at most `limit` tokens that may come next."""


class Proposer(Protocol):
    """Where drafts come from."""

    name: str

    def open(self, text: Text) -> Reader:
        """Begin to follow a request."""

    def close(self, text: Text) -> None:
        """A request has ended."""

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant's requests that have ended."""
