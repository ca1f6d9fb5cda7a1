"""The memory behind the block ids: one tensor that holds every block's keys and values of every layer.

Block-major, so that a block is one contiguous run of memory and moving it (to host memory, disk or a peer) is one
copy; a layer sees strided views. Knows nothing of owners: those are in `cache.block_pool`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


class KvStore:
    """`data` [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; index 2 is 0 for keys, 1 for values.

    With `has_spare` there is one block more, of no id that is ever given out: rows that pad a step write there.
    Starts zeroed: a mask that multiplies garbage by zero would still let NaN through.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        has_spare: bool = False,
    ) -> None:
        shape = (num_blocks + has_spare, num_layers, 2, block_size, num_kv_heads, head_dim)
        if torch.device(device).type == "cpu":  # pages of a fresh mapping are zero, and taken when first written to
            size_bytes = math.prod(shape) * dtype.itemsize
            try:
                pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:  # where memory may not be overcommitted
                raise MemoryError(f"{size_bytes} bytes for keys and values: {error.strerror}") from None
            self.data = torch.frombuffer(pages, dtype=dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers = [(self.data[:, i, 0], self.data[:, i, 1]) for i in range(num_layers)]
        # What `write` writes to: all token rows from layer i's first keys (values) on; so all layers share `rows`.
        flat = self.data.view(-1, num_kv_heads, head_dim)
        self._targets = [(flat[2 * i * block_size :], flat[(2 * i + 1) * block_size :]) for i in range(num_layers)]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Return layer i's keys and values, strided views [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[i]

    def rows(self, slots: Tensor) -> Tensor:
        """Return the index [num_tokens] that `write` takes for `slots`, the same for every layer."""
        block_ids = slots.div(self.block_size, rounding_mode="floor")
        rows_per_block = len(self._layers) * 2 * self.block_size
        return slots + block_ids * (rows_per_block - self.block_size)

    def token_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what `rows` indexes of a layer's keys and values, views [num_rows, num_kv_heads, head_dim]."""
        return self._targets[layer]

    @property
    def spare_slot(self) -> int:
        """The first slot of the spare block."""
        return self.num_blocks * self.block_size

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [num_tokens, num_kv_heads, head_dim] at `rows`.

        They must not repeat, but for those of the spare block.
        """
        key_rows, value_rows = self.token_rows(layer)
        key_rows.index_copy_(0, rows, keys)
        value_rows.index_copy_(0, rows, values)

    def zero(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks with zeros, as is due when a block changes tenant."""
        for block_id in block_ids:  # one by one: a list of indices on a GPU would wait for it
            self.data[block_id].zero_()

    def copy_block(self, src: int, dst: int) -> None:
        """Copy block `src` of all layers over block `dst` (for forks)."""
        self.data[dst].copy_(self.data[src])


def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what one block of such a store takes, to size a pool before there is one."""
    return num_layers * 2 * block_size * num_kv_heads * head_dim * dtype.itemsize
