"""Engines over a transformer that hold answers to grammars, and what runs them to the end."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.grammars.grammars import Grammars
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import sample
from kvasir.worker.speculation.draft_model import DraftModel
from tests.engine_helpers import PUBLIC_SPACE, Stream
from tests.grammar_helpers import DEMO, EOS, TOKENIZER

SIZE = 16


def load(folder: Path = DEMO, dtype: torch.dtype = torch.float64) -> Model:
    torch.set_num_threads(1)
    return load_model(folder, "cpu", dtype)


def make_engine(model: Model, *, num_blocks: int = 512, max_requests: int = 16) -> Engine:
    config = model.config
    kv = KvStore(num_blocks, config.num_layers, SIZE, config.num_kv_heads, config.head_dim, model.dtype, "cpu")
    engine = Engine(
        LocalExecutor(model, kv, sample),
        PrefixCache(num_blocks, SIZE),
        EngineLimits(max_requests, 256, min(config.max_position, num_blocks * SIZE)),
        vocab_size=config.vocab_size,
        eos_token_ids=EOS,
        check=True,
        grammars=Grammars(TOKENIZER, EOS),
    )
    engine.public_namespace = PUBLIC_SPACE
    return engine


def make_draft_model(engine: Engine, *, is_of_same_mind: bool) -> DraftModel:
    """Return the bundled model once more, or with something changed that makes it say other things at times."""
    model = load()
    if not is_of_same_mind:
        norm = model.weights.final_norm
        norm *= 1 + 0.5 * torch.rand(norm.shape, generator=torch.Generator().manual_seed(1), dtype=norm.dtype)
    config, num_blocks = model.config, engine.cache.pool.num_blocks
    kv = KvStore(num_blocks, config.num_layers, SIZE, config.num_kv_heads, config.head_dim, model.dtype, "cpu")
    executor, window = LocalExecutor(model, kv, sample), config.max_position
    return DraftModel(
        executor, num_blocks, SIZE, vocab_size=config.vocab_size, window=window, token_work=0.1, clock=time.monotonic
    )


def run(engine: Engine, *commands: Generate, timeout_s: float = 60.0) -> list[Stream]:
    """Submit `commands`, no more at a time than the engine takes, and run them to their ends."""
    streams = {command.req_id: Stream() for command in commands}
    left = [*commands]
    deadline = time.monotonic() + timeout_s
    while left or engine.num_unfinished or engine.has_work:
        assert time.monotonic() < deadline
        while left and engine.num_unfinished < engine.limits.max_requests:
            engine.submit(left.pop(0))
        if not engine.has_work:
            time.sleep(0.001)
        for output in engine.step().outputs:
            stream = streams[output.req_id]
            assert stream.finish_reason is None
            stream.token_ids += unpack_tokens(output.token_ids)
            stream.finish_reason, stream.error = output.finish_reason, output.error
    return list(streams.values())
