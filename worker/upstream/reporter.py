"""What a worker that fronts an upstream says of it: outputs, block events, load and rates, put into `StepReport`s.

An upstream tells its tokens stream by stream. What came since the last report is one step here. The step counter grows
only with what shows that the engine works: a token, or figures of its metrics that only its work changes. Pure state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvasir.protocol.messages import Load, Output, Snapshot, StepReport
from kvasir.worker.upstream.cached import CachedBlocks
from kvasir.worker.upstream.vllm import Metrics

MIN_RATE_TOKENS = 256  # fewer prompt tokens take a step's time whatever the rate is: nothing is learned from them
MAX_STEP_S = 1.0  # a longer pause between tokens is no decode step


class Reporter:
    """Collects until `take`. `num_blocks`: the upstream's pool in blocks of the gateway's.

    `wake` is called when there is something that should not wait.
    """

    def __init__(
        self, cached: CachedBlocks, num_blocks: int, clock: Callable[[], float], wake: Callable[[], None]
    ) -> None:
        self._cached = cached
        self._num_blocks = num_blocks
        self._clock = clock
        self._wake = wake
        self._outputs: list[Output] = []
        self._step = self._event_seq = 0
        self._is_progress = False
        self._load = Load(num_free_blocks=num_blocks)
        self._progress: tuple[str, ...] = ()
        self._num_decoded = self._num_prefilled = 0
        self._prefill_s = 0.0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=64)  # of the last requests: (sent, first token)
        self._decoded_at = 0.0  # when a report last told of decoded tokens

    def add(self, output: Output) -> None:
        """Put an output into the next report."""
        self._outputs.append(output)
        self._wake()

    def decoded(self, num_tokens: int) -> None:
        """Note tokens of a running request."""
        self._num_decoded += num_tokens
        self._is_progress = True

    def prefilled(self, num_tokens: int, sent_at: float) -> None:
        """Note the first token of a request; `num_tokens` of its prompt had to be computed.

        The engine computes prompts in the order in which they were sent: this one's turn began when it was sent, or
        when those before it were through. First tokens of one step come in any order.
        """
        now = self._clock()
        began_at = max([first_at for at, first_at in self._first_tokens if at <= sent_at], default=sent_at)
        self._num_prefilled += num_tokens
        self._prefill_s += max(1e-6, now - max(sent_at, began_at))
        self._first_tokens.append((sent_at, now))
        self._is_progress = True

    def observe(self, metrics: Metrics) -> None:
        """Take in the engine's own figures."""
        self._is_progress |= metrics.progress != self._progress
        self._progress = metrics.progress
        self._load = Load(
            num_running=metrics.num_running,
            num_waiting=metrics.num_waiting,
            num_free_blocks=round(self._num_blocks * (1.0 - metrics.cache_usage)),
        )
        self._wake()

    def take(self) -> StepReport:
        """Return what has happened since the last call."""
        now = self._clock()
        stored, removed = self._cached.resident.take()
        if stored or removed:
            self._event_seq += 1
        self._step += self._is_progress
        load = Load(self._load.num_running, self._load.num_waiting, self._load.num_free_blocks)
        if self._num_prefilled:
            load.num_prefill_tokens = self._num_prefilled
            if self._num_prefilled >= MIN_RATE_TOKENS:
                load.step_s = self._prefill_s
        elif self._num_decoded:
            step_s = now - self._decoded_at
            load.num_decode_tokens, load.step_s = self._num_decoded, step_s if step_s < MAX_STEP_S else 0.0
        if self._num_decoded:
            self._decoded_at = now
        outputs, self._outputs = self._outputs, []
        self._is_progress, self._num_decoded, self._num_prefilled, self._prefill_s = False, 0, 0, 0.0
        return StepReport(self._step, self._event_seq, load, outputs, stored, removed)

    def snapshot(self) -> Snapshot:
        """Return all resident hashes; the next events count on from it."""
        resident = self._cached.resident
        resident.take()
        return Snapshot(self._event_seq, resident.snapshot())
