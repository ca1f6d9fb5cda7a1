"""Which block goes when room is needed: the interface of eviction policies, and leaf-first LRU.

A policy instance keeps one *order* of published blocks: the common one, or that of a tenant with a floor or a cap. The
cache makes them with a factory, so that what several of them learn can live in the factory's closure.

The cache keeps one promise that every policy may build on: whoever references a published block references all its
ancestors too, and frees them after it. So an idle block has only idle descendants. They may be in another order, and
that order may keep them: `block.num_children` says whether a block may go, and `on_leaf` when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from cache.block_pool import Block

if TYPE_CHECKING:
    from cache.block_table import BlockTable, Chain

_MIN_HEAP = 64

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

    `num_answer_tokens` None: the answer is not complete, though the blocks may be free already (only a replay that
    does not model time in use does that).
    """

    num_answer_tokens: int | None = None
    hint: Hint | None = None
    retention: tuple[Retention, ...] = ()


class Policy(Protocol):
    """Notified by the cache of everything that happens to the blocks of its order. All calls are O(log n) or better.

    A block is *idle* while nobody references it; only idle blocks without resident children (leaves) may go.
    """

    def on_insert(self, block: Block) -> None:
        """`block` was published; it is referenced by who published it. Or it came from another order: then it may be
        idle, and `on_release` follows."""

    def on_hit(self, block: Block) -> None:
        """`block` got one more reference, already counted: `ref_count` 1 means that it was idle until now."""

    def on_release(self, block: Block) -> None:
        """`block` lost its last reference and is idle from now on; a leaf if `num_children` is 0."""

    def on_leaf(self, block: Block) -> None:
        """`block`, idle for some time already, lost its last resident child: from now on it may go."""

    def on_evict(self, block: Block) -> None:
        """`block` leaves this order: forget it. Any leaf, not only the last `victim`, or on its way to another order
        any block at all."""

    def victim(self) -> Block | None:
        """Return the leaf that should go next, None if there is none. Changes nothing that anybody sees."""

    def leaves(self) -> Iterator[Block]:
        """Yield all leaves, in any order (for integrity checks)."""


PolicyFactory = Callable[[], Policy]


@runtime_checkable
class Observer(Protocol):
    """What a policy factory may be as well, to be told about whole requests. One per cache."""

    def on_match(self, chain: Chain, table: BlockTable, now: float) -> None:
        """A new request was matched: `table` references what was found of `chain`."""

    def on_free(self, table: BlockTable, now: float) -> None:
        """Everything that `table` references is about to be released, the deepest block first."""


class Lru:
    """Leaf-first least recently used: the leaf that was released longest ago.

    A heap of leaves by `released_at`. Whole chains are released and found again at a time, but only their last block
    is a leaf, so hits and releases cost next to nothing and an eviction O(log number of leaves).
    """

    def __init__(self) -> None:
        self._leaves: dict[int, Block] = {}  # by released_at
        self._heap: list[int] = []  # the same numbers, and some that are no leaf's any more

    def on_insert(self, block: Block) -> None:
        pass

    def on_hit(self, block: Block) -> None:
        if not block.num_children:
            self._leaves.pop(block.released_at, None)

    def on_release(self, block: Block) -> None:
        if not block.num_children:
            self.on_leaf(block)

    def on_leaf(self, block: Block) -> None:
        if len(self._heap) > 2 * len(self._leaves) + _MIN_HEAP:
            self._heap = list(self._leaves)
            heapify(self._heap)
        self._leaves[block.released_at] = block
        heappush(self._heap, block.released_at)

    def on_evict(self, block: Block) -> None:
        self._leaves.pop(block.released_at, None)

    def victim(self) -> Block | None:
        while self._heap:
            block = self._leaves.get(self._heap[0])
            if block is not None:
                return block
            heappop(self._heap)
        return None

    def leaves(self) -> Iterator[Block]:
        yield from self._leaves.values()
