"""Who comes back: visits, the conversations that they are turns of, and how a visit is known again that was evicted."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, inf, log
from typing import TYPE_CHECKING

from kvasir.cache.policies.hazard import Description, Row
from kvasir.cache.policy import Retention, Use
from kvasir.cache.run import Run

if TYPE_CHECKING:
    from kvasir.cache.block_table import BlockTable, Chain
    from kvasir.cache.policies.adaptive import AdaptiveOrder

_WEIGHT = 0.4  # of the last one in the running means of a conversation
_GRID = 8
_MIN_REST_S = 0.25  # rests are told apart down to this


class Session:
    """One conversation, recognised by what its requests share beyond the prefix that was known before its first:
    `trunk` blocks. The means are of rests in seconds and of answers' lengths in tokens, geometric; None: none yet."""

    __slots__ = ("last_rest_s", "mean_answer", "mean_rest_s", "trunk", "turn")

    def __init__(self, trunk: int) -> None:
        self.trunk = trunk
        self.turn = 0
        self.last_rest_s: float | None = None
        self.mean_rest_s: float | None = None
        self.mean_answer: float | None = None

    def rested(self, rest_s: float) -> None:
        """It went on `rest_s` after the end of the last answer."""
        self.last_rest_s = max(_MIN_REST_S, rest_s)
        self.mean_rest_s = _mean(self.mean_rest_s, self.last_rest_s)

    def answered(self, num_tokens: int) -> None:
        self.mean_answer = _mean(self.mean_answer, 1.0 + num_tokens)


class Phase:
    """What is known of `visit` from the time `since` on, as a `row` for the hazard model.

    `age_bin` is the bin of its age, seen from when it was last looked at; `is_due`: it will be looked at again.
    """

    __slots__ = ("age_bin", "is_due", "row", "since", "visit")

    def __init__(self, visit: Visit, row: Row, since: float) -> None:
        self.visit = visit
        self.row = row
        self.since = since
        self.age_bin = 0
        self.is_due = False


class Visit:
    """What one request used last: blocks whose fate is decided together, since a conversation that goes on needs all.

    `features` describe it before anything is known of the answer, `phase` now. `leaf` is the one of its runs that may
    go, ordered by `order`.
    """

    __slots__ = (
        "answered_at",
        "features",
        "is_open",
        "is_over",
        "leaf",
        "num_anchors",
        "order",
        "phase",
        "released_at",
        "retentions",
        "reused_at",
        "session",
        "size",
        "tail",
        "use",
        "worth",
    )

    def __init__(self, session: Session, size: int, use: Use | None, features: Description) -> None:
        self.session = session
        self.size = size  # blocks, from the root on
        self.use = use
        self.features = features
        self.phase: Phase  # set before anything is released
        self.released_at = 0.0
        self.answered_at = inf
        self.reused_at = inf
        self.num_anchors = 0
        self.tail = b""  # hash of the last block
        self.retentions: list[tuple[Retention, float]] = []  # what was asked, until when
        self.leaf: Run | None = None
        self.order: AdaptiveOrder | None = None
        self.worth = 0.0  # hits per second of room
        self.is_open = False  # the model learns from it
        self.is_over = False  # the conversation went on without what is left of it


class Ghosts:
    """By which blocks visits are known again, evicted ones too: near their ends, then at ever greater distances, there
    only at multiples of `_GRID` blocks, so that not every block has to be looked up to find the deepest.

    At most `max_anchors` hashes; the oldest are forgotten.
    """

    def __init__(self, max_anchors: int) -> None:
        self._max_anchors = max_anchors
        self._anchors: dict[bytes, Visit] = {}

    def find(self, chain: Chain, num_known: int) -> tuple[Visit | None, int]:
        """Return the visit that shares most with `chain` beyond its first `num_known` blocks, and how many blocks it
        is known to share."""
        anchors, hashes = self._anchors, chain.hashes
        on_grid = len(hashes) // _GRID * _GRID
        while on_grid > num_known and hashes[on_grid - 1] not in anchors:
            on_grid -= _GRID
        for depth in range(min(on_grid + _GRID - 1, len(hashes)), max(on_grid - 1, num_known), -1):
            if (ghost := anchors.get(hashes[depth - 1])) is not None:
                return ghost, depth
        return None, num_known

    def add(self, visit: Visit, table: BlockTable) -> None:
        """Remember `visit`, the blocks of `table`."""
        depths = _anchor_depths(visit.size)
        depth = next(depths, 0)
        for run in table.runs():
            while depth > run.start:
                digest = run.hash_of(depth - 1 - run.start)
                visit.tail = visit.tail or digest
                self._anchor(digest, visit)
                depth = next(depths, 0)

    def _anchor(self, digest: bytes, visit: Visit) -> None:
        anchors = self._anchors
        old = anchors.pop(digest, None)
        if old is not None:
            self._forget(old)
        anchors[digest] = visit
        visit.num_anchors += 1
        if len(anchors) > self._max_anchors:
            self._forget(anchors.pop(next(iter(anchors))))

    @staticmethod
    def _forget(visit: Visit) -> None:
        visit.num_anchors -= 1
        if not visit.num_anchors:
            visit.is_open = False  # its return would go unseen: nothing to be learned from it any more


def _anchor_depths(size: int) -> Iterator[int]:
    """Yield the depths at which `size` blocks are known again, the deepest first."""
    depth, step = size // _GRID * _GRID, _GRID
    depths = {size, size - 1, size - 3}
    while depth > 0:
        depths.add(depth)
        depth -= step
        step *= 2
    yield from sorted((depth for depth in depths if depth > 0), reverse=True)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else exp(log(mean) + _WEIGHT * (log(value) - log(mean)))
