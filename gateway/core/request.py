"""One request as the core sees it: what was asked, what was delivered, where it is."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvasir.gateway.core.admission import Share
from kvasir.gateway.core.api import Finished, Submit
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.messages import Generate
from kvasir.protocol.prefix import HASH_BYTES, extend_chain
from kvasir.protocol.terms import RANKS
from kvasir.protocol.tokens import TOKEN_BYTES, unpack_tokens

State = Literal["queued", "dispatched", "closed"]
NORMAL = RANKS["normal"]


class Request(msgspec.Struct, eq=False):
    """State of one request. `attempt` counts dispatches; `token_ids` and `prefix_hashes` grow by what was delivered
    whenever an attempt is lost, so that the next worker goes on from there.

    queued -> dispatched (-> queued ...) -> closed. A request is closed when its `Finished` has been put; a closed one
    may still hold a worker's credit until that worker has answered the `Abort`.
    """

    submit: Submit
    token_ids: bytes
    prefix_hashes: bytes
    queued_at: float
    share: Share  # of what its API request has reserved
    state: State = "queued"
    attempt: int = 0
    num_deaths: int = 0  # of workers that were computing it
    is_suspect: bool = False  # it has seen so many deaths that it must be alone on its worker, see `endings`
    worker_id: str = ""  # where it is, or was last
    is_held: bool = False  # that worker still has to answer for it
    is_begun: bool = False  # some worker has begun to compute its prompt, as far as reports show
    delivered: bytearray = msgspec.field(default_factory=bytearray)  # packed, over all attempts
    first_token_at: float | None = None
    num_cached_tokens: int | None = None  # of the first attempt that said so
    cached_is_guess: bool = False  # until the engine tells
    held_for: str = ""  # the worker that it waits for while it is queued, see `TenantQueue.hold`
    held_since: float = 0.0  # when it first found a worker without room, 0 if it did not
    held_at: float = 0.0  # when it chose that one
    held_key: float = 0.0  # its place in the backlog there
    rank: int = NORMAL  # its class, 0 first
    num_told: int | None = None  # how many of the delivered tokens the client gets, if not all

    @property
    def num_delivered(self) -> int:
        return len(self.delivered) // TOKEN_BYTES

    @property
    def num_tokens(self) -> int:
        """Tokens that the next attempt starts from: the prompt and what lost attempts delivered."""
        return len(self.token_ids) // TOKEN_BYTES

    @property
    def num_needed(self) -> int:
        """Tokens of context that it may come to: the prompt and the longest answer."""
        return self.submit.num_prompt_tokens + self.submit.max_tokens

    def guess_cached(self, num_cached_tokens: int) -> None:
        """Note how much of the prompt is probably cached, until `found_cached` says it."""
        if self.num_cached_tokens is None:
            self.found_cached(num_cached_tokens)
            self.cached_is_guess = True

    def found_cached(self, num_cached_tokens: int) -> None:
        """Note how many tokens an attempt has found cached. Of several attempts the first one counts."""
        if self.num_cached_tokens is None or self.cached_is_guess:
            self.num_cached_tokens = min(num_cached_tokens, self.submit.num_prompt_tokens)
            self.cached_is_guess = False

    def generate(self, now: float, lead: float = 0.0) -> Generate:
        """Return the command that starts the current attempt. `lead`: see there."""
        submit = self.submit
        return Generate(
            submit.req_id,
            self.attempt,
            submit.tenant_id,
            self.token_ids,
            submit.num_prompt_tokens,
            submit.root,
            self.prefix_hashes,
            submit.num_public_tokens,
            submit.namespace,
            submit.max_tokens - self.num_delivered,
            submit.sampling,
            list(submit.stop_token_ids),
            submit.ignore_eos,
            None if submit.deadline is None else max(0.0, submit.deadline - now),
            submit.cache_hint,
            list(submit.retention),
            lead,
            submit.no_store,
        )

    def go_on_elsewhere(self, block_size: int) -> None:
        """Make prompt + delivered tokens what the next attempt starts from. The new blocks are the tenant's own."""
        submit = self.submit
        self.token_ids = submit.token_ids + bytes(self.delivered)
        num_hashed = len(self.prefix_hashes) // HASH_BYTES * block_size * TOKEN_BYTES
        parent = self.prefix_hashes[-HASH_BYTES:] or submit.root
        self.prefix_hashes += extend_chain(parent, submit.namespace, self.token_ids[num_hashed:], block_size)

    def end_of_delivered(self) -> Literal["stop", "length"] | None:
        """Return why the delivered tokens are already a whole answer, or None if more were asked for.

        A worker may die between the last token and saying so. An end-of-sequence token needs no such care: it comes
        in the same `Output` as its `finish_reason`.
        """
        if not self.delivered:
            return None
        if unpack_tokens(bytes(self.delivered[-TOKEN_BYTES:]))[0] in self.submit.stop_token_ids:
            return "stop"
        return "length" if self.num_delivered >= self.submit.max_tokens else None

    def finished(self, reason: str, error: ErrorInfo | None = None) -> Finished:
        """Return the terminal event."""
        submit = self.submit
        return Finished(
            submit.req_id,
            reason,
            submit.num_prompt_tokens if self.is_begun else 0,
            self.num_delivered if self.num_told is None else self.num_told,
            self.num_cached_tokens or 0,
            self.worker_id,
            self.attempt,
            0.0 if self.first_token_at is None else self.first_token_at - submit.arrived,
            error,
        )
