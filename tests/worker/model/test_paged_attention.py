"""The Triton kernels without a GPU: their work lists, their results in the interpreter, and what they compile to."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from itertools import count as count_from_0
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.config import ModelConfig, RopeConfig

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from kvasir.worker.model.fused_kernels import multiply_silu, race_tiles, rotate_and_store_heads  # noqa: E402
from kvasir.worker.model.paged_attention import (  # noqa: E402
    CHUNK_SPAN,
    MAX_CUT_QUERIES,
    SPAN,
    PagedAttention,
    constants,
    padded_dim,
    plan_work,
    tile_rows,
)
from kvasir.worker.model.paged_kernels import MERGE_FIELDS, attend_items, merge_partials  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "gpu_check.py"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def make_config(num_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128) -> ModelConfig:
    return ModelConfig("llama", 8, 24, 8, 1, num_heads, num_kv_heads, head_dim, 1e-5, 999, RopeConfig(), (None,))


def plan(
    shares: list[tuple[int, int]],
    small: int = 4,
    large: int = 32,
    window: int | None = None,
    tables: list[list[int]] | None = None,
    block_size: int = 16,
) -> Any:
    """Return the work of one step; without `tables`, no two sequences have a block in common."""
    pieces = [SequenceSlice(i, [0] * count, start, [], 0) for i, (start, count) in enumerate(shares)]
    ids = count_from_0()
    tables = tables or [[next(ids) for _ in range(-(-piece.end // block_size))] for piece in pieces]
    starts = np.cumsum([0, *map(len, tables)])[:-1]
    flat = np.array([i for table in tables for i in table], dtype=np.int32)
    return plan_work(pieces, flat, starts, small, large, window, block_size)


def items_of(work: Any) -> list[tuple[list[tuple[int, int]], int, range, int]]:
    """Return for each item its queries (row, partial row), the position of the first, the keys, the table's start."""
    found = []
    for table_start, queries_at, position, num_queries, key_begin, key_end, nth in np.concatenate(
        (work.small, work.large)
    ).tolist():
        first = queries_at // 2
        queries = [
            (row, base + nth if nth >= 0 else -1) for row, base in work.queries[first : first + num_queries].tolist()
        ]
        found.append((queries, position, range(key_begin, key_end), table_start))
    return found


