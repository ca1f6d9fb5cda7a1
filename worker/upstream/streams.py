"""The requests that run on one upstream: each is a stream of HTTP, and ends in exactly one final output.

Unless the upstream dies: then everything goes back to the gateway at once, and no stream says anything more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import inf

import trio

from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import FinishReason, Generate, Output
from kvasir.protocol.prefix import HASH_BYTES, extend_chain
from kvasir.protocol.tokens import TOKEN_BYTES, num_tokens, pack_tokens
from kvasir.worker.upstream import vllm
from kvasir.worker.upstream.cached import CachedBlocks
from kvasir.worker.upstream.http_client import UpstreamUnreachable
from kvasir.worker.upstream.reporter import Reporter
from kvasir.worker.upstream.server import ASK_TIMEOUT_S, Facts, Server

ABORT_S = 2.0  # until a stream that was aborted must have ended
_ENDS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
FULL_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # between tries while the upstream's own queue is full


@dataclass(slots=True, eq=False)
class Active:
    """One request on the upstream. `generated`: packed, of this attempt. `is_aborted`: the rest is not wanted."""

    command: Generate
    request_id: str
    body: bytes  # what the upstream is sent
    num_guessed: int  # prompt tokens that will probably be cached when its turn comes
    sent_at: float
    scope: trio.CancelScope
    generated: bytearray = field(default_factory=bytearray)
    is_aborted: bool = False
    error: str = ""

    @property
    def seq(self) -> int:
        """Index of the next token among all generated ones, those of earlier attempts too."""
        return first_seq(self.command) + self.num_generated

    @property
    def num_generated(self) -> int:
        return len(self.generated) // TOKEN_BYTES


def first_seq(command: Generate) -> int:
    """Return the index of the first token to come among all that were generated."""
    return max(0, num_tokens(command.token_ids) - command.num_prompt_tokens)


class Streams:
    """Runs requests in `nursery`. `fail(reason)` is told of trouble and returns only if the upstream lives."""

    def __init__(
        self,
        server: Server,
        facts: Facts,
        reporter: Reporter,
        cached: CachedBlocks,
        nursery: trio.Nursery,
        *,
        fail: Callable[[str], Awaitable[None]],
    ) -> None:
        self._server = server
        self._facts = facts
        self._reporter = reporter
        self._cached = cached
        self._nursery = nursery
        self._fail = fail
        self._active: dict[tuple[bytes, int], Active] = {}

    def __len__(self) -> int:
        return len(self._active)

    def start(self, command: Generate) -> None:
        """Send a request to the upstream. One that it cannot serve is answered in the next report."""
        key = (command.req_id, command.attempt)
        if key in self._active:
            return
        request_id, facts = f"{command.req_id.hex()}-{command.attempt}", self._facts
        try:
            body = vllm.generate_body(
                command,
                facts.model.id,
                request_id,
                has_generate=facts.has_generate,
                has_grammars=facts.has_grammars,
            )
        except BadRequest as error:
            self.refuse(*key, first_seq(command), "error", error.message)
            return
        now = trio.current_time()
        deadline = inf if command.deadline_s is None else now + command.deadline_s
        coming = [active.command.prefix_hashes for active in self._active.values() if not active.generated]
        num_guessed = self._cached.num_leading_tokens(command.prefix_hashes, num_tokens(command.token_ids), coming)
        active = Active(command, request_id, body, num_guessed, now, trio.CancelScope(deadline=deadline))
        self._active[key] = active
        self._nursery.start_soon(self._run, active)

    def refuse(self, req_id: bytes, attempt: int, seq: int, reason: FinishReason, text: str) -> None:
        """Answer a request that is not taken."""
        self._reporter.add(Output(req_id, attempt, seq, finish_reason=reason, error=text))

    def abort(self, req_id: bytes, attempt: int) -> None:
        """Stop a request; its final output says "abort". Unknown ids are ignored.

        The upstream is asked to end the stream: its last chunk says what was cached. If it does not end, it is cut.
        """
        active = self._active.get((req_id, attempt))
        if active is not None and not active.is_aborted:
            active.is_aborted = True
            active.scope.deadline = min(active.scope.deadline, trio.current_time() + ABORT_S)
            self._nursery.start_soon(self._abort, active)

    def hand_back(self, text: str) -> None:
        """Cut all streams; their final outputs say "abort", so that they go on elsewhere."""
        for active in self._active.values():
            active.is_aborted, active.error = True, text
            active.scope.cancel()

    async def _abort(self, active: Active) -> None:
        if not await self._server.abort(self._facts, active.request_id):
            active.scope.cancel()

    async def _run(self, active: Active) -> None:
        command = active.command
        final = Output(command.req_id, command.attempt, 0)
        with active.scope:
            await self._stream(active, final)
        if active.scope.cancelled_caught:
            final.finish_reason = "abort" if active.is_aborted else "deadline"
            final.error = active.error
        final.seq = active.seq
        del self._active[command.req_id, command.attempt]
        self._reporter.add(final)

    async def _stream(self, active: Active, final: Output) -> None:
        """Follow one request to its end and write that into `final`."""
        delays = iter(FULL_DELAYS_S)
        error: vllm.UpstreamError | None
        while True:
            try:
                async with self._server.generate(active.body, self._facts) as stream:
                    if stream.status != 200:
                        body = b""
                        with trio.move_on_after(ASK_TIMEOUT_S):
                            body = await stream.receive() or b""
                        error = vllm.UpstreamError(body.decode(errors="replace")[:1000], stream.status)
                    else:
                        error = await self._follow(active, stream.event, final)
            except UpstreamUnreachable as unreachable:
                error = vllm.UpstreamError(str(unreachable), 500)
            if error is None:
                return
            is_full = error.code == vllm.QUEUE_FULL and not active.generated
            if is_full and (delay_s := next(delays, None)) is not None:
                await trio.sleep(delay_s)
                continue
            if isinstance(error.code, int) and error.code >= 500 and not is_full:
                await self._fail(error.message)
            if active.is_aborted:
                final.finish_reason = "abort"
            else:
                final.finish_reason = "error"
                final.error = f"the upstream {self._server.name} says: {error.message}"[:4096]
            return

    async def _follow(
        self, active: Active, next_event: Callable[[], Awaitable[bytes | None]], final: Output
    ) -> vllm.UpstreamError | None:
        """Report tokens as they come and put the last into `final`; return what went wrong, if anything."""
        while (event := await next_event()) is not None and event != vllm.DONE:
            try:
                chunk = vllm.CHUNKS.decode(event)
            except vllm.UNREADABLE as error:
                return vllm.UpstreamError(f"an event that cannot be read: {error}", 500)
            if chunk.error is not None:
                return chunk.error
            if chunk.num_cached_tokens is not None:
                final.num_cached_tokens = min(chunk.num_cached_tokens, num_tokens(active.command.token_ids))
            num_new = sum([len(choice.token_ids or ()) for choice in chunk.choices])
            if active.num_generated + num_new > active.command.max_tokens:
                return vllm.UpstreamError(f"more than the {active.command.max_tokens} tokens asked for")
            for choice in chunk.choices:
                self._take(active, choice, final)
        if final.finish_reason is None:
            return vllm.UpstreamError("the stream ended without an end", 500)
        return None

    def _take(self, active: Active, choice: vllm.Choice, final: Output) -> None:
        token_ids = choice.token_ids or []
        if token_ids:
            self._count(active, len(token_ids))
            active.generated += pack_tokens(token_ids)
        if choice.finish_reason in _ENDS:
            final.finish_reason = _ENDS[choice.finish_reason]
            self._finished(active)
        elif choice.finish_reason is not None and active.is_aborted:
            final.finish_reason = "abort"
        if not token_ids:
            return
        seq = active.seq - len(token_ids)
        num_top = active.command.sampling.logprobs
        output = Output(active.command.req_id, active.command.attempt, seq, pack_tokens(token_ids))
        if num_top is not None:
            output.logprobs = vllm.token_logprobs(choice, num_top)
        if active.num_generated == len(token_ids):
            output.guessed_cached_tokens = active.num_guessed
        self._reporter.add(output)

    def _count(self, active: Active, num_new: int) -> None:
        """Note what new tokens show of the engine's speed, and that the prompt is computed if they are the first."""
        if active.generated:
            self._reporter.decoded(num_new)
            return
        num_prompt = num_tokens(active.command.token_ids)
        self._reporter.prefilled(max(1, num_prompt - active.num_guessed), active.sent_at)
        self._cached.computed(active.command.prefix_hashes)

    def _finished(self, active: Active) -> None:
        """Note what the answer has left in the upstream's cache: all but its last token was computed."""
        command = active.command
        token_ids = command.token_ids + bytes(active.generated)
        parent = command.prefix_hashes[-HASH_BYTES:] or self._cached.root
        num_hashed = len(command.prefix_hashes) // HASH_BYTES * self._cached.block_size * TOKEN_BYTES
        hashes = command.prefix_hashes + extend_chain(
            parent, command.namespace, token_ids[num_hashed:-TOKEN_BYTES], self._cached.block_size
        )
        self._cached.answered(hashes, num_tokens(command.token_ids), trio.current_time())
