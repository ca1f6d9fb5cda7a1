"""Which blocks go when room is needed: the interface of eviction policies.

A policy instance keeps one *order* of runs of published blocks: the common one, or that of a tenant with a floor or a
cap. The cache makes them with a factory, so that what several of them share can live there.

The blocks of a run have always been used together, so a policy decides about runs. What it knows of one it keeps in
`run.note` or in a table of its own; a run that is cut in two has the same note in both parts. Of the run that it gives
as the victim the cache takes as many blocks as it needs, the last ones first; what is left of it is still a leaf.

The cache keeps one promise that every policy may build on: a table that references a run references all its ancestors
too, and frees them after it. So an idle run has only idle descendants. They may be in another order, and that order may
keep them: `run.num_children` says whether a run may go, and `on_leaf` when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.run import Run


class Policy(Protocol):
    """Notified by the cache of what happens to the runs of its order. All calls are O(log n) or better.

    A run is *idle* while no table references it; only idle runs without children (leaves) may go.
    """

    def on_hit(self, run: Run) -> None:
        """`run` got one more reference, already counted: `ref_count` 1 means that it was idle until now."""

    def on_release(self, run: Run) -> None:
        """`run` lost its last reference, or came idle from another order; a leaf if `num_children` is 0."""

    def on_leaf(self, run: Run) -> None:
        """`run`, idle for some time already, lost its last child: from now on it may go."""

    def on_evict(self, run: Run, num_blocks: int) -> None:
        """The last `num_blocks` blocks of `run`, which still shows them, are about to leave this order. All of them:
        forget it. Any leaf, not only the last `victim`, or on its way to another order any run at all."""

    def victim(self) -> Run | None:
        """Return the leaf that should go next, None if there is none. Asking changes no later answer. Asked whenever
        another order may have to give a block: cheap, if nothing has changed since."""

    def leaves(self) -> Iterator[Run]:
        """Yield all leaves, in any order (for integrity checks)."""


PolicyFactory = Callable[[], Policy]


@runtime_checkable
class Observer(Protocol):
    """What a policy factory may be as well, to be told about whole requests. One per cache."""

    def on_advance(self, now: float) -> None:
        """It is `now`. Called often, between requests."""

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        """A new request was matched: `table` references what was found of `chain`, `num_published` blocks that end with
        the run `table.last`."""

    def on_free(self, table: BlockTable) -> None:
        """All `table.runs()` are about to be released, the deepest first."""
