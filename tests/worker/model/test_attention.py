"""Every attention path against the readable reference, on stores whose unused slots are poisoned with NaN."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention, chunk_attend, reference_attend
from kvasir.worker.model.attention_paths import choose_attention
from kvasir.worker.model.batch import pack
from kvasir.worker.model.cascade import Stem
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.linear import probe_packing
from kvasir.worker.model.working_set import WorkingSetAttention, _capacity

BLOCK_SIZE = 5  # divides no power of two
MAX_TOKENS = 300  # beyond two shelf capacities


def make_config(windows: tuple[int | None, ...] = (None, 20), num_kv_heads: int = 2) -> ModelConfig:
    return ModelConfig("mistral", 8, 24, 8, len(windows), 6, num_kv_heads, 4, 1e-5, 999, RopeConfig(), windows)


class Harness:
    """Drives an attention path and the reference over one store with random queries, keys and values."""

    def __init__(
        self, config: ModelConfig, attention: Attention, num_sequences: int, num_shared: Sequence[int] = ()
    ) -> None:
        """The sequences share the blocks of sequence 0 to begin with, `num_shared[i]` tokens, which are there."""
        self.config, self.attention, self.reference = config, attention, ReferenceAttention(config)
        blocks_each = -(-MAX_TOKENS // BLOCK_SIZE)
        ids = list(range(num_sequences * blocks_each))
        random.Random(1).shuffle(ids)
        self.tables = [ids[i::num_sequences] for i in range(num_sequences)]
        shape = (len(ids), config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.kv = KvStore(*shape, dtype=torch.float32, device="cpu")
        self.kv.data.fill_(float("nan"))
        self.lengths = [0] * num_sequences
        self.generator = torch.Generator().manual_seed(0)
        for i, num_tokens in enumerate(num_shared):
            num_blocks = num_tokens // BLOCK_SIZE
            self.tables[i] = self.tables[0][:num_blocks] + self.tables[i][num_blocks:]
            self.lengths[i] = num_blocks * BLOCK_SIZE
        shared = torch.tensor(self.tables[0][: max(num_shared, default=0) // BLOCK_SIZE], dtype=torch.int64)
        self.kv.data[shared] = torch.randn(self.kv.data[shared].shape, generator=self.generator)

    def step(self, shares: dict[int, int], kept: dict[int, int] | None = None) -> None:
        """Compute `shares[i]` new tokens of sequence i, all in one step, and compare the two paths layer by layer.

        Sequences in `kept` decode with drafts, of whose tokens they keep so many.
        """
        kept = kept or {}
        slices = [
            SequenceSlice(i, [0] * count, self.lengths[i], self.tables[i], count if i in kept else 0)
            for i, count in shares.items()
        ]
        singles, chunks = self.attention.arrange(slices, self.kv)
        batch = pack(slices, singles, chunks, BLOCK_SIZE, self.kv.data.device)
        self.attention.begin(batch, self.kv)
        self.reference.begin(batch, self.kv)
        rows = self.kv.rows(batch.slots)
        for layer in range(self.config.num_layers):
            q, k, v = self.heads(len(batch.slots))
            self.kv.write(layer, rows, k, v)
            expected = self.reference.attend(layer, q, k, v, self.kv)
            actual = self.attention.attend(layer, q, k, v, self.kv)
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max().item() < 1e-5
        for i, count in shares.items():
            self.lengths[i] += kept.get(i, count)

    def heads(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        shape = (num_tokens, num_heads + 2 * num_kv_heads, self.config.head_dim)
        heads = torch.randn(shape, generator=self.generator)
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return q, k, v


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("start", [0, 5])
def test_reference_is_the_textbook_formula(start: int, window: int | None) -> None:
    q, keys, values = torch.randn(9, 6, 8), torch.randn(start + 9, 2, 8), torch.randn(start + 9, 2, 8)
    out = reference_attend(q, keys, values, start, 0.5, window)
    for i in range(9):
        position = start + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(6):
            scores = torch.stack([q[i, head] @ keys[j, head // 3] * 0.5 for j in range(first, position + 1)])
            expected = (scores.softmax(0)[:, None] * values[first : position + 1, head // 3]).sum(0)
            torch.testing.assert_close(out[i, head], expected)


@pytest.mark.parametrize("window", [None, 1, 6, 50])
@pytest.mark.parametrize(("start", "num_new"), [(0, 40), (0, 2), (17, 33), (64, 16)])
@pytest.mark.parametrize("long_past", [1, 512], ids=["past by itself", "masked"])
def test_prefill_chunk_in_pieces_equals_the_reference(
    start: int, num_new: int, window: int | None, long_past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.worker.model.attention._MASK_ELEMENTS", 1)  # the smallest pieces
    monkeypatch.setattr("kvasir.worker.model.attention._LONG_PAST", long_past)
    q = torch.randn(num_new, 6, 8)
    keys, values = torch.randn(start + num_new, 2, 8), torch.randn(start + num_new, 2, 8)
    expected = reference_attend(q, keys, values, start, 8**-0.5, window).flatten(1)
    torch.testing.assert_close(chunk_attend(q, keys, values, start, window), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("limit_bytes", [0, 90_000, 1 << 30], ids=["all gathered", "some gathered", "all in the set"])
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_equal_the_reference(limit_bytes: int, seed: int) -> None:
    rng = random.Random(seed)
    attention = WorkingSetAttention(make_config(), limit_bytes)
    harness = Harness(make_config(), attention, num_sequences=7)
    gathered = 0
    for _ in range(60):
        shares = {}
        for i in rng.sample(range(7), rng.randint(1, 7)):  # the others are absent, as when preempted
            room = MAX_TOKENS - harness.lengths[i]
            if room == 0 or rng.random() < 0.03:  # finished: another sequence takes the key from the start
                harness.lengths[i] = 0
                room = MAX_TOKENS
            count = 1 if harness.lengths[i] and rng.random() < 0.8 else rng.randint(1, 90)
            shares[i] = min(count, room)
        kept = {}
        for i in shares:
            if harness.lengths[i] and rng.random() < 0.4:
                shares[i] = min(rng.choice([1, 2, 2, 5, 9]), MAX_TOKENS - harness.lengths[i])
                kept[i] = rng.randint(1, shares[i])
        harness.step(shares, kept)
        decoding = sum(count == 1 or i in kept for i, count in shares.items())
        gathered += decoding - attention.num_sequences
        assert attention.num_sequences <= decoding
        assert attention.allocated_bytes <= limit_bytes
    assert (gathered > 0) == (limit_bytes < 1 << 30)


@pytest.mark.parametrize("limit_bytes", [60_000, 1 << 30], ids=["some gathered", "all in the set"])
@pytest.mark.parametrize("packs", [False, True], ids=["plain stems", "packed stems"])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_begin_alike_equal_the_reference(
    limit_bytes: int, packs: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come and go, with drafts and without, and share 0 to 40 blocks."""
    use_stems(packs, monkeypatch)
    rng, config = random.Random(seed), make_config((None, None))
    num_shared = [200, 200, *(rng.choice([0, 3, 50, 120, 200]) for _ in range(6))]
    attention = WorkingSetAttention(config, limit_bytes)
    harness = Harness(config, attention, len(num_shared), num_shared)
    num_with_stem = num_stems = 0
    for _ in range(50):
        shares, kept = {}, {}
        for i in rng.sample(range(len(num_shared)), rng.randint(1, len(num_shared))):
            if harness.lengths[i] + 9 > MAX_TOKENS:
                harness.lengths[i] = num_shared[i] // BLOCK_SIZE * BLOCK_SIZE
            shares[i] = rng.choice([1, 1, 1, 4]) if harness.lengths[i] else 5
            if harness.lengths[i] and shares[i] > 1 and rng.random() < 0.7:
                kept[i] = rng.randint(1, shares[i])
        harness.step(shares, kept)
        assert attention.allocated_bytes <= limit_bytes
        num_with_stem += len(attention.stem_of)
        num_stems = max(num_stems, len(set(attention.stem_of.values())))
    assert num_with_stem > (5 if packs else 20) and num_stems > 0  # packed ones take twice the room


