"""How fast a worker prefills and decodes, learned from what it reports."""

from __future__ import annotations

from kvasir.protocol.messages import Load

DEFAULT_PREFILL_TOKENS_PER_S = 5_000.0
_FORGET = 0.9  # weight of the past per report: rates follow a change within some ten steps
_LEAST_STEP_S = 1e-6  # a shorter step was not measured: its rate would be beyond all sense
_FIRST_S = 0.01  # what is expected of a worker weighs as much as one so short prefill
_MIN_PREFILL_SHARE = 0.1  # of a mixed step's time: what is left when the decode round is taken off is never nothing


class Rates:
    """Prefill rate and decode round of one worker, learned from its step reports.

    Prefill is a ratio of decayed sums, so that large steps count for more than their number. A step that does both is
    charged one decode round first; what remains is prefill. Before its first prefill a worker is expected to be as fast
    as its model's others: `typical` learns from all of them. Else whoever has not worked yet would seem slow, and get
    no work.
    """

    def __init__(self, typical: Rates | None = None) -> None:
        self._typical = typical
        self._tokens = self._seconds = 0.0
        self.round_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        if self._seconds:
            return self._tokens / self._seconds
        return DEFAULT_PREFILL_TOKENS_PER_S if self._typical is None else self._typical.prefill_tokens_per_s

    def learn(self, load: Load) -> None:
        """Take in what one step did."""
        if load.step_s < _LEAST_STEP_S:
            return
        if load.num_prefill_tokens:
            step_s = load.step_s
            if load.num_decode_tokens:
                step_s = max(step_s - self.round_s, step_s * _MIN_PREFILL_SHARE)
            self._learn_prefill(load.num_prefill_tokens, step_s)
        elif load.num_decode_tokens:
            self.round_s = load.step_s if not self.round_s else self.round_s * 0.8 + load.step_s * 0.2

    def _learn_prefill(self, num_tokens: int, step_s: float) -> None:
        if not self._seconds:
            self._tokens, self._seconds = self.prefill_tokens_per_s * _FIRST_S, _FIRST_S
        self._tokens = self._tokens * _FORGET + num_tokens
        self._seconds = self._seconds * _FORGET + step_s
        if self._typical is not None:
            self._typical._learn_prefill(num_tokens, step_s)
