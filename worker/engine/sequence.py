"""One request while this worker has it: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.protocol.errors import BadRequest, PromptTooLong
from kvasir.protocol.messages import FinishReason, Generate
from kvasir.protocol.prefix import HASH_BYTES
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import TOKEN_BYTES, num_tokens, unpack_tokens
from kvasir.worker.engine.step import Matcher, SampleRow, asks_for_counts
from kvasir.worker.speculation.track import Track


@dataclass(slots=True, eq=False)
class Sequence:
    """`prompt_ids` and `output_ids` together are the sequence; the first `num_computed` of them are in the KV store, or
    will be when the steps launched are collected. Those steps draw `num_drawing` tokens more, unknown yet.

    `output_ids` begins with what earlier attempts delivered (`num_given` tokens in all were given with the request).
    `given` is whose it is, its zones and those tokens: where it is equal, keys and values are, too. `max_length`: at
    this many tokens it ends with "length". Times are those of the engine's clock.

    While it waits, `hold` references what is cached of it, so that it stays. Once it had to let go, it may hold nothing
    any more. It waits, too, until its `matcher` is ready, if its answer has a grammar.
    """

    key: int
    req_id: bytes
    attempt: int
    prompt_ids: list[int]
    output_ids: list[int]
    num_given: int
    given: tuple[str, bytes, bytes, int, bytes]
    max_length: int
    chain: Chain
    sampling: Sampling
    stop_token_ids: frozenset[int]
    arrived: float
    deadline: float | None = None
    lead: float = 0.0  # tokens, see `Generate.lead`
    table: BlockTable = field(default_factory=BlockTable)
    hold: BlockTable = field(default_factory=BlockTable)
    may_hold: bool = True
    num_computed: int = 0
    num_drawing: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # as `SampleRow.counts`; only where a penalty asks
    num_cached: int | None = None  # prompt tokens found at its first admission; None until then
    cached_reported: bool = False
    matcher: Matcher | None = None
    track: Track | None = None  # of its drafts, once it decodes

    @property
    def is_ready(self) -> bool:
        """Whether it can be computed."""
        return self.matcher is None or self.matcher.is_ready

    @property
    def num_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """How many there are, with those that are being drawn."""
        return len(self.prompt_ids) + len(self.output_ids) + self.num_drawing

    @property
    def num_remaining(self) -> int:
        """Tokens that are not computed: 1 while decoding."""
        return len(self.prompt_ids) + len(self.output_ids) + self.num_drawing - self.num_computed

    @property
    def is_ending(self) -> bool:
        """Whether the token that is being drawn is its last, whichever it is."""
        return self.num_drawing > 0 and self.num_tokens >= self.max_length

    @property
    def reads_output(self) -> bool:
        """Whether what may be drawn next depends on the tokens drawn before."""
        return self.matcher is not None or bool(self.counts) or self.sampling.constraint is not None

    @property
    def is_fresh(self) -> bool:
        """Whether no token has been drawn here yet."""
        return self.num_tokens == self.num_given

    @property
    def num_drafts(self) -> int:
        """How many drafts are to be computed after its last token."""
        return 0 if self.track is None else self.track.num_drafts

    @property
    def last_token(self) -> int:
        return self.output_ids[-1] if self.output_ids else self.prompt_ids[-1]

    def append(self, token_id: int) -> None:
        """Take the next token of the output."""
        self.output_ids.append(token_id)
        if self.counts:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1

    def row(self, position: int, draft_ids: Seq[int] = ()) -> SampleRow:
        """Return what the draw for `position` needs, as if `draft_ids` had been drawn."""
        output_ids, counts = self.output_ids, self.counts
        if draft_ids:
            output_ids = [*output_ids, *draft_ids]
            if counts:
                counts = {**counts}
                for token_id in draft_ids:
                    counts[token_id] = counts.get(token_id, 0) + 1
        return SampleRow(self.sampling, position, output_ids, counts, self.stop_token_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Return the token ids at positions start..end-1."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:] + self.output_ids[: end - num_prompt]

    def num_missing_blocks(self, num_tokens: int, block_size: int) -> int:
        """How many blocks more are needed to hold its first `num_tokens` tokens."""
        return max(0, -(-num_tokens // block_size) - len(self.table.block_ids))

    def num_own_blocks(self, start: int, end: int) -> int:
        """How many of its blocks start..end-1 are its owner's, not published ones."""
        return max(0, end - max(start, self.chain.num_public_blocks))

    def extend_chain(self, num_blocks: int) -> None:
        """Hash its full blocks up to `num_blocks`, as far as the gateway has not done that already."""
        chain, size = self.chain, self.chain.block_size
        if len(chain) < num_blocks:
            chain.extend(self.tokens(len(chain) * size, num_blocks * size))

    def finish_reason(self) -> FinishReason | None:
        """Say whether the token drawn last ends it."""
        if self.output_ids[-1] in self.stop_token_ids or (self.matcher is not None and self.matcher.is_complete):
            return "stop"
        return "length" if self.num_known >= self.max_length else None


