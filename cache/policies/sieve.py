"""SIEVE (Zhang et al., NSDI 2024): a hand goes round from the oldest run to the newest and takes what was not used
since it came by last.

Runs keep the place they were published at. The hand sees leaves only: it passes the others without touching their
mark. Known to suffer from that on deep trees; here for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from kvasir.cache.policies.leaf_queue import Key, LeafQueue
from kvasir.cache.run import Run


@dataclass(slots=True)
class _Entry:
    """A run's note. `number`: how many blocks were published before it."""

    number: int
    is_visited: bool = False


class Sieve:
    """The leaves that the hand will still come to in this round, and those that it has passed."""

    def __init__(self) -> None:
        self._ahead = LeafQueue()
        self._behind = LeafQueue()
        self._hand: Key = (0, 0)  # where it stands
        self._num_inserted = 0

    def on_insert(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            run.note = _Entry(self._num_inserted)
        self._num_inserted += num_blocks

    def on_split(self, head: Run, tail: Run) -> None:
        head.note = replace(tail.note)

    def on_hit(self, run: Run) -> None:
        run.note.is_visited = True
        if not run.num_children:
            self._discard(run)

    def on_release(self, run: Run) -> None:
        if not run.num_children:
            self.on_leaf(run)

    def on_leaf(self, run: Run) -> None:
        place = self._place(run)
        (self._ahead if place >= self._hand else self._behind).add(run, place)

    def on_evict(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            self._discard(run)

    def victim(self) -> Run | None:
        while True:
            run = self._ahead.first()
            if run is None:
                if not self._behind:
                    return None
                self._ahead, self._behind = self._behind, self._ahead
                self._hand = (0, 0)
                continue
            self._hand = self._place(run)
            if not run.note.is_visited:
                return run
            run.note.is_visited = False
            self._ahead.discard(run)
            self._behind.add(run, self._hand)

    def leaves(self) -> Iterator[Run]:
        return chain(self._ahead, self._behind)

    def _place(self, run: Run) -> Key:
        return run.note.number, run.start

    def _discard(self, run: Run) -> None:
        if not self._ahead.discard(run):
            self._behind.discard(run)
