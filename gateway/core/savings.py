"""Which beginnings of prompts have saved how much: published prefixes, and private ones by whose they are.

Private prompts count together when they begin alike, in their first block after the published zone: the turns of one
conversation, or all prompts of one tenant under a system prompt of its own. No text and no token ids are kept.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from kvasir.gateway.core.api import Submit
from kvasir.protocol.prefix import HASH_BYTES

MAX_PUBLISHED = 10_000  # forms of published prefixes, old ones too


@dataclass(slots=True)
class Saving:
    """Prompt tokens found in the cache, in how many attempts, since the gateway started."""

    num_hits: int = 0
    num_tokens: int = 0

    def add(self, num_tokens: int, num_hits: int = 1) -> None:
        self.num_hits += num_hits
        self.num_tokens += num_tokens


class Savings:
    """Counts what was found cached. When there are more than `max_private` private beginnings, the half that has saved
    least is forgotten."""

    def __init__(self, block_size: int, max_private: int = 10_000) -> None:
        self._block_size = block_size
        self._max_private = max_private
        self._published: dict[tuple[str, bytes], Saving] = {}
        self._private: dict[tuple[str, str, bytes], Saving] = {}

    @property
    def published(self) -> dict[tuple[str, bytes], Saving]:
        """By model and hash of the last block of the published zone."""
        return self._published

    def top_private(self, num: int) -> list[tuple[str, str, Saving]]:
        """Return (tenant id, model, saving) of the `num` private beginnings that have saved most, most first."""
        top = heapq.nlargest(num, self._private.items(), key=lambda item: item[1].num_tokens)
        return [(tenant_id, model, saving) for (tenant_id, model, _), saving in top]

    def add(self, submit: Submit, num_cached: int) -> None:
        """Count that `num_cached` of a request's tokens were found: those of its published zone, and those after it."""
        num_public = submit.num_public_tokens
        num_private = min(num_cached, submit.num_prompt_tokens) - num_public
        if num_public and num_cached and len(self._published) < MAX_PUBLISHED:
            key = submit.model, self._hash(submit, num_public // self._block_size - 1)
            self._published.setdefault(key, Saving()).add(min(num_cached, num_public))
        if num_private >= self._block_size:
            first = self._hash(submit, num_public // self._block_size)
            self._private.setdefault((submit.tenant_id, submit.model, first), Saving()).add(num_private)
            if len(self._private) > self._max_private:
                top = heapq.nlargest(self._max_private // 2, self._private.items(), key=lambda i: i[1].num_tokens)
                self._private = dict(top)

    def _hash(self, submit: Submit, block: int) -> bytes:
        return submit.prefix_hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]
