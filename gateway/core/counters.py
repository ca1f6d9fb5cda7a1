"""What the core adds up while it works. `statistics` makes values of it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class HistogramStatistics(msgspec.Struct, frozen=True):
    """`counts[i]` values were at most `LATENCY_BUCKETS_S[i]` and above the one before; the last count is above all."""

    counts: tuple[int, ...]
    sum: float


class Histogram:
    """Counts values in the buckets of latencies."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(LATENCY_BUCKETS_S, value)] += 1
        self._sum += value

    def statistics(self) -> HistogramStatistics:
        """Return the counts so far."""
        return HistogramStatistics(tuple(self._counts), self._sum)


@dataclass(slots=True)
class ModelCounters:
    """Since the start. `ttft_s` from arrival to the first token, `queue_s` from arrival to the first dispatch."""

    ttft_s: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class WorkerCounters:
    """Since the worker joined; fields of `WorkerInfo`. Prompt, cached and predicted tokens are summed over the attempts
    that said how much of their prompt was cached."""

    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    predicted_cached_tokens: int = 0
    mispredicted_tokens: int = 0  # sum of |predicted - cached|
    drift_tokens: int = 0  # of those that the index was wrong about, without any reason
    num_stale_outputs: int = 0


class Totals(msgspec.Struct):
    """Since the start. `num_lost`: workers by cause. `num_stale_outputs` came for attempts that are over."""

    num_dispatches: int = 0
    num_redispatches: int = 0
    num_poisoned: int = 0
    num_stale_outputs: int = 0
    num_resyncs: int = 0
    num_refused_workers: int = 0
    num_lost: dict[str, int] = {}
