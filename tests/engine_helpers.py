"""Engines over the oracle model, and what drives them in tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate, Output, StepReport
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Mask, OutOfMemory, Sampled, SampleRow, SequenceSlice
from kvasir.worker.model.oracle_model import _MASK, OracleConfig, OracleModel, OracleStore, _weights, _words
from kvasir.worker.speculation.costs import StepCosts

SECRET = b"deployment"
ROOT = derive_root(SECRET, "oracle", "uint64")
PUBLIC_SPACE = derive_namespace(SECRET, "public")
GREEDY = Sampling(temperature=0.0)
SIZE = 4


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FixedCosts(StepCosts):
    """Drafts cost what they are said to: at 0, whatever has a chance is drafted."""

    def __init__(self, cost: float = 0.0) -> None:
        super().__init__()
        self.cost = cost

    def relative(self, num_sequences: int) -> tuple[float, float] | None:
        return 0.0, self.cost

    def relative_round(self, num_sequences: int, num_drafting: int) -> float:
        return self.cost


class WatchedStore(OracleStore):
    """Remembers what was zeroed, and who wrote what is in each block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.zeroed: list[int] = []

    def zero(self, block_ids: Iterable[int]) -> None:
        self.zeroed += block_ids
        super().zero(list(block_ids))


class WatchedModel(OracleModel):
    """Remembers the slices of every step, and how often there were none.

    Has memory for `max_tokens` tokens in a step, and no finite logits for sequences that have computed `sick_token`.
    """

    def __init__(self, config: OracleConfig) -> None:
        super().__init__(config)
        self.max_tokens = 1 << 30
        self.sick_token = -1
        self.sick_keys: set[int] = set()
        self.steps: list[list[SequenceSlice]] = []
        self.num_rests = 0

    def forward(self, slices: list[SequenceSlice], kv: OracleStore) -> list[int]:
        if not slices:
            self.num_rests += 1
            return []
        self.steps.append(slices)
        self.sick_keys |= {piece.seq_key for piece in slices if self.sick_token in piece.token_ids}
        hashes = super().forward(slices, kv)
        if sum(len(piece.token_ids) for piece in slices) > self.max_tokens:
            raise OutOfMemory("no memory for this step")
        return hashes

    def sample_all(
        self, hashes: Sequence[int], rows: Sequence[SampleRow], masks: Sequence[Mask] = ()
    ) -> list[Sampled | None]:
        drawn = self.sample(hashes, rows)
        if not self.sick_keys:
            return [*drawn]
        keys = [piece.seq_key for piece in self.steps[-1] for _ in range(piece.num_logits * piece.num_draws)]
        return [None if key in self.sick_keys else sampled for key, sampled in zip(keys, drawn, strict=True)]


@dataclass
class Stream:
    """What one request has got so far."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_cached: int | None = None
    num_logprobs: int = 0
    error: str = ""


class Rig:
    """An engine with everything around it visible. A step checks its books, and the order of what it reports."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        max_requests: int = 16,
        max_step_tokens: int = 64,
        max_context: int | None = None,
        eos: int = -1,
        size: int = SIZE,
        is_ahead: bool = False,
    ) -> None:
        self.size = size
        self.clock = Clock()
        self.model = WatchedModel(OracleConfig(eos=eos))
        self.kv = WatchedStore(num_blocks, size)
        self.cache = PrefixCache(num_blocks, size)
        limits = EngineLimits(max_requests, max_step_tokens, max_context or num_blocks * size)
        self.executor = LocalExecutor(self.model, self.kv, self.model.sample_all)
        self.engine = Engine(
            self.executor,
            self.cache,
            limits,
            vocab_size=self.model.config.vocab,
            eos_token_ids=self.model.config.eos_token_ids,
            clock=self.clock,
            check=True,
            is_ahead=is_ahead,
        )
        self.engine.public_namespace = PUBLIC_SPACE
        self.streams: dict[bytes, Stream] = {}
        self.next_seq: dict[bytes, int] = {}
        self.followed: set[bytes] = set()
        self.event_seq = 0
        self.reports: list[StepReport] = []

    def submit(self, command: Generate) -> Stream:
        self.engine.submit(command)
        self.next_seq[command.req_id] = len(command.token_ids) // 4 - command.num_prompt_tokens
        return self.streams.setdefault(command.req_id, Stream())

    def step(self) -> StepReport:
        report = self.engine.step()
        self.engine.check_integrity()
        self.reports.append(report)
        for output in report.outputs:
            self._take(output)
        assert report.event_seq == self.event_seq + bool(report.stored or report.removed)
        self.event_seq = report.event_seq
        stored, removed = _split(report.stored), _split(report.removed)
        assert not stored & removed
        assert not stored & self.followed
        assert removed <= self.followed
        self.followed = (self.followed | stored) - removed
        return report

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left, which must happen within `max_steps`."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"{self.engine.num_unfinished} requests are unfinished after {max_steps} steps")

    def _take(self, output: Output) -> None:
        stream = self.streams[output.req_id]
        assert stream.finish_reason is None, "an output after the end"
        tokens = unpack_tokens(output.token_ids)
        assert output.seq == self.next_seq[output.req_id]
        self.next_seq[output.req_id] += len(tokens)
        stream.token_ids += tokens
        stream.num_logprobs += len(output.logprobs)
        stream.finish_reason = output.finish_reason
        stream.error = output.error
        if output.num_cached_tokens is not None:
            assert stream.num_cached is None, "cached tokens told twice"
            stream.num_cached = output.num_cached_tokens


def _split(packed: bytes) -> set[bytes]:
    return {packed[i : i + 16] for i in range(0, len(packed), 16)}


def make_generate(
    prompt: list[int],
    max_tokens: int = 8,
    *,
    req_id: bytes = b"r",
    tenant: str = "a",
    delivered: list[int] | None = None,
    num_public: int = 0,
    sampling: Sampling = GREEDY,
    size: int = SIZE,
    **options: Any,
) -> Generate:
    """Return a `Generate` as the gateway makes it, `num_public` being blocks of the public zone."""
    packed = pack_tokens(prompt + (delivered or []))
    space = derive_namespace(SECRET, "tenant", tenant)
    return Generate(
        req_id=req_id,
        attempt=options.pop("attempt", 1),
        tenant=tenant,
        token_ids=packed,
        num_prompt_tokens=len(prompt),
        root=ROOT,
        prefix_hashes=hash_prompt(ROOT, PUBLIC_SPACE, space, packed, num_public * size, size),
        num_public_tokens=num_public * size,
        namespace=space,
        max_tokens=max_tokens,
        sampling=sampling,
        **options,
    )


def make_prompt(length: int, salt: int = 0) -> list[int]:
    return [int(x) for x in np.random.default_rng(salt).integers(0, 4096, length)]


def expected_tokens(prompt: list[int], num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
    """Return the `num_tokens` tokens after `prompt`, computed without a store: what every stream must equal."""
    tokens = np.array(prompt, dtype=np.uint64)
    positions = np.arange(len(tokens), dtype=np.uint64)
    digest = int((_words(tokens, positions) * _weights(positions)).sum(dtype=np.uint64))
    drawn: list[int] = []
    for position in range(len(tokens), len(tokens) + num_tokens):
        token_id = OracleModel()._draw(digest, sampling, position).token_id
        drawn.append(token_id)
        here = np.array([position], dtype=np.uint64)
        digest = digest + int((_words(np.array([token_id], dtype=np.uint64), here) * _weights(here))[0]) & _MASK
    return drawn
