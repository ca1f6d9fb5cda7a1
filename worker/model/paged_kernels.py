"""Triton kernels of attention over the paged store, as it lies: no gather, no padding, no mask in memory.

Work comes as *items*: a few queries and a span of keys that they see. They are of one sequence, at consecutive
positions, or each of another one whose beginning is the same (cascade inference, FlashInfer). A query whose keys were
cut into several spans gets one partial result per span, merged by their log-sum-exps (flash decoding; arXiv
2205.14135). Where the cuts are depends on the sequence alone, so that a result does not change with its company.

The query heads that share a key head are rows of one tile, so keys are read once for all of them. `worker.model.
paged_attention` makes the items and launches: as many programs as there are items, or fewer that take turns, so that
a launch in a CUDA graph can serve any number. UNPROVEN ON A DEVICE: tested in Triton's interpreter, compiled for sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl

ITEM_FIELDS = 7  # table_start, queries_at, position, num_queries, key_begin, key_end, nth span (-1: not cut)
QUERY_FIELDS = 2  # row of the query, row of its first partial result
MERGE_FIELDS = 3  # row of the query, row of its first partial result, num_spans
LIST_FIELDS = 2  # where in the plan a list of items or merges begins, and how many it has


@triton.jit(do_not_specialize=["list_at"])
def attend_items(
    q,  # [num_tokens, num_heads, HEAD_DIM], its rows `q_stride` apart
    keys,  # [num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM], blocks `block_stride` apart; so `values`
    values,
    out,  # [num_tokens, num_heads, HEAD_DIM]: of the queries that are not cut
    partials,  # [num_partial_rows, num_heads, HEAD_DIM] fp32: of those that are
    lse,  # [num_partial_rows, num_heads] fp32, to the base of 2
    plan,  # int32: items, their queries, merges, block tables, and where the lists of items and merges are
    list_at,  # where it says where this launch's items are (LIST_FIELDS)
    q_stride,
    block_stride,
    token_stride,
    scale_log2,  # the scale of the scores, times log2(e)
    GROUP: tl.constexpr,  # query heads per key head
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # at least num_queries * GROUP
    TILE: tl.constexpr,  # keys per iteration
    WINDOW: tl.constexpr,  # 0: none
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, which multiplies the bit patterns of bf16
    FIELDS: tl.constexpr,
):
    """Attend items for the queries of one key head; grid (any number that take turns, num_kv_heads)."""
    head, num_heads = tl.program_id(1), tl.num_programs(1) * GROUP
    row = tl.arange(0, ROWS)
    query = row // GROUP
    query_head = head * GROUP + row % GROUP
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    begin, num_items = tl.load(plan + list_at), tl.load(plan + list_at + 1)
    for nth in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = plan + begin + nth * FIELDS
        table_start, queries_at, position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        num_queries, key_begin, key_end = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        nth_span = tl.load(item + 6)
        is_query = query < num_queries
        is_value = is_query[:, None] & is_dim[None, :]
        query_row = tl.load(plan + queries_at + 2 * query, mask=is_query, other=0).to(tl.int64)
        query_at = query_row * q_stride + query_head * HEAD_DIM
        queries = tl.load(q + query_at[:, None] + dim[None, :], mask=is_value, other=0.0)  # [ROWS, PADDED_DIM]
        if UPCAST:
            queries = queries.to(tl.float32)

        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, PADDED_DIM), tl.float32)
        for first in range(key_begin, key_end, TILE):
            key = first + tl.arange(0, TILE)
            is_key = key < key_end
            block = tl.load(plan + table_start + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            key_at = block * block_stride + (key % BLOCK_SIZE) * token_stride + head * HEAD_DIM
            k = tl.load(keys + key_at[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0)
            v = tl.load(values + key_at[:, None] + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(queries, k, input_precision=PRECISION) * scale_log2  # [ROWS, TILE]
            ahead = (position + query)[:, None] - key[None, :]
            is_seen = is_key[None, :] & (ahead >= 0)
            if WINDOW:
                is_seen = is_seen & (ahead < WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(best - finite)
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = higher

        total = tl.where(total == 0, 1.0, total)  # rows that see none of these keys, whose `best` is -inf
        result = result / total[:, None]
        if nth_span < 0:
            out_at = query_row * num_heads + query_head
            tl.store(out + out_at[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=is_value)
        else:
            partial_row = tl.load(plan + queries_at + 2 * query + 1, mask=is_query, other=0) + nth_span
            out_at = partial_row.to(tl.int64) * num_heads + query_head
            tl.store(partials + out_at[:, None] * HEAD_DIM + dim[None, :], result, mask=is_value)
            tl.store(lse + out_at, best + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=["list_at"])
def merge_partials(
    partials,
    lse,
    out,
    plan,
    list_at,  # where it says where the merges are
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,  # spans per iteration
    FIELDS: tl.constexpr,
):
    """Merge the partial results of queries, of one of their heads; grid (any number that take turns, num_heads)."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    begin, num_merges = tl.load(plan + list_at), tl.load(plan + list_at + 1)
    for nth in range(tl.program_id(0), num_merges, tl.num_programs(0)):
        merge = plan + begin + nth * FIELDS
        query_row, partial_row, num_spans = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
        best = float("-inf")
        total = 0.0
        result = tl.zeros((PADDED_DIM,), tl.float32)
        for first in range(0, num_spans, TILE):
            span = first + tl.arange(0, TILE)
            is_span = span < num_spans
            at = (partial_row + span).to(tl.int64) * num_heads + head
            logs = tl.load(lse + at, mask=is_span, other=float("-inf"))
            parts = tl.load(
                partials + at[:, None] * HEAD_DIM + dim[None, :], mask=is_span[:, None] & is_dim[None, :], other=0.0
            )
            higher = tl.maximum(best, tl.max(logs, 0))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(logs - finite)
            shrink = tl.exp2(best - finite)
            total = total * shrink + tl.sum(weights, 0)
            result = result * shrink + tl.sum(weights[:, None] * parts, 0)
            best = higher
        out_at = (query_row.to(tl.int64) * num_heads + head) * HEAD_DIM + dim
        tl.store(out + out_at, (result / total).to(out.dtype.element_ty), mask=is_dim)
