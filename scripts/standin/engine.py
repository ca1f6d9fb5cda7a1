"""The stand-in's engine: what vLLM schedules and caches, over a model that only hashes. One per data-parallel rank.

What it does as vLLM does (v1 scheduler, one token budget per step): running requests first, then waiting ones while
sequences, tokens and blocks suffice; a prompt must fit as a whole; chunked prefill; the last running request is
preempted when blocks run out. Prompt blocks are findable from the step that schedules them, generated ones from the
step that computes their last token, so that the last drawn token is never in a block. The events of a step go out
before its tokens. What it leaves out: speculation, LoRA, several cache groups, and time itself, which is two options.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import trio

from scripts.standin.cache import Block, BlockCache, HashForm, hash_block
from scripts.standin.events import EventPublisher

FinishReason = Literal["stop", "length", "abort", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
_MODULUS = (1 << 61) - 1
_MAX_UNREAD_STEPS = 1 << 16  # a request's steps nobody has read: more than any context here has tokens


@dataclass(slots=True)
class EngineOptions:
    """Sizes and speed. `step_ms` and `prefill_tokens_per_s` may change while it runs."""

    block_size: int = 32
    num_blocks: int = 400  # the null block counts, as in `vllm:cache_config_info`
    max_model_len: int = 2048
    vocab_size: int = 4096
    eos_token_ids: tuple[int, ...] = (4, 0)  # the tokenizer's, then what else the model's folder names
    eos_per_mille: int = 0  # how often the model wants to end, out of 1000 tokens
    max_num_seqs: int = 32
    max_step_tokens: int = 2048
    step_ms: float = 1.0
    prefill_tokens_per_s: float = math.inf
    hash_form: HashForm = "int"
    holds_grammars: bool = True

    def __post_init__(self) -> None:
        if (self.num_blocks - 1) * self.block_size < self.max_model_len:
            raise ValueError(
                f"{self.num_blocks} blocks of {self.block_size} (one is the null block) do not hold one request of "
                f"{self.max_model_len} tokens; raise num_blocks or lower max_model_len"
            )


@dataclass(frozen=True, slots=True)
class Sampling:
    """What of vLLM's SamplingParams changes which tokens come, or when they end."""

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    forced: tuple[int, ...] = ()  # the first tokens of the answer


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of one request, or its end, or why the engine failed it."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


class TokenModel:
    """The next token as a pure function of all tokens before it; sampled ones also of seed and position in the answer.

    So greedy answers go on identically from prompt + delivered tokens on another server, and sampled ones do not, as
    on vLLM. A penalty bars what this answer has said already, so that it too forgets at a hand-over.
    """

    def __init__(self, options: EngineOptions, prompt: Sequence[int], sampling: Sampling) -> None:
        self._options = options
        self._sampling = sampling
        self._said: set[int] = set()
        self._num_drawn = 0
        self._state = 1
        for token_id in prompt:
            self._take(token_id)

    def draw(self) -> int:
        """Return the next token, which becomes part of what the one after it depends on."""
        sampling, options = self._sampling, self._options
        value = self._state
        if sampling.temperature > 0:
            value = (value * 31 + sampling.seed * 7919 + self._num_drawn) % _MODULUS
        value = value * 0x9E3779B97F4A7C15 % (1 << 64) >> 13
        if self._num_drawn < len(sampling.forced):
            return self._drawn(sampling.forced[self._num_drawn])
        may_end = self._num_drawn >= sampling.min_tokens
        if may_end and value // options.vocab_size % 1000 < options.eos_per_mille:
            token_id = options.eos_token_ids[value % len(options.eos_token_ids)]
        else:
            token_id = value % options.vocab_size
            barred = set(options.eos_token_ids)
            if sampling.presence_penalty or sampling.frequency_penalty:
                barred |= self._said
            while token_id in barred or (not may_end and token_id in sampling.stop_token_ids):
                token_id = (token_id + 1) % options.vocab_size
        return self._drawn(token_id)

    def _drawn(self, token_id: int) -> int:
        self._said.add(token_id)
        self._num_drawn += 1
        self._take(token_id)
        return token_id

    def _take(self, token_id: int) -> None:
        self._state = (self._state * 1_000_003 + token_id + 1) % _MODULUS


