"""Workers that compute first come, first served, for the rules of others; and the bounds of one pooled cache.

A worker prefills one prompt at a time, decodes beside it, both undisturbed, and has `MAX_RUNNING` slots; a prompt takes
its slot when its prefill begins. Its order never changes, so everything is known when a request is sent: when it
starts, what it will find cached, when it ends. Running requests take no room in the cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Protocol

from replay_cache import Request, Trace, optimum_hits
from route_arrivals import PREFILL_TOKENS_PER_S, Arrival

from kvasir.cache.block_table import BlockTable
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.tokens import TOKEN_BYTES

DECODE_S = 0.03
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one arrival: which worker computed it, how many of its tokens were found cached, when its first
    token came. `worker` None: it was refused."""

    arrival: Arrival
    worker: int | None
    num_hit_tokens: int
    ttft_s: float

    @property
    def num_computed(self) -> int:
        """Prompt tokens that were not found: one at least."""
        return max(1, self.arrival.request.num_tokens - self.num_hit_tokens)


class LabCache:
    """The product's cache, holding a trace's blocks. What a request uses is free again at once."""

    def __init__(self, trace: Trace, num_blocks: int) -> None:
        self._trace, self._num_blocks = trace, num_blocks
        self.cache = PrefixCache(num_blocks, 1)

    def num_cached(self, request: Request) -> int:
        """Return how many leading blocks of `request` are cached."""
        return self.cache.probe(self._trace.chain(request), len(request.block_ids))[0]

    def use(self, request: Request) -> int:
        """Find what is cached of `request`, keep all of it from now on; return how many blocks were found."""
        chain = self._trace.chain(request)
        length = min(len(chain), self._num_blocks)
        if length < len(chain):
            del chain.hashes[length:]
            chain.tokens = chain.tokens[: length * TOKEN_BYTES]
        table = BlockTable()
        num_found = self.cache.match(chain, table, length)
        allocated = self.cache.allocate(chain, table, length - num_found)
        assert allocated is not None
        self.cache.insert(chain, table, length)
        self.cache.free(table)
        return num_found


class FifoWorker:
    """See the module. Questions about `now` must not go back in time."""

    def __init__(self, trace: Trace, num_blocks: int) -> None:
        self._cache = LabCache(trace, num_blocks)
        self._block_tokens = trace.block_tokens
        self._free_at = 0.0  # when its last prefill ends
        self._running: list[float] = []  # when they end, a heap: of those that have begun when the last one begins
        self._unfinished: list[tuple[float, int, list[int]]] = []  # end, serial, blocks: a heap
        self._prefills: deque[tuple[float, int]] = deque()  # end and uncached blocks, in order
        self._num_outstanding = 0
        self._active: dict[int, int] = {}
        self._num_sent = 0

    def num_in_flight(self, now: float) -> int:
        self._finish(now)
        return len(self._unfinished)

    def num_cached(self, request: Request) -> int:
        return self._cache.num_cached(request)

    def miss_s(self, request: Request, num_cached: int) -> float:
        """Return how long the prefill takes when `num_cached` blocks are found."""
        return max(1, request.num_tokens - num_cached * self._block_tokens) / PREFILL_TOKENS_PER_S

    def wait_s(self, now: float) -> float:
        """Return how long a request sent now waits for its prefill to begin."""
        return self._next_start(now) - now

    def num_outstanding(self, now: float) -> int:
        """Return the uncached blocks of the prompts whose prefill has not ended."""
        while self._prefills and self._prefills[0][0] <= now:
            self._num_outstanding -= self._prefills.popleft()[1]
        return self._num_outstanding

    @property
    def num_active_blocks(self) -> int:
        """Distinct blocks of unfinished requests."""
        return len(self._active)

    def num_active(self, request: Request, now: float) -> int:
        """Return how many leading blocks of `request` are active."""
        self._finish(now)
        return num_leading(request.block_ids, self._active)

    def send(self, request: Request, now: float) -> tuple[int, float]:
        """Take a request; return (tokens found cached, time until its first token)."""
        num_found = self._cache.use(request)
        start = self._next_start(now)
        while self._running and self._running[0] <= start:
            heappop(self._running)
        end = self._free_at = start + self.miss_s(request, num_found)
        finish = end + DECODE_S * request.num_output_tokens
        heappush(self._running, finish)
        self._num_sent += 1
        heappush(self._unfinished, (finish, self._num_sent, request.block_ids))
        num_new = len(request.block_ids) - num_found
        self._prefills.append((end, num_new))
        self._num_outstanding += num_new
        for block_id in request.block_ids:
            self._active[block_id] = self._active.get(block_id, 0) + 1
        return min(num_found * self._block_tokens, request.num_tokens), end - now

    def _next_start(self, now: float) -> float:
        start = max(now, self._free_at)
        num_over = sum(end > start for end in self._running) - MAX_RUNNING + 1
        return start if num_over <= 0 else max(start, sorted(e for e in self._running if e > start)[num_over - 1])

    def _finish(self, now: float) -> None:
        active = self._active
        while self._unfinished and self._unfinished[0][0] <= now:
            for block_id in heappop(self._unfinished)[2]:
                if active[block_id] == 1:
                    del active[block_id]
                else:
                    active[block_id] -= 1


