"""Every attention path against the readable reference, on stores whose unused slots are poisoned with NaN."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import Attention, GatherAttention, ReferenceAttention, chunk_attend, reference_attend
from kvasir.worker.model.attention_cuda import PagedAttention, agrees_with_reference, cuda_attention
from kvasir.worker.model.batch import pack
from kvasir.worker.model.config import ModelConfig, RopeConfig
from kvasir.worker.model.working_set import WorkingSetAttention

BLOCK_SIZE = 5  # divides no power of two
MAX_TOKENS = 300  # beyond two shelf capacities


def make_config(windows: tuple[int | None, ...] = (None, 20), num_kv_heads: int = 2) -> ModelConfig:
    return ModelConfig("mistral", 8, 24, 8, len(windows), 6, num_kv_heads, 4, 1e-5, 999, RopeConfig(), windows)


class Harness:
    """Drives an attention path and the reference over one store with random queries, keys and values."""

    def __init__(self, config: ModelConfig, attention: Attention, num_sequences: int) -> None:
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

    def step(self, shares: dict[int, int]) -> None:
        """Compute `shares[i]` new tokens of sequence i, all in one step, and compare the two paths layer by layer."""
        slices = [SequenceSlice(i, [0] * count, self.lengths[i], self.tables[i], 0) for i, count in shares.items()]
        singles = self.attention.arrange([piece for piece in slices if len(piece.token_ids) == 1], self.kv)
        chunks = [piece for piece in slices if len(piece.token_ids) > 1]
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
        for piece in slices:
            self.lengths[piece.seq_key] = piece.end

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
def test_prefill_chunk_in_pieces_equals_the_reference(
    start: int, num_new: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.worker.model.attention._MASK_ELEMENTS", 1)  # the smallest pieces
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
                attention.forget(i)
                harness.lengths[i] = 0
                room = MAX_TOKENS
            count = 1 if harness.lengths[i] and rng.random() < 0.8 else rng.randint(1, 90)
            shares[i] = min(count, room)
        harness.step(shares)
        singles = sum(count == 1 for count in shares.values())
        gathered += singles - attention.num_sequences
        assert attention.num_sequences <= singles
        assert attention.allocated_bytes <= limit_bytes
    assert (gathered > 0) == (limit_bytes < 1 << 30)


def test_gather_path_equals_the_reference() -> None:
    harness = Harness(make_config(), GatherAttention(make_config()), num_sequences=3)
    for shares in ({0: 10, 1: 1, 2: 33}, {0: 1, 1: 1, 2: 1}, {2: 5, 0: 1}, {1: 90}, {0: 1, 1: 1, 2: 1}):
        harness.step(shares)


def emulated_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents of itself, on any device."""
    assert cu_seq_k is None and enable_gqa and window_size[1] == 0
    assert block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
    window = None if window_size[0] < 0 else window_size[0] + 1
    out = []
    bounds = cu_seq_q.tolist()
    for i, num_keys in enumerate(seqused_k.tolist()):
        q = query[bounds[i] : bounds[i + 1]]
        assert len(q) <= max_q and num_keys <= max_k
        used = block_table[i, : -(-num_keys // key.shape[1])]
        keys, values = (part[used].flatten(0, 1)[:num_keys] for part in (key, value))
        out.append(reference_attend(q, keys, values, num_keys - len(q), scale, window))
    return torch.cat(out)


def test_paged_kernel_is_called_as_it_documents_itself() -> None:
    harness = Harness(make_config(), PagedAttention(make_config(), emulated_varlen), num_sequences=3)
    for shares in ({0: 10, 1: 1, 2: 33}, {0: 1, 1: 1, 2: 1}, {2: 5, 0: 1}, {1: 90}, {0: 1, 1: 1, 2: 1}):
        harness.step(shares)


def test_self_test_accepts_what_is_right_and_refuses_what_is_wrong_or_raises() -> None:
    def check(attention: Attention) -> bool:
        return agrees_with_reference(attention, make_config(), 16, torch.device("cpu"), torch.float32)

    def ignores_the_window(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Tensor:
        return emulated_varlen(*args, window_size=(-1, 0), **kwargs)

    def gives_nan(*args: Any, **kwargs: Any) -> Tensor:
        return emulated_varlen(*args, **kwargs) * float("nan")

    def wants_larger_pages(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")

    assert check(PagedAttention(make_config(), emulated_varlen))
    assert check(GatherAttention(make_config()))
    assert check(WorkingSetAttention(make_config()))
    for wrong in (ignores_the_window, gives_nan, wants_larger_pages):
        assert not check(PagedAttention(make_config(), wrong))


def test_cuda_path_falls_back_to_gathers_where_the_kernel_does_not_run() -> None:
    config, device = make_config(), torch.device("cpu")
    assert isinstance(cuda_attention(config, 16, device, torch.float32), GatherAttention)


def test_sequence_crossing_its_shelf_keeps_all_it_had() -> None:
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=2)
    harness.step({0: 126, 1: 20})
    for _ in range(6):
        harness.step({0: 1, 1: 1})
    assert attention.num_sequences == 2


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


def test_forgotten_and_absent_sequences_give_their_memory_back() -> None:
    attention = WorkingSetAttention(make_config())
    harness = Harness(make_config(), attention, num_sequences=3)
    harness.step({0: 5, 1: 5, 2: 200})
    harness.step({0: 1, 1: 1, 2: 1})
    full = attention.allocated_bytes
    config = make_config()
    row_bytes = bytes_per_block(config.num_layers, 256, config.num_kv_heads, config.head_dim, torch.float32)
    assert 0 < full <= 2 * 3 * row_bytes
    attention.forget(2)
    assert attention.allocated_bytes < full
    harness.step({2: 3})
    assert attention.allocated_bytes == attention.num_sequences == 0
    attention.forget(99)  # unknown keys are no error: the engine forgets whatever ends


def test_fused_attention_sees_what_the_mask_says() -> None:
    """The assumption behind all paths: `scaled_dot_product_attention` reads an expanded head as if it were repeated."""
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 8)
    expanded = scaled_dot_product_attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1))
    repeated = scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))
    torch.testing.assert_close(expanded, repeated)