@dataclass(eq=False, slots=True)
class Request:
    """One sequence. `steps` gives its outputs; the last has a finish reason. `is_aborted` is set from outside."""

    request_id: str
    token_ids: list[int]  # prompt, then what was drawn
    sampling: Sampling
    salt: str | None
    session_id: str | None
    model: TokenModel
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    num_cached_tokens: int = 0  # as first scheduled
    num_preemptions: int = 0
    is_aborted: bool = False
    table: list[Block] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    outbox: trio.MemorySendChannel[Output] = field(init=False)
    steps: trio.MemoryReceiveChannel[Output] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.outbox, self.steps = trio.open_memory_channel(_MAX_UNREAD_STEPS)

    @property
    def num_drawn(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def hash_full_blocks(self, block_size: int) -> None:
        """Bring `hashes` up to the tokens that are there."""
        for index in range(len(self.hashes), len(self.token_ids) // block_size):
            block = self.token_ids[index * block_size : (index + 1) * block_size]
            self.hashes.append(hash_block(self.hashes[-1] if self.hashes else None, block, self.salt))


@dataclass(slots=True)
class EngineCounters:
    """Lifetime counters, named as the metrics that show them."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    iterations: int = 0
    iteration_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))


class Engine:
    """Owns its cache and its requests; `run` steps while there is work and it is not hung."""

    def __init__(self, options: EngineOptions, publisher: EventPublisher | None) -> None:
        self.options = options
        self.counters = EngineCounters()
        self.cache = BlockCache(options.num_blocks, options.block_size, options.hash_form)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.is_hung = False
        self.gauges = (0, 0, 0.0)  # running, waiting, cache usage: as of the last step, which is what metrics show
        self._publisher = publisher
        self._has_news = trio.Event()

    def submit(self, request: Request) -> None:
        self.waiting.append(request)
        self._has_news.set()

    def abort(self, request: Request, *, with_last_token: bool = False) -> None:
        """End a request from outside, as the API process does: its stream ends now, its blocks at the next step.

        `with_last_token`: the end comes with one more token, as when the whole server is told to stop.
        """
        if not request.is_aborted:
            request.is_aborted = True
            last = (request.model.draw(),) if with_last_token and request.num_drawn else ()
            self._emit(request, last, "abort")
            self._has_news.set()

    def fail_all(self) -> None:
        """What the API process does when the engine has died: every stream gets an error."""
        for request in list(self.unfinished()):
            if not request.is_aborted:
                request.is_aborted = True
                self._emit(request, (), "error")

    def set_hung(self, is_hung: bool) -> None:
        """Stop or go on between two steps, as SIGSTOP and SIGCONT of the engine's process."""
        self.is_hung = is_hung
        self._has_news.set()

    def unfinished(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    async def run(self) -> None:
        while True:
            if self.is_hung or not (self.running or self.waiting):
                self._has_news = trio.Event()
                await self._has_news.wait()
                continue
            scheduled = self._schedule()
            num_prefill = sum(count for request, count in scheduled if request.num_computed < request.num_prompt_tokens)
            await trio.sleep(self.options.step_ms / 1000 + num_prefill / self.options.prefill_tokens_per_s)
            while self.is_hung:
                self._has_news = trio.Event()
                await self._has_news.wait()
            self._finish_step(scheduled)

    # ---- a step --------------------------------------------------------------------------------------------------

    def _schedule(self) -> list[tuple[Request, int]]:
        """Decide what the next step computes: requests with their number of tokens, blocks allocated and stored."""
        self._drop_aborted()
        budget = self.options.max_step_tokens
        scheduled: list[tuple[Request, int]] = []
        # 1. What runs goes on; who came last gives way.
        index = 0
        num_preempted = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            count = min(len(request.token_ids) - request.num_computed, budget)
            while request in self.running and not self._allocate(request, count):
                self._preempt(self.running[-1])
                num_preempted += 1
            if request not in self.running:
                break
            scheduled.append((request, count))
            budget -= count
            index += 1
        # 2. Who waits comes in, in order, while sequences, tokens and blocks suffice.
        while self.waiting and budget and not num_preempted and len(self.running) < self.options.max_num_seqs:
            count = self._admit(self.waiting[0], budget)
            if count == 0:
                break
            scheduled.append((self.waiting.popleft(), count))
            budget -= count
        return scheduled

    def _admit(self, request: Request, budget: int) -> int:
        """Try to begin a waiting request; return how many of its tokens the step computes, 0 if it must wait."""
        size = self.options.block_size
        request.hash_full_blocks(size)
        found = self.cache.match(request.hashes, len(request.token_ids))
        num_found_tokens = len(found) * size
        count = min(len(request.token_ids) - num_found_tokens, budget)
        num_idle_found = sum(block.num_references == 0 for block in found)
        num_whole = math.ceil(len(request.token_ids) / size) - len(found) + num_idle_found
        num_promised = sum(self._num_missing_blocks(other) for other in self.running)
        num_now = math.ceil((num_found_tokens + count) / size) - len(found) + num_idle_found
        if num_whole > self.cache.num_free or num_now > self.cache.num_free - num_promised:
            return 0
        self.cache.hold(found)
        request.table, request.num_computed = found, num_found_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_found_tokens
            self.counters.prefix_cache_queries += len(request.token_ids)
            self.counters.prefix_cache_hits += num_found_tokens
        self._allocate(request, count)
        self.running.append(request)
        return count

    def _num_missing_blocks(self, request: Request) -> int:
        """Blocks that a prompt in chunks will still need."""
        return max(0, math.ceil(request.num_prompt_tokens / self.options.block_size) - len(request.table))

    def _allocate(self, request: Request, count: int) -> bool:
        """Give `request` room for `count` more tokens and store the blocks they fill; False if there is no room."""
        size = self.options.block_size
        num_new = math.ceil((request.num_computed + count) / size) - len(request.table)
        if num_new > self.cache.num_free:
            return False
        request.table += self.cache.allocate(max(0, num_new))
        request.hash_full_blocks(size)
        first, end = request.num_computed // size, (request.num_computed + count) // size
        if end > first:
            told = {"salt": request.salt, "session_id": request.session_id}
            self.cache.store(request.table, first, end, request.hashes, request.token_ids, **told)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.appendleft(request)

    def _finish_step(self, scheduled: list[tuple[Request, int]]) -> None:
        """Draw tokens where all that is known is computed, tell the events, then the tokens."""
        num_tokens = 0
        outputs: list[tuple[Request, int, FinishReason | None]] = []
        for request, count in scheduled:
            request.num_computed += count
            if request.is_aborted or request.num_computed < len(request.token_ids):
                continue
            if request.num_drawn == 0:
                num_tokens += request.num_prompt_tokens
                self.counters.prompt_tokens += request.num_prompt_tokens
                self.counters.prompt_tokens_cached += request.num_cached_tokens
            token_id = request.model.draw()
            request.token_ids.append(token_id)
            num_tokens += 1
            self.counters.generation_tokens += 1
            reason = self._reason_to_end(request, token_id)
            if reason is not None:
                self.running.remove(request)
                self._release(request)
            outputs.append((request, token_id, reason))
        self._drop_aborted()
        events = self.cache.take_events()
        if events and self._publisher is not None:
            self._publisher.publish(events)
        if outputs:
            self.counters.iterations += 1
            self.counters.iteration_tokens += num_tokens
        self.gauges = (len(self.running), len(self.waiting), self.cache.usage)
        for request, token_id, reason in outputs:
            self._emit(request, (token_id,), reason)

    def _reason_to_end(self, request: Request, token_id: int) -> FinishReason | None:
        sampling = request.sampling
        if request.num_drawn >= sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return "stop"
            if token_id in self.options.eos_token_ids and not sampling.ignore_eos:
                return "stop"
        if request.num_drawn >= sampling.max_tokens or len(request.token_ids) >= self.options.max_model_len:
            return "length"
        return None

    def _drop_aborted(self) -> None:
        for request in [request for request in self.unfinished() if request.is_aborted]:
            if request in self.running:
                self.running.remove(request)
                self._release(request)
            else:
                self.waiting.remove(request)
        if not (self.running or self.waiting):
            self.gauges = (0, 0, self.cache.usage)

    def _release(self, request: Request) -> None:
        self.cache.free(request.table)
        request.table, request.num_computed = [], 0

    def _emit(self, request: Request, token_ids: tuple[int, ...], reason: FinishReason | None) -> None:
        if reason is not None:
            self.counters.finished[reason] += 1
        stop_reason = None
        if reason == "stop" and token_ids[-1] != self.options.eos_token_ids[0]:
            stop_reason = token_ids[-1]
        num_cached = request.num_cached_tokens if request.num_drawn else 0  # not known before the first token
        output = Output(token_ids, num_cached, reason, stop_reason)
        try:
            request.outbox.send_nowait(output)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.is_aborted = True  # its client has gone
