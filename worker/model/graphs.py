"""Decode steps under CUDA graphs: all launches of a step in one call, which costs the host next to nothing.

What a graph reads and writes has its place once and for all, so a step is written into one buffer, is padded to the
next size that was captured, and comes back in the same logits. A padded row has no work in the attention's plan, and
its keys and values go to the store's spare block. A step that is not one token each of a few sequences is computed as
ever.

But for capture and replay all of it runs on a CPU as well, where tests compare it with steps
that are not padded. UNPROVEN ON A DEVICE.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.batch import feed_tokens
from kvasir.worker.model.memory import copy_to, memory_errors
from kvasir.worker.model.model import Model

_NUM_COLUMNS = 4  # token ids, positions, slots, draws to be fed


@runtime_checkable
class FixedAttention(Protocol):
    """An attention path whose launches can be the same for every decode step, see `PagedAttention`."""

    def fixed_sizes(self, num_singles: int, num_tokens: int, block_size: int) -> tuple[int, int]:
        """Return how long the plan of so many singles can be, of `num_tokens` in all, and how many partial results."""

    def plan(
        self, singles: Sequence[SequenceSlice], block_size: int, base: int, num_partial_rows: int
    ) -> NDArray[np.int32] | None:
        """Return a step's plan, to lie at `base` of a buffer; None if it has more partial results."""

    def begin_fixed(self, buffer: Tensor, base: int, num_singles: int, num_partial_rows: int) -> None:
        """Attend from now on to what is in `buffer`."""


def graph_sizes(num_rows: int) -> list[int]:
    """Return the numbers of rows for which there are graphs: no step is padded by more than half."""
    sizes = [1, 2, 3, 4, 6, 8, 12, *range(16, 65, 8), *range(80, 257, 16), *range(288, num_rows, 32)]
    return [*(size for size in sizes if size < num_rows), num_rows]


class DecodeGraphs:
    """Computes steps as `Model.forward` does; those that only decode, under graphs once `capture` was called.

    Within the limits of its buffers is a step of up to `num_rows` sequences whose tokens are no more than `max_context`
    each, and together no more than twice those of the store: what they share counts for each.
    """

    def __init__(self, model: Model, kv: KvStore, num_rows: int, max_context: int) -> None:
        """Raises: ValueError where the model's attention cannot be captured."""
        if not isinstance(model.attention, FixedAttention):
            raise ValueError(f"attention by {model.attention.name} cannot be captured")
        self._model, self._kv, self._num_rows, self._attention = model, kv, num_rows, model.attention
        self.sizes = graph_sizes(num_rows)
        num_tokens = min(num_rows * max_context, 2 * kv.num_blocks * kv.block_size)
        plan_size, self._num_partial_rows = self._attention.fixed_sizes(num_rows, num_tokens, kv.block_size)
        self._base = _NUM_COLUMNS * num_rows  # of the plan
        self._buffer = torch.zeros(self._base + plan_size, dtype=torch.int32, device=model.device)
        self._buffer[: self._base].view(_NUM_COLUMNS, -1)[2] = kv.spare_slot
        self._drawn = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        exact = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._logits = torch.empty(num_rows, model.config.vocab_size, dtype=exact, device=model.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        model.rotary.reserve(max_context)
        self.num_padded = 0  # rows computed for nobody
        self.num_steps = 0  # of those below

    def capture(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Capture a graph for every size. `on_progress(done, total)` is called after each."""
        pool: Any = None
        for done, size in enumerate(reversed(self.sizes), 1):  # the largest first: the others fit into its memory
            pool = self._capture(size, pool)
            if on_progress is not None:
                on_progress(done, len(self.sizes))

    @torch.inference_mode()
    @memory_errors()
    def forward(self, slices: list[SequenceSlice], kv: KvStore, drawn: Tensor | None = None) -> Tensor:
        """Do what `Model.forward` does. The logits are valid until the next call.

        Raises: OutOfMemory.
        """
        if not self._prepare(slices, drawn):
            return self._model.forward(slices, kv, drawn)
        size = self.sizes[bisect_left(self.sizes, len(slices))]
        self.num_steps += 1
        self.num_padded += size - len(slices)
        if self._graphs:
            self._graphs[size].replay()
        else:
            self._compute(size)
        return self._logits[: len(slices)]

    @torch.inference_mode()
    def largest_difference(self) -> float:
        """Return by how much the logits of a padded step differ from those of the same step computed as ever.

        It is relative to the largest. Writes to the first blocks of the store, and zeroes them.
        """
        block_ids = range(min(3, self._num_rows, self._kv.num_blocks))
        slices = [SequenceSlice(i, [i + 1], 0, [i], 1) for i in block_ids]
        try:
            expected = self._model.forward(slices, self._kv)
            difference = (self.forward(slices, self._kv) - expected).abs().max() / expected.abs().max()
        finally:
            self._kv.zero(block_ids)
        return difference.nan_to_num(torch.inf).item()

    def _prepare(self, slices: list[SequenceSlice], drawn: Tensor | None) -> bool:
        """Write the step into the buffer; False if it is none for a graph."""
        num_rows, block_size = self._num_rows, self._kv.block_size
        is_plain = all(len(s.token_ids) == s.num_logits == s.num_draws == 1 for s in slices)
        if not slices or not is_plain or max(len(slices), 0 if drawn is None else len(drawn)) > num_rows:
            return False
        plan = self._attention.plan(slices, block_size, self._base, self._num_partial_rows)
        if plan is None or self._base + len(plan) > len(self._buffer):
            return False
        columns = np.zeros((_NUM_COLUMNS, num_rows), dtype=np.int32)
        columns[2] = self._kv.spare_slot
        columns[3] = -1
        columns[:, : len(slices)] = np.array(
            [
                (
                    piece.token_ids[0],
                    piece.start,
                    piece.block_table[piece.start // block_size] * block_size + piece.start % block_size,
                    -1 if piece.drawn is None else piece.drawn,
                )
                for piece in slices
            ],
            dtype=np.int32,
        ).T
        copy_to(self._buffer, np.concatenate((columns.ravel(), plan)))
        if drawn is not None:
            self._drawn[: len(drawn)].copy_(drawn)
        return True

    def _compute(self, size: int) -> None:
        """Compute the logits of the first `size` rows in the buffer; this is what is captured."""
        model = self._model
        token_ids, positions, slots, feed = self._buffer[: self._base].view(_NUM_COLUMNS, -1)[:, :size]
        self._attention.begin_fixed(self._buffer, self._base, size, self._num_partial_rows)
        token_ids = feed_tokens(token_ids, feed, self._drawn)
        rows = self._kv.rows(slots.long())
        model.compute(token_ids, model.rotary.rows(positions), rows, self._kv, out=self._logits[:size])

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> Any:
        """Capture the graph of `size`, whose memory is in `pool`; return the pool."""
        self._compute(size)  # compiles kernels, and allocates what stays
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._compute(size)
        self._graphs[size] = graph
        return graph.pool()
