"""When will a prefix be used again: a hazard rate over its idle time, learned online from what has been seen.

    log(rate of reuse at age a) =
        base[bin(a)] + sum over nodes of share * (level[node] + level[node, zone(a)])

is fitted by Poisson regression, one observation per visit and age zone (reused or not, after so long), in one pass: the
weights have independent Gaussian beliefs, and an observation moves each in proportion to its variance, which shrinks
by what was learned (a diagonal extended Kalman filter, as in Microsoft's AdPredictor). So there is no learning rate, a
feature that has told nothing yet weighs nothing, and the cost does not depend on the history.

Knows nothing of blocks. What is built in is only what anybody would expect: that the rate falls with age, so that an
untaught model orders prefixes as LRU does, and what `believe` is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log2, sqrt

import numpy as np
from numpy.typing import NDArray

ZONE_EDGES = (0.0, *(float(2**i) for i in range(13)))  # seconds; 13 zones, up to 4096 s
NUM_ZONES = len(ZONE_EDGES) - 1
BIN_EDGES = (0.0, 0.5, *(sqrt(2.0**i) for i in range(25)))  # two bins per zone
NUM_BINS = len(BIN_EDGES) - 1

Floats = NDArray[np.float64]

Description = list[tuple[int, float]]
"""What describes something: nodes of features and their shares, 1 per feature."""

_NUM_NODES = 12  # of a feature
_BASE_VARIANCE = 1.0
_COMMON_VARIANCE = 4.0
_PRIOR_S = 10.0  # the untaught rate is half of 1 / (age + this)
_LEVEL_VARIANCE = 0.3
_ZONE_VARIANCE = 0.1
_MIN_VARIANCE = 3e-3  # never certain: traffic changes
_MIN_RESIDUAL = -3.0  # one surprise may not turn everything over
_MAX_LOG_RATE = 3.0


@dataclass(slots=True, eq=False)
class Row:
    """A description as the model reads it: which base; the places of its weights, the levels and then those of the
    first zone; per zone how far from there they are; and their shares."""

    base: int
    at: NDArray[np.intp]
    offsets: list[NDArray[np.intp]]
    shares: Floats


class HazardModel:
    """Rates of reuse for visits described by `num_features` features, each a quantity or one of a few kinds.

    `num_bases`: how many classes of visits there are whose rates have nothing in common but what features do to them.
    """

    def __init__(self, num_features: int, num_bases: int = 1) -> None:
        # The first nodes, one per base, are what all its visits have in common at all ages: what is learned of ages
        # seen often is believed of the others.
        self._first = [num_bases + i * _NUM_NODES for i in range(num_features)]
        self._num_nodes = num_bases + num_features * _NUM_NODES
        shape = (1 + NUM_ZONES, self._num_nodes)  # the levels, then what is added in each zone
        self._weights, self._variances = np.zeros(shape), np.full(shape, _ZONE_VARIANCE)
        self._variances[0] = _LEVEL_VARIANCE
        self._variances[:, :num_bases] = _MIN_VARIANCE
        self._variances[0, :num_bases] = _COMMON_VARIANCE
        self._flat_weights, self._flat_variances = self._weights.reshape(-1), self._variances.reshape(-1)  # views
        self._offsets: dict[int, list[NDArray[np.intp]]] = {}
        self._bases = [[log(0.5 / (edge + _PRIOR_S)) for edge in BIN_EDGES[:-1]] for _ in range(num_bases)]
        self._base_variances = [[_BASE_VARIANCE] * NUM_BINS for _ in range(num_bases)]

    def amount(self, feature: int, value: float | None) -> Description:
        """Describe a quantity >= 0, on a scale with a node at every fourth power of two less 1; None: not known."""
        first = self._first[feature]
        if value is None:
            return [(first, 1.0)]
        x = min(0.5 * log2(1.0 + value), _NUM_NODES - 2.001)
        node = int(x)
        share = x - node
        return [(first + 1 + node, 1.0 - share), (first + 2 + node, share)]

    def kind(self, feature: int, value: int) -> Description:
        """Describe one of at most 12 kinds (more share weights)."""
        return [(self._first[feature] + value % _NUM_NODES, 1.0)]

    def row(self, description: Description, base: int = 0) -> Row:
        """Return `description`, of a visit of the class `base`, in the form that is learned from and asked about."""
        nodes, shares = zip((base, 1.0), *description, strict=True)
        if len(nodes) not in self._offsets:
            stride = np.array([0] * len(nodes) + [self._num_nodes] * len(nodes))
            self._offsets[len(nodes)] = [zone * stride for zone in range(NUM_ZONES)]
        at = np.array([*nodes, *(self._num_nodes + node for node in nodes)])
        return Row(base, at, self._offsets[len(nodes)], np.array(shares + shares))

    def believe(self, feature: int, value: int, mean: float) -> None:
        """Start with `mean` for what kind `value` does to the logarithm of the rate."""
        self._weights[0, self._first[feature] + value] = mean

    def believe_in_rhythm(self, feature: int) -> None:
        """Start with the belief that the quantity `feature`, in seconds, is a likely age of reuse: half as much again
        there, and less by a factor of e^(1/4) for every factor of two beside it."""
        for node in range(1, _NUM_NODES):
            away = np.abs(np.arange(NUM_ZONES) - 0.5 - 2 * (node - 1))
            self._weights[1:, self._first[feature] + node] = np.maximum(0.5 - 0.25 * away, -1.0)

    def rates(self, rows: Sequence[Row]) -> list[list[float]]:
        """Return the rate of reuse of each in all age bins, per second."""
        described = np.zeros((len(rows), self._num_nodes))
        for i, row in enumerate(rows):
            num_nodes = len(row.at) >> 1
            described[i, row.at[:num_nodes]] = row.shares[:num_nodes]
        logs = (described @ (self._weights[0] + self._weights[1:]).T).repeat(2, axis=1)
        logs += [self._bases[row.base] for row in rows]
        rates: list[list[float]] = np.exp(np.minimum(logs, _MAX_LOG_RATE)).tolist()
        return rates

    def densities(self, rows: Sequence[Row], ages_s: Sequence[float]) -> list[float]:
        """Return of each the highest P(reused within T) / E[time idle within T] over all T, from its age on.

        What keeping it earns per second of room, with the best moment to give up: the Gittins index, published for
        caches as hit density (LHD, NSDI 2018).
        """
        return [_density(rates, age_s) for rates, age_s in zip(self.rates(rows), ages_s, strict=True)]

    def learn(self, row: Row, zone: int, end_s: float, reused: bool) -> None:
        """Learn that what `row` describes was idle in `zone` up to the age `end_s`, and whether it was reused then."""
        at, shares = row.at + row.offsets[zone], row.shares
        weights, variances = self._flat_weights, self._flat_variances
        old, variance = weights[at], variances[at]
        change = variance * shares
        x = float(shares @ old)
        base, base_variance = self._bases[row.base], self._base_variances[row.base]
        low, high = 2 * zone, 2 * zone + 1
        start_s, border_s = BIN_EDGES[low], BIN_EDGES[high]
        is_late = end_s >= border_s
        early = exp(min(base[low] + x, _MAX_LOG_RATE)) * ((border_s if is_late else end_s) - start_s)
        late = exp(min(base[high] + x, _MAX_LOG_RATE)) * (end_s - border_s) if is_late else 0.0
        expected = early + late
        total = float(shares @ change) + 0.5 * (base_variance[low] + base_variance[high])
        gain = 1.0 / (1.0 + expected * total)
        weights[at] = old + change * (max(reused - expected, _MIN_RESIDUAL) * gain)
        change *= change
        change *= -expected * gain
        change += variance
        variances[at] = np.maximum(change, _MIN_VARIANCE, out=change)
        for i, seen, e in ((low, reused and not is_late, early), (high, reused and is_late, late)):
            v = base_variance[i]
            base[i] += v * max(seen - e, _MIN_RESIDUAL) * gain
            base_variance[i] = max(v - v * v * e * gain, _MIN_VARIANCE)


def bin_of(age_s: float) -> int:
    """Return the bin of an age of at least 0 seconds."""
    if age_s < 1.0:
        return age_s >= 0.5
    return min(int(2.0 * log2(age_s)) + 2, NUM_BINS - 1)


def _density(rates: list[float], age_s: float) -> float:
    """Return the density at `age_s` of what has these `rates` in all age bins."""
    if age_s >= BIN_EDGES[-1]:  # older than all that is told apart: as at the end, and falling with age
        return rates[-1] * BIN_EDGES[-1] / age_s
    left, idle_s, best = 1.0, 0.0, 0.0
    start = age_s
    for i in range(bin_of(age_s), NUM_BINS):
        end = BIN_EDGES[i + 1]
        survival = left * exp(rates[i] * (start - end))
        idle_s += 0.5 * (left + survival) * (end - start)
        left, start = survival, end
        earned = 1.0 - survival
        if earned > best * idle_s:
            best = earned / idle_s
        elif best * idle_s > 1.0:  # not even certainty would be better from here on
            break
    return best
