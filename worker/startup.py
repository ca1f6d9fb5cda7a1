"""From options to an engine ready to run: picks the device, loads the model, allocates the KV pool.

Whatever does not allow a start is a `ConfigurationError` in one sentence. torch is imported only for a real model.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvasir.cache.policies import POLICIES
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.errors import ConfigurationError, ModelError
from kvasir.protocol.messages import Hello, Limits
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Executor, Grammars, OutOfMemory
from kvasir.worker.log import log, progress
from kvasir.worker.model.oracle_model import PREFIX, OracleModel, OracleStore, parse_oracle
from kvasir.worker.options import Options
from kvasir.worker.sizes import MIN_BLOCKS, choose_limits, choose_num_blocks, free_memory, gib, num_requests
from kvasir.worker.speculation.draft_model import DraftModel
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.same_tokenizer import check_same_tokenizer
from kvasir.worker.speculation.speculator import Speculator

if TYPE_CHECKING:
    from kvasir.worker.model.attention import Attention
    from kvasir.worker.model.model import Model


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory and what goes with it."""

    executor: Executor
    num_blocks: int
    bytes_per_block: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    limits: EngineLimits
    fingerprint: str
    dtype: str
    device: str
    attention: str = ""
    grammars: Grammars | None = None
    is_ahead: bool = False
    draft_model: DraftModel | None = None


def build(options: Options) -> tuple[Engine, Hello]:
    """Return the engine and what the worker says of itself. Takes as long as loading the model.

    Raises:
        ConfigurationError: a folder that is no model, too little memory, arguments that contradict the model.
    """
    try:
        loaded = _load_oracle(options) if options.model.startswith(PREFIX) else _load_torch(options)
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


def _load_torch(options: Options) -> Loaded:
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # read once, when torch is loaded
    import torch

    from kvasir.cache.kv_store import KvStore, bytes_per_block
    from kvasir.worker.engine.step import SequenceSlice
    from kvasir.worker.model.config import ModelConfig
    from kvasir.worker.model.linear import Packing, choose_packing, gain_over_fp32
    from kvasir.worker.model.loader import load_model, model_fingerprint, read_config, resolve_dtype, weight_bytes
    from kvasir.worker.model.sampling import sample

    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch finds no CUDA device here; use --device cpu or auto.")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")

    def free_bytes() -> int:
        return torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()

    config = read_config(Path(options.model))
    draft_config = read_config(Path(options.draft_model)) if options.draft_model else None
    if draft_config is not None:
        check_same_tokenizer(Path(options.model), Path(options.draft_model))
    configs = [config] if draft_config is None else [config, draft_config]
    folders = [folder for folder in (options.model, options.draft_model) if folder]
    dtype = resolve_dtype(options.dtype, config, device)
    packing = choose_packing(dtype, device, weight_bytes(config, dtype, Packing(), device))
    needed = sum(weight_bytes(each, dtype, packing, device) for each in configs)
    if needed > free_bytes():
        raise ModelError(
            f"{' and '.join(folders)} need {gib(needed)} for weights in {_name(dtype)}, but only "
            f"{gib(free_bytes())} are free on {device.type}; use a smaller model or a narrower --dtype."
        )

    def block_bytes_of(its: ModelConfig) -> int:
        return bytes_per_block(its.num_layers, options.block_size, its.num_kv_heads, its.head_dim, dtype)

    block_bytes = sum(map(block_bytes_of, configs))

    def num_blocks_of(free_bytes: int) -> int:
        num_per_request = -(-(options.max_context or config.max_position) // options.block_size)
        return choose_num_blocks(
            options.kv_memory,
            free_bytes=free_bytes,
            block_bytes=block_bytes,
            on_gpu=on_gpu,
            num_useful=num_requests(options, on_gpu) * num_per_request,
        )

    num_blocks = num_blocks_of(free_bytes() - needed)
    limits = choose_limits(options, window=config.max_position, num_blocks=num_blocks, on_gpu=on_gpu)
    is_packed = {"packed": packing.packs} if not on_gpu else {}
    if not on_gpu and dtype in (torch.bfloat16, torch.float16) and (gain := gain_over_fp32(dtype)) < 1:
        log("slow_dtype", dtype=_name(dtype), times_fp32=round(gain, 2), hint="on this CPU --dtype float32 is faster")
    log("loading", device=device.type, dtype=_name(dtype), weight_bytes=needed, **is_packed)

    def load(folder: str, its: ModelConfig) -> Model:
        log("loading", model=folder)
        return load_model(
            folder,
            device,
            dtype,
            block_size=options.block_size,
            working_set_limit_bytes=num_blocks * block_bytes_of(its),
            packing=packing,
            on_progress=progress("layers"),
        )

    def local(model: Model) -> Executor:
        its = model.config
        kv = KvStore(num_blocks, its.num_layers, options.block_size, its.num_kv_heads, its.head_dim, dtype, device)
        # The first step allocates and compiles what every step needs: better before anybody waits for it.
        model.forward([SequenceSlice(0, [0], 0, [0], 1)], kv)
        kv.zero([0])
        return LocalExecutor(model, kv, sample)

    draft_model = None
    try:
        models = [load(folder, its) for folder, its in zip(folders, configs, strict=True)]
        attention = _attention(models[0].attention)
        if on_gpu:
            from kvasir.worker.startup_gpu import open_on_gpu

            opened = open_on_gpu(options, models, num_blocks_of)
            executors, num_blocks, limits = opened.executors, opened.num_blocks, opened.limits
            attention = f"{attention}, {opened.graphs}"[:256]
        else:
            executors = [local(model) for model in models]
        if draft_config is not None:
            draft_model = DraftModel(
                executors[1],
                num_blocks,
                options.block_size,
                vocab_size=min(config.vocab_size, draft_config.vocab_size),
                window=draft_config.max_position,
                clock=time.monotonic,
            )
    except (MemoryError, torch.OutOfMemoryError, OutOfMemory) as error:
        raise ModelError(
            f"{options.model} does not fit into memory ({error}); give less --kv-memory, or --max-step-tokens."
        ) from None
    return Loaded(
        executor=executors[0],
        is_ahead=on_gpu,  # a GPU computes beside Python, which plans the next step meanwhile
        num_blocks=num_blocks,
        bytes_per_block=block_bytes,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        limits=limits,
        fingerprint=model_fingerprint(options.model),
        dtype=_name(dtype),
        device=device.type,
        attention=attention,
        grammars=_load_grammars(Path(options.model), config.vocab_size, config.eos_token_ids),
        draft_model=draft_model,
    )


def _load_grammars(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Grammars | None:
    """Return what holds answers to grammars, None (and say why) where the model's tokenizer does not allow it."""
    try:
        from kvasir.protocol.grammars import load_tokenizer
        from kvasir.worker.grammars.grammars import Grammars as Compiler

        return Compiler(load_tokenizer(folder, vocab_size, eos_token_ids), eos_token_ids)
    except (ImportError, ModelError) as error:
        log("no_grammars", reason=str(error))
        return None


def _attention(attention: Attention) -> str:
    """Return the path in words, after saying aloud that it is not the one that this device should have."""
    if not attention.fallback_reason:
        return attention.name
    log("slow_attention", path=attention.name, reason=attention.fallback_reason)
    return f"{attention.name}: {attention.fallback_reason}"[:256]


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
