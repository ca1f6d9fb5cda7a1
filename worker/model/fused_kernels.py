"""Triton kernels for what lies between a layer's matrices and for draws, each in place of several launches of torch.

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


@triton.jit
def race_tiles(
    weights,  # [num_rows, vocab] fp64
    keys,  # [num_rows] int64
    times,  # [num_rows, number of tiles] fp64: when the first token of each tile arrives
    ids,  # the same, int64: which it is
    vocab,
    TILE: tl.constexpr,
):
    """Let the tokens of a tile run, see `worker.model.draws`; grid (num_rows, number of tiles)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_here = token < vocab
    weight = tl.load(weights + row * vocab + token, mask=is_here, other=0.0)
    key = tl.load(keys + row).to(tl.uint64)
    of_block = hash_bits(key, (token // 64).to(tl.uint64) + (1 << 40))
    least = exponential_of(of_block) / 64
    is_least = (of_block & 63) == (token & 63).to(tl.uint64)
    noise = tl.where(is_least, least, least + exponential_of(hash_bits(key, token.to(tl.uint64))))
    time = tl.where(weight > 0, noise / weight, float("inf"))
    first = tl.argmin(time, 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(times + at, tl.min(time, 0))
    tl.store(ids + at, (tl.program_id(1) * TILE + first).to(tl.int64))


@triton.jit
def hash_bits(key, number):
    """Return 64 bits of splitmix64 at `number`."""
    x = number * 0x9E3779B97F4A7C15 + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def exponential_of(bits):
    """Return -log(1 - u) for the uniform u that `bits` give; near 0 by its series, where 1 - u would be rounded."""
    u = ((bits >> 11).to(tl.float64) + 0.5) * (2.0**-53)
    return tl.where(u < 1e-5, u * (1 + u * (0.5 + u / 3)), -tl.log(1 - u))
