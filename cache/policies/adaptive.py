"""The adaptive policy: keep the blocks that promise the most hits per second of room.

What one request used and nobody has used since is one *visit*: blocks whose fate is decided together, since a
conversation that goes on needs all of them. For every visit a model of `cache.policies.hazard`, learned online from all
visits, evicted ones included, says what keeping it earns; the leaf of the lowest goes. What describes a visit is what
the worker knows anyway: the turn, how much was new and how much was known, the rhythm of the conversation, how long the
answer was, whose it is, the published prefix that it begins with, and the client's hint if there is one.

Time counts from the end of the answer. Blocks may be free before that (a preempted sequence, a replay that does not
model time in use): then a second model speaks, which knows how long the answer has lasted and how long it usually is.

What a visit is worth changes with its age: it is appraised anew whenever it enters another age bin of the model. So the
order is exact up to that, and asking for a victim changes nothing.

What a request asked to retain goes after everything of a lower priority, as with `cache.policies.ttl`.

One `Adaptive` per cache makes its policies, which share what it learns, and observes its requests.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush
from math import exp, inf, log
from typing import TYPE_CHECKING

from cache.policies.hazard import NUM_ZONES, ZONE_EDGES, Active, HazardModel, next_edge
from cache.policies.leaf_queue import Key, LeafOrder
from cache.policies.ttl import DEFAULT_PRIORITY
from cache.policy import Hint, Retention, Use
from cache.run import Run

if TYPE_CHECKING:
    from cache.block_table import BlockTable, Chain

_TURN, _FIRST, _MORE, _KNOWN, _LAST_REST, _MEAN_REST, _ANSWER, _RATIO, _TENANT, _PREFIX, _HINT = range(11)
_NUM_FEATURES = 11
_EXPECTED, _PHASE = range(2)  # of the model of visits whose answer is not complete
_PHASE_EDGES = (0.0, 4.0, 16.0, 64.0, 256.0, 1024.0)  # seconds from the release at which such a visit is judged anew
_HINTS: dict[Hint, int] = {"one_shot": 1, "open": 2, "closing": 3}
_BELIEFS: dict[Hint, float] = {"one_shot": -2.0, "open": 0.5, "closing": -2.0}
_MEMORY = 0.4  # weight of the last one in the running means of a conversation
_USUAL = 20.0  # what the ratio of an answer's length to the usual one is multiplied by: the scale begins at 1
_GHOSTS_PER_BLOCK = 4
_MIN_REST_S = 0.25  # rests are told apart down to this
_CHEAP = 0.8  # a last block that is used again in less than this share of continuations is a run of its own


class _Session:
    """One conversation, recognised by what its requests share beyond the prefix that was known before its first.

    The means are of logarithms: of its rests in seconds, of its answers' lengths in tokens.
    """

    __slots__ = ("last_rest_s", "mean_answer", "mean_rest", "trunk", "turn")

    def __init__(self, trunk: int) -> None:
        self.trunk = trunk
        self.turn = 0
        self.last_rest_s: float | None = None
        self.mean_rest: float | None = None
        self.mean_answer: float | None = None


class _Visit:
    """What one request used last.

    `features` describe it before anything is known of the answer, `phase` since `since`: the last phase, after the
    answer, begins at `answered_at`. `leaf` is the one of its runs that may go, ordered by `order`.
    """

    __slots__ = (
        "answered_at",
        "due_at",
        "features",
        "is_open",
        "is_over",
        "leaf",
        "model",
        "num_anchors",
        "order",
        "phase",
        "released_at",
        "retentions",
        "reused_at",
        "session",
        "since",
        "size",
        "tail",
        "use",
        "worth",
    )

    def __init__(self, model: HazardModel, session: _Session, size: int, use: Use | None, features: Active) -> None:
        self.session = session
        self.size = size  # blocks, from the root on
        self.use = use
        self.features = features
        self.model, self.phase, self.since = model, features, 0.0
        self.released_at = 0.0
        self.answered_at = inf
        self.reused_at = inf
        self.num_anchors = 0
        self.tail = b""  # hash of the last block
        self.retentions: list[tuple[Retention, float]] = []  # what was asked, until when
        self.leaf: Run | None = None
        self.order: AdaptiveOrder | None = None
        self.worth = 0.0
        self.due_at = inf  # when it will be appraised anew
        self.is_open = False  # the models learn from it
        self.is_over = False  # the conversation went on without what is left of it


class Adaptive:
    """What the orders of one cache of `num_blocks` blocks of `block_size` tokens share.

    Remembers at most four hashes per block, of evicted blocks too: the log2(n) blocks of a visit by which it is known
    again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.now = 0.0
        self._block_size = block_size
        self._after = HazardModel(_NUM_FEATURES)
        self._during = HazardModel(2)  # shares the weights of a visit's `features` with the other
        self._after.believe_in_rhythm(_MEAN_REST)
        for hint, belief in _BELIEFS.items():
            self._after.believe(_HINT, _HINTS[hint], belief)
        self._releasing: _Visit | None = None  # None: blocks are released that nobody has used
        self._anchors: dict[bytes, _Visit] = {}
        self._max_anchors = _GHOSTS_PER_BLOCK * num_blocks
        self._unanswered: list[_Visit] = []
        self._watched: list[tuple[float, int, _Visit, HazardModel, Active, float, int]] = []  # heap, see `_watch`
        self._due: list[tuple[float, int, _Visit]] = []  # heap by when to appraise anew
        self._num_pushed = 0
        self._kinds: dict[str | bytes, int] = {}  # of tenants and of published prefixes
        self._num_tails = self._num_used_tails = 1  # continued visits, and those of them whose last block was used

    def __call__(self) -> AdaptiveOrder:
        """Make the policy of one order."""
        return AdaptiveOrder(self)

    # ---- what the cache tells

    def on_match(self, chain: Chain, table: BlockTable, now: float) -> None:
        self.now = now
        if self._unanswered:
            self._note_answers()
        self._learn()
        self._appraise_due()
        hashes, num_known = chain.hashes, table.num_published
        last: _Visit | None = table.last.note if table.last is not None else None
        anchors = self._anchors
        for i in range(len(hashes) - 1, num_known - 1, -1):
            if (ghost := anchors.get(hashes[i])) is not None:
                num_known, last = i + 1, ghost
                break
        if last is not None and num_known > (trunk := last.session.trunk) and 2 * num_known >= last.size + trunk:
            self._continue(last, num_known)
            session, retentions = last.session, last.retentions
        else:
            session, retentions = _Session(num_known), []
        visit = table.visit = self._visit(session, chain, num_known, table.use)
        visit.retentions = [kept for kept in retentions if kept[1] > now]

    def cuts(self, table: BlockTable) -> list[int]:
        """Begin a run where something is retained, and at the last block if conversations go on without it much more
        often than with it."""
        cuts = [end for kept in self._asked(table) for end in (kept.start, kept.end) if end is not None]
        if self._tail_share < _CHEAP:
            cuts.append(table.num_published - 1)
        return cuts

    def on_free(self, table: BlockTable, now: float) -> None:
        self.now = now
        visit = table.visit
        if not isinstance(visit, _Visit):  # a pin or a hold, which says nothing about when it is used again
            self._releasing = None
            return
        if visit.tail:  # a preempted sequence: what it left idle then it has used itself
            visit.is_open = False
            again = table.visit = _Visit(self._after, visit.session, visit.size, visit.use, visit.features)
            again.retentions = visit.retentions
            visit = again
        num_prompt, visit.size = visit.size, table.num_published
        visit.released_at, visit.is_open = now, table.last is not None
        asked = [(kept, inf if kept.duration_s is None else now + kept.duration_s) for kept in self._asked(table)]
        visit.retentions = visit.retentions + asked
        self._remember(visit, table)
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
            run.note = visit = _Visit(self._after, _Session(0), 0, None, [])
            visit.since = visit.answered_at = self.now

    def on_leaf(self, run: Run, order: AdaptiveOrder) -> Key:
        """Return the key of `run`, which is a leaf now."""
        visit: _Visit = run.note
        visit.leaf, visit.order = run, order
        if visit.due_at == inf:
            self._appraise(visit)
        return self._key(visit)

    def on_no_leaf(self, run: Run) -> None:
        """`run` is a leaf no longer."""
        visit: _Visit = run.note
        if visit.leaf is run:
            visit.leaf = visit.order = None

    # ---- worth

    def _key(self, visit: _Visit) -> Key:
        run, priority = visit.leaf, DEFAULT_PRIORITY
        assert run is not None
        for kept, until in visit.retentions:
            if run.start >= kept.start and (kept.end is None or run.end <= kept.end) and until > self.now:
                priority = kept.priority
        worth = visit.worth * self._tail_share if run.hashes == visit.tail else visit.worth
        return priority, worth, run.released_at

    def _appraise(self, visit: _Visit) -> None:
        """Set what keeping `visit` earns, in hits per second of room, and when that has to be done again."""
        age_s = max(0.0, self.now - visit.since)
        visit.worth = 0.0 if visit.is_over else visit.model.density(visit.phase, age_s)
        until = min((until for _, until in visit.retentions if until > self.now), default=inf)
        if not visit.is_over:
            until = min(until, visit.since + next_edge(age_s))
        visit.due_at = until
        if until < inf:
            heappush(self._due, (until, self._push(), visit))

    def _appraise_due(self) -> None:
        due, ready = self._due, list[_Visit]()
        while due and due[0][0] <= self.now:
            time, _, visit = heappop(due)
            if time == visit.due_at:
                visit.due_at = inf
                ready.append(visit)
        for visit in ready:
            if visit.leaf is not None:
                self._appraise(visit)
                self._reorder(visit)

    def _reorder(self, visit: _Visit) -> None:
        if visit.order is not None and visit.leaf is not None:
            visit.order.reorder(visit.leaf, self._key(visit))

    @property
    def _tail_share(self) -> float:
        return self._num_used_tails / self._num_tails

    # ---- visits and their phases

    def _visit(self, session: _Session, chain: Chain, num_known: int, use: Use | None) -> _Visit:
        session.turn += 1
        amount, kind = self._after.amount, self._after.kind
        features = [
            *amount(_TURN, session.turn - 1),
            *amount(_FIRST if session.turn == 1 else _MORE, len(chain) - num_known),
            *amount(_KNOWN, num_known),
            *amount(_LAST_REST, session.last_rest_s),
            *amount(_MEAN_REST, None if session.mean_rest is None else exp(session.mean_rest)),
            *kind(_TENANT, self._kind(chain.owner)),
        ]
        if 0 < chain.num_public_blocks <= len(chain):
            features += kind(_PREFIX, self._kind(chain.hashes[chain.num_public_blocks - 1]))
        if use is not None and use.hint is not None:
            features += kind(_HINT, _HINTS[use.hint])
        return _Visit(self._after, session, len(chain), use, features)

    def _kind(self, name: str | bytes) -> int:
        return self._kinds.setdefault(name, len(self._kinds))

    @staticmethod
    def _asked(table: BlockTable) -> tuple[Retention, ...]:
        return table.use.retention if table.use is not None else ()

    def _enter_answering(self, visit: _Visit, phase: int) -> None:
        """The answer of `visit` is not complete `_PHASE_EDGES[phase]` after its release."""
        model, expected = self._during, visit.session.mean_answer
        length = model.amount(_EXPECTED, None if expected is None else exp(expected))
        features = [*visit.features, *length, *model.kind(_PHASE, phase)]
        self._enter(visit, model, features, visit.released_at + _PHASE_EDGES[phase])

    def _note_answers(self) -> None:
        """See which answers are complete by now, and which have lasted into another phase."""
        unanswered = []
        for visit in self._unanswered:
            use = visit.use
            if not visit.is_open or use is None:
                continue
            if use.num_answer_tokens is not None:
                self._answered(visit, self.now if use.answered_at is None else use.answered_at, use.num_answer_tokens)
            elif not visit.is_over:
                unanswered.append(visit)
                phase = bisect_right(_PHASE_EDGES, self.now - visit.released_at) - 1
                if visit.released_at + _PHASE_EDGES[phase] > visit.since:
                    self._enter_answering(visit, phase)
        self._unanswered = unanswered

    def _answered(self, visit: _Visit, answered_at: float, num_tokens: int) -> None:
        amount, session = self._after.amount, visit.session
        usual = session.mean_answer
        visit.answered_at = answered_at
        phase = [
            *visit.features,
            *amount(_ANSWER, num_tokens),
            *amount(_RATIO, None if usual is None else _USUAL * (1 + num_tokens) / exp(usual)),
        ]
        self._enter(visit, self._after, phase, answered_at)
        session.mean_answer = _mean(usual, log(1.0 + num_tokens))

    def _enter(self, visit: _Visit, model: HazardModel, phase: Active, since: float) -> None:
        visit.model, visit.phase, visit.since = model, phase, since
        self._watch(visit, model, phase, since, 0)
        if visit.leaf is not None:
            self._appraise(visit)
            self._reorder(visit)

    def _continue(self, visit: _Visit, num_known: int) -> None:
        """The conversation of `visit` goes on: it was used again, `num_known` blocks of it."""
        session = visit.session
        if visit.is_open and visit.reused_at == inf:
            visit.reused_at = self.now
            self._num_tails += 1
            self._num_used_tails += num_known >= visit.size
        visit.is_over, visit.worth = True, 0.0
        self._reorder(visit)
        session.last_rest_s = max(_MIN_REST_S, self.now - visit.answered_at)
        session.mean_rest = _mean(session.mean_rest, log(session.last_rest_s))

    # ---- what the models learn

    def _watch(self, visit: _Visit, model: HazardModel, phase: Active, since: float, zone: int) -> None:
        """Have `model` learn, when it is over, whether `visit` was used again in age zone `zone` of its `phase`."""
        heappush(self._watched, (since + ZONE_EDGES[zone + 1], self._push(), visit, model, phase, since, zone))

    def _learn(self) -> None:
        """Let the models see every age zone that is over for some visit, continued in it or not.

        What is continued is learned no earlier than what is not: else the models would think too well of long ages.
        """
        watched, now = self._watched, self.now
        while watched and watched[0][0] <= now:
            _, _, visit, model, phase, since, zone = heappop(watched)
            start_s, end_s = ZONE_EDGES[zone], ZONE_EDGES[zone + 1]
            rest_s = visit.reused_at - since
            if not visit.is_open or rest_s <= start_s:
                continue
            model.learn(phase, start_s, min(end_s, rest_s), rest_s < end_s)
            if rest_s >= end_s and zone + 1 < NUM_ZONES:
                self._watch(visit, model, phase, since, zone + 1)

    def _push(self) -> int:
        self._num_pushed += 1
        return self._num_pushed

    # ---- ghosts

    def _remember(self, visit: _Visit, table: BlockTable) -> None:
        """Note the last block of `visit`, the second last, the fourth last and so on, to know it again by."""
        n = 1
        for run in table.runs():
            while (index := visit.size - n - run.start) >= 0:
                digest = run.hash_of(index)
                visit.tail = visit.tail or digest
                self._anchor(digest, visit)
                n *= 2

    def _anchor(self, digest: bytes, visit: _Visit) -> None:
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


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _MEMORY * (value - mean)