def use_stems(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even short stems, packed or not, for any number of queries."""
    if packs and not probe_packing(torch.float32).packs:
        pytest.skip("this CPU packs no matrices")
    monkeypatch.setattr("kvasir.worker.model.cascade._SAVED_BYTES", 2000)
    monkeypatch.setattr("kvasir.worker.model.cascade._FEW_ROWS", 1)
    monkeypatch.setattr("kvasir.worker.model.working_set.probe_packed_attention", lambda dtype: packs)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 64, 65, 130])
def test_attention_to_a_packed_stem_equals_that_to_a_plain_one(num_rows: int) -> None:
    if not probe_packing(torch.float32).packs:
        pytest.skip("this CPU packs no matrices")
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 3, 200, 32, generator=generator)
    q = torch.randn(3, num_rows, 32, generator=generator)
    q[0] *= 30  # scores far apart: nearly all weight is on one key
    plain, packed = Stem([0], [data]), Stem([0], [data], packs=True)
    with torch.inference_mode():
        expected, actual = plain.attend(0, q), packed.attend(0, q)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, atol=5e-5, rtol=1e-5)
    assert bool(packed._heads) == (num_rows >= 24) and packed.size_bytes == 2 * plain.size_bytes


def test_what_several_begin_with_is_held_once_and_by_who_comes_later_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stems(False, monkeypatch)
    config = make_config((None, None))
    attention, plain = WorkingSetAttention(config), WorkingSetAttention(config, has_stems=False)
    for path in (attention, plain):
        harness = Harness(config, path, 4, [250] * 4)
        harness.step({0: 1})
        harness.step({0: 1, 1: 1})  # the first gives up its row for a shorter one
        harness.step({0: 1, 1: 1, 2: 1, 3: 1})
    (stem,) = set(attention.stem_of.values())
    assert (stem.length, len(attention.stem_of), plain.stem_of) == (250, 4, {})
    assert attention.allocated_bytes < 0.8 * plain.allocated_bytes
    harness = Harness(config, attention, 4, [250] * 4)
    attention.arrange([], harness.kv)
    assert attention.allocated_bytes == 0 and not attention.stem_of


def test_little_in_common_or_a_window_makes_no_stem() -> None:
    for config in (make_config((None, None)), make_config((None, 20))):
        attention = WorkingSetAttention(config)
        harness = Harness(config, attention, 3, [50] * 3)
        harness.step({0: 1, 1: 1, 2: 1})
        assert not attention.stem_of


def test_gather_path_equals_the_reference() -> None:
    harness = Harness(make_config(), GatherAttention(make_config()), num_sequences=3)
    for shares in ({0: 10, 1: 1, 2: 33}, {0: 1, 1: 1, 2: 1}, {2: 5, 0: 1}, {1: 90}, {0: 1, 1: 1, 2: 1}):
        harness.step(shares)


def test_rows_gathered_together_are_of_about_the_same_length_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """63 rows of 1k tokens and one of 131k take no more than the long one's own blocks and a bound."""
    config = make_config(windows=(None,), num_kv_heads=1)
    ends = [1_024] * 31 + [131_072] + [1_024] * 32
    kv = KvStore(131_072 // 16, 1, 16, 1, config.head_dim, torch.float32, "cpu")
    token_bytes = 2 * config.head_dim * 4  # keys and values of the layer
    bound = 16 * 1_024 * token_bytes
    monkeypatch.setattr("kvasir.worker.model.attention._GATHER_BYTES", bound)
    slices = [SequenceSlice(i, [0], end - 1, list(range(-(-end // 16))), 1) for i, end in enumerate(ends)]
    attention, batch = GatherAttention(config), pack(slices, slices, [], 16, kv.data.device)
    q, k, v = torch.randn(64, 6, 4), torch.randn(64, 1, 4), torch.randn(64, 1, 4)
    with LiveTensors() as live:
        attention.begin(batch, kv)
        out = attention.attend(0, q, k, v, kv)
    padded = 64 * 131_072 * token_bytes
    longest = 131_072 * token_bytes
    small = 64 * 6 * 4 * 4 * 8 + 131_072 * 8 * 4 + 64 * 1_024 * 8  # outputs; masks and the indices behind them
    assert longest < live.peak_bytes <= longest + bound + small < padded / 8
    assert len(attention._groups) == 1 + -(-63 // 16)
    assert torch.allclose(out[:31], attention.attend(0, q, k, v, kv)[:31])
    reference = ReferenceAttention(config)
    reference.begin(batch, kv)
    assert (out - reference.attend(0, q, k, v, kv)).abs().max().item() < 1e-5


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still referenced, and the most that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._seen:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self._seen.add(key)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._bytes -= size


@pytest.mark.parametrize("fault", ["differs", "gives NaN", "raises"])
def test_a_path_that_fails_its_check_is_left_for_gathers_with_the_reason(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose() -> Attention:
        return choose_attention(make_config(), torch.device("cpu"), torch.float32, 16, 1 << 30)

    assert isinstance(choose(), WorkingSetAttention) and choose().fallback_reason == ""
    attend = WorkingSetAttention.attend

    def faulty(self: WorkingSetAttention, layer: int, *args: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("Paged KV cache block size must be divisible by 256\nat line 7")
        return attend(self, layer, *args) * (float("nan") if fault == "gives NaN" else 1.1)

    monkeypatch.setattr(WorkingSetAttention, "attend", faulty)
    chosen = choose()
    assert type(chosen) is GatherAttention
    expected = {
        "raises": "RuntimeError: Paged KV cache block size must be divisible by 256",
        "gives NaN": "it differs from the reference by inf",
    }
    assert chosen.fallback_reason.startswith(expected.get(fault, "it differs from the reference by 2.0e-01"))


def test_sequence_crossing_its_shelf_keeps_all_it_had() -> None:
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=2)
    harness.step({0: 126, 1: 20})
    for _ in range(6):
        harness.step({0: 1, 1: 1})
    assert attention.num_sequences == 2


@pytest.mark.parametrize("call", [0, 1 << 40])
def test_drafts_stay_in_the_set_and_those_that_did_not_hold_are_overwritten(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with more than one query are attended by themselves where calls cost nothing, else with all others."""
    monkeypatch.setattr("kvasir.worker.model.working_set._CALL", call)
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=3)
    harness.step({0: 30, 1: 40, 2: 50})
    harness.step(dict.fromkeys(range(3), 1))
    admitted: list[int] = []
    monkeypatch.setattr(attention, "_admit", lambda piece, kv, coming: admitted.append(piece.seq_key))
    harness.step({0: 6, 1: 1, 2: 3}, {0: 1, 2: 3})
    harness.step({0: 6, 1: 6, 2: 6}, {0: 2, 1: 1, 2: 6})
    harness.step({0: 1, 1: 2, 2: 1}, {1: 2})
    assert admitted == [] and harness.lengths == [35, 45, 61]


@pytest.mark.parametrize("call", [0, 1 << 40])
def test_rows_with_drafts_are_attended_right_wherever_they_stand(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir.worker.model.working_set._CALL", call)
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=6)
    harness.step({i: 30 + 3 * i for i in range(6)})
    harness.step(dict.fromkeys(range(6), 1))
    num_passes = []
    for counts in ((1, 2, 3, 1, 4, 1), (2, 1, 1, 1, 1, 5), (1, 1, 1, 3, 3, 3), (4, 4, 4, 4, 4, 4), (1, 1, 1, 1, 1, 1)):
        harness.step(dict(enumerate(counts)), {i: 1 + (i + n) % n for i, n in enumerate(counts) if n > 1})
        [shelf] = attention._active
        num_passes.append(len(shelf.passes))
    assert num_passes == ([3, 3, 2, 1, 1] if call == 0 else [1] * 5)


def test_a_shelf_grows_to_its_limit_and_not_only_to_half_of_it() -> None:
    """Sequences that come one after the other all get a row, as those that come together."""
    config = make_config()
    row_bytes = bytes_per_block(config.num_layers, 130, config.num_kv_heads, config.head_dim, torch.float32)
    attention = WorkingSetAttention(config, limit_bytes=8 * row_bytes)
    harness = Harness(config, attention, num_sequences=9)
    harness.step(dict.fromkeys(range(9), 30))
    for count in range(1, 10):
        harness.step(dict.fromkeys(range(count), 1))
        assert attention.num_sequences == min(count, 8)
        assert attention.allocated_bytes <= attention.limit_bytes


@pytest.mark.parametrize(("num_tokens", "capacity"), [(1, 128), (129, 256), (520, 640), (2049, 2560), (2560, 2560)])
def test_a_row_is_little_longer_than_what_it_holds(num_tokens: int, capacity: int) -> None:
    assert _capacity(num_tokens, 16) == capacity


def test_steady_decode_copies_no_sequence_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=4)
    harness.step({0: 30, 1: 40, 2: 50, 3: 60})
    harness.step(dict.fromkeys(range(4), 1))
    admitted: list[int] = []
    monkeypatch.setattr(attention, "_admit", lambda piece, kv, coming: admitted.append(piece.seq_key))
    harness.step(dict.fromkeys(range(4), 1))
    harness.step({3: 1, 1: 1, 0: 1})  # 2 finished: nobody else is copied in anew
    harness.step({0: 1, 3: 1, 1: 1})
    assert admitted == []


def test_absent_sequences_give_their_memory_back() -> None:
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=3)
    harness.step({0: 5, 1: 5, 2: 200})
    harness.step({0: 1, 1: 1, 2: 1})
    full = attention.allocated_bytes
    config = make_config()
    row_bytes = bytes_per_block(config.num_layers, 256, config.num_kv_heads, config.head_dim, torch.float32)
    assert 0 < full <= 2 * 3 * row_bytes
    harness.step({0: 1, 1: 1})
    assert attention.allocated_bytes < full
    harness.step({2: 3})
    assert attention.allocated_bytes == attention.num_sequences == 0
    harness.step({0: 1})
    attention.arrange([], harness.kv)  # a step without sequences
    assert attention.allocated_bytes == 0


def test_fused_attention_sees_what_the_mask_says() -> None:
    """The assumption behind all paths: `scaled_dot_product_attention` reads an expanded head as if it were repeated."""
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 8)
    expanded = scaled_dot_product_attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1))
    repeated = scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))
    torch.testing.assert_close(expanded, repeated)