def make_sequence(
    command: Generate,
    *,
    key: int,
    now: float,
    public_namespace: bytes,
    block_size: int,
    max_context: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
) -> Sequence:
    """Return the checked sequence that `command` asks for.

    Raises:
        BadRequest: the command contradicts itself or does not fit the model, saying how.
    """
    length = num_tokens(command.token_ids)
    if length == 0 or len(command.token_ids) % TOKEN_BYTES:
        raise BadRequest(f"token_ids of {len(command.token_ids)} bytes hold no whole number of tokens, at least one")
    if length >= max_context:
        raise PromptTooLong(f"{length} tokens leave no room for an answer in this worker's {max_context} tokens")
    if not 1 <= command.num_prompt_tokens <= length:
        raise BadRequest(f"num_prompt_tokens is {command.num_prompt_tokens}, of {length} tokens")
    num_blocks = length // block_size
    if len(command.prefix_hashes) != num_blocks * HASH_BYTES:
        raise BadRequest(f"prefix_hashes of {len(command.prefix_hashes)} bytes do not belong to {num_blocks} blocks")
    if command.num_public_tokens % block_size or command.num_public_tokens > length:
        raise BadRequest(
            f"num_public_tokens {command.num_public_tokens} is no whole number of blocks of {length} tokens"
        )
    token_ids = unpack_tokens(command.token_ids)
    if max(token_ids) >= vocab_size:
        raise BadRequest(f"token id {max(token_ids)} is outside the model's vocabulary of {vocab_size}")
    prompt_ids, output_ids = token_ids[: command.num_prompt_tokens], token_ids[command.num_prompt_tokens :]
    counts = {**dict.fromkeys(prompt_ids, 0), **Counter(output_ids)} if asks_for_counts(command.sampling) else {}
    stop = command.stop_token_ids if command.ignore_eos else [*command.stop_token_ids, *eos_token_ids]
    return Sequence(
        key=key,
        req_id=command.req_id,
        attempt=command.attempt,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        counts=counts,
        num_given=length,
        given=(command.tenant, command.root, command.namespace, command.num_public_tokens, command.token_ids),
        max_length=min(length + command.max_tokens, max_context),
        chain=Chain(
            owner=command.tenant,
            root=command.root,
            public_namespace=public_namespace,
            namespace=command.namespace,
            num_public_blocks=command.num_public_tokens // block_size,
            block_size=block_size,
            packed_tokens=command.token_ids,
            packed_hashes=command.prefix_hashes,
        ),
        sampling=command.sampling,
        stop_token_ids=frozenset(stop),
        arrived=now,
        deadline=None if command.deadline_s is None else now + command.deadline_s,
        lead=command.lead,
        table=BlockTable(hint=command.cache_hint, retention=tuple(command.retention), leaves_nothing=command.no_store),
    )
