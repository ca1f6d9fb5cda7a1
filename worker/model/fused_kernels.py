"""Triton kernels for what lies between a layer's matrices, each in place of several launches of torch's own.

Norms need none (torch has one kernel for each), nor do residuals (they are added by the matrix product). `worker.model.
ops` launches these. UNPROVEN ON A DEVICE: tested in Triton's interpreter, compiled for sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_and_store_heads(
    heads,  # [num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM]: queries, keys, values; rotated in place
    rotation,  # [num_tokens, HEAD_DIM / 2, 2] fp32: cosine and sine
    key_rows,  # [num_rows, num_kv_heads, HEAD_DIM]: where the store has a layer's keys; so `value_rows`
    value_rows,
    rows,  # [num_tokens] int64
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,  # at least HEAD_DIM / 2
    TILE: tl.constexpr,  # heads per program
):
    """Rotate the queries and keys of one token, store its keys and values; grid (num_tokens, number of tiles)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    pair = tl.arange(0, PADDED_HALF)[None, :]
    is_here = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (pair < HEAD_DIM // 2)
    is_rotated = is_here & (head < NUM_HEADS + NUM_KV_HEADS)
    at = (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM + 2 * pair
    first = tl.load(heads + at, mask=is_here, other=0.0).to(tl.float32)
    second = tl.load(heads + at + 1, mask=is_here, other=0.0).to(tl.float32)
    angle_at = token * HEAD_DIM + 2 * pair
    cosine = tl.load(rotation + angle_at, mask=is_rotated, other=1.0)
    sine = tl.load(rotation + angle_at + 1, mask=is_rotated, other=0.0)
    turned = (first * cosine - second * sine).to(heads.dtype.element_ty)
    turned_second = (first * sine + second * cosine).to(heads.dtype.element_ty)
    tl.store(heads + at, turned, mask=is_rotated)
    tl.store(heads + at + 1, turned_second, mask=is_rotated)
    row = tl.load(rows + token) * NUM_KV_HEADS
    key_at = (row + head - NUM_HEADS) * HEAD_DIM + 2 * pair
    is_key = is_rotated & (head >= NUM_HEADS)
    tl.store(key_rows + key_at, turned, mask=is_key)
    tl.store(key_rows + key_at + 1, turned_second, mask=is_key)
    value_at = key_at - NUM_KV_HEADS * HEAD_DIM
    is_value = is_here & (head >= NUM_HEADS + NUM_KV_HEADS)
    tl.store(value_rows + value_at, turned, mask=is_value)
    tl.store(value_rows + value_at + 1, turned_second, mask=is_value)


@triton.jit
def multiply_silu(
    gate_up,  # [num_tokens, 2 * size]: gates, then what they let through
    out,  # [num_tokens, size]
    size,
    TILE: tl.constexpr,
):
    """Compute silu(gate) * up; grid (num_tokens, number of tiles)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_here = column < size
    gate = tl.load(gate_up + token * 2 * size + column, mask=is_here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * size + column, mask=is_here, other=0.0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + token * size + column, product.to(out.dtype.element_ty), mask=is_here)
