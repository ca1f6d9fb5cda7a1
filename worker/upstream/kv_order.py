"""In which order batches of KV events count, and what to do about those that are missing. Pure: no I/O, no clock.

Some facts about the publisher, and what follows:

- Numbers begin at 0 and grow by one. So a gap shows as soon as a later batch comes, and a replay can fill it.
- After a restart they begin at 0 again, and nothing says so. A lower number with a newer time is a restart, one with an
  older time is a duplicate or late. But the first batches of a new stream may have been missed, and then its numbers
  look like the next ones of the old. So every replay begins with the batch that was applied last: the same bytes prove
  the same stream. A restart is a new connection, too. While that is unproven, live batches wait.
- Only so many batches are kept for replays, and a replay may lose some on its way, its end too. What cannot be had is
  *lost*: the index is cleared and goes on from what there is. It then holds less than the upstream, never more.
- The last batch before a silence may be lost, too, which no number shows. So whoever feeds this asks for a replay now
  and then when nothing comes (`want_replay`).
"""

from __future__ import annotations

from msgspec import Struct

from kvasir.protocol.errors import InvalidMessage
from kvasir.worker.upstream.kv_index import UpstreamIndex
from kvasir.worker.upstream.kv_wire import END_SEQ, Batch, Cleared, decode_batch

MAX_WAITING = 10_000
MAX_WAITING_BYTES = 64 << 20
MAX_TRIES = 3  # of a replay, without a batch gained


class _Received(Struct, frozen=True):
    payload: bytes
    batch: Batch


