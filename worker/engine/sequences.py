"""What happens to one sequence: it waits, holds, runs, forks, is preempted, gets its tokens, ends.

`worker.engine.engine` decides when and has the steps; here is what each event does to the sequence, to its blocks in
the cache and to its outputs. Every sequence taken gets exactly one `Output` with a finish reason, unless `drop_all`
forgets it. Blocks are free when no step under way names them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from kvasir.cache.block_pool import IntegrityError
from kvasir.cache.block_table import BlockTable
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import FinishReason, Output, TokenLogprobs
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.engine.flight import Flight, Share
from kvasir.worker.engine.pins import is_prewarming
from kvasir.worker.engine.scheduler import Plan, no_room
from kvasir.worker.engine.sequence import Sequence
from kvasir.worker.engine.step import Sampled, SequenceSlice

_COMPILE_WAIT_S = 10.0  # for a grammar that the gateway has compiled in less than one


class Sequences:
    """The unfinished sequences of an engine, each either in `running` or in `waiting`.

    `outputs` is what has come of them since the last report. `copies` of blocks and then `to_zero` are due before the
    next step computes. `flights`, the steps under way, are the engine's: here they only say which blocks are named.
    """

    def __init__(self, cache: PrefixCache, flights: deque[Flight]) -> None:
        self._cache, self._flights = cache, flights
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.by_id: dict[tuple[bytes, int], Sequence] = {}
        self.outputs: list[Output] = []
        self.copies: list[tuple[int, int]] = []  # (source, target)
        self.to_zero: list[int] = []
        self.num_preempted = self.num_forked = self.num_not_finite = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([*self.running, *self.waiting])

    # ---- on its way to a step

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence; it waits."""
        self.by_id[sequence.req_id, sequence.attempt] = sequence
        self.waiting.append(sequence)

    def end_hopeless(self, now: float) -> None:
        """End those whose deadline has passed, and those that wait for a grammar which does not come."""
        for s in [s for s in self.by_id.values() if s.deadline is not None and now >= s.deadline]:
            self.end(s, "deadline", "the request's deadline passed before it was finished")
        for s in [s for s in self.waiting if s.matcher is not None]:
            assert s.matcher is not None
            if s.matcher.error:
                self.end(s, "error", s.matcher.error)
            elif not s.is_ready and now - s.arrived > _COMPILE_WAIT_S:
                self.end(s, "error", f"the grammar was not compiled within {_COMPILE_WAIT_S:.0f} s")

    def carry_out(self, plan: Plan) -> list[Share]:
        """Carry out `plan` as far as blocks go; return what is to be computed, and give it its blocks."""
        for sequence, text in plan.failed:
            self.end(sequence, "error", text)
        for sequence in plan.let_go:
            self._let_go(sequence)
            sequence.may_hold = False
        for sequence in plan.preempted:
            self.preempt(sequence)
        for sequence in plan.admitted:
            self._admit(sequence)
        for sequence in plan.held:
            self._hold(sequence)
        draw_of = {s: i for i, (s, *_) in enumerate(self._flights[-1].drawing)} if self._flights else {}
        shares: list[Share] = []
        for i, (sequence, count) in enumerate(plan.work):
            start = sequence.num_computed
            is_decode, num_free = i < plan.num_decodes, 0
            if is_decode and count > 1:
                if self._allocate(sequence, start + count):
                    num_free = count - 1
                count = 1
            if sequence is plan.last_resort and not self._allocate(sequence, sequence.num_tokens):
                self.end(sequence, "error", no_room(-(-sequence.num_tokens // self._cache.block_size)))
                continue
            if not self._allocate(sequence, start + count):
                self.preempt(sequence)  # only after a hash collision is less there than the plan could see
                continue
            num_logits = int(count == sequence.num_remaining)
            piece = SequenceSlice(sequence.key, [], start, sequence.table.block_ids, num_logits)
            if sequence.num_drawing:
                piece.token_ids, piece.drawn = [0], draw_of[sequence]
            else:
                piece.token_ids = (
                    [sequence.last_token] if count == num_logits else sequence.tokens(start, start + count)
                )
            forks = plan.forks.get(sequence.key, []) if num_logits else []
            piece.num_draws += len(forks)
            shares.append(Share(sequence, piece, forks, sequence.table, is_decode, num_free))
        return shares

    def _hold(self, sequence: Sequence) -> None:
        """Reference all that is cached of the waiting `sequence`."""
        hold, num_held = BlockTable(), len(sequence.hold.block_ids)
        max_blocks = (sequence.num_tokens - 1) // self._cache.block_size
        num_matched = self._cache.match(sequence.chain, hold, max_blocks, again=True)
        self._let_go(sequence)
        sequence.hold = hold
        sequence.may_hold = num_matched > num_held  # else a hash collision has hidden what was to be had

    def _let_go(self, sequence: Sequence) -> None:
        """Give up what the waiting `sequence` holds."""
        if sequence.hold.block_ids:
            self._cache.free(sequence.hold)

    def _admit(self, sequence: Sequence, max_blocks: int | None = None) -> None:
        """Let `sequence` run, with what is cached of its first `max_blocks` blocks.

        By default those are all but that of its last token, which is computed in any case: the next one is drawn from
        its logits.
        """
        if max_blocks is None:
            max_blocks = (sequence.num_tokens - 1) // self._cache.block_size
        self.waiting.remove(sequence)
        self.running.append(sequence)
        num_matched = self._cache.match(
            sequence.chain, sequence.table, max_blocks, again=sequence.num_cached is not None
        )
        self._let_go(sequence)
        sequence.num_computed = num_matched * self._cache.block_size
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))

    def _allocate(self, sequence: Sequence, length: int, *, is_copied: bool = False) -> bool:
        """Give `sequence` the blocks for its first `length` tokens. False: there are not as many.

        What another tenant had is zeroed before it is used, unless it `is_copied` over as a whole.
        """
        num_missing = sequence.num_missing_blocks(length, self._cache.block_size)
        if not num_missing:
            return True
        foreign = self._cache.allocate(sequence.chain, sequence.table, num_missing)
        if foreign is None:
            return False
        if not is_copied:
            self.to_zero += foreign
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Let the running `sequence` wait again, without its blocks."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.append(sequence)
        self.num_preempted += 1

    # ---- what a step has come to

    def take(self, share: Share, drawn: Seq[Sampled | None]) -> int:
        """Publish the blocks that a step filled, and give `share`'s sequences the tokens drawn: first the forks.

        Return how many of its drafts held.
        """
        sequence, piece, forks = share.sequence, share.piece, share.forks
        if not share.is_current:
            return 0
        sequence.num_drawing -= bool(piece.num_logits)
        if drawn and drawn[len(forks)] is None:  # then its keys and values are no good either
            self._end_not_finite([*forks, sequence])
            return 0
        self._publish(sequence, piece.end - len(share.draft_ids))
        for fork, sampled in zip(forks, drawn, strict=False):
            if self._fork(fork, sequence):
                self._append(fork, [sampled])
        return self._append(sequence, drawn[len(forks) :], share.draft_ids) if drawn else 0

    def _fork(self, fork: Sequence, original: Sequence) -> bool:
        """Let `fork` run from the blocks of `original`, which has just computed the tokens that both have.

        The full ones are published and shared. The last one, partly filled, is copied before the next step: both write
        their next token into it then, so that a later copy would hardly ever be saved. False: a hash collision has
        hidden a block, and `fork` has to compute the rest by itself.
        """
        num_full = fork.num_tokens // self._cache.block_size
        self._admit(fork, num_full)
        if len(fork.table.block_ids) < num_full or not self._allocate(fork, fork.num_tokens, is_copied=True):
            return False
        self.copies += zip(original.table.block_ids[num_full:], fork.table.block_ids[num_full:], strict=True)
        fork.num_computed = fork.num_tokens
        self.num_forked += 1
        return True

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Publish the full blocks of the first `num_computed` tokens; the step that filled them is over."""
        num_blocks = num_computed // self._cache.block_size
        if num_blocks > sequence.table.num_published:
            sequence.extend_chain(num_blocks)
            self._cache.insert(sequence.chain, sequence.table, num_blocks)

    def _append(self, sequence: Sequence, drawn: Seq[Sampled | None], draft_ids: Seq[int] = ()) -> int:
        """Give `sequence` its next token, and those drawn after `draft_ids` as far as the drafts hold.

        Return how many of those do.
        """
        output = Output(sequence.req_id, sequence.attempt, len(sequence.output_ids))
        taken: list[int] = []
        sampled: Sampled | None = None
        for i, sampled in enumerate(drawn):
            if sampled is None:
                break
            token_id = sampled.token_id
            if sequence.matcher is not None:
                sequence.matcher.accept(token_id)
                if sequence.matcher.error:
                    break
            self.num_not_finite = 0
            sequence.append(token_id)
            taken.append(token_id)
            if sampled.logprob is not None:
                output.logprobs.append(TokenLogprobs(sampled.logprob, list(sampled.top_logprobs)))
            output.finish_reason = sequence.finish_reason()
            if output.finish_reason is not None or i == len(draft_ids) or token_id != draft_ids[i]:
                break
        num_held = max(0, len(taken) - 1)
        if num_held:
            sequence.num_computed += num_held
            self._publish(sequence, sequence.num_computed)
        output.num_extra_tokens = len(draft_ids) - num_held
        if sequence.track is not None:
            sequence.track.drawn(taken, len(draft_ids))
            output.num_extra_tokens += sequence.track.take_work()
        output.token_ids = pack_tokens(taken)
        if taken:
            self._emit(sequence, output)
        if output.finish_reason is not None:
            self._forget(sequence)
        elif sequence.matcher is not None and sequence.matcher.error:
            self.end(sequence, "error", sequence.matcher.error)
        elif sampled is None:
            self._end_not_finite([sequence])
        return num_held

    # ---- its end

    def end(self, sequence: Sequence, reason: FinishReason, text: str = "") -> None:
        """End `sequence` without a further token."""
        seq = len(sequence.output_ids)
        self._emit(sequence, Output(sequence.req_id, sequence.attempt, seq, finish_reason=reason, error=text))
        self._forget(sequence)

    def drop_all(self) -> None:
        """Forget all, and the outputs."""
        for sequence in self:
            self._release(sequence)
        self.by_id.clear()
        self.running.clear()
        self.waiting.clear()
        self.outputs.clear()

    def check_integrity(self) -> None:
        """Check sequences, tables, cache and pool against each other.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        if sorted(map(id, self)) != sorted(map(id, self.by_id.values())):
            raise IntegrityError(f"{len(self)} sequences are running or waiting, {len(self.by_id)} are known")
        for s in self:
            if s.num_computed > len(s.table.block_ids) * self._cache.block_size:
                raise IntegrityError(f"sequence {s.key} has {s.num_computed} tokens in {len(s.table.block_ids)} blocks")
        if any(s.table.block_ids for s in self.waiting) or any(s.hold.block_ids for s in self.running):
            raise IntegrityError("a waiting sequence has blocks to compute in, or a running one still holds some")
        flights = list(self._flights)
        for i, share in ((i, share) for i, flight in enumerate(flights) for share in flight.shares):
            if not share.is_current and not any(share.table is t for later in flights[i:] for t in later.leaving):
                raise IntegrityError(f"a step under way computes in blocks that sequence {share.piece.seq_key} lost")
        leaving = [table for flight in flights for table in flight.leaving]
        self._cache.check_integrity([*(table for s in self for table in (s.table, s.hold)), *leaving])

    def _end_not_finite(self, sequences: Seq[Sequence]) -> None:
        self.num_not_finite += 1
        for s in sequences:
            self.end(s, "error", f"the model's logits for token {s.num_known} are not finite")

    def _emit(self, sequence: Sequence, output: Output) -> None:
        if not sequence.cached_reported and sequence.num_cached is not None:
            output.num_cached_tokens = sequence.num_cached
            sequence.cached_reported = True
        if not is_prewarming(sequence.req_id):
            self.outputs.append(output)

    def _forget(self, sequence: Sequence) -> None:
        del self.by_id[sequence.req_id, sequence.attempt]
        if sequence.track is not None:
            sequence.track.close()
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take its blocks from `sequence`; they are free when the last step that names them is collected."""
        self._let_go(sequence)
        flight = next((flight for flight in reversed(self._flights) if flight.names(sequence)), None)
        if flight is None:
            self._cache.free(sequence.table)
        else:
            flight.leaving.append(sequence.table)
        sequence.table = sequence.table.renewed()
        sequence.num_computed = sequence.num_drawing = 0
