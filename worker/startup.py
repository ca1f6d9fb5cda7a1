"""From options to an engine ready to run.

Whatever does not allow a start is a `ConfigurationError` in one sentence. torch is imported only for a real model.
"""

from __future__ import annotations

import os
import secrets

from kvasir.cache.policies import POLICIES
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.messages import Hello, Limits
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.loaded import Loaded
from kvasir.worker.model.oracle_model import PREFIX, OracleModel, OracleStore, parse_oracle
from kvasir.worker.options import Options
from kvasir.worker.sizes import MIN_BLOCKS, choose_limits, choose_num_blocks, free_memory
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.speculator import Speculator


def build(options: Options) -> tuple[Engine, Hello]:
    """Return the engine and what the worker says of itself. Takes as long as loading the model.

    Raises:
        ConfigurationError: a folder that is no model, too little memory, arguments that contradict the model.
    """
    try:
        loaded = _load(options)
    except OSError as error:  # a folder that this user may not read, a path that is too long, a disk that fails
        raise ConfigurationError(f"{options.model[:256]} cannot be read: {error.strerror or error}") from None
    limits = loaded.limits
    make_policy = POLICIES[options.eviction_policy](loaded.num_blocks)
    cache = PrefixCache(loaded.num_blocks, options.block_size, make_policy)
    is_auto = options.speculate == "auto" and (loaded.device == "cpu" or bool(options.draft_model))
    speculates = options.speculate == "lookup" or is_auto
    speculator = Speculator(Lookup(), loaded.draft_model) if speculates else None
    engine = Engine(
        loaded.executor,
        cache,
        limits,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        check=options.check,
        grammars=loaded.grammars,
        is_ahead=loaded.is_ahead,
        speculator=speculator,
    )
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id=options.worker_id,
        incarnation=secrets.token_bytes(16),
        model=options.name,
        fingerprint=loaded.fingerprint,
        dtype=loaded.dtype,
        block_size=options.block_size,
        num_blocks=loaded.num_blocks,
        limits=Limits(limits.max_requests, limits.max_context, limits.max_step_tokens),
        device=loaded.device,
        attention=loaded.attention,
        pid=os.getpid(),
        bytes_per_block=loaded.bytes_per_block,
        lacks=[] if loaded.grammars is not None else ["grammars"],
    )
    return engine, hello


def _load(options: Options) -> Loaded:
    if options.model.startswith(PREFIX):
        return _load_oracle(options)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # read once, when torch is loaded
    from kvasir.worker.startup_torch import load_torch

    return load_torch(options)


def _load_oracle(options: Options) -> Loaded:
    model = OracleModel(parse_oracle(options.model))
    config = model.config
    block_bytes = 8 * options.block_size
    if options.kv_memory is None:
        num_blocks = max(MIN_BLOCKS, -(-config.window // options.block_size) * 4)
    else:
        num_blocks = choose_num_blocks(
            options.kv_memory, free_bytes=free_memory(), block_bytes=block_bytes, on_gpu=False
        )
    return Loaded(
        executor=LocalExecutor(model, OracleStore(num_blocks, options.block_size), model.sample),
        num_blocks=num_blocks,
        bytes_per_block=block_bytes,
        vocab_size=config.vocab,
        eos_token_ids=config.eos_token_ids,
        limits=choose_limits(options, window=config.window, num_blocks=num_blocks, on_gpu=False),
        fingerprint=f"oracle-{config.vocab}-{config.window}-{config.eos}",
        dtype="uint64",
        device="cpu",
    )
