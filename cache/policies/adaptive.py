"""The adaptive policy: keep the blocks that promise the most hits per second of room.

What one request used and nobody has used since is one *visit*: a run of blocks whose fate is decided together, since
a conversation that goes on needs all of them. For every visit the model of `cache.policies.hazard`, learned online
from all visits, evicted ones included, says what keeping it earns; the leaf of the lowest goes. What describes a visit
is what the worker knows anyway: the turn, how much was new and how much was known, the rhythm of the conversation, how
long the answer was, whose it is, and the client's hint if there is one.

One `Adaptive` per cache makes its policies, which share what it learns, and observes its requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from math import exp, inf, log
from random import Random

from cache.block_pool import Block
from cache.block_table import BlockTable, Chain
from cache.policies.hazard import BIN_EDGES, NUM_ZONES, ZONE_EDGES, Active, HazardModel, bin_of
from cache.policy import Hint, Use

_TURN, _FIRST, _MORE, _KNOWN, _LAST_GAP, _MEAN_GAP, _ANSWER, _EXPECTED, _TENANT, _HINT = range(10)
_NUM_FEATURES = 10
_HINTS: dict[Hint, int] = {"one_shot": 1, "open": 2, "closing": 3}
_BELIEFS: dict[Hint, float] = {"one_shot": -2.0, "open": 0.5, "closing": -2.0}
_MEMORY = 0.4  # weight of the last one in the running means of a conversation
_GHOSTS_PER_BLOCK = 4
_NUM_DRAWN = 24
_NUM_KEPT = 8
_CHEAP = 0.8
_LATE = bin_of(64.0)  # from here on what a visit is worth is computed once per age zone, before, per bin
_MIN_GAP_S = 0.25  # gaps are told apart down to this


class _Session:
    """One conversation, recognised by what its requests share beyond the prefix that was known before its first."""

    __slots__ = ("answer", "last_gap", "mean_gap", "trunk", "turn")

    def __init__(self, trunk: int) -> None:
        self.trunk = trunk
        self.turn = 0
        self.last_gap: float | None = None
        self.mean_gap: float | None = None  # of the logarithm
        self.answer: float | None = None  # of the logarithm


class _Visit:
    """What one request used last."""

    __slots__ = (
        "active",
        "answer",
        "density",
        "expected",
        "gap_s",
        "is_open",
        "is_over",
        "moment",
        "num_anchors",
        "num_released",
        "released_at",
        "session",
        "size",
        "tail_id",
        "use",
        "was_pending",
        "zone",
    )

    def __init__(self, session: _Session, size: int, use: Use | None, active: Active, expected: Active) -> None:
        self.session = session
        self.size = size  # blocks, from the root on
        self.use = use
        self.active = active
        self.expected = expected  # what the answer's length is like,
        self.answer: Active | None = None  # and once it is known, what it is
        self.was_pending = False  # it was not known yet when the blocks were released
        self.released_at = 0.0
        self.num_released = 0
        self.num_anchors = 0
        self.tail_id = -1
        self.is_open = False  # watched: the model learns from it
        self.zone = 0  # of its age, as far as the model has learned from it
        self.gap_s = inf  # age at which it was used again
        self.is_over = False  # the conversation went on without what is left of it
        self.moment = -1  # the part of its life that `density` was computed for
        self.density = 0.0

    @property
    def is_pending(self) -> bool:
        return self.use is not None and self.use.num_answer_tokens is None


class Adaptive:
    """What the orders of one cache of `num_blocks` blocks of `block_size` tokens share.

    Remembers at most four hashes per block, of evicted blocks too: the log2(n) blocks of a visit by which it is known
    again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.now = 0.0
        self.visit_of: list[_Visit | None] = [None] * num_blocks
        self.releasing: _Visit | None = None  # None: blocks are released that nobody has used
        self.last_release = 0  # `released_at` of the block released last
        self.random = Random(0)
        self.round = 0  # changes with every request: what a policy prepared for the last one is stale
        self._model = HazardModel(_NUM_FEATURES)
        self._model.believe_in_rhythm(_MEAN_GAP)
        for hint, belief in _BELIEFS.items():
            self._model.believe(_HINT, _HINTS[hint], belief)
        self._anchors: dict[bytes, _Visit] = {}
        self._max_anchors = _GHOSTS_PER_BLOCK * num_blocks
        self._watched: list[tuple[float, int, _Visit]] = []  # heap by when the next age zone begins
        self._num_watched = 0
        self._tenants: dict[str, int] = {}
        self._num_tails = self._num_used_tails = 1  # continued visits, and those of them whose last block was used

    def __call__(self) -> AdaptiveOrder:
        """Make the policy of one order."""
        return AdaptiveOrder(self)

    # ---- what the cache tells

    def on_match(self, chain: Chain, table: BlockTable, now: float) -> None:
        """A request was matched: `table` holds what was found of `chain`."""
        self.now = now
        self.round += 1
        self._learn_idle_times()
        hashes, num_found = chain.hashes, len(table.block_ids)
        num_known = num_found
        last: _Visit | None = self.visit_of[table.block_ids[-1]] if num_found else None
        anchors = self._anchors
        for i in range(len(hashes) - 1, num_found - 1, -1):
            ghost = anchors.get(hashes[i])
            if ghost is not None:
                num_known, last = i + 1, ghost
                break
        session = None
        if last is not None:
            trunk = last.session.trunk
            if num_known > trunk and 2 * (num_known - trunk) >= last.size - trunk:
                session = last.session
                self._continue(last, num_known)
        if session is None:
            session = _Session(num_known)
        table.visit = self._visit(session, chain, num_known, table.use)

    def on_free(self, table: BlockTable, now: float) -> None:
        """What `table` references is about to be released."""
        self.now = now
        visit = table.visit
        if not isinstance(visit, _Visit):  # a pin or a hold, which is no use
            self.releasing = None
            return
        if visit.num_released:  # a preempted sequence: what it left idle then it has used itself
            visit.is_open = False
            visit = table.visit = _Visit(visit.session, visit.size, visit.use, visit.active, visit.expected)
        num_prompt, visit.size = visit.size, table.num_published
        self._complete(visit, max(0, visit.size - num_prompt) * self.block_size)
        visit.was_pending = visit.answer is None
        visit.released_at = now
        self.releasing = visit

    def on_release(self, block: Block) -> None:
        """`block` becomes idle; the deepest one comes first."""
        visit = self.releasing
        if visit is None:
            if self.visit_of[block.block_id] is None:  # its publisher went before who pinned it
                visit = self.visit_of[block.block_id] = _Visit(_Session(0), 0, None, [], [])
                visit.released_at = self.now
            return
        self.visit_of[block.block_id] = visit
        assert block.hash is not None
        n = visit.num_released
        visit.num_released = n + 1
        if n & (n + 1) or not visit.active:
            return
        if n == 0:
            visit.tail_id = block.block_id
            visit.is_open = True
            self._watch(visit)
        self._remember(block.hash, visit)

    # ---- what the orders ask

    def worth(self, block: Block) -> float:
        """Return what keeping `block`, a leaf, earns, in hits per second of room."""
        visit = self.visit_of[block.block_id]
        assert visit is not None
        if visit.is_over:
            return 0.0
        if visit.answer is None:
            self._complete(visit)
        age_s = max(0.0, self.now - visit.released_at)
        moment = bin_of(age_s)
        if moment >= _LATE:
            moment |= 1
        if visit.moment != moment or age_s >= BIN_EDGES[-1]:
            visit.density = self._model.density(visit.active + (visit.answer or visit.expected), age_s)
            visit.moment = moment
        return visit.density * self._tail_share if block.block_id == visit.tail_id else visit.density

    def is_cheap_tail(self, block: Block) -> bool:
        """Whether `block` is the last of its visit and conversations go on without it much more often than with it:
        then what is before it is worth more, and does not go with it."""
        visit = self.visit_of[block.block_id]
        assert visit is not None
        return block.block_id == visit.tail_id and self._tail_share < _CHEAP

    @property
    def _tail_share(self) -> float:
        return self._num_used_tails / self._num_tails

    # ---- visits and what is learned from them

    def _visit(self, session: _Session, chain: Chain, num_known: int, use: Use | None) -> _Visit:
        session.turn += 1
        kind, amount = self._model.kind, self._model.amount
        num_new = len(chain) - num_known
        active = [
            *amount(_TURN, session.turn - 1),
            *amount(_FIRST if session.turn == 1 else _MORE, num_new),
            *amount(_KNOWN, num_known),
            *amount(_LAST_GAP, session.last_gap),
            *amount(_MEAN_GAP, None if session.mean_gap is None else exp(session.mean_gap)),
            *kind(_TENANT, self._tenants.setdefault(chain.owner, len(self._tenants))),
        ]
        if use is not None and use.hint is not None:
            active += kind(_HINT, _HINTS[use.hint])
        expected = amount(_EXPECTED, None if session.answer is None else exp(session.answer))
        return _Visit(session, len(chain), use, active, expected)

    def _complete(self, visit: _Visit, num_tokens: int = 0) -> None:
        """Go by the length of the answer from now on, if it is complete: as told, or else `num_tokens`."""
        if visit.answer is not None or visit.is_pending:
            return
        if visit.use is not None and visit.use.num_answer_tokens is not None:
            num_tokens = visit.use.num_answer_tokens
        visit.moment = -1
        visit.answer = self._model.amount(_ANSWER, num_tokens)
        session = visit.session
        length = log(1.0 + num_tokens)
        session.answer = length if session.answer is None else session.answer + _MEMORY * (length - session.answer)

    def _watch(self, visit: _Visit) -> None:
        self._num_watched += 1
        heappush(self._watched, (visit.released_at + ZONE_EDGES[visit.zone + 1], self._num_watched, visit))

    def _learn_idle_times(self) -> None:
        """Let the model see every age zone that is over for some visit, continued in it or not.

        What is continued is learned no earlier than what is not: else the model would think too well of long ages.
        """
        watched, now = self._watched, self.now
        while watched and watched[0][0] <= now:
            _, _, visit = heappop(watched)
            if not visit.is_open:
                continue
            start_s, end_s = ZONE_EDGES[visit.zone], ZONE_EDGES[visit.zone + 1]
            self._learn(visit, start_s, min(end_s, visit.gap_s), visit.gap_s < end_s)
            visit.zone += 1
            if visit.gap_s < end_s or visit.zone == NUM_ZONES:
                visit.is_open = False
                continue
            self._watch(visit)

    def _continue(self, visit: _Visit, num_known: int) -> None:
        """The conversation of `visit` goes on: it was used again, `num_known` blocks of it."""
        session = visit.session
        gap = self.now - visit.released_at
        if visit.is_open and visit.gap_s == inf:
            visit.gap_s = gap
            self._num_tails += 1
            self._num_used_tails += num_known >= visit.size
        visit.is_over = True
        session.last_gap = gap
        length = log(max(gap, _MIN_GAP_S))
        mean = session.mean_gap
        session.mean_gap = length if mean is None else mean + _MEMORY * (length - mean)

    def _learn(self, visit: _Visit, start_s: float, end_s: float, reused: bool) -> None:
        self._complete(visit)
        if visit.answer is not None:
            self._model.learn(visit.active + visit.answer, start_s, end_s, reused)
        if visit.was_pending:
            self._model.learn(visit.active + visit.expected, start_s, end_s, reused, visit.expected)

    # ---- ghosts

    def _remember(self, digest: bytes, visit: _Visit) -> None:
        anchors = self._anchors
        old = anchors.pop(digest, None)
        if old is not None:
            self._forget(old)
        anchors[digest] = visit
        visit.num_anchors += 1
        if len(anchors) > self._max_anchors:
            self._forget(anchors.pop(next(iter(anchors))))

    @staticmethod
    def _forget(visit: _Visit) -> None:
        visit.num_anchors -= 1
        if not visit.num_anchors:
            visit.is_open = False  # its return would go unseen: nothing to be learned from it any more


