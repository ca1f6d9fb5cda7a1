"""The adaptive policy: keep the blocks that promise the most hits per second of room.

What one request used and nobody has used since is one *visit* (`cache.policies.visits`). For every visit a hazard model
(`cache.policies.hazard`), learned online from all visits, evicted ones included, says what keeping it earns; the leaf
of the lowest goes. What describes a visit is what the worker knows anyway: the turn, how much was new and how much was
known, the rhythm of the conversation, how long the answer was, whose it is, the published prefix that it begins with,
and the client's hint if there is one.

Time counts from the end of the answer. Blocks may be free before that (a preempted sequence, a replay that does not
model time in use): then what describes the visit is how long the answer has lasted and how long it usually is.

What a visit is worth changes with its age: it is appraised anew whenever it enters another age bin of the model. So the
order is exact up to that, and asking for a victim changes nothing.

What a request asked to retain goes after everything of a lower priority, as with `cache.policies.ttl`.

One `Adaptive` per cache makes its policies, which share what it learns, and observes its requests. Learning and
appraising is done when time advances, many visits at once, not while a request is matched.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from kvasir.cache.policies.hazard import BIN_EDGES, NUM_BINS, ZONE_EDGES, Description, HazardModel, Row
from kvasir.cache.policies.leaf_queue import Key, LeafOrder
from kvasir.cache.policies.ttl import DEFAULT_PRIORITY
from kvasir.cache.policies.visits import Ghosts, Phase, Session, Visit
from kvasir.cache.policy import Hint, Retention, Use
from kvasir.cache.run import Run

if TYPE_CHECKING:
    from kvasir.cache.block_table import BlockTable, Chain

# The features. An answer that is not complete has an expected length and a phase; one that is, a length and a ratio to
# the conversation's usual length.
_TURN, _FIRST, _MORE, _KNOWN, _LAST_REST, _MEAN_REST, _TENANT, _PREFIX, _HINT, _EXPECTED, _PHASE, _ANSWER, _RATIO = (
    range(13)
)
_NUM_FEATURES = 13
_AFTER, _DURING = range(2)  # the model's bases: visits whose answer is complete, and those whose is not
_PHASE_EDGES = (0.0, 4.0, 16.0, 64.0, 256.0, 1024.0)  # seconds from the release: phases of an incomplete answer
_HINTS: dict[Hint, int] = {"one_shot": 1, "open": 2, "closing": 3}
_BELIEFS: dict[Hint, float] = {"one_shot": -2.0, "open": 0.5, "closing": -2.0}
_USUAL = 20.0  # what the ratio of an answer's length to the usual one is multiplied by: the scale begins at 1
_GHOSTS_PER_BLOCK = 4
_MAX_GHOSTS = 1 << 17
_MAX_AT_ONCE = 512  # phases that grow older in one step: after a long rest the others have to wait for the next ones
_MAX_DUE = 1 << 15  # where more than these grow older, the model learns from some visits only: they are a fair sample
_LATE = 1.4  # past the last age bin, a visit is appraised anew when it is so much older
_CHEAP = 0.8  # a last block that is used again in less than this share of continuations is a run of its own


class Adaptive:
    """What the orders of one cache of `num_blocks` blocks of `block_size` tokens share.

    Remembers at most four hashes per block, of evicted blocks too, and a bounded number of visits, some 2 KB each,
    beside those of what is resident.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.now = 0.0
        self._block_size = block_size
        self._model = HazardModel(_NUM_FEATURES, 2)
        self._model.believe_in_rhythm(_MEAN_REST)
        for hint, belief in _BELIEFS.items():
            self._model.believe(_HINT, _HINTS[hint], belief)
        self._ghosts = Ghosts(min(_GHOSTS_PER_BLOCK * num_blocks, _MAX_GHOSTS))
        self._releasing: Visit | None = None  # None: blocks are released that nobody has used
        self._unanswered: list[Visit] = []
        self._due: list[tuple[float, int, Phase]] = []  # heap by when they enter another age bin
        self._expiring: list[tuple[float, int, Visit]] = []  # heap by when something is retained no longer
        self._num_pushed = 0
        self._changed: dict[Visit, None] = {}  # what they are worth has to be found anew
        self._kinds: dict[str | bytes, int] = {}  # of tenants and of published prefixes
        self._num_tails = self._num_used_tails = 1  # continued visits, and those of them whose last block was used

    def __call__(self) -> AdaptiveOrder:
        """Make the policy of one order."""
        return AdaptiveOrder(self)

    # ---- what the cache tells

    def on_advance(self, now: float) -> None:
        self.now = now
        if self._unanswered:
            self._note_answers()
        for _ in range(_MAX_AT_ONCE):
            if not self._due or self._due[0][0] > now:
                break
            self._grow_older(heappop(self._due)[2])
        while self._expiring and self._expiring[0][0] <= now:
            self._changed[heappop(self._expiring)[2]] = None
        self._appraise_changed()

    def on_match(self, chain: Chain, table: BlockTable) -> None:
        last: Visit | None = table.last.note if table.last is not None else None
        ghost, num_known = self._ghosts.find(chain, table.num_published)
        last = ghost or last
        if last is not None and num_known > (trunk := last.session.trunk) and 2 * num_known >= last.size + trunk:
            self._continue(last, num_known)
            session, retentions = last.session, last.retentions
        else:
            session, retentions = Session(num_known), []
        session.turn += 1
        features = self._features(session, chain, num_known, table.use)
        table.visit = visit = Visit(session, len(chain), table.use, features)
        visit.retentions = [kept for kept in retentions if kept[1] > self.now]

    def cuts(self, table: BlockTable) -> list[int]:
        """Begin a run where something is retained, and at the last block if conversations go on without it much more
        often than with it."""
        cuts = [end for kept in _asked(table) for end in (kept.start, kept.end) if end is not None]
        if self._tail_share < _CHEAP:
            cuts.append(table.num_published - 1)
        return cuts

    def on_free(self, table: BlockTable) -> None:
        visit, now = table.visit, self.now
        if not isinstance(visit, Visit):  # a pin or a hold, which says nothing about when it is used again
            self._releasing = None
            return
        if visit.tail:  # a preempted sequence: what it left idle then it has used itself
            visit.is_open, visit.use = False, None
            again = table.visit = Visit(visit.session, visit.size, table.use, visit.features)
            again.retentions = visit.retentions
            visit = again
        num_prompt, visit.size = visit.size, table.num_published
        visit.released_at = now
        visit.is_open = table.last is not None and len(self._due) < _MAX_DUE
        asked = [(kept, inf if kept.duration_s is None else now + kept.duration_s) for kept in _asked(table)]
        visit.retentions = visit.retentions + asked
        for until in {until for _, until in visit.retentions if until < inf}:
            heappush(self._expiring, (until, self._push(), visit))
        self._ghosts.add(visit, table)
        use = visit.use
        if use is None or use.num_answer_tokens is not None:
            num_tokens = (visit.size - num_prompt) * self._block_size if use is None else use.num_answer_tokens
            self._answered(visit, now, num_tokens or 0)
        else:
            self._unanswered.append(visit)
            self._enter_answering(visit, 0)
        self._releasing = visit

    # ---- what the orders tell

    def on_release(self, run: Run) -> None:
        if self._releasing is not None:
            run.note = self._releasing
        elif run.note is None:  # its publisher went before who pinned it
            run.note = visit = Visit(Session(0), 0, None, [])
            self._enter(visit, self._model.row([]), self.now)

    def on_leaf(self, run: Run, order: AdaptiveOrder) -> Key:
        """Return the key of `run`, which is a leaf of `order` now."""
        visit: Visit = run.note
        visit.leaf, visit.order = run, order
        if not visit.is_over:
            [visit.worth] = self._worths([visit])
            if not visit.phase.is_due:
                self._push_due(visit.phase)
        return self._key(visit)

    def on_no_leaf(self, run: Run) -> None:
        """`run` is a leaf no longer."""
        visit: Visit = run.note
        if visit.leaf is run:
            visit.leaf = visit.order = None

    # ---- worth

    def _worths(self, visits: list[Visit]) -> list[float]:
        """Return what keeping each of `visits` earns, in hits per second of room."""
        phases = [visit.phase for visit in visits]
        ages_s = [max(0.0, self.now - phase.since) for phase in phases]
        return self._model.densities([phase.row for phase in phases], ages_s)

    def _appraise_changed(self) -> None:
        """Give the leaves of the visits that have changed their places in their orders."""
        visits = [visit for visit in self._changed if visit.leaf is not None and not visit.is_over]
        self._changed.clear()
        if not visits:
            return
        for visit, worth in zip(visits, self._worths(visits), strict=True):
            visit.worth = worth
            self._reorder(visit)
        for order in {visit.order for visit in visits if visit.order is not None}:
            order.victim()  # cleared of void entries now, it is found at once when somebody waits for room

    def _reorder(self, visit: Visit) -> None:
        if visit.order is not None and visit.leaf is not None:
            visit.order.reorder(visit.leaf, self._key(visit))

    def _key(self, visit: Visit) -> Key:
        run, priority = visit.leaf, DEFAULT_PRIORITY
        assert run is not None
        for kept, until in visit.retentions:
            if run.start >= kept.start and (kept.end is None or run.end <= kept.end) and until > self.now:
                priority = kept.priority
        worth = 0.0 if visit.is_over else visit.worth
        return priority, worth * self._tail_share if run.hashes == visit.tail else worth, run.released_at

    @property
    def _tail_share(self) -> float:
        return self._num_used_tails / self._num_tails

    # ---- visits grow older

    def _enter(self, visit: Visit, row: Row, since: float) -> None:
        """From `since` on, `row` is what is known of `visit`."""
        visit.phase = phase = Phase(visit, row, since)
        self._push_due(phase)
        if visit.leaf is not None:  # else `on_leaf` will ask what it is worth
            self._changed[visit] = None

    def _grow_older(self, phase: Phase) -> None:
        """`phase` leaves its age bin: let the model learn from the age zone if that is over.

        A reuse is learned no earlier than its absence would be: else the model would think too well of long ages.
        """
        phase.is_due = False
        visit, age_bin = phase.visit, phase.age_bin
        phase.age_bin += 1
        is_open = visit.is_open and age_bin < NUM_BINS
        if is_open and age_bin & 1:
            zone = age_bin >> 1
            start_s, end_s, rest_s = ZONE_EDGES[zone], ZONE_EDGES[zone + 1], visit.reused_at - phase.since
            is_open = rest_s >= end_s
            if rest_s > start_s:
                self._model.learn(phase.row, zone, min(end_s, rest_s), not is_open)
        if visit.phase is phase and visit.leaf is not None and not visit.is_over:
            self._changed[visit] = None
            self._push_due(phase)
        elif is_open:
            phase.age_bin |= 1  # nobody asks for its worth: only the ends of zones matter
            self._push_due(phase)

    def _push_due(self, phase: Phase) -> None:
        if phase.age_bin < NUM_BINS:
            edge = phase.since + BIN_EDGES[phase.age_bin + 1]
        else:
            edge = phase.since + _LATE * (self.now - phase.since)
        phase.is_due = True
        heappush(self._due, (edge, self._push(), phase))

    def _push(self) -> int:
        self._num_pushed += 1
        return self._num_pushed

    # ---- what is known of a visit

    def _features(self, session: Session, chain: Chain, num_known: int, use: Use | None) -> Description:
        amount, kind = self._model.amount, self._model.kind
        features = [
            *amount(_TURN, session.turn - 1),
            *amount(_FIRST if session.turn == 1 else _MORE, len(chain) - num_known),
            *amount(_KNOWN, num_known),
            *amount(_LAST_REST, session.last_rest_s),
            *amount(_MEAN_REST, session.mean_rest_s),
            *kind(_TENANT, self._kind(chain.owner)),
        ]
        if 0 < chain.num_public_blocks <= len(chain):
            features += kind(_PREFIX, self._kind(chain.hashes[chain.num_public_blocks - 1]))
        if use is not None and use.hint is not None:
            features += kind(_HINT, _HINTS[use.hint])
        return features

    def _kind(self, name: str | bytes) -> int:
        return self._kinds.setdefault(name, len(self._kinds))

    def _enter_answering(self, visit: Visit, phase: int) -> None:
        """The answer of `visit` is not complete `_PHASE_EDGES[phase]` after its release."""
        amount, kind = self._model.amount, self._model.kind
        known = [*visit.features, *amount(_EXPECTED, visit.session.mean_answer), *kind(_PHASE, phase)]
        self._enter(visit, self._model.row(known, _DURING), visit.released_at + _PHASE_EDGES[phase])

    def _note_answers(self) -> None:
        """See which answers are complete by now, and which have lasted into another phase."""
        unanswered = []
        for visit in self._unanswered:
            use = visit.use
            if use is None:
                continue
            if use.num_answer_tokens is not None:
                self._answered(visit, self.now if use.answered_at is None else use.answered_at, use.num_answer_tokens)
            elif not visit.is_over:
                unanswered.append(visit)
                phase = bisect_right(_PHASE_EDGES, self.now - visit.released_at) - 1
                if visit.released_at + _PHASE_EDGES[phase] > visit.phase.since:
                    self._enter_answering(visit, phase)
        self._unanswered = unanswered

    def _answered(self, visit: Visit, answered_at: float, num_tokens: int) -> None:
        amount = self._model.amount
        usual = visit.session.mean_answer
        ratio = None if usual is None else _USUAL * (1 + num_tokens) / usual
        known = [*visit.features, *amount(_ANSWER, num_tokens), *amount(_RATIO, ratio)]
        visit.answered_at = answered_at
        self._enter(visit, self._model.row(known, _AFTER), answered_at)
        visit.features = []
        visit.session.answered(num_tokens)

    def _continue(self, visit: Visit, num_known: int) -> None:
        """The conversation of `visit` goes on: it was used again, `num_known` blocks of it."""
        if visit.is_open and visit.reused_at == inf:
            visit.reused_at = self.now
            self._num_tails += 1
            self._num_used_tails += num_known >= visit.size
        visit.is_over = True
        self._reorder(visit)
        visit.session.rested(self.now - visit.answered_at)


class AdaptiveOrder(LeafOrder):
    """The policy of one order: its leaves by priority, then by what their visits are worth."""

    def __init__(self, shared: Adaptive) -> None:
        super().__init__()
        self._shared = shared
        self._arriving: Run | None = None  # idle, on its way from another order

    def key(self, run: Run) -> Key:
        return self._shared.on_leaf(run, self)

    def reorder(self, run: Run, key: Key) -> None:
        """Give the leaf `run` another key."""
        self._leaves.discard(run)
        self._leaves.add(run, key)

    def on_insert(self, run: Run, num_blocks: int) -> None:
        self._arriving = None if run.ref_count else run

    def on_hit(self, run: Run) -> None:
        if not run.num_children and self._leaves.discard(run):
            self._shared.on_no_leaf(run)

    def on_release(self, run: Run) -> None:
        if run is not self._arriving:
            self._shared.on_release(run)
        self._arriving = None
        super().on_release(run)

    def on_evict(self, run: Run, num_blocks: int) -> None:
        if num_blocks == len(run) and self._leaves.discard(run):
            self._shared.on_no_leaf(run)


def _asked(table: BlockTable) -> tuple[Retention, ...]:
    return table.use.retention if table.use is not None else ()
