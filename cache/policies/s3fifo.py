"""S3-FIFO (Yang et al., SOSP 2023): most blocks are used once, so new ones have to prove themselves in a small queue.

A new run enters `small`, a tenth of the blocks; used twice there it moves to `main`, else it goes and leaves its hashes
in `ghost`. Whose first hash is there when it comes back enters `main` at once. `main` gives every use, up to three,
another round. Only leaves can be looked at when room is needed: the oldest leaf of a queue stands for its head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from kvasir.cache.policies.leaf_queue import LeafQueue
from kvasir.cache.run import Run
from kvasir.protocol.prefix import HASH_BYTES, split_hashes

SMALL_SHARE = 0.1
_MAX_USES = 3


@dataclass(slots=True)
class _Entry:
    """A run's note. `number`: when it entered its queue."""

    number: int
    in_main: bool
    num_uses: int = 0


class S3Fifo:
    """The two queues of one order, sized by how many blocks it has. `ghost` remembers as many hashes as it has blocks,
    at least until the next one comes."""

    def __init__(self) -> None:
        self._small = LeafQueue()
        self._main = LeafQueue()
        self._num_blocks = self._num_small = 0
        self._num_entered = 0
        self._ghost: dict[bytes, None] = {}  # oldest first
        self._victim: Run | None = None

    def on_insert(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run):
            self._num_entered += 1
            run.note = _Entry(self._num_entered, self._ghost.pop(run.key[1], False) is None)
        self._num_blocks += num_blocks
        self._num_small += 0 if run.note.in_main else num_blocks

    def on_split(self, head: Run, tail: Run) -> None:
        head.note = replace(tail.note)

    def on_hit(self, run: Run) -> None:
        entry: _Entry = run.note
        entry.num_uses = min(entry.num_uses + 1, _MAX_USES)
        if not run.num_children:
            self._queue(entry).discard(run)

    def on_release(self, run: Run) -> None:
        if not run.num_children:
            self.on_leaf(run)

    def on_leaf(self, run: Run) -> None:
        entry: _Entry = run.note
        self._queue(entry).add(run, (entry.number, run.start))

    def on_evict(self, run: Run, num_blocks: int) -> None:
        entry: _Entry = run.note
        if num_blocks == len(run):
            self._queue(entry).discard(run)
        self._num_blocks -= num_blocks
        self._num_small -= 0 if entry.in_main else num_blocks
        if run is self._victim and not entry.in_main:
            self._ghost.update(dict.fromkeys(split_hashes(run.hashes[-num_blocks * HASH_BYTES :])))
            while len(self._ghost) > self._num_blocks + 1:
                del self._ghost[next(iter(self._ghost))]

    def victim(self) -> Run | None:
        while True:
            use_small = self._num_small >= SMALL_SHARE * self._num_blocks
            first, second = (self._small, self._main) if use_small else (self._main, self._small)
            queue = first if first else second
            run = self._victim = queue.first()
            if run is None:
                return None
            entry: _Entry = run.note
            if entry.num_uses <= (0 if entry.in_main else 1):
                return run
            queue.discard(run)
            self._num_small -= 0 if entry.in_main else len(run)
            entry.num_uses = entry.num_uses - 1 if entry.in_main else 0
            entry.in_main = True
            self._num_entered += 1
            entry.number = self._num_entered
            self.on_leaf(run)

    def leaves(self) -> Iterator[Run]:
        return chain(self._small, self._main)

    def _queue(self, entry: _Entry) -> LeafQueue:
        return self._main if entry.in_main else self._small
