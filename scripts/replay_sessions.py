"""What a trace says of sessions, and two rules that go by it: the lab's, none of the product's.

A session is the trace's own. Where it has no name for one, a chain of requests stands for it, each of which goes on
with the one before: all of a trace without sessions, and sub-agents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from replay_cache import Trace, chains

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.policies.leaf_queue import LeafQueue
from kvasir.cache.policies.lru import Lru
from kvasir.cache.policies.two_heaps import TwoHeaps, Visit
from kvasir.cache.run import Run
from kvasir.protocol.sampling import CacheHint


def sessions_of(trace: Trace) -> list[int]:
    """Return the session of every request."""
    if any(request.session is None for request in trace.requests):
        return chains(trace)
    numbers = zip(trace.requests, chains(trace), strict=True)
    return [-1 - chain if request.is_sub else request.session or 0 for request, chain in numbers]


def last_words(sessions: Sequence[int]) -> list[CacheHint | None]:
    """Return what clients say that say nothing but which request is the last of its session."""
    last = {session: i for i, session in enumerate(sessions)}
    first = {session: i for i, session in reversed(list(enumerate(sessions)))}
    return [
        None if last[session] != i else "one_shot" if first[session] == i else "closing"
        for i, session in enumerate(sessions)
    ]


class SessionLru:
    """SGLang's rule (0.5.23, `--enable-session-radix-cache`): what no open session has used goes first, the least
    recently used of either kind. A session is open from its first request until it is closed."""

    def __init__(self, num_blocks: int) -> None:
        self.session = -1  # of the request that is replayed
        self.closed: set[int] = set()
        self.orders: list[SessionLruOrder] = []

    def __call__(self) -> SessionLruOrder:
        self.orders.append(SessionLruOrder(self))
        return self.orders[-1]

    def close(self, session: int) -> None:
        self.closed.add(session)
        for order in self.orders:
            order.reorder(session)

    def on_advance(self, now: float) -> None:
        pass

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        self.closed.discard(self.session)

    def on_free(self, table: BlockTable) -> None:
        for run in table.runs():
            run.note = (run.note or frozenset()) | {self.session}


class SessionLruOrder(Lru):
    def __init__(self, shared: SessionLru) -> None:
        super().__init__()
        self._shared = shared
        self._unused = LeafQueue()
        self._leaves: dict[int, set[Run]] = defaultdict(set)  # by open session

    def on_leaf(self, run: Run) -> None:
        is_open = [session for session in run.note or () if session not in self._shared.closed]
        (self._by_age if is_open else self._unused).add(run, (run.released_at,))
        for session in is_open:
            self._leaves[session].add(run)

    def reorder(self, session: int) -> None:
        for run in self._leaves.pop(session, set()):
            self._discard(run)
            self.on_leaf(run)

    def victim(self) -> Run | None:
        return self._unused.first() or self._by_age.first()

    def leaves(self) -> list[Run]:  # type: ignore[override]
        return [*self._unused, *self._by_age]

    def _discard(self, run: Run) -> None:
        self._unused.discard(run)
        self._by_age.discard(run)
        for session in run.note or ():
            self._leaves[session].discard(run)


class SessionTwoHeaps(TwoHeaps):
    """Two heaps, told which requests are of one session, where the product finds that out from their prompts."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.session = -1
        self._visits: dict[int, Visit] = {}

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        table.visit = visit = Visit(is_final=table.hint in ("one_shot", "closing"))
        last = self._visits.get(self.session)
        if last is not None and last.freed_at is not None:
            visit.mean_rest_s = last.mean_with(self.now - last.freed_at)
            last.is_final = True
            if last.leaf is not None and last.order is not None:
                last.order.reorder(last.leaf)
        self._visits[self.session] = visit
