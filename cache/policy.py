"""Which blocks go when room is needed: the interface of eviction policies.

A policy instance keeps one *order* of runs of published blocks: the common one, or that of a tenant with a floor or a
cap. The cache makes them with a factory, so that what several of them learn can live in the factory's closure.

The blocks of a run have always been used together, so a policy decides about runs. What it knows of one it keeps in
`run.note` or in a table of its own. Of the run that it gives as the victim the cache takes as many blocks as it needs,
the last ones first; what is left of it is still a leaf.

The cache keeps one promise that every policy may build on: whoever references a run references all its ancestors too,
and frees them after it. So an idle run has only idle descendants. They may be in another order, and that order may keep
them: `run.num_children` says whether a run may go, and `on_leaf` when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kvasir.cache.block_table import BlockTable, Chain
    from kvasir.cache.run import Run

Hint = Literal["one_shot", "open", "closing"]
"""What a client may say about a request: nothing follows it, the conversation goes on, this was its last turn."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep blocks `start` to `end` (None: to the end) of a request with `priority` (0 to 100) for `duration_s`."""

    start: int = 0
    end: int | None = None
    priority: int = 50
    duration_s: float | None = None


@dataclass(slots=True)
class Use:
    """What is known about a request that uses the cache, beyond its blocks. It may be filled in later.

    `num_answer_tokens` None: the answer is not complete, though the blocks may be free already (a preempted sequence;
    a replay that does not model time in use). `answered_at`: when it was completed, if that is known.
    """

    num_answer_tokens: int | None = None
    answered_at: float | None = None
    hint: Hint | None = None
    retention: tuple[Retention, ...] = ()


class Policy(Protocol):
    """Notified by the cache of everything that happens to the runs of its order. All calls are O(log n) or better.

    A run is *idle* while nobody references it; only idle runs without children (leaves) may go.
    """

    def on_insert(self, run: Run, num_blocks: int) -> None:
        """The last `num_blocks` blocks of `run` were published, all of them if it is new; it is referenced by who
        published them. Or it came from another order: then it may be idle, and `on_release` follows."""

    def on_split(self, head: Run, tail: Run) -> None:
        """`head`, which is new, has got the first blocks of `tail` and become its parent. `head.note` is `tail.note`,
        and whatever was said of `tail` holds for both; only `tail` may be a leaf."""

    def on_hit(self, run: Run) -> None:
        """`run` got one more reference, already counted: `ref_count` 1 means that it was idle until now."""

    def on_release(self, run: Run) -> None:
        """`run` lost its last reference and is idle from now on; a leaf if `num_children` is 0."""

    def on_leaf(self, run: Run) -> None:
        """`run`, idle for some time already, lost its last child: from now on it may go."""

    def on_evict(self, run: Run, num_blocks: int) -> None:
        """The last `num_blocks` blocks of `run`, which still shows them, are about to leave this order. All of them:
        forget it. Any leaf, not only the last `victim`, or on its way to another order any run at all."""

    def victim(self) -> Run | None:
        """Return the leaf that should go next, None if there is none. Changes nothing that anybody sees, and is asked
        whenever somebody else's order may have to give a block: cheap, if nothing has changed since."""

    def leaves(self) -> Iterator[Run]:
        """Yield all leaves, in any order (for integrity checks)."""


PolicyFactory = Callable[[], Policy]


@runtime_checkable
class Observer(Protocol):
    """What a policy factory may be as well, to be told about whole requests. One per cache."""

    def on_advance(self, now: float) -> None:
        """It is `now`. Called often, between requests: what takes its time is done here."""

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        """A new request was matched: `table` references what was found of `chain`, `num_published` blocks that end with
        the run `table.last`."""

    def cuts(self, table: BlockTable) -> Iterable[int]:
        """Return the depths at which runs of `table`, which is about to be freed, have to begin, because from there on
        its blocks will be worth something else than those before."""

    def on_free(self, table: BlockTable) -> None:
        """All `table.runs()` are about to be released, the deepest first. They have been cut as wanted."""
