"""The engine: runs sequences step by step over a paged KV cache. It waits for nothing but its steps.

Knows neither sockets nor torch: executor and clock are handed in. `step` is the place to begin: schedule, launch,
collect, report. What happens to one sequence on its way through the steps is in `worker.engine.sequences`.

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import inf

from kvasir.cache.events import Stored
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import BadRequest, Overloaded
from kvasir.protocol.messages import (
    Drafts,
    FinishReason,
    Generate,
    KvAccounts,
    Load,
    Output,
    Pin,
    Quotas,
    Snapshot,
    StepReport,
)
from kvasir.protocol.tokens import num_tokens
from kvasir.worker.engine.flight import Flight, Share
from kvasir.worker.engine.pins import Pins, is_prewarming
from kvasir.worker.engine.scheduler import MIN_CHUNK, EngineLimits, Plan, schedule
from kvasir.worker.engine.sequence import make_sequence
from kvasir.worker.engine.sequences import Sequences
from kvasir.worker.engine.step import Executor, Grammars, OutOfMemory, StepBatch
from kvasir.worker.speculation.proposer import Text
from kvasir.worker.speculation.speculator import Speculator

_FIRST_RATE = 100.0  # prompt tokens per second, until measured: low, so that the first chunk is a small one
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
        self._sequences = Sequences(cache, self._flights)
        self._collected_at = -inf
        self._num_steps = self._num_launched = self._event_seq = self._num_submitted = self.num_out_of_memory = 0
        self._rate = _FIRST_RATE
        self._is_at_rest = True  # nothing computed in the last step
        self._collected: list[tuple[Flight, float]] = []  # since the last report, with their seconds
        self._pins = Pins(cache)

    # ---- for reading

    @property
    def cache(self) -> PrefixCache:
        return self._cache

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything but say that the engine is alive."""
        sequences = self._sequences
        is_busy = bool(sequences.running or sequences.outputs or self._flights)
        return is_busy or any(s.is_ready for s in sequences.waiting)

    @property
    def is_preparing(self) -> bool:
        """Whether a sequence waits for its grammar, which will be ready without anything else happening."""
        return not all(s.is_ready for s in self._sequences.waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_not_finite(self) -> int:
        return self._sequences.num_not_finite

    @property
    def num_preempted(self) -> int:
        return self._sequences.num_preempted

    @property
    def num_forked(self) -> int:
        return self._sequences.num_forked

    # ---- commands

    def submit(self, command: Generate) -> None:
        """Take a request. One that cannot be served is answered with finish reason "error" in the next report.

        A `Generate` that repeats the (req_id, attempt) of an unfinished one is ignored.
        """
        if (command.req_id, command.attempt) in self._sequences.by_id:
            return
        self._num_submitted += 1
        try:
            if self.num_unfinished >= 2 * self.limits.max_requests:
                num_credits = self.limits.max_requests
                raise Overloaded(f"{self.num_unfinished} requests are here, credits were {num_credits}")
            sequence = make_sequence(
                command,
                key=self._num_submitted,
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
        self._sequences.add(sequence)

    def refuse(self, req_id: bytes, attempt: int, seq: int, reason: FinishReason, text: str) -> None:
        """Answer a request that is not taken; `seq` is the number of its tokens already delivered."""
        if not is_prewarming(req_id):
            self._sequences.outputs.append(Output(req_id, attempt, seq, finish_reason=reason, error=text))

    def abort(self, req_id: bytes, attempt: int) -> None:
        """Stop a request and free its blocks now; the next report says "abort". Unknown ids are ignored."""
        sequence = self._sequences.by_id.get((req_id, attempt))
        if sequence is not None:
            self._sequences.end(sequence, "abort")

    def abort_all(self, text: str) -> None:
        """Hand everything unfinished back, as aborted with `text`."""
        for sequence in self._sequences:
            self._sequences.end(sequence, "abort", text)

    def drop_all(self) -> None:
        """Forget unfinished requests, unsent outputs, pins and quotas: the gateway that asked for them is gone."""
        self._abandon_flights()
        self._sequences.drop_all()
        self._pins.clear()
        self._cache.set_quotas({})

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
        self._sequences.check_integrity()

    # ---- a step

    def step(self) -> StepReport:
        """Launch one step, collect one or all, and return what has come of it; without work, an empty report."""
        plan = self._schedule()
        flight = self._launch(plan)
        num_ahead = int(self._is_ahead and flight is not None and not self._must_be_known(flight))
        while len(self._flights) > num_ahead:
            self._collect()
        return self._report(plan)

    def _schedule(self) -> Plan:
        """Plan the next step; if it takes anything from a sequence, then with all that is under way collected."""
        plan = self._plan()
        if plan.takes and self._flights:
            while self._flights:
                self._collect()
            plan = self._plan()
        return plan

    def _plan(self) -> Plan:
        now, sequences = self._clock(), self._sequences
        self._cache.advance(now)
        sequences.end_hopeless(now)
        if self.speculator is not None:
            self._draft(self.speculator)
        ready = [s for s in sequences.waiting if s.is_ready]
        return schedule(sequences.running, ready, self._cache, self._limits, now, self._rate)

    def _draft(self, speculator: Speculator) -> None:
        """Choose the drafts of the sequences that decode. One whose newest token is not known yet has none."""
        wanted, num_decoding = [], 0
        for s in self._sequences.running:
            if s.num_remaining != 1 or s.is_ending:
                continue
            num_decoding += 1
            if s.num_drawing or s.is_fresh:
                if s.track is not None:
                    s.track.clear()
                continue
            if s.track is None:
                chain = s.chain
                text = Text(chain.owner, chain.namespace, s.prompt_ids, s.output_ids, s.table.leaves_nothing)
                s.track = speculator.open(text, s)
            wanted.append((s.track, s.max_length - s.num_tokens - 1))
        speculator.draft(wanted, num_decoding, self._num_launched)

    def _launch(self, plan: Plan) -> Flight | None:
        """Launch what `plan` computes; None if that is nothing."""
        shares = self._sequences.carry_out(plan)
        if not shares and (self._is_at_rest or self._flights):
            return None
        draft_s = 0.0 if self.speculator is None else self._add_drafts(self.speculator, shares)
        num_prefill = sum(count for _, count in plan.work[plan.num_decodes :])
        flight = Flight(shares, plan.now, plan.num_decodes, num_prefill, draft_s)
        sequences = self._sequences
        step = StepBatch(
            sequences.copies,
            sequences.to_zero,
            [share.piece for share in shares],
            [s.row(position, draft_ids) for s, position, draft_ids in flight.drawing],
            has_masks=any(s.matcher is not None for s, *_ in flight.drawing),
        )
        sequences.copies, sequences.to_zero, self._is_at_rest = [], [], not shares
        flight.handle = self._executor.launch(step)
        for share in shares:
            share.sequence.num_computed = share.piece.end - len(share.draft_ids)  # those count once they hold
            share.sequence.num_drawing += bool(share.piece.num_logits)
        self._flights.append(flight)
        self._num_launched += 1
        return flight

    def _add_drafts(self, speculator: Speculator, shares: list[Share]) -> float:
        """Append the drafts to what `shares` compute; return the seconds that a draft model took for them."""
        began = self._clock()
        drafting = [(share, share.sequence.track) for share in shares if share.is_decode]
        tracks = [(track, share.num_free) for share, track in drafting if track is not None]
        speculator.compute(tracks)
        for share, track in drafting:
            if track is not None and track.draft_ids:
                share.add_drafts(track.draft_ids)
        if not shares:
            speculator.rest()
        return self._clock() - began

    def _must_be_known(self, flight: Flight) -> bool:
        """Whether the next step cannot be planned before the draws of `flight` are known."""
        if flight.must_be_known or self.speculator is None:
            return flight.must_be_known
        turn = self._num_launched
        return any(s.track is None or s.track.looks_at(turn) for s, *_ in flight.drawing)

    def _collect(self) -> None:
        """Take the result of the oldest step under way."""
        flight = self._flights[0]
        masks = flight.masks()  # while a GPU still computes the logits
        try:
            result = self._executor.collect(flight.handle, masks)
        except OutOfMemory as error:
            self._hand_back(error)
            return
        self._flights.popleft()
        draws = iter(result.sampled)
        num_held = 0
        for share in flight.shares:
            drawn = [next(draws) for _ in range(len(share.forks) + share.piece.num_logits)]
            num_held += self._sequences.take(share, drawn)
        self._free_leaving(flight)
        self._learn(flight, num_held, result.seconds)

    def _learn(self, flight: Flight, num_held: int, device_s: float | None) -> None:
        """Measure the step that was collected just now; `num_held` of its drafts held."""
        now = self._clock()
        step_s = now - max(flight.began, self._collected_at) - flight.draft_s if device_s is None else device_s
        self._collected_at = now
        self._collected.append((flight, step_s + flight.draft_s))
        if self.speculator is not None and flight.num_decodes and not flight.num_prefill and step_s > 0:
            self.speculator.costs.learn(flight.num_decodes, flight.num_drafts, num_held, step_s)
        if flight.num_prefill >= MIN_CHUNK and step_s > 0:  # less says more about a step's fixed costs than the rate
            rate = flight.num_prefill / step_s
            self._rate = rate if self._rate == _FIRST_RATE else self._rate + _RATE_SHARE * (rate - self._rate)

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
                self._sequences.end(shares[0].sequence, "error", text)
        else:
            max_step_tokens = max(1, limits.max_step_tokens // 2)
            max_requests = min(limits.max_requests, max_step_tokens)
            self._limits = replace(limits, max_step_tokens=max_step_tokens, max_requests=max_requests)
            self.num_out_of_memory += 1
        for share in [*shares, *later]:
            if share.is_current:
                self._sequences.preempt(share.sequence)

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

    def _report(self, plan: Plan) -> StepReport:
        """Return what has happened since the last report."""
        sequences = self._sequences
        stored, removed = self._take_events()
        if stored or removed:
            self._event_seq += 1
        outputs, sequences.outputs = sequences.outputs, []
        collected, self._collected = self._collected, []
        self._num_steps += 1
        if not self.num_unfinished:
            self._limits = self.limits
            if self._check:
                self.check_integrity()
        load = Load(
            num_running=len(sequences.running),
            num_waiting=len(sequences.waiting),
            num_free_blocks=self._cache.num_unused,
            num_prefill_tokens=sum(flight.num_prefill for flight, _ in collected),
            num_decode_tokens=sum(flight.num_decodes for flight, _ in collected),
            step_s=sum(step_s for flight, step_s in collected if flight.shares),
        )
        if self.speculator is not None:
            news = self.speculator.experience.news()
            load.drafts = [Drafts(name, c.num_runs, c.num_drafted, c.num_accepted) for name, c in news.items()]
        return StepReport(self._num_steps, self._event_seq, load, outputs, stored, removed)

    def _take_events(self) -> tuple[bytes, bytes]:
        """Return the packed hashes stored and removed since the last call."""
        stored, removed = self._cache.take_events()
        if self.on_blocks is not None and (stored or removed):
            self.on_blocks(stored, removed)
        return b"".join(blocks.hashes for blocks in stored), removed
