"""A stand-in for a transformer whose every token depends on every earlier one, as it lies in the paged store.

The next token is a hash of all previous tokens, and they are read from the store through the block table at every
step: a block too many, too few, swapped, overwritten or not zeroed changes all that follows. So equal streams are a
complete check of scheduling, paging, sharing and resumption. Needs no torch and starts at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.sampling import Sampling
from kvasir.worker.engine.step import Mask, Sampled, SampleRow, SequenceSlice

PREFIX = "oracle:"
_MASK = (1 << 64) - 1
Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class OracleConfig:
    """Settings, given as `oracle:step_ms=2,vocab=4096`. A step sleeps `step_ms` plus `token_us` per token.

    `eos` is the end-of-sequence token, -1 for none.
    """

    vocab: int = 4096
    window: int = 131072
    step_ms: float = 0.0
    token_us: float = 0.0
    eos: int = -1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.eos,) if self.eos >= 0 else ()


def parse_oracle(spec: str) -> OracleConfig:
    """Return the configuration in `spec`, which begins with `oracle:`.

    Raises:
        ConfigurationError: an unknown setting, or a value that is no number.
    """
    kinds = {field.name: float if field.type == "float" else int for field in fields(OracleConfig)}
    values: dict[str, float] = {}
    for item in filter(None, spec.removeprefix(PREFIX).split(",")):
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ConfigurationError(f"{spec}: the oracle has no setting {name!r}; it has {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise ConfigurationError(f"{spec}: {name} must be a number, not {value!r}.") from None
    config = OracleConfig(**values)  # type: ignore[arg-type]
    if config.vocab < 2 or config.window < 2 or min(config.step_ms, config.token_us) < 0:
        raise ConfigurationError(f"{spec}: vocab and window must be at least 2, times not negative.")
    return config


class OracleStore:
    """`data` [num_blocks, block_size] u64: one word per token where a transformer has keys and values."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.data: Words = np.zeros((num_blocks, block_size), dtype=np.uint64)
        self.block_size = block_size

    def zero(self, block_ids: Sequence[int]) -> None:
        self.data[list(block_ids)] = 0

    def copy_block(self, src: int, dst: int) -> None:
        self.data[dst] = self.data[src]


class OracleModel:
    """Its "logits" are one u64 per row: the hash of everything before the token to be drawn."""

    def __init__(self, config: OracleConfig | None = None) -> None:
        self.config = config or OracleConfig()

    def forward(self, slices: list[SequenceSlice], kv: OracleStore) -> list[int]:
        """Write the tokens of `slices` to `kv`, read back all that their tables hold, return one hash per logit."""
        flat = kv.data.reshape(-1)
        slots = [_slots(piece, kv.block_size) for piece in slices]
        for piece, where in zip(slices, slots, strict=True):
            positions = np.arange(piece.start, piece.end, dtype=np.uint64)
            flat[where[piece.start :]] = _words(np.array(piece.token_ids, dtype=np.uint64), positions)
        hashes: list[int] = []
        for piece, where in zip(slices, slots, strict=True):
            if piece.num_logits:
                terms = flat[where] * _weights(np.arange(piece.end, dtype=np.uint64))
                hashes += np.cumsum(terms, dtype=np.uint64)[-piece.num_logits :].tolist() * piece.num_draws
        if not slices:
            return hashes
        delay_s = self.config.step_ms * 1e-3 + self.config.token_us * 1e-6 * sum(len(p.token_ids) for p in slices)
        if delay_s:
            time.sleep(delay_s)
        return hashes

    def sample(self, hashes: Sequence[int], rows: Sequence[SampleRow], masks: Sequence[Mask] = ()) -> list[Sampled]:
        """Draw one token per hash: greedy from it alone, otherwise from it, the seed and the position."""
        return [self._draw(digest, row.params, row.position) for digest, row in zip(hashes, rows, strict=True)]

    def _draw(self, digest: int, params: Sampling, position: int) -> Sampled:
        if params.temperature:
            digest ^= _scramble(_scramble(params.seed) + position & _MASK)
        token_id = _scramble(digest) % self.config.vocab
        if params.logprobs is None:
            return Sampled(token_id)
        return Sampled(
            token_id, -0.5, tuple(((token_id + i) % self.config.vocab, -0.5 - i) for i in range(params.logprobs))
        )


def _slots(piece: SequenceSlice, block_size: int) -> NDArray[np.int64]:
    """Return where positions 0..end-1 of the sequence lie, [end]."""
    blocks = np.array(piece.block_table[: -(-piece.end // block_size)], dtype=np.int64)
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[: piece.end]


def _words(token_ids: Words, positions: Words) -> Words:
    """What is stored for a token: never what another token or position would store."""
    return _scramble_all((positions << np.uint64(32)) + token_ids + np.uint64(1))


def _weights(positions: Words) -> Words:
    """Odd factors, one per position: words that trade places change the sum."""
    return _scramble_all(positions) | np.uint64(1)


def _scramble_all(x: Words) -> Words:
    """splitmix64's output function (Steele, Lea, Flood 2014) of every element."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scramble(x: int) -> int:
    """The same for one Python integer."""
    x = x + 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
