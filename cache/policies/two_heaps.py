"""Two heaps: least recently used, but first what no request comes back for, then what is likely to rest longest.

What one request used and no other has used since is one *visit*. A visit is final if its request's hint says that
nothing follows, or if the conversation has already gone on without what is left of it. Any other is expected back after
the usual rest of its conversation, 30 s at most. One heap has the leaves by age, the other by expected rest:

- a final visit goes first;
- else the oldest goes if it is idle for longer than the longest expected rest: it is overdue. This is LRU;
- else the cache is too small for the conversations that are running. LRU would evict each just before it comes back, so
  the one expected to rest longest goes, of equals the oldest.

A request continues the visit whose prompt it extends. The hashes of prompts' ends are remembered, evicted ones too, so
that a conversation keeps its usual rest.

What a request asked to retain goes after everything of a lower priority (`Run.priority`), until its time is over.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import exp, inf, log
from typing import TYPE_CHECKING

from kvasir.cache.policies.leaf_queue import LeafQueue
from kvasir.cache.policies.lru import Lru
from kvasir.cache.run import Run

if TYPE_CHECKING:
    from kvasir.cache.block_table import BlockTable, Chain

_MAX_REST_S = 30.0
_MIN_REST_S = 0.25
_WEIGHT = 0.4  # of the last rest in the mean of a conversation
_NUM_ENDS = 2  # last blocks of a prompt that are remembered: the very last may be cut differently next time
_ENDS_PER_BLOCK = 4
_MAX_ENDS = 1 << 17


@dataclass(slots=True, eq=False)
class Visit:
    """One request's use of its blocks. `freed_at` None: it has not ended yet.

    `mean_rest_s` is the geometric mean of its conversation's rests, None before the first. `leaf` is the visit's run
    that may go, if there is one, ordered by `order`.
    """

    mean_rest_s: float | None = None
    is_final: bool = False
    freed_at: float | None = None
    leaf: Run | None = None
    order: TwoHeapsOrder | None = None

    @property
    def rest_s(self) -> float:
        """The expected time from its end to the next use."""
        return inf if self.is_final else min(self.mean_rest_s or _MAX_REST_S, _MAX_REST_S)

    def mean_with(self, rest_s: float) -> float:
        """Return the mean rest of the conversation that goes on after `rest_s`."""
        rest_s = max(_MIN_REST_S, rest_s)
        if self.mean_rest_s is None:
            return rest_s
        return exp((1 - _WEIGHT) * log(self.mean_rest_s) + _WEIGHT * log(rest_s))


class TwoHeaps:
    """Makes the orders of one cache of `num_blocks` blocks, which share its clock, and observes its requests.

    Remembers at most four prompts' ends per block, of evicted blocks too.
    """

    def __init__(self, num_blocks: int) -> None:
        self.now = 0.0
        self._max_ends = min(_ENDS_PER_BLOCK * num_blocks, _MAX_ENDS)
        # By prefix hash, oldest first. A plain dict would look for its first key behind all that were deleted before.
        self._ends: OrderedDict[bytes, Visit] = OrderedDict()

    def __call__(self) -> TwoHeapsOrder:
        return TwoHeapsOrder(self)

    def on_advance(self, now: float) -> None:
        self.now = now

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        if table.leaves_nothing:
            return
        ends = self._ends
        table.visit = visit = Visit(is_final=table.hint in ("one_shot", "closing"))
        known = next(filter(ends.__contains__, reversed(chain.hashes)), None)
        if known is not None and (last := ends[known]).freed_at is not None:
            visit.mean_rest_s = last.mean_with(self.now - last.freed_at)
            last.is_final = True
            if last.leaf is not None and last.order is not None:
                last.order.reorder(last.leaf)
        # What was resident before may be a beginning that many conversations share: no end of this one.
        for digest in chain.hashes[max(table.num_published, len(chain) - _NUM_ENDS) :]:
            ends.pop(digest, None)
            ends[digest] = visit
        while len(ends) > self._max_ends:
            ends.popitem(last=False)

    def on_free(self, table: BlockTable) -> None:
        visit = table.visit
        if not isinstance(visit, Visit):
            return  # a pin or a hold, which says nothing about when its blocks are used again
        visit.freed_at = self.now
        for run in table.runs():
            run.note = visit


class TwoHeapsOrder(Lru):
    """The policy of one order."""

    def __init__(self, shared: TwoHeaps) -> None:
        super().__init__()
        self._shared = shared
        self._by_rest = LeafQueue()
        self._retained = LeafQueue()  # leaves by when their priority ends

    def on_leaf(self, run: Run) -> None:
        if run.note is None:
            run.note = Visit(freed_at=0.0)  # published, but no request that was matched has freed it
        visit: Visit = run.note
        visit.leaf, visit.order = run, self
        if run.retained_until <= self._shared.now:
            run.forget_retention()
        elif run.retained_until < inf:
            self._retained.add(run, (run.retained_until,))
        self._by_age.add(run, (run.priority, run.released_at))
        self._by_rest.add(run, (run.priority, -visit.rest_s, run.released_at))

    def reorder(self, run: Run) -> None:
        """Give `run` its new place if it is a leaf: what is known of it has changed."""
        if self._by_age.discard(run):
            self._by_rest.discard(run)
            self._retained.discard(run)
            self.on_leaf(run)

    def victim(self) -> Run | None:
        now = self._shared.now
        while (run := self._retained.first()) is not None and run.retained_until <= now:
            self.reorder(run)
        oldest, longest = self._by_age.first(), self._by_rest.first()
        if oldest is None or longest is None:
            return None
        return oldest if now - oldest.note.freed_at >= longest.note.rest_s else longest

    def _discard(self, run: Run) -> None:
        if self._by_age.discard(run):
            self._by_rest.discard(run)
            self._retained.discard(run)
            if run.note.leaf is run:
                run.note.leaf = run.note.order = None
