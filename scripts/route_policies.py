"""How others route: the rules of the routing lab's peers, over workers that compute first come, first served.

Every rule sees the workers as they will be after what was already sent to them, exactly: the wait, and the cache. Only
sglang's rule goes by what it believes itself, as it does at home.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from replay_cache import Request
from route_peers import FifoWorker, Policy, num_leading
from xxhash import xxh3_64_intdigest


class RoundRobin:
    """Each worker in its turn."""

    def __init__(self) -> None:
        self._next = -1

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        self._next = (self._next + 1) % len(workers)
        return self._next


class LeastInFlight:
    """The worker with the fewest unfinished requests."""

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        return _least(_in_flight(workers, now))


class PowerOfTwo:
    """The one with fewer unfinished requests of two drawn by lot."""

    def __init__(self) -> None:
        self._rng = Random(2)

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        one, two = self._rng.sample(range(len(workers)), 2) if len(workers) > 1 else (0, 0)
        return min(one, two, key=lambda i: (workers[i].num_in_flight(now), i))


class ConsistentHash:
    """Where the hash of the first `num_blocks` blocks says (rendezvous hashing)."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        block_ids = request.block_ids[: self._num_blocks]  # the last one stands for all before it
        key = b"%d" % (block_ids[-1] if block_ids else 0)
        return max(range(len(workers)), key=lambda i: xxh3_64_intdigest(b"%d/%s" % (i, key)))


class Overlap:
    """The worker with the longest cached prefix, whatever its load."""

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        return _least([-worker.num_cached(request) for worker in workers], _in_flight(workers, now))


class WaitAndMiss:
    """The least wait plus `price` times the time to compute what is not cached. Ties: the fewest unfinished."""

    def __init__(self, price: float) -> None:
        self._price = price

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        costs = [w.wait_s(now) + self._price * w.miss_s(request, w.num_cached(request)) for w in workers]
        return _least([round(cost, 9) for cost in costs], _in_flight(workers, now))


class Dynamo:
    """NVIDIA Dynamo's KV router at its defaults: prefill blocks outstanding there and new ones, plus the blocks that
    would be active there; the least of it (temperature 0)."""

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        num_blocks = len(request.block_ids)
        costs = []
        for worker in workers:
            num_new = num_blocks - worker.num_cached(request)
            num_inactive = num_blocks - worker.num_active(request, now)
            costs.append(worker.num_outstanding(now) + num_new + worker.num_active_blocks + num_inactive)
        return _least(costs, _in_flight(workers, now))


class Sglang:
    """SGLang's cache_aware rule at its defaults.

    While the numbers of unfinished requests differ by more than `abs_threshold` and by more than the factor
    `rel_threshold`, the worker with the fewest. Else the one whose tree has the longest prefix of the request, if that
    is more than `cache_threshold` of it; else the one with the smallest tree. The trees are the router's own: it is not
    told of evictions.
    """

    def __init__(self, cache_threshold: float = 0.3, abs_threshold: int = 64, rel_threshold: float = 1.5) -> None:
        self._cache_threshold = cache_threshold
        self._abs_threshold, self._rel_threshold = abs_threshold, rel_threshold
        self._trees: list[set[int]] = []

    def choose(self, request: Request, workers: Sequence[FifoWorker], now: float) -> int:
        trees = self._trees = self._trees or [set() for _ in workers]
        loads = _in_flight(workers, now)
        most, fewest = max(loads), min(loads)
        if most - fewest > self._abs_threshold and most > fewest * self._rel_threshold:
            chosen = _least(loads)
        else:
            block_ids = request.block_ids
            found = [num_leading(block_ids, tree) for tree in trees]
            best = _least([-num for num in found], loads)
            is_found = found[best] > self._cache_threshold * len(block_ids)
            chosen = best if is_found else _least([len(tree) for tree in trees])
        trees[chosen].update(request.block_ids)
        return chosen


_NAMES: dict[str, Callable[[], Policy]] = {
    "round-robin": RoundRobin,
    "least-in-flight": LeastInFlight,
    "power-of-two": PowerOfTwo,
    "overlap": Overlap,
    "dynamo": Dynamo,
    "sglang": Sglang,
}
_FORMS: dict[str, Callable[[int], Policy]] = {r"hash-(\d+)": ConsistentHash, r"wait\+(\d+)miss": WaitAndMiss}
PEERS = [*_NAMES, "hash-K", "wait+Cmiss"]
"""Names of the rules; K blocks are hashed, a miss costs C times its time."""


def make_policy(name: str) -> Policy | None:
    """Return a fresh policy of that name, None if there is none."""
    if name in _NAMES:
        return _NAMES[name]()
    for form, make in _FORMS.items():
        if (match := re.fullmatch(form, name)) and int(match[1]) > 0:
            return make(int(match[1]))
    return None


def _in_flight(workers: Sequence[FifoWorker], now: float) -> list[int]:
    return [worker.num_in_flight(now) for worker in workers]


def _least(values: Sequence[float], ties: Sequence[float] = ()) -> int:
    """Return the index of the least value; among equals of the least of `ties`, then the first."""
    return min(range(len(values)), key=lambda i: (values[i], ties[i] if ties else 0, i))
