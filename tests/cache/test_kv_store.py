"""The layout of the KV store: what a layer sees, what a block is, what writing touches."""

from __future__ import annotations

import pytest
import torch

from kvasir.cache.kv_store import KvStore, bytes_per_block


def make_store(dtype: torch.dtype = torch.float32) -> KvStore:
    return KvStore(num_blocks=6, num_layers=3, block_size=4, num_kv_heads=2, head_dim=5, dtype=dtype, device="cpu")


def test_a_block_is_one_contiguous_run_of_all_layers() -> None:
    store = make_store()
    assert store.data.shape == (6, 3, 2, 4, 2, 5)
    assert store.data[2].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_size_of_a_block_is_known_before_there_is_a_store(dtype: torch.dtype) -> None:
    assert make_store(dtype).data[2].nbytes == bytes_per_block(3, 4, 2, 5, dtype)


def test_layers_are_views_of_the_one_tensor() -> None:
    store = make_store()
    keys, values = store.layer(1)
    assert keys.shape == values.shape == (6, 4, 2, 5)
    keys[5, 3] = 1.0
    values[5, 3] = 2.0
    assert store.data[5, 1, 0, 3].eq(1).all() and store.data[5, 1, 1, 3].eq(2).all()
    assert store.data.sum() == 30


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_writing_slots_touches_just_their_keys_and_values(layer: int) -> None:
    store = make_store()
    slots = torch.tensor([23, 0, 9, 6])
    keys, values = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    store.write(layer, store.rows(slots), keys, values)
    expected = torch.zeros_like(store.data)
    for slot, key, value in zip(slots.tolist(), keys, values, strict=True):
        expected[slot // 4, layer, 0, slot % 4] = key
        expected[slot // 4, layer, 1, slot % 4] = value
    assert torch.equal(store.data, expected)


def test_zero_and_copy_touch_whole_blocks_and_no_others() -> None:
    store = make_store()
    store.data.normal_()
    before = store.data.clone()
    store.zero([4, 1])
    store.copy_block(2, 5)
    assert store.data[[1, 4]].eq(0).all()
    assert torch.equal(store.data[5], before[2])
    assert torch.equal(store.data[[0, 2, 3]], before[[0, 2, 3]])
    store.zero([])
    assert torch.equal(store.data[0], before[0])


def test_memory_that_the_system_refuses_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes for keys and values"):
        KvStore(1 << 40, 8, 16, 8, 64, torch.float32, "cpu")