class AdaptiveOrder:
    """The policy of one order: evicts, among leaves drawn at random and the cheapest of the last draw, the cheapest.

    Once per request leaves are drawn. A run of blocks goes in one piece: the next victim is the parent of the last as
    long as that is a leaf then. O(1) per block.
    """

    def __init__(self, shared: Adaptive) -> None:
        self._shared = shared
        self._leaves: list[Block] = []
        self._places: dict[int, int] = {}  # block id -> index in `_leaves`
        self._kept: list[Block] = []
        self._next: Block | None = None
        self._trimmed: _Visit | None = None
        self._round = -1

    def on_insert(self, block: Block) -> None:
        if block.ref_count:
            self._shared.visit_of[block.block_id] = None

    def on_hit(self, block: Block) -> None:
        if block.ref_count == 1 and not block.num_children:
            self._remove(block)

    def on_release(self, block: Block) -> None:
        shared = self._shared
        if block.released_at > shared.last_release:  # else it comes from another order, idle as it was
            shared.last_release = block.released_at
            shared.on_release(block)
        if not block.num_children:
            self._add(block)

    def on_leaf(self, block: Block) -> None:
        self._add(block)
        if self._trimmed is not None and self._shared.visit_of[block.block_id] is self._trimmed:
            self._next = block

    def on_evict(self, block: Block) -> None:
        if block.block_id in self._places:
            self._remove(block)

    def victim(self) -> Block | None:
        shared = self._shared
        if self._round == shared.round and self._next is not None:
            return self._next
        leaves, worth = self._leaves, shared.worth
        if len(leaves) <= _NUM_DRAWN + _NUM_KEPT:
            ranked = sorted((worth(block), block.released_at, block) for block in leaves)
        else:
            places = self._places
            drawn = {block.block_id: block for block in self._kept if block.block_id in places}
            if self._round != shared.round or not drawn:
                pick, num_leaves = shared.random.random, len(leaves)
                for _ in range(_NUM_DRAWN):
                    block = leaves[int(pick() * num_leaves)]
                    drawn[block.block_id] = block
            ranked = sorted((worth(block), block.released_at, block) for block in drawn.values())
        self._round = shared.round
        if not ranked:
            return None
        self._kept = [block for _, _, block in ranked[1 : 1 + _NUM_KEPT]]
        self._next = block = ranked[0][2]
        self._trimmed = None if shared.is_cheap_tail(block) else shared.visit_of[block.block_id]
        return block

    def leaves(self) -> Iterator[Block]:
        yield from self._leaves

    def _add(self, block: Block) -> None:
        self._places[block.block_id] = len(self._leaves)
        self._leaves.append(block)

    def _remove(self, block: Block) -> None:
        place = self._places.pop(block.block_id)
        last = self._leaves.pop()
        if last is not block:
            self._leaves[place] = last
            self._places[last.block_id] = place
        if block is self._next:
            self._next = None