class BatchOrder:
    """Applies the batches of one publisher to an index, each once and in order.

    Feed it what comes: `connected`, `live`, and per replay `begin_replay`, `replayed`…, `end_replay` or `fail_replay`.
    `num_lost`: times that the index was cleared because batches are missing; `num_late`: batches that came twice or too
    late.
    """

    def __init__(self, index: UpstreamIndex, *, has_replay: bool, rank: int | None = None) -> None:
        """`has_replay`: whether batches can be asked for again. `rank`: ignore what other ranks publish."""
        self._index, self._has_replay, self._rank = index, has_replay, rank
        self._next: int | None = 0 if has_replay else None  # None: begin with whatever comes
        self._last: tuple[int, bytes] | None = None  # (seq, payload) of the batch applied last in this stream
        self._last_ts = float("-inf")
        self._waiting: dict[int, _Received] = {}  # come before their turn
        self._waiting_bytes = 0
        self._is_proven = not has_replay
        self._wants_replay = has_replay
        self._asked: tuple[int, bytes] | None = None  # what `_last` was when the replay was asked for
        self._is_replaying = self._has_answer = False  # `_has_answer`: a batch of this replay has come
        self._num_tries = 0
        self.num_batches = self.num_gaps = self.num_replays = self.num_failed_replays = self.num_lost = 0
        self.num_restarts = self.num_late = self.num_malformed = self.num_other_ranks = 0

    @property
    def wants_replay(self) -> bool:
        """Whether batches are missing, or the stream is unproven: replay from `begin_replay` on."""
        return self._wants_replay

    @property
    def in_order(self) -> bool:
        """Whether the index holds what every batch so far has said."""
        return self._is_proven and not self._waiting

    def connected(self) -> None:
        """The link is up, for the first time or again: what was published in between is not known."""
        self._drop_waiting()
        if self._has_replay:
            self._is_proven, self._wants_replay, self._is_replaying, self._num_tries = False, True, False, 0
        elif self._last is not None:
            self._lose(None)

    def restarted(self) -> None:
        """The upstream has restarted: hold nothing, and begin with the first batch of the new stream."""
        self.num_restarts += 1
        self._index.clear()
        self._drop_waiting()
        self._next, self._last, self._last_ts = (0 if self._has_replay else None), None, float("-inf")
        self._is_proven, self._wants_replay = not self._has_replay, self._has_replay
        self._is_replaying, self._num_tries = False, 0

    def want_replay(self) -> None:
        """Ask for a replay although nothing is known to be missing."""
        self._wants_replay = self._has_replay

    def live(self, seq: int, payload: bytes) -> None:
        """Take a batch that was just published: apply it, keep it for later, or pass over it."""
        received = self._decode(payload)
        if received is None or seq >= END_SEQ:
            return
        if not self._is_proven:
            self._keep(seq, received)
            return
        if self._next is None:
            self._next = seq
        if seq < self._next and received.batch.ts > self._last_ts:
            self.restarted()
            if self._has_replay:
                self._keep(seq, received)
                return
            self._next = seq
        if seq < self._next:
            self.num_late += 1
        elif seq == self._next and (received.batch.ts >= self._last_ts or not self._has_replay):
            self._apply(seq, received)
            self._go_on()
        else:
            self._keep(seq, received)  # too early; or of an earlier stream, by its time: a replay will tell
        if self._waiting:
            self._note_gap()

    # ---- replay

    def begin_replay(self) -> int:
        """Return the number to ask for a replay from."""
        self.num_replays += 1
        self._wants_replay = False
        self._asked = self._last
        self._is_replaying, self._has_answer = True, False
        return self._asked[0] if self._asked is not None else self._next or 0

    def replayed(self, seq: int, payload: bytes) -> bool:
        """Take the next batch of a replay. False: the replay is out of date; begin another one."""
        if not self._is_replaying:
            return False
        is_first, self._has_answer = not self._has_answer, True
        if is_first and self._asked is not None and seq == self._asked[0]:
            if payload == self._asked[1]:
                self._prove()
            else:
                self.restarted()
            return self._is_replaying
        received = self._decode(payload, may_be_of_other_rank=True)
        assert received is not None
        if is_first and (self._next is None or seq > self._next or not self._is_proven):
            if seq or self._asked is not None:
                self._forget(seq)  # what we need has not been kept, or not what would prove that it is the same stream
            else:
                self._next = 0
        if seq == self._next:
            self._apply(seq, received)
            self._num_tries = 0
            self._is_proven = True
            self._go_on()
        elif self._next is not None and seq > self._next:
            self._keep(seq, received)
        return True

    def end_replay(self) -> None:
        """The publisher has sent everything that it has kept."""
        if not self._is_replaying:
            return
        self._is_replaying = False
        if not self._has_answer and self._asked is not None:
            self.restarted()  # it has never published what we applied last
            return
        self._prove()
        self._ask_again_or_lose()

    def fail_replay(self) -> None:
        """The replay did not end in time. Without effect if it has ended or is out of date."""
        if self._is_replaying:
            self._is_replaying = False
            self.num_failed_replays += 1
            self._ask_again_or_lose()

    def _prove(self) -> None:
        """The stream is the one that was applied so far: what waited while this was open may have its turn."""
        if not self._is_proven:
            self._is_proven = True
            self._go_on()

    def _ask_again_or_lose(self) -> None:
        for seq in [seq for seq, received in self._waiting.items() if received.batch.ts < self._last_ts]:
            self._unkeep(seq)  # of an earlier stream
        if self._is_proven and not self._waiting:
            self._num_tries = 0
            return
        self._num_tries += 1
        if self._num_tries < MAX_TRIES:
            self._wants_replay = True
        else:
            self._lose(min(self._waiting, default=None))

    # ---- order

    def _decode(self, payload: bytes, may_be_of_other_rank: bool = False) -> _Received | None:
        """Return the batch, None if it is another rank's. What cannot be read may have said anything: a clear."""
        try:
            batch = decode_batch(payload)
        except InvalidMessage:
            self.num_malformed += 1
            return _Received(payload, Batch(self._last_ts, [Cleared()]))
        if self._rank is None or batch.rank is None or batch.rank == self._rank:
            return _Received(payload, batch)
        self.num_other_ranks += 1
        return _Received(payload, Batch(batch.ts, [])) if may_be_of_other_rank else None

    def _apply(self, seq: int, received: _Received) -> None:
        self._index.apply(received.batch)
        self._unkeep(seq)
        self._last, self._next = (seq, received.payload), seq + 1
        self._last_ts = received.batch.ts
        self.num_batches += 1

    def _go_on(self) -> None:
        """Apply what has waited for its turn. What is older than the batch before it is of an earlier stream."""
        while self._next is not None and (received := self._unkeep(self._next)) is not None:
            if received.batch.ts < self._last_ts:
                break
            self._apply(self._next, received)

    def _note_gap(self) -> None:
        if not self._has_replay:
            self.num_gaps += 1
            self._lose(min(self._waiting))
        elif not self._wants_replay and not self._is_replaying:
            self.num_gaps += 1
            self._wants_replay, self._num_tries = True, 0

    def _lose(self, next_seq: int | None) -> None:
        """Give up what is missing before `next_seq` and go on from there. None: go on from the next that comes."""
        self._forget(next_seq)
        self._go_on()

    def _forget(self, next_seq: int | None) -> None:
        self.num_lost += 1
        self._index.clear()
        self._next, self._last = next_seq, None
        self._is_proven, self._wants_replay, self._num_tries = True, False, 0

    def _keep(self, seq: int, received: _Received) -> None:
        """Have a batch wait for its turn, if there is room: else it becomes a gap later."""
        size = len(received.payload)
        if len(self._waiting) < MAX_WAITING and self._waiting_bytes + size <= MAX_WAITING_BYTES:
            self._unkeep(seq)
            self._waiting[seq] = received
            self._waiting_bytes += size

    def _unkeep(self, seq: int) -> _Received | None:
        received = self._waiting.pop(seq, None)
        if received is not None:
            self._waiting_bytes -= len(received.payload)
        return received

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
