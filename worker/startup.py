"""From options to an engine ready to run: picks device and sizes, loads the model, allocates the KV pool.

Whatever does not allow a start is a `ConfigurationError` in one sentence. torch is imported only for a real model.
"""

from __future__ import annotations

import os
import re
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
from kvasir.worker.log import log
from kvasir.worker.model.oracle_model import PREFIX, OracleModel, OracleStore, parse_oracle
from kvasir.worker.options import MemorySize, Options
from kvasir.worker.speculation.draft_model import DraftModel
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.same_tokenizer import check_same_tokenizer
from kvasir.worker.speculation.speculator import Speculator

if TYPE_CHECKING:
    from kvasir.worker.model.attention import Attention

GIB = 1 << 30
MIN_BLOCKS = 8
MAX_BLOCKS = 1 << 20  # bounds a snapshot to 16 MiB


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
    loaded = _load_oracle(options) if options.model.startswith(PREFIX) else _load_torch(options)
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


def choose_limits(options: Options, *, window: int, num_blocks: int, on_gpu: bool) -> EngineLimits:
    """Return the limits for a model of `window` tokens over a pool of `num_blocks` blocks.

    Raises:
        ConfigurationError: what was asked for does not fit.
    """
    num_slots = num_blocks * options.block_size
    max_requests = num_requests(options, on_gpu)
    max_step_tokens = options.max_step_tokens or max(8192 if on_gpu else 512, max_requests)
    if max_step_tokens < max_requests:
        raise ConfigurationError(
            f"--max-step-tokens {max_step_tokens} is less than the {max_requests} requests that may decode in one step."
        )
    if options.max_context is not None and options.max_context > window:
        raise ConfigurationError(f"--max-context {options.max_context} exceeds the model's window of {window} tokens.")
    if options.max_context is not None and options.max_context > num_slots:
        raise ConfigurationError(
            f"--max-context {options.max_context} exceeds the {num_slots} tokens that the KV memory holds; "
            "give more --kv-memory."
        )
    if num_slots < window and options.max_context is None:
        log("context_limited", max_context=num_slots, window=window, hint="--kv-memory")
    return EngineLimits(max_requests, max_step_tokens, options.max_context or min(window, num_slots))


def choose_num_blocks(
    kv_memory: MemorySize | None, *, free_bytes: int, block_bytes: int, on_gpu: bool, num_useful: int = MAX_BLOCKS
) -> int:
    """Return how many blocks of `block_bytes` the pool gets.

    A number of bytes is taken as it is. A share is taken whole on a GPU; on a CPU, where others live too, no more than
    `num_useful` blocks. Without `kv_memory` the share is 85 % on a GPU, on a CPU a quarter and at most 1 GiB.

    Raises:
        ConfigurationError: more than is free, or less than a few blocks.
    """
    if kv_memory is None:
        size_bytes = int(0.85 * free_bytes) if on_gpu else min(GIB, free_bytes // 4)
    else:
        size_bytes = kv_memory.size_bytes or int((kv_memory.share or 0) * free_bytes)
    if not on_gpu and (kv_memory is None or kv_memory.share):
        size_bytes = min(size_bytes, max(MIN_BLOCKS, num_useful) * block_bytes)
    if size_bytes > free_bytes:
        raise ConfigurationError(
            f"--kv-memory asks for {_gib(size_bytes)}, but only {_gib(free_bytes)} are free for it; give less."
        )
    num_blocks = min(size_bytes // block_bytes, MAX_BLOCKS)
    if num_blocks < MIN_BLOCKS:
        raise ConfigurationError(
            f"{size_bytes} bytes of KV memory hold {num_blocks} blocks of {block_bytes} bytes, at least {MIN_BLOCKS} "
            "are needed; give more --kv-memory, or a smaller model if there is none."
        )
    return num_blocks


def num_requests(options: Options, on_gpu: bool) -> int:
    """Return how many requests are taken at a time."""
    return options.max_requests or (128 if on_gpu else 32)


def free_memory() -> int:
    """Return the bytes that this process may still take, as the kernel and a memory cgroup see it."""
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]
    except (OSError, TypeError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


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
    from kvasir.worker.model.device_executor import DeviceExecutor
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
            f"{' and '.join(folders)} need {_gib(needed)} for weights in {_name(dtype)}, but only "
            f"{_gib(free_bytes())} are free on {device.type}; use a smaller model or a narrower --dtype."
        )

    def block_bytes_of(its: ModelConfig) -> int:
        return bytes_per_block(its.num_layers, options.block_size, its.num_kv_heads, its.head_dim, dtype)

    block_bytes = sum(map(block_bytes_of, configs))
    num_blocks = choose_num_blocks(
        options.kv_memory,
        free_bytes=free_bytes() - needed,
        block_bytes=block_bytes,
        on_gpu=on_gpu,
        num_useful=num_requests(options, on_gpu)
        * -(-(options.max_context or config.max_position) // options.block_size),
    )
    limits = choose_limits(options, window=config.max_position, num_blocks=num_blocks, on_gpu=on_gpu)
    is_packed = {"packed": packing.packs} if not on_gpu else {}
    if not on_gpu and dtype in (torch.bfloat16, torch.float16) and (gain := gain_over_fp32(dtype)) < 1:
        log("slow_dtype", dtype=_name(dtype), times_fp32=round(gain, 2), hint="on this CPU --dtype float32 is faster")
    log("loading", model=options.model, device=device.type, dtype=_name(dtype), weight_bytes=needed, **is_packed)

    def load(folder: str, its: ModelConfig) -> tuple[Executor, Attention]:
        model = load_model(
            folder,
            device,
            dtype,
            block_size=options.block_size,
            working_set_limit_bytes=num_blocks * block_bytes_of(its),
            packing=packing,
            on_progress=_report_progress,
        )
        kv = KvStore(num_blocks, its.num_layers, options.block_size, its.num_kv_heads, its.head_dim, dtype, device)
        # The first step allocates and compiles what every step needs: better before anybody waits for it.
        model.forward([SequenceSlice(0, [0], 0, [0], 1)], kv)
        kv.zero([0])
        # A GPU computes beside Python, which plans the next step meanwhile; a CPU's cores all compute already.
        return DeviceExecutor(model.forward, kv) if on_gpu else LocalExecutor(model, kv, sample), model.attention

    draft_model = None
    try:
        executor, attention = load(options.model, config)
        if draft_config is not None:
            log("loading", draft_model=options.draft_model)
            draft_model = DraftModel(
                load(options.draft_model, draft_config)[0],
                num_blocks,
                options.block_size,
                vocab_size=min(config.vocab_size, draft_config.vocab_size),
                window=draft_config.max_position,
                clock=time.monotonic,
            )
    except (MemoryError, torch.OutOfMemoryError, OutOfMemory) as error:
        raise ModelError(f"{options.model} does not fit into memory ({error}); give less --kv-memory.") from None
    return Loaded(
        executor=executor,
        is_ahead=on_gpu,
        num_blocks=num_blocks,
        bytes_per_block=block_bytes,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        limits=limits,
        fingerprint=model_fingerprint(options.model),
        dtype=_name(dtype),
        device=device.type,
        attention=_attention(attention),
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


def _report_progress(done: int, total: int) -> None:
    """Log every tenth of the way."""
    if done * 10 // total > (done - 1) * 10 // total:
        log("loading", layers=f"{done}/{total}")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):.1f} MiB"
