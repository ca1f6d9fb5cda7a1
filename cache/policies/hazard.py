"""When will a prefix be used again: a hazard rate over its idle time, learned online from what has been seen.

    log(rate of reuse at age a) =
        common + base[bin(a)] + sum over features of share * (level[feature] + level[feature, zone(a)])

is fitted by Poisson regression, one observation per visit and age zone (reused or not, after so long), in one pass: the
weights have independent Gaussian beliefs, and an observation moves each in proportion to its variance, which shrinks
by what was learned (a diagonal extended Kalman filter, as in Microsoft's AdPredictor). So there is no learning rate, a
feature that has told nothing yet weighs nothing, and the cost does not depend on the history.

Knows nothing of blocks. What is built in is only what anybody would expect: that the rate falls with age, so that an
untaught model orders prefixes as LRU does, and what `believe` is told.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp, log, log2, sqrt

ZONE_EDGES = (0.0, *(float(2**i) for i in range(13)))  # seconds; 13 zones, up to 4096 s
NUM_ZONES = len(ZONE_EDGES) - 1
BIN_EDGES = (0.0, 0.5, *(sqrt(2.0**i) for i in range(25)))  # two bins per zone
NUM_BINS = len(BIN_EDGES) - 1
NUM_NODES = 12

Weights = list[float]
"""Of one node of one feature: mean for all ages, means per zone, variance for all ages, variances per zone."""

Active = list[tuple[Weights, float]]
"""What describes one visit: weights and their shares, 1 per feature."""

_VARIANCES = 1 + NUM_ZONES
_BASE_VARIANCE = 1.0
_COMMON_VARIANCE = 4.0
_PRIOR_S = 10.0  # the untaught rate is half of 1 / (age + this)
_LEVEL_VARIANCE = 0.3
_ZONE_VARIANCE = 0.1
_MIN_VARIANCE = 3e-3  # never certain: traffic changes
_MIN_RESIDUAL = -3.0  # one surprise may not turn everything over
_MAX_LOG_RATE = 3.0


def zone_of(age_s: float) -> int:
    """Return the zone of an age of at least 0 seconds."""
    return min(int(log2(age_s)) + 1, NUM_ZONES - 1) if age_s >= 1.0 else 0


def bin_of(age_s: float) -> int:
    """Return the bin of an age of at least 0 seconds."""
    if age_s < 1.0:
        return age_s >= 0.5
    return min(int(2.0 * log2(age_s)) + 2, NUM_BINS - 1)


def next_edge(age_s: float) -> float:
    """Return the age at which the next bin begins; past the last one, some time later."""
    i = bisect_right(BIN_EDGES, age_s)
    return BIN_EDGES[i] if i <= NUM_BINS else 1.4 * age_s


class HazardModel:
    """Rates of reuse for visits described by `num_features` features, each a quantity or one of a few kinds."""

    def __init__(self, num_features: int) -> None:
        self._base = [log(0.5 / (edge + _PRIOR_S)) for edge in BIN_EDGES[:-1]]
        self._base_variance = [_BASE_VARIANCE] * NUM_BINS
        self._weights: list[list[Weights]] = [
            [[0.0] * _VARIANCES + [_LEVEL_VARIANCE] + [_ZONE_VARIANCE] * NUM_ZONES for _ in range(NUM_NODES)]
            for _ in range(num_features)
        ]
        # What all visits have in common at all ages: what is learned of ages seen often is believed of the others.
        self._common: Active = [([0.0] * _VARIANCES + [_COMMON_VARIANCE] + [0.0] * NUM_ZONES, 1.0)]

    def amount(self, feature: int, value: float | None) -> Active:
        """Describe a quantity >= 0, on a scale with a node at every fourth power of two less 1; None: not known."""
        nodes = self._weights[feature]
        if value is None:
            return [(nodes[0], 1.0)]
        x = min(0.5 * log2(1.0 + value), NUM_NODES - 2.001)
        node = int(x)
        share = x - node
        return [(nodes[1 + node], 1.0 - share), (nodes[2 + node], share)]

    def kind(self, feature: int, value: int) -> Active:
        """Describe one of at most 12 kinds (more share weights)."""
        return [(self._weights[feature][value % NUM_NODES], 1.0)]

    def believe(self, feature: int, value: int, mean: float) -> None:
        """Start with `mean` for what kind `value` does to the logarithm of the rate."""
        self._weights[feature][value][0] = mean

    def believe_in_rhythm(self, feature: int) -> None:
        """Start with the belief that the quantity `feature`, in seconds, is a likely age of reuse: half as much again
        there, and less by a factor of e^(1/4) for every factor of two beside it."""
        for node in range(1, NUM_NODES):
            log_value = 2 * (node - 1)
            for zone in range(NUM_ZONES):
                self._weights[feature][node][1 + zone] = max(0.5 - 0.25 * abs(zone - 0.5 - log_value), -1.0)

    def density(self, active: Active, age_s: float, delay_s: float = 0.0) -> float:
        """Return the highest P(reused within T) / E[time idle within T] over all T, from `age_s` on, per second.

        What keeping it earns per second of room, with the best moment to give up: the Gittins index, published for
        caches as hit density (LHD, NSDI 2018).
        """
        zone = zone_of(age_s)
        sums = [0.0] * (NUM_ZONES - zone)
        level = 0.0
        for weights, share in active + self._common:
            level += share * weights[0]
            sums = [x + share * y for x, y in zip(sums, weights[1 + zone : _VARIANCES], strict=True)]
        base = self._base
        start, first = age_s, bin_of(age_s)
        left, idle_s, best = 1.0, delay_s, 0.0
        for i in range(first, NUM_BINS):
            x = base[i] + level + sums[(i >> 1) - zone]
            rate = exp(x if x < _MAX_LOG_RATE else _MAX_LOG_RATE)
            end = BIN_EDGES[i + 1]
            width = end - start
            if width <= 0.0:  # older than all that is told apart: as at the end, and falling with age
                return rate * end / age_s
            start = end
            survival = left * exp(-rate * width)
            idle_s += 0.5 * (left + survival) * width
            left = survival
            earned = 1.0 - left
            if earned > best * idle_s:
                best = earned / idle_s
        return best

    def learn(self, active: Active, start_s: float, end_s: float, reused: bool) -> None:
        """Learn that a visit described by `active` was idle from age `start_s` to `end_s`, both in one zone, and
        whether it was reused then."""
        active = active + self._common
        zone = zone_of(start_s)
        mean_at, level_at, spread_at = 1 + zone, _VARIANCES, _VARIANCES + 1 + zone
        x = variance = 0.0
        for weights, share in active:
            x += share * (weights[0] + weights[mean_at])
            variance += share * share * (weights[level_at] + weights[spread_at])
        base, base_variance = self._base, self._base_variance
        low, high = 2 * zone, 2 * zone + 1
        border = BIN_EDGES[high]
        early = exp(min(base[low] + x, _MAX_LOG_RATE)) * (min(end_s, border) - start_s)
        late = exp(min(base[high] + x, _MAX_LOG_RATE)) * (end_s - border) if end_s > border else 0.0
        expected = early + late
        variance += 0.5 * (base_variance[low] + base_variance[high])
        gain = 1.0 / (1.0 + expected * variance)
        step = max((1.0 if reused else 0.0) - expected, _MIN_RESIDUAL) * gain
        shrink = expected * gain
        for weights, share in active:
            change = weights[level_at] * share
            weights[0] += change * step
            weights[level_at] = max(weights[level_at] - change * change * shrink, _MIN_VARIANCE)
            change = weights[spread_at] * share
            weights[mean_at] += change * step
            weights[spread_at] = max(weights[spread_at] - change * change * shrink, _MIN_VARIANCE)
        in_late = reused and end_s >= border
        for i, seen, e in ((low, reused and not in_late, early), (high, in_late, late)):
            change = base_variance[i]
            base[i] += change * max((1.0 if seen else 0.0) - e, _MIN_RESIDUAL) * gain
            base_variance[i] = max(change - change * change * e * gain, _MIN_VARIANCE)