class Policy(Protocol):
    """Chooses a worker for each request, in the order of arrival."""

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int: ...


def run_peer(
    trace: Trace, arrivals: Sequence[Arrival], policy: Policy, num_workers: int, num_blocks: int
) -> list[Served]:
    """Route every arrival with `policy` to workers of `num_blocks` blocks each."""
    workers = [FifoWorker(trace, num_blocks) for _ in range(num_workers)]
    served = []
    for arrival in arrivals:
        chosen = policy.choose(arrival.request, workers, arrival.time_s)
        served.append(Served(arrival, chosen, *workers[chosen].send(arrival.request, arrival.time_s)))
    return served


def run_pooled_lru(trace: Trace, arrivals: Sequence[Arrival], num_workers: int, num_blocks: int) -> list[Served]:
    """Serve all from one cache that all workers reach for free, first come, first served."""
    cache = LabCache(trace, num_blocks)
    return _run_pooled(trace, arrivals, [cache.use(arrival.request) for arrival in arrivals], num_workers)


def run_pooled_optimum(trace: Trace, arrivals: Sequence[Arrival], num_workers: int, num_blocks: int) -> list[Served]:
    """The same with the cache that knows the future: no rule has more hits."""
    hits = optimum_hits([arrival.request for arrival in arrivals], num_blocks)
    return _run_pooled(trace, arrivals, hits, num_workers)


def _run_pooled(trace: Trace, arrivals: Sequence[Arrival], hits: Sequence[int], num_workers: int) -> list[Served]:
    """One queue before all workers; each has slots of its own."""
    free = [(0.0, i) for i in range(num_workers)]  # a heap: when each worker can begin its next prefill
    running: list[list[float]] = [[] for _ in range(num_workers)]
    served = []
    for arrival, num_found in zip(arrivals, hits, strict=True):
        request = arrival.request
        free_at, i = free[0]
        start = max(arrival.time_s, free_at)
        num_hit = min(num_found * trace.block_tokens, request.num_tokens)
        end = start + max(1, request.num_tokens - num_hit) / PREFILL_TOKENS_PER_S
        heappush(running[i], end + DECODE_S * request.num_output_tokens)
        while running[i] and running[i][0] <= end:
            heappop(running[i])
        is_full = len(running[i]) >= MAX_RUNNING
        heapreplace(free, (max(end, heappop(running[i])) if is_full else end, i))
        served.append(Served(arrival, i, num_hit, end - arrival.time_s))
    return served


def num_leading(block_ids: Sequence[int], members: Container[int]) -> int:
    """Return how many leading ids are among `members`, which hold every id's predecessors too."""
    return bisect_left(block_ids, True, key=lambda block_id: block_id not in members)
