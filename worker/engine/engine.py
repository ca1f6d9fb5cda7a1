"""The engine: runs sequences step by step over a paged KV cache. It waits for nothing but its steps.

Knows neither sockets nor torch: executor and clock are handed in. Every `Generate` submitted gets exactly
one `Output` with a finish reason, whatever happens to it, unless `drop_all` forgets it.

With `is_ahead`, the next step is planned and launched while one is computed, so that a fast device need not wait for
Python; the same code without it is its plain twin. Facts: of a step that is under way all is known but the tokens it
draws, how many those are is known. From this follows: a sequence counts as computed when its step is launched, and a
token that is being drawn has its place (`Sequence.num_drawing`) until `collect` tells it. What we chose: whatever
cannot be planned without those tokens waits for them (`Flight.must_be_known`, `Plan.takes`), and costs what the plain
loop costs, the time of a plan. A sequence that ends at a token that only `collect` told was computed once too often;
that result is dropped. Blocks are free when no step under way names them. Only what is collected is published.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from math import inf

from kvasir.cache.block_pool import IntegrityError
from kvasir.cache.block_table import BlockTable
from kvasir.cache.events import Stored
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import BadRequest, Overloaded
from kvasir.protocol.messages import (
    FinishReason,
    Generate,
    KvAccounts,
    Load,
    Output,
    Pin,
    Quotas,
    Snapshot,
    StepReport,
    TokenLogprobs,
)
from kvasir.protocol.tokens import num_tokens, pack_tokens
from kvasir.worker.engine.flight import Flight, Share
from kvasir.worker.engine.pins import Pins, is_prewarming
from kvasir.worker.engine.scheduler import MIN_CHUNK, EngineLimits, Plan, no_room, schedule
from kvasir.worker.engine.sequence import Sequence, make_sequence
from kvasir.worker.engine.step import (
    Executor,
    Grammars,
    Mask,
    OutOfMemory,
    Sampled,
    SequenceSlice,
    StepBatch,
)
from kvasir.worker.speculation.proposer import Text
from kvasir.worker.speculation.speculator import Counts, Speculator

_FIRST_RATE = 100.0  # prompt tokens per second, until measured: low, so that the first chunk is a small one
_COMPILE_WAIT_S = 10.0  # for a grammar that the gateway has compiled in less than one
_RATE_SHARE = 0.2  # weight of the newest step in the measured rate


class Engine:
    """Sequences in, one `StepReport` per step out. Without `grammars`, requests with one are refused.

    A sequence whose logits are not finite (NaN) ends with an error. `num_not_finite` counts such sequences since the
    last one with finite logits: one may be the fault of its prompt, many in a row are the worker's.

    When a step runs out of memory, its sequences go back to waiting and the limits of a step are halved, until the
    engine has nothing to do; a sequence that fails alone in a small step ends with an error. `num_out_of_memory` counts
    the halvings.

    With a `speculator`, a step computes drafts after a sequence's last token and draws at each of them. The drafts that
    equal the draws are kept, so that an answer is the same as without, and comes in fewer steps.

    `check` verifies the cache's integrity whenever the engine runs empty. `public_namespace` is the gateway's to set
    (`Welcome`) before anything is submitted.
    """

    def __init__(
        self,
        executor: Executor,
        cache: PrefixCache,
        limits: EngineLimits,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        check: bool = False,
        grammars: Grammars | None = None,
        is_ahead: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        self.speculator = speculator
        self._counts = Counts()  # of drafts, as last reported
        self._grammars = grammars
        self._executor, self._cache = executor, cache
        self.limits = self._limits = limits
        self.public_namespace = bytes(16)
        self.on_blocks: Callable[[list[Stored], bytes], None] | None = None  # told what every step stored and removed
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._clock = clock
        self._check = check
        self._is_ahead = is_ahead
        self._flights: deque[Flight] = deque()  # one at most between steps
        self._collected_at = -inf
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[tuple[bytes, int], Sequence] = {}
        self._outputs: list[Output] = []  # of the next report: what was refused or aborted between steps
        self._num_steps = self._num_launched = self._event_seq = self._num_sequences = 0
        self.num_preempted = self.num_forked = self.num_not_finite = self.num_out_of_memory = 0
        self._rate = _FIRST_RATE
        self._copies: list[tuple[int, int]] = []  # of blocks, due before the next step computes
        self._to_zero: list[int] = []  # then these
        self._is_at_rest = True  # nothing computed in the last step
        self._collected: list[tuple[Flight, float]] = []  # since the last report, with their seconds
        self._pins = Pins(cache)

    @property
    def cache(self) -> PrefixCache:
        """For reading only."""
        return self._cache

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything but say that the engine is alive."""
        return bool(self._running or self._outputs or self._flights) or any(s.is_ready for s in self._waiting)

    @property
    def is_preparing(self) -> bool:
        """Whether a sequence waits for its grammar, which will be ready without anything else happening."""
        return not all(sequence.is_ready for sequence in self._waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._running) + len(self._waiting)

    def submit(self, command: Generate) -> None:
        """Take a request. One that cannot be served is answered with finish reason "error" in the next report.

        A `Generate` that repeats the (req_id, attempt) of an unfinished one is ignored.
        """
        if (command.req_id, command.attempt) in self._by_id:
            return
        self._num_sequences += 1
        try:
            if self.num_unfinished >= 2 * self.limits.max_requests:
                num_credits = self.limits.max_requests
                raise Overloaded(f"{self.num_unfinished} requests are here, credits were {num_credits}")
            sequence = make_sequence(
                command,
                key=self._num_sequences,
                now=self._clock(),
                public_namespace=self.public_namespace,
                block_size=self._cache.block_size,
                max_context=self._limits.max_context,
                vocab_size=self._vocab_size,
                eos_token_ids=self._eos_token_ids,
            )
            constraint = command.sampling.constraint
            if constraint is not None and constraint.grammar is not None:
                if self._grammars is None:
                    raise BadRequest("this worker cannot hold answers to grammars")
                sequence.matcher = self._grammars.open(command.tenant, constraint, sequence.output_ids)
        except (BadRequest, Overloaded) as error:
            seq = max(0, num_tokens(command.token_ids) - command.num_prompt_tokens)
            self.refuse(command.req_id, command.attempt, seq, "error", error.message)
            return
        self._by_id[command.req_id, command.attempt] = sequence
        self._waiting.append(sequence)

    def refuse(self, req_id: bytes, attempt: int, seq: int, reason: FinishReason, text: str) -> None:
        """Answer a request that is not taken; `seq` is the number of its tokens already delivered."""
        if not is_prewarming(req_id):
            self._outputs.append(Output(req_id, attempt, seq, finish_reason=reason, error=text))

    def abort(self, req_id: bytes, attempt: int) -> None:
        """Stop a request and free its blocks now; the next report says "abort". Unknown ids are ignored."""
        sequence = self._by_id.get((req_id, attempt))
        if sequence is not None:
            self._end(sequence, "abort")

    def abort_all(self, text: str) -> None:
        """Hand everything unfinished back, as aborted with `text`."""
        for sequence in [*self._running, *self._waiting]:
            self._end(sequence, "abort", text)

    def drop_all(self) -> None:
        """Forget unfinished requests, unsent outputs, pins and quotas: the gateway that asked for them is gone."""
        self._abandon_flights()
        for sequence in [*self._running, *self._waiting]:
            self._release(sequence)
        self._by_id.clear()
        self._running.clear()
        self._waiting.clear()
        self._outputs.clear()
        self._pins.clear()
        self._cache.set_quotas({})

    def step(self) -> StepReport:
        """Launch one step, collect one or all, and return what has come of it; without work, an empty report."""
        plan = self._schedule()
        flight = self._launch(plan)
        num_ahead = int(self._is_ahead and flight is not None and not self._must_be_known(flight))
        while len(self._flights) > num_ahead:
            self._collect()
        return self._report(plan)

    def set_quotas(self, command: Quotas) -> None:
        """Put floors and caps in force, at once.

        Raises:
            BadRequest: they do not fit together in this pool; those before stay in force.
        """
        self._cache.set_quotas(command.quotas)

    def clear_tenant(self, tenant: str) -> int:
        """Drop what is cached of `tenant` and not in use; return how many blocks that were."""
        if self.speculator is not None:
            self.speculator.forget(tenant)
        return self._cache.clear(tenant)

    def pin(self, command: Pin) -> int:
        """Keep a published prefix's blocks, those that come later too; return how many are resident now.

        Raises:
            BadRequest: the command contradicts itself.
        """
        num_pinned, prewarming = self._pins.pin(command, self.public_namespace)
        if prewarming is not None:
            self.submit(prewarming)
        return num_pinned

    def unpin(self, name: str) -> None:
        """Let a pinned prefix go."""
        self._pins.unpin(name)

    def kv_accounts(self) -> KvAccounts:
        """Return every owner's holdings and counters. Also pins what has become resident of pinned prefixes."""
        self._pins.renew()
        return KvAccounts(self._cache.accounts(), self._cache.statistics().num_pinned)

    def snapshot(self) -> Snapshot:
        """Return all resident hashes. Call it between steps; the next events count on from it."""
        self._take_events()
        return Snapshot(self._event_seq, self._cache.resident_hashes())

    def check_integrity(self) -> None:
        """Check sequences, tables, cache and pool against each other.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        sequences = [*self._running, *self._waiting]
        if sorted(map(id, sequences)) != sorted(map(id, self._by_id.values())):
            raise IntegrityError(f"{len(sequences)} sequences are running or waiting, {len(self._by_id)} are known")
        for s in sequences:
            if s.num_computed > len(s.table.block_ids) * self._cache.block_size:
                raise IntegrityError(f"sequence {s.key} has {s.num_computed} tokens in {len(s.table.block_ids)} blocks")
        if any(s.table.block_ids for s in self._waiting) or any(s.hold.block_ids for s in self._running):
            raise IntegrityError("a waiting sequence has blocks to compute in, or a running one still holds some")
        flights = list(self._flights)
        for i, share in ((i, share) for i, flight in enumerate(flights) for share in flight.shares):
            if not share.is_current and not any(share.table is t for later in flights[i:] for t in later.leaving):
                raise IntegrityError(f"a step under way computes in blocks that sequence {share.piece.seq_key} lost")
        leaving = [table for flight in flights for table in flight.leaving]
        self._cache.check_integrity([*(table for s in sequences for table in (s.table, s.hold)), *leaving])

    # ---- the four parts of a step

    def _schedule(self) -> Plan:
        """Plan the next step; if it takes anything from a sequence, then with all that is under way collected."""
        plan = self._plan()
        if plan.takes and self._flights:
            while self._flights:
                self._collect()
            plan = self._plan()
        return plan

    def _plan(self) -> Plan:
        now = self._clock()
        self._cache.advance(now)
        for sequence in [s for s in self._by_id.values() if s.deadline is not None and now >= s.deadline]:
            self._end(sequence, "deadline", "the request's deadline passed before it was finished")
        for sequence in [s for s in self._waiting if s.matcher is not None]:
            self._check_matcher(sequence, now)
        if self.speculator is not None:
            self._draft(self.speculator)
        ready = [s for s in self._waiting if s.is_ready]
        return schedule(self._running, ready, self._cache, self._limits, now, self._rate)

    def _draft(self, speculator: Speculator) -> None:
        """Choose the drafts of the sequences that decode. One whose newest token is not known yet has none."""
        decoding = [s for s in self._running if s.num_remaining == 1 and not s.is_ending]
        drafting = []
        for s in decoding:
            if s.track is not None:
                s.track.draft_ids = []
            if not s.num_drawing and not s.is_fresh:
                if s.track is None:
                    chain = s.chain
                    text = Text(chain.owner, chain.namespace, s.prompt_ids, s.output_ids, s.table.leaves_nothing)
                    s.track = speculator.open(text)
                drafting.append((s.track, s.max_length - s.num_tokens - 1))
        speculator.draft(drafting, len(decoding), self._num_launched)

    def _check_matcher(self, sequence: Sequence, now: float) -> None:
        """End a waiting `sequence` whose grammar could not be compiled."""
        assert sequence.matcher is not None
        if sequence.matcher.error:
            self._end(sequence, "error", sequence.matcher.error)
        elif not sequence.is_ready and now - sequence.arrived > _COMPILE_WAIT_S:
            self._end(sequence, "error", f"the grammar was not compiled within {_COMPILE_WAIT_S:.0f} s")

    def _prepare(self, plan: Plan) -> list[Share]:
        """Carry out `plan` as far as blocks go; return what is to be computed."""
        for sequence, text in plan.failed:
            self._end(sequence, "error", text)
        for sequence in plan.let_go:
            self._let_go(sequence)
            sequence.may_hold = False
        for sequence in plan.preempted:
            self._preempt(sequence)
        for sequence in plan.admitted:
            # The last token is computed in any case: its logits are what the next one is drawn from.
            self._admit(sequence, (sequence.num_tokens - 1) // self._cache.block_size)
        for sequence in plan.held:
            self._hold(sequence)
        draw_of = {s: i for i, (s, *_) in enumerate(self._flights[-1].drawing)} if self._flights else {}
        shares: list[Share] = []
        for i, (sequence, count) in enumerate(plan.work):
            start = sequence.num_computed
            draft_ids: list[int] = []
            if i < plan.num_decodes and count > 1 and sequence.track is not None:
                if self._allocate(sequence, start + count, self._to_zero):
                    draft_ids = sequence.track.draft_ids[: count - 1]
                count = 1
            if sequence is plan.last_resort and not self._allocate(sequence, sequence.num_tokens, self._to_zero):
                self._end(sequence, "error", no_room(-(-sequence.num_tokens // self._cache.block_size)))
                continue
            if not self._allocate(sequence, start + count, self._to_zero):
                self._preempt(sequence)  # only after a hash collision is less there than the plan could see
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
            piece.num_logits += len(draft_ids)
            piece.token_ids += draft_ids
            shares.append(Share(sequence, piece, forks, sequence.table, draft_ids))
        return shares

    def _launch(self, plan: Plan) -> Flight | None:
        """Launch what `plan` computes; None if that is nothing."""
        shares = self._prepare(plan)
        if not shares and (self._is_at_rest or self._flights):
            return None
        num_prefill = sum(count for _, count in plan.work[plan.num_decodes :])
        flight = Flight(shares, plan.now, plan.num_decodes, num_prefill)
        step = StepBatch(
            self._copies,
            self._to_zero,
            [share.piece for share in shares],
            [s.row(position, draft_ids) for s, position, draft_ids in flight.drawing],
            has_masks=any(s.matcher is not None for s, *_ in flight.drawing),
        )
        self._copies, self._to_zero, self._is_at_rest = [], [], not shares
        flight.handle = self._executor.launch(step)
        for share in shares:
            share.sequence.num_computed = share.piece.end - len(share.draft_ids)  # those count once they hold
            share.sequence.num_drawing += bool(share.piece.num_logits)
        self._flights.append(flight)
        self._num_launched += 1
        return flight

    def _collect(self) -> None:
        """Take the result of the oldest step under way."""
        flight = self._flights[0]
        masks = self._masks(flight)  # while a GPU still computes the logits
        try:
            sampled = self._executor.collect(flight.handle, masks).sampled
        except OutOfMemory as error:
            self._hand_back(error)
            return
        self._flights.popleft()
        self._take(flight, sampled)
        self._free_leaving(flight)
        now = self._clock()
        step_s = now - max(flight.began, self._collected_at)
        self._collected_at = now
        self._collected.append((flight, step_s))
        if self.speculator is not None and flight.num_decodes and not flight.num_prefill and step_s > 0:
            self.speculator.costs.learn(flight.num_decodes, flight.num_drafts, step_s)
        if flight.num_prefill >= MIN_CHUNK and step_s > 0:  # less says more about a step's fixed costs than the rate
            rate = flight.num_prefill / step_s
            self._rate = rate if self._rate == _FIRST_RATE else self._rate + _RATE_SHARE * (rate - self._rate)

    def _must_be_known(self, flight: Flight) -> bool:
        """Whether the next step cannot be planned before the draws of `flight` are known."""
        if flight.must_be_known or self.speculator is None:
            return flight.must_be_known
        turn = self._num_launched
        return any(s.track is None or s.track.looks_at(turn) for s, *_ in flight.drawing)

    def _masks(self, flight: Flight) -> list[Mask]:
        """Return what each draw may be, where grammars say that; empty where none does.

        None for a sequence whose grammar has become too complex: it ends, whatever is drawn.
        """
        if all(s.matcher is None for s, *_ in flight.drawing):
            return []
        masks: list[Mask] = []
        for share in flight.shares:
            if share.piece.num_logits:
                for s, draft_ids in (*((fork, []) for fork in share.forks), (share.sequence, share.draft_ids)):
                    masks += [None] * (1 + len(draft_ids)) if s.matcher is None else s.matcher.masks(draft_ids)
        return masks

    def _hand_back(self, error: OutOfMemory) -> None:
        """Let the sequences of a step that ran out of memory wait, to be computed again in smaller steps.

        So do those of a step launched after it: what they were given may be of no use.
        """
        shares, num_drafts = self._flights[0].shares, self._flights[0].num_drafts
        is_alone = len(shares) == 1 and not shares[0].forks and not num_drafts
        later = [share for flight in list(self._flights)[1:] for share in flight.shares]
        self._abandon_flights()
        limits = self._limits
        if is_alone and limits.max_step_tokens <= MIN_CHUNK:
            if shares[0].is_current:
                text = f"the worker has too little memory to compute this request: {error}"
                self._end(shares[0].sequence, "error", text)
        else:
            max_step_tokens = max(1, limits.max_step_tokens // 2)
            max_requests = min(limits.max_requests, max_step_tokens)
            self._limits = replace(limits, max_step_tokens=max_step_tokens, max_requests=max_requests)
            self.num_out_of_memory += 1
        for share in [*shares, *later]:
            if share.is_current:
                self._preempt(share.sequence)

    def _abandon_flights(self) -> None:
        """Wait for all that is under way, whose results are of no use."""
        while self._flights:
            flight = self._flights.popleft()
            with suppress(OutOfMemory):
                self._executor.collect(flight.handle)
            self._free_leaving(flight)

    def _free_leaving(self, flight: Flight) -> None:
        for table in flight.leaving:
            self._cache.free(table)

    def _take(self, flight: Flight, drawn: Iterable[Sampled | None]) -> None:
        """Publish the blocks that `flight` filled, and give every sequence its token."""
        draws = iter(drawn)
        for share in flight.shares:
            sequence, piece, forks = share.sequence, share.piece, share.forks
            drawn_here = [next(draws) for _ in range(len(forks) + piece.num_logits)]
            if not share.is_current:
                continue
            sequence.num_drawing -= bool(piece.num_logits)
            if drawn_here and drawn_here[len(forks)] is None:  # then its keys and values are no good either
                self._end_not_finite([*forks, sequence])
                continue
            self._publish(sequence, piece.end - len(share.draft_ids))
            for fork, sampled in zip(forks, drawn_here, strict=False):
                if self._fork(fork, sequence):
                    self._append(fork, [sampled])
            if drawn_here:
                self._append(sequence, drawn_here[len(forks) :], share.draft_ids)

    def _end_not_finite(self, sequences: list[Sequence]) -> None:
        self.num_not_finite += 1
        for s in sequences:
            text = f"the model's logits for token {s.num_known} are not finite (step {self._num_steps + 1})"
            self._end(s, "error", text)

    def _report(self, plan: Plan) -> StepReport:
        """Return what has happened since the last report."""
        stored, removed = self._take_events()
        if stored or removed:
            self._event_seq += 1
        outputs, self._outputs = self._outputs, []
        collected, self._collected = self._collected, []
        self._num_steps += 1
        if not self.num_unfinished:
            self._limits = self.limits
            if self._check:
                self.check_integrity()
        load = Load(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=self._cache.num_unused,
            pending_tokens=plan.num_pending,
            num_prefill_tokens=sum(flight.num_prefill for flight, _ in collected),
            num_decode_tokens=sum(flight.num_decodes for flight, _ in collected),
            step_s=sum(step_s for flight, step_s in collected if flight.shares),
        )
        if self.speculator is not None:
            counts, before = self.speculator.counts, self._counts
            self._counts = counts
            load.num_draft_runs = counts.num_runs - before.num_runs
            load.num_drafted = counts.num_drafted - before.num_drafted
            load.num_accepted = counts.num_accepted - before.num_accepted
        return StepReport(self._num_steps, self._event_seq, load, outputs, stored, removed)

    def _take_events(self) -> tuple[bytes, bytes]:
        """Return the packed hashes stored and removed since the last call."""
        stored, removed = self._cache.take_events()
        if self.on_blocks is not None and (stored or removed):
            self.on_blocks(stored, removed)
        return b"".join(blocks.hashes for blocks in stored), removed

    # ---- what happens to one sequence

    def _admit(self, sequence: Sequence, max_blocks: int) -> None:
        """Let `sequence` run, with what is cached of its first `max_blocks` blocks."""
        self._waiting.remove(sequence)
        self._running.append(sequence)
        num_matched = self._cache.match(
            sequence.chain, sequence.table, max_blocks, again=sequence.num_cached is not None
        )
        self._let_go(sequence)
        sequence.num_computed = num_matched * self._cache.block_size
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))

    def _hold(self, sequence: Sequence) -> None:
        """Reference all that is cached of the waiting `sequence`."""
        hold, num_held = BlockTable(), len(sequence.hold.block_ids)
        max_blocks = (sequence.num_tokens - 1) // self._cache.block_size
        num_matched = self._cache.match(sequence.chain, hold, max_blocks, again=True)
        self._let_go(sequence)
        sequence.hold = hold
        sequence.may_hold = num_matched > num_held  # else a hash collision has hidden what was to be had

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.hold.block_ids:
            self._cache.free(sequence.hold)

    def _fork(self, fork: Sequence, original: Sequence) -> bool:
        """Let `fork` run from the blocks of `original`, which has just computed the tokens that both have.

        The full ones are published and shared. The last one, partly filled, is copied before the next step: both write
        their next token into it then, so that a later copy would hardly ever be saved. False: a hash collision has
        hidden a block, and `fork` has to compute the rest by itself.
        """
        num_full = fork.num_tokens // self._cache.block_size
        self._admit(fork, num_full)
        if len(fork.table.block_ids) < num_full or not self._allocate(fork, fork.num_tokens, to_zero=[]):
            return False
        # As wholes, so that nothing of another owner is left to be zeroed.
        self._copies += zip(original.table.block_ids[num_full:], fork.table.block_ids[num_full:], strict=True)
        fork.num_computed = fork.num_tokens
        self.num_forked += 1
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.append(sequence)
        self.num_preempted += 1

    def _allocate(self, sequence: Sequence, length: int, to_zero: list[int]) -> bool:
        """Give `sequence` the blocks for its first `length` tokens, adding to `to_zero` what must be zeroed."""
        num_missing = sequence.num_missing_blocks(length, self._cache.block_size)
        if not num_missing:
            return True
        foreign = self._cache.allocate(sequence.chain, sequence.table, num_missing)
        if foreign is None:
            return False
        to_zero += foreign
        return True

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Publish the full blocks of the first `num_computed` tokens; the step that filled them is over."""
        num_blocks = num_computed // self._cache.block_size
        if num_blocks > sequence.table.num_published:
            sequence.extend_chain(num_blocks)
            self._cache.insert(sequence.chain, sequence.table, num_blocks)

    def _append(self, sequence: Sequence, drawn: Seq[Sampled | None], draft_ids: Seq[int] = ()) -> None:
        """Give `sequence` its next token, and those drawn after `draft_ids` as far as the drafts hold."""
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
        if self.speculator is not None and sequence.track is not None:
            self.speculator.drawn(sequence.track, taken, len(draft_ids))
        output.token_ids = pack_tokens(taken)
        output.num_rejected_tokens = len(draft_ids) - num_held
        if taken:
            self._emit(sequence, output)
        if output.finish_reason is not None:
            self._forget(sequence)
        elif sequence.matcher is not None and sequence.matcher.error:
            self._end(sequence, "error", sequence.matcher.error)
        elif sampled is None:
            self._end_not_finite([sequence])

    def _end(self, sequence: Sequence, reason: FinishReason, text: str = "") -> None:
        """End `sequence` without a further token."""
        seq = len(sequence.output_ids)
        self._emit(sequence, Output(sequence.req_id, sequence.attempt, seq, finish_reason=reason, error=text))
        self._forget(sequence)

    def _emit(self, sequence: Sequence, output: Output) -> None:
        if not sequence.cached_reported and sequence.num_cached is not None:
            output.num_cached_tokens = sequence.num_cached
            sequence.cached_reported = True
        if not is_prewarming(sequence.req_id):
            self._outputs.append(output)

    def _forget(self, sequence: Sequence) -> None:
        del self._by_id[sequence.req_id, sequence.attempt]
        if self.speculator is not None and sequence.track is not None:
            self.speculator.close(sequence.track)
        (self._running if sequence in self._running else self._waiting).remove(sequence)
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