@pytest.mark.parametrize("window", [None, 1, 600])
@pytest.mark.parametrize("seed", range(5))
def test_every_query_meets_every_key_that_it_sees_exactly_once(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    shares = [(rng.choice([0, 3, 511, 512, 5000]), rng.choice([1, 1, 4, 5, 40, 64, 65, 200])) for _ in range(6)]
    work = plan(shares, window=window)
    expected, row = {}, 0
    for start, count in shares:
        for i in range(count):
            position = start + i
            expected[row + i] = set(range(0 if window is None else max(0, position - window + 1), position + 1))
        row += count
    met: dict[int, list[int]] = {i: [] for i in expected}
    partials: dict[int, int] = {}  # partial row -> the query that writes it
    whole = set()
    for queries, position, keys, _ in items_of(work):
        for i, (query, partial_row) in enumerate(queries):
            seen = set(keys) & expected[query]
            assert {key for key in keys if key <= position + i} >= seen
            met[query] += seen
            if partial_row < 0:
                whole.add(query)
            else:
                assert partial_row not in partials
                partials[partial_row] = query
    assert {i: sorted(keys) for i, keys in met.items()} == {i: sorted(keys) for i, keys in expected.items()}
    merged = {query: {*range(first, first + count)} for query, first, count in work.merges.tolist()}
    assert set(partials) == set(range(work.num_partial_rows))
    assert whole | set(merged) == set(expected) and not whole & set(merged)
    for query, rows in merged.items():
        assert rows == {at for at, its_query in partials.items() if its_query == query}


@pytest.mark.parametrize(("size", "num_items"), [(1, 18), (2, 10), (4, 6), (8, 5)])
def test_singles_that_have_a_span_in_the_same_blocks_read_it_as_one_item(size: int, num_items: int) -> None:
    """Five begin with the same 1,024 tokens; two of those, and two others, with the same 1,536."""
    ends = [1600, 1700, 1600, 1601, 1537, 40]
    ids = count_from_0()
    tables = [[next(ids) for _ in range(-(-end // 16))] for end in ends]
    for i in range(1, 5):
        tables[i][:64] = tables[0][:64]
    tables[1][:96], tables[3][:96] = tables[0][:96], tables[2][:96]
    work = plan([(end - 1, 1) for end in ends], small=size, tables=tables)
    met: dict[int, list[int]] = {i: [] for i in range(6)}
    owner = {start: i for i, start in enumerate(np.cumsum([0, *map(len, tables)])[:-1].tolist())}
    starts_at = []
    for queries, position, keys, table_start in items_of(work):
        starts_at.append(keys.start)
        for query, partial_row in queries:
            met[query] += keys
            blocks = slice(keys.start // 16, -(-keys.stop // 16))
            assert tables[query][blocks] == tables[owner[table_start]][blocks], "it would read another's keys"
            assert position >= keys.stop or (len(queries), position) == (1, ends[query] - 1)
            assert partial_row == (work.queries[query, 1] + keys.start // SPAN if query < 5 else -1)
    assert {i: sorted(keys) for i, keys in met.items()} == {i: [*range(end)] for i, end in enumerate(ends)}
    # Of each span: one for each `size` sequences that have it, and the rest of every sequence.
    groups = {0: [5], 512: [5], 1024: [2, 2, 1]}
    assert num_items <= len(work.small)
    for begin, counts in groups.items():
        assert starts_at.count(begin) - (begin == 0) == sum(-(-count // size) for count in counts)


def test_blocks_that_a_span_cuts_are_not_shared() -> None:
    tables = [[*range(100)], [*range(99), 200]]
    assert len(plan([(1000, 1), (1000, 1)], tables=tables, block_size=11).small) == 4
    assert len(plan([(1590, 1), (1590, 1)], tables=tables, window=2000).small) == 8, "a window moves where spans begin"


def test_a_sequence_is_cut_the_same_way_in_any_company() -> None:
    alone, together = plan([(5000, 1)]), plan([(100, 1), (70_000, 1), (5000, 1), (0, 300)])
    spans = [
        sorted(keys.start for queries, _, keys, _ in items_of(work) for query, _ in queries if query == row)
        for work, row in ((alone, 0), (together, 2))
    ]
    assert spans[0] == spans[1] and len(spans[0]) == -(-5001 // SPAN)


def test_work_and_scratch_grow_with_the_sum_of_the_contexts() -> None:
    """63 rows of 1k tokens and one of 131k: 64 times the longest would be 16,384 items."""
    work = plan([(1023, 1)] * 63 + [(131_071, 1)])
    assert len(work.small) == 63 * 2 + 256 == work.num_partial_rows and len(work.large) == 0
    heads, head_dim = 32, 128
    scratch = work.num_partial_rows * heads * (head_dim + 1) * 4
    keys_and_values = (63 * 1024 + 131_072) * 2 * 8 * head_dim * 2  # 8 key heads, bf16, one layer
    assert scratch < keys_and_values / 100
    long_chunk = plan([(100_000, MAX_CUT_QUERIES + 1)])
    assert long_chunk.num_partial_rows == 0  # many queries: no partial results of each
    assert plan([(100_000, 64)]).num_partial_rows == 64 * -(-100_032 // CHUNK_SPAN)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of all kernel cases; a process of its own, since Triton decides to interpret when it is imported."""
    out = tmp_path_factory.mktemp("kernels") / "result.json"
    command = [sys.executable, str(SCRIPT), "--kernels-only", "--json", str(out)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert out.exists(), done.stderr
    return {row["case"]: row for row in json.loads(out.read_text())["kernels"]}


def kernel_cases() -> list[str]:
    sys.path.insert(0, str(SCRIPT.parent))
    import gpu_check

    return [*gpu_check.KERNEL_CASES, *gpu_check.OPS_CASES, gpu_check.GRAPH_CASE]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", kernel_cases())
def test_kernels_equal_the_reference_in_the_interpreter(case: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted[case]["ok"], interpreted[case]


def compiled(kernel: Any, types: dict[str, str], constexprs: dict[str, Any], folder: Path) -> tuple[int, int, int]:
    """Compile `kernel` for sm_90 without a device; return its registers, spilled bytes and shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages") if name in constexprs}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("q_stride", "block_stride", "token_stride")
    }
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, ptxas = folder / "kernel.ptx", Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptx.write_text(built.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    assert registers and spilled, told
    return int(registers[1]), int(spilled[1]), built.metadata.shared


@pytest.mark.parametrize("size", [0, 1], ids=["small", "large"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile_for_sm_90_without_spilling(
    dtype: torch.dtype, head_dim: int, size: int, tmp_path: Path
) -> None:
    config = make_config(head_dim=head_dim)
    values = dict.fromkeys(("q", "keys", "values", "out"), f"*{TYPES[dtype]}")
    types = {**values, "partials": "*fp32", "lse": "*fp32", "plan": "*i32", "scale_log2": "fp32"}
    options = constants(config, 16, tile_rows(config, dtype)[size], None, dtype, is_interpreted=False)
    registers, spilled, shared_bytes = compiled(attend_items, types, options, tmp_path)
    assert spilled <= (20 if head_dim == 256 else 0) and registers <= 255
    assert shared_bytes <= 227 * 1024  # what a block may have on sm_90
    if dtype == torch.bfloat16 and head_dim == 128 and size == 0:  # a decode step of an 8 B model: 3 programs an SM
        assert 3 * registers * 128 <= 65_536 and 3 * shared_bytes <= 227 * 1024


def test_merge_compiles_for_sm_90(tmp_path: Path) -> None:
    config = make_config()
    types = {"partials": "*fp32", "lse": "*fp32", "out": "*bf16", "plan": "*i32"}
    options = {"HEAD_DIM": 128, "PADDED_DIM": padded_dim(config), "TILE": 16, "FIELDS": MERGE_FIELDS}
    assert compiled(merge_partials, types, options, tmp_path)[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_kernels_compile_for_sm_90_without_spilling(dtype: torch.dtype, tmp_path: Path) -> None:
    kind = f"*{TYPES[dtype]}"
    types = {"heads": kind, "rotation": "*fp32", "key_rows": kind, "value_rows": kind, "rows": "*i64"}
    sizes = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "PADDED_HALF": 64, "TILE": 8}
    registers, spilled, _ = compiled(rotate_and_store_heads, types, sizes, tmp_path)
    assert spilled == 0 and registers <= 128
    types = {"weights": "*fp64", "keys": "*i64", "times": "*fp64", "ids": "*i64"}
    registers, spilled, _ = compiled(race_tiles, types, {"TILE": 1024}, tmp_path)
    assert spilled == 0 and registers <= 160
    registers, spilled, _ = compiled(multiply_silu, {"gate_up": kind, "out": kind}, {"TILE": 1024}, tmp_path)
    assert spilled == 0 and registers <= 128


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    for config, dtype in ((make_config(), torch.float64), (make_config(head_dim=512), torch.bfloat16)):
        with pytest.raises(ValueError, match="do not compute"):
            PagedAttention(config, dtype)
