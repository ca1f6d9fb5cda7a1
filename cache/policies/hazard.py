"""When will a prefix be used again: a hazard rate over its idle time, learned online from what has been seen.

log(rate of reuse at age a) = base[bin(a)] + sum over features f of coefficient_f * (level[f] + zone[f, zone(a)])

is fitted by Poisson regression, one observation per visit and age zone (reused or not, after so long), in one pass: the
weights have independent Gaussian beliefs, and an observation moves each in proportion to its variance, which shrinks
by what was learned (a diagonal extended Kalman filter, as in Microsoft's AdPredictor). So there is no learning rate, a
feature that has told nothing yet weighs nothing, and the cost does not depend on the history.

Knows nothing of blocks. Every weight is learned on the spot; the only knowledge built in is that the rate falls with
age, which makes an untaught model order prefixes as LRU does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from math import exp, log, log2

Active = list[tuple[int, float]]
"""The features of one visit: (slot of the weight, coefficient)."""

ZONE_EDGES = (0.0, *(2.0**i for i in range(1, 13)))  # seconds; 12 zones, up to 4096 s
NUM_ZONES = len(ZONE_EDGES) - 1
BIN_EDGES = (0.0, 1.0, *(2.0 ** (i / 2) for i in range(2, 25)))  # two bins per zone
NUM_BINS = len(BIN_EDGES) - 1

_BASE_VARIANCE = 1.0
_LEVEL_VARIANCE = 0.3
_ZONE_VARIANCE = 0.1
_MIN_VARIANCE = 1e-4  # never certain: traffic changes
_MIN_RESIDUAL = -3.0  # one surprise may not turn everything over
_MAX_LOG_RATE = 3.0
_NUM_NODES = 12


def zone_of(age_s: float) -> int:
    return min(bisect_right(ZONE_EDGES, age_s) - 1, NUM_ZONES - 1)


def bin_of(age_s: float) -> int:
    return min(bisect_right(BIN_EDGES, age_s) - 1, NUM_BINS - 1)


class HazardModel:
    """Rates of reuse for visits described by `num_features` features."""

    def __init__(self, num_features: int) -> None:
        num_slots = num_features * _NUM_NODES
        self._base = [log(0.5 / (edge + 30.0)) for edge in BIN_EDGES[:-1]]
        self._base_variance = [_BASE_VARIANCE] * NUM_BINS
        self._mean = [[0.0] * (1 + NUM_ZONES) for _ in range(num_slots)]  # [level, zone 0, zone 1, ...] per slot
        self._variance = [[_LEVEL_VARIANCE] + [_ZONE_VARIANCE] * NUM_ZONES for _ in range(num_slots)]

    @staticmethod
    def amount(feature: int, value: float | None) -> Active:
        """A quantity >= 0 on a logarithmic scale with a node at every fourth power of two; None: not known."""
        first = feature * _NUM_NODES
        if value is None:
            return [(first, 1.0)]
        x = min(log2(1.0 + value) / 2, _NUM_NODES - 2.001)
        node = int(x)
        share = x - node
        return [(first + 1 + node, 1.0 - share), (first + 2 + node, share)]

    @staticmethod
    def kind(feature: int, value: int) -> Active:
        """One of at most 12 kinds."""
        return [(feature * _NUM_NODES + value % _NUM_NODES, 1.0)]

    def believe(self, slot: int, mean: float) -> None:
        """Start with `mean` for the level of `slot`: what a hint means before anything is learned."""
        self._mean[slot][0] = mean

    def density(self, active: Iterable[Active], age_s: float) -> float:
        """Return the highest P(reused within T) / E[time idle within T] over all T, from `age_s` on, per second.

        What keeping it earns per second of room, with the best moment to give up: the Gittins index, published for
        caches as hit density (LHD, NSDI 2018).
        """
        zone = zone_of(age_s)
        sums = [0.0] * (NUM_ZONES - zone)
        for features in active:
            for slot, share in features:
                mean = self._mean[slot]
                level = mean[0]
                sums = [x + share * (level + y) for x, y in zip(sums, mean[1 + zone :], strict=True)]
        base = self._base
        first = bin_of(age_s)
        start = min(age_s, BIN_EDGES[-1])
        survival, idle_s, best = 1.0, 0.0, 0.0
        for i in range(first, NUM_BINS):
            x = base[i] + sums[(i >> 1) - zone]
            rate = exp(x if x < _MAX_LOG_RATE else _MAX_LOG_RATE)
            width = BIN_EDGES[i + 1] - start
            start = BIN_EDGES[i + 1]
            if width > 0:
                left = survival * exp(-rate * width)
                idle_s += (survival + left) * 0.5 * width
                survival = left
                earned = (1.0 - survival) / idle_s
                if earned > best:
                    best = earned
        if first == NUM_BINS - 1 and age_s > BIN_EDGES[-1]:
            best = rate * BIN_EDGES[-1] / age_s
        return best

    def learn(self, active: list[Active], updated: list[Active], start_s: float, end_s: float, reused: bool) -> None:
        """Learn that a visit with the features `active` was idle from age `start_s` to `end_s`, both in one zone, and
        whether it was reused then. Only the weights in `updated` (and the base if that is `active`) change."""
        zone = zone_of(start_s)
        offset = 1 + zone
        means, variances = self._mean, self._variance
        x = variance = 0.0
        for features in active:
            for slot, share in features:
                mean, spread = means[slot], variances[slot]
                x += share * (mean[0] + mean[offset])
                variance += share * share * (spread[0] + spread[offset])
        base, base_variance = self._base, self._base_variance
        first = 2 * zone
        expected = []
        for i in (first, first + 1):
            width = min(end_s, BIN_EDGES[i + 1]) - max(start_s, BIN_EDGES[i])
            expected.append(exp(min(base[i] + x, _MAX_LOG_RATE)) * width if width > 0 else 0.0)
        total = expected[0] + expected[1]
        variance += 0.5 * (base_variance[first] + base_variance[first + 1])
        residual = max((1.0 if reused else 0.0) - total, _MIN_RESIDUAL)
        gain = 1.0 / (1.0 + total * variance)
        step = residual * gain
        shrink = total * gain
        for features in updated:
            for slot, share in features:
                mean, spread = means[slot], variances[slot]
                for i in (0, offset):
                    v = spread[i] * share
                    mean[i] += v * step
                    spread[i] = max(spread[i] - v * v * shrink, _MIN_VARIANCE)
        if updated is active:
            last = bin_of(end_s) if reused else -1
            if last > first + 1:
                last = first + 1
            for i, e in zip((first, first + 1), expected, strict=True):
                v = base_variance[i]
                base[i] += v * max((1.0 if i == last else 0.0) - e, _MIN_RESIDUAL) * gain
                base_variance[i] = max(v - v * v * e * gain, _MIN_VARIANCE)
