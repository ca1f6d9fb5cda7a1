"""Decode steps in fixed buffers, padded to fixed sizes, on the CPU: all of it but the capture of CUDA graphs.

The attention is the reference, which takes its plan from the buffer as the kernels do and leaves NaN in padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.attention import ReferenceAttention, gather, reference_attend
from kvasir.worker.model.batch import Batch
from kvasir.worker.model.device_executor import DeviceExecutor
from kvasir.worker.model.graphs import DecodeGraphs, graph_sizes
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from tests.worker.model.test_device_executor import Run, make_commands

SIZE, NUM_BLOCKS = 16, 40


class FixedReference(ReferenceAttention):
    """Its plan: the number of rows; for each the tokens in the store, where its table is, and the tables."""

    def begin(self, batch: Batch, kv: KvStore) -> None:
        self._buffer: Tensor | None = None
        super().begin(batch, kv)

    def fixed_sizes(self, num_singles: int, num_tokens: int, block_size: int) -> tuple[int, int]:
        return 1 + 3 * num_singles + num_tokens // block_size, 0

    def plan(self, singles: Sequence[SequenceSlice], block_size: int, base: int, num_partial_rows: int) -> Any:
        plan, tables = [len(singles)], []
        for piece in singles:
            plan += [piece.end, base + 1 + 2 * len(singles) + len(tables)]
            tables += piece.block_table[: -(-piece.end // block_size)]
        return np.array([*plan, *tables], dtype=np.int32)

    def begin_fixed(self, buffer: Tensor, base: int, num_singles: int, num_partial_rows: int) -> None:
        self._buffer, self._base = buffer, base

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: KvStore) -> Tensor:
        if self._buffer is None:
            return super().attend(layer, q, k, v, kv)
        out, buffer, base = torch.full_like(q, torch.nan), self._buffer, self._base
        for row in range(int(buffer[base])):
            end, at = buffer[base + 1 + 2 * row : base + 3 + 2 * row].tolist()
            keys, values = gather(kv, layer, buffer[at : at - (-end // SIZE)].long(), end)
            window = self._config.sliding_windows[layer]
            out[row] = reference_attend(q[row : row + 1], keys, values, end - 1, self._config.scale, window)[0]
        return out.flatten(1)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(tiny_folder, "cpu", torch.float64, make_attention=FixedReference)


def make_store(model: Model) -> KvStore:
    config = model.config
    shape = (NUM_BLOCKS, config.num_layers, SIZE, config.num_kv_heads, config.head_dim)
    kv = KvStore(*shape, dtype=model.dtype, device="cpu", has_spare=True)
    kv.data.fill_(torch.nan)  # nobody may read what nobody wrote
    return kv


def prefilled(model: Model, lengths: list[int]) -> tuple[KvStore, list[SequenceSlice]]:
    """Return a store with sequences of `lengths` tokens, and the slices of the step after."""
    kv, ids = make_store(model), iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist())
    tables = [[next(ids) for _ in range(length // SIZE + 1)] for length in lengths]
    chunks = [
        SequenceSlice(i, [7 + i] * n, 0, table, 0) for i, (n, table) in enumerate(zip(lengths, tables, strict=True))
    ]
    model.forward(chunks, kv)
    return kv, [
        SequenceSlice(i, [30 + i], n, table, 1) for i, (n, table) in enumerate(zip(lengths, tables, strict=True))
    ]


@pytest.mark.parametrize("count", [1, 3, 5, 7, 10])
def test_a_padded_step_equals_the_plain_one_and_writes_to_no_other_block(model: Model, count: int) -> None:
    lengths = [1, 15, 16, 17, 40, 3, 31, 32, 33, 8][:count]
    kv, slices = prefilled(model, lengths)
    twin, _ = prefilled(model, lengths)
    graphs = DecodeGraphs(model, kv, 10, 512)
    for _ in range(2):  # the second step with what the first has left in the buffers
        logits = graphs.forward(slices, kv)
        torch.testing.assert_close(logits, model.forward(slices, twin), rtol=0, atol=1e-9)
        torch.testing.assert_close(kv.data[:NUM_BLOCKS], twin.data[:NUM_BLOCKS], rtol=0, atol=1e-9, equal_nan=True)
        slices = [
            SequenceSlice(s.seq_key, [5], s.end, s.block_table, 1) for s in slices if s.end < len(s.block_table) * SIZE
        ]
    assert graphs.num_steps == 2
    has_written = bool(kv.data[NUM_BLOCKS, 0, :, 0].isfinite().all())  # in the first layer; then come the rows' NaN
    assert (graphs.num_padded > 0) == has_written


def test_draws_of_the_step_before_are_fed_by_their_place(model: Model) -> None:
    kv, slices = prefilled(model, [4, 9, 20])
    twin, _ = prefilled(model, [4, 9, 20])
    drawn = torch.tensor([110, 120, 130, 140])
    fed = [
        SequenceSlice(s.seq_key, [0], s.start, s.block_table, 1, drawn=i)
        for s, i in zip(slices, (3, None, 0), strict=True)
    ]
    fed[1].token_ids = [55]
    for piece, token_id in zip(slices, (140, 55, 110), strict=True):
        piece.token_ids = [token_id]
    graphs = DecodeGraphs(model, kv, 10, 512)
    torch.testing.assert_close(graphs.forward(fed, kv, drawn), model.forward(slices, twin), rtol=0, atol=1e-9)
    assert graphs.num_steps == 1


def test_whatever_is_no_plain_decode_step_is_computed_as_ever(model: Model) -> None:
    kv, slices = prefilled(model, [4, 9])
    graphs = DecodeGraphs(model, kv, 10, 512)
    first, second = slices
    chunk = SequenceSlice(2, [1, 2, 3], 0, [39], 1)
    drafts = SequenceSlice(1, [1, 2], 9, second.block_table, 2)
    forked = SequenceSlice(1, [1], 9, second.block_table, 1, num_draws=2)
    silent = SequenceSlice(1, [1], 9, second.block_table, 0)
    for step in ([first, chunk], [first, drafts], [first, forked], [first, silent], []):
        num_logits = sum(piece.num_logits * piece.num_draws for piece in step)
        assert graphs.forward(step, kv).shape == (num_logits, model.config.vocab_size)
    many = [SequenceSlice(i, [1], 0, [20 + i], 1) for i in range(11)]
    assert len(graphs.forward(many, kv)) == 11
    assert len(graphs.forward(slices, kv, torch.zeros(11, dtype=torch.int64))) == 2, "more draws than have a place"
    short = DecodeGraphs(model, kv, 2, max_context=8)  # whose buffer has a place for 1 + 3 * 2 + 1 numbers
    assert len(short.forward([SequenceSlice(0, [1], 16 * 6 - 1, [*range(6)], 1)], kv)) == 1
    assert graphs.num_steps == short.num_steps == 0


class FakeGraph:
    """Computes anew what was computed while it was captured."""

    size = 0

    def replay(self) -> None:
        FakeCuda.replayed.append(self.size)
        FakeCuda.compute(self.size)

    def pool(self) -> str:
        return "pool"


class FakeCuda:
    """Stands for what `torch.cuda` does for a capture."""

    captured: list[tuple[int, str | None]] = []
    replayed: list[int] = []
    compute: Any = None
    computed: list[int] = []

    def __init__(self, graph: FakeGraph, pool: str | None = None) -> None:
        self._graph, self._pool = graph, pool

    def __enter__(self) -> None:
        self._num_computed = len(self.computed)

    def __exit__(self, *error: object) -> None:
        (self._graph.size,) = self.computed[self._num_computed :]
        self.captured.append((self._graph.size, self._pool))


def test_every_size_is_captured_once_warm_in_one_pool_and_replayed_for_its_rows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, slices = prefilled(model, [4, 9, 20, 3, 1])
    twin, _ = prefilled(model, [4, 9, 20, 3, 1])
    graphs, progress = DecodeGraphs(model, kv, 10, 512), []
    compute = FakeCuda.compute = graphs._compute
    monkeypatch.setattr(graphs, "_compute", lambda size: FakeCuda.computed.append(size) or compute(size))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before = kv.data[:NUM_BLOCKS].clone()
    graphs.capture(lambda *done: progress.append(done))
    torch.testing.assert_close(kv.data[:NUM_BLOCKS], before, rtol=0, atol=0, equal_nan=True)  # of empty steps
    assert graphs.sizes == [1, 2, 3, 4, 6, 8, 10]
    assert FakeCuda.captured == [(10, None), *((size, "pool") for size in (8, 6, 4, 3, 2, 1))]
    assert FakeCuda.computed == [size for size in (10, 8, 6, 4, 3, 2, 1) for _ in range(2)]
    assert progress == [(i, 7) for i in range(1, 8)]
    for count in (5, 1, 4):
        torch.testing.assert_close(
            graphs.forward(slices[:count], kv), model.forward(slices[:count], twin), rtol=0, atol=1e-9
        )
    assert FakeCuda.replayed == [6, 1, 4]


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_an_engine_over_padded_steps_gives_the_same_answers(model: Model, num_blocks: int) -> None:
    plain, padded = Run(model, None, num_blocks), Run(model, model.forward, num_blocks)
    graphs = DecodeGraphs(model, padded.kv, 16, 512)
    padded.engine._executor = DeviceExecutor(graphs.forward, padded.kv)
    for run in (plain, padded):
        run.take(make_commands(30 if num_blocks == 12 else 0))
    assert padded.answers == plain.answers
    assert padded.num_ahead > 10 and graphs.num_steps > 20 and graphs.num_padded > 5


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 64, 100, 128, 500])
def test_every_number_of_rows_has_a_size_that_is_not_much_larger(num_rows: int) -> None:
    sizes = graph_sizes(num_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == num_rows and len(sizes) < 40
    for count in range(1, num_rows + 1):
        assert min(size for size in sizes if size >= count) <= count * 1.5


def test_a_path_that_cannot_be_captured_is_named(model: Model) -> None:
    plain = Model(model.config, model.weights, ReferenceAttention(model.config))
    with pytest.raises(ValueError, match="attention by reference cannot be captured"):
        DecodeGraphs(plain, make_store(model), 10, 512)


def test_the_check_at_start_tells_a_wrong_step_and_leaves_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = make_store(model)
    kv.zero(range(NUM_BLOCKS + 1))
    graphs = DecodeGraphs(model, kv, 10, 512)
    assert graphs.largest_difference() < 1e-9
    assert not kv.data[:NUM_BLOCKS].any()
    compute = graphs._compute
    monkeypatch.setattr(
        graphs, "_compute", lambda size: compute(size) or graphs._logits.copy_(graphs._logits.roll(1, 0))
    )
    assert graphs.largest_difference() > 0.01
    monkeypatch.setattr(graphs, "_compute", lambda size: compute(size) or graphs._logits.fill_(torch.nan))
    assert graphs.largest_difference() == torch.inf


def test_the_rotary_table_stays_where_graphs_read_it(model: Model) -> None:
    DecodeGraphs(model, make_store(model), 10, 5000)
    before = model.rotary._table.data_ptr()
    model.rotary(torch.tensor([4999]), 4999)
    assert model.rotary._table.data_ptr() == before
