"""From the folder of a model to what computes it: device, sizes, weights and KV memory. Needs torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvasir.cache.kv_store import KvStore, bytes_per_block
from kvasir.protocol.errors import ConfigurationError, ModelError
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.step import Executor, Grammars, OutOfMemory, SequenceSlice
from kvasir.worker.loaded import Loaded
from kvasir.worker.log import log, progress
from kvasir.worker.model import linear
from kvasir.worker.model.attention import Attention
from kvasir.worker.model.config import ModelConfig
from kvasir.worker.model.linear import Packing, choose_packing
from kvasir.worker.model.loader import load_model, model_fingerprint, read_config, resolve_dtype, weight_bytes
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import sample
from kvasir.worker.options import Options
from kvasir.worker.sizes import choose_limits, choose_num_blocks, free_memory, gib, num_requests
from kvasir.worker.speculation.draft_model import DraftModel
from kvasir.worker.speculation.same_tokenizer import check_same_tokenizer


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be loaded: the model that answers, and the one that drafts for it if there is one."""

    options: Options
    device: torch.device
    folders: list[str]
    configs: list[ModelConfig]
    dtype: torch.dtype
    packing: Packing

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        return sum(map(self.weight_bytes_of, self.configs))

    def weight_bytes_of(self, its: ModelConfig) -> int:
        return weight_bytes(its, self.dtype, self.packing, self.device)

    @property
    def block_bytes(self) -> int:
        """What one block of all models takes."""
        return sum(map(self.block_bytes_of, self.configs))

    def block_bytes_of(self, its: ModelConfig) -> int:
        return bytes_per_block(its.num_layers, self.options.block_size, its.num_kv_heads, its.head_dim, self.dtype)

    def num_blocks(self, free_bytes: int) -> int:
        """Return how many blocks the pool gets where so much is free. Raises ConfigurationError: too few."""
        options = self.options
        num_per_request = -(-(options.max_context or self.configs[0].max_position) // options.block_size)
        return choose_num_blocks(
            options.kv_memory,
            free_bytes=free_bytes,
            block_bytes=self.block_bytes,
            on_gpu=self.on_gpu,
            num_useful=num_requests(options, self.on_gpu) * num_per_request,
        )


def load_torch(options: Options) -> Loaded:
    """Load the model of `options` onto its device. Takes as long as reading the weights.

    Raises:
        ConfigurationError: a folder that is no model, no such device, too little memory, contradictions.
    """
    torch.set_num_threads(options.threads)
    plan = _plan(options, _choose_device(options.device))
    config = plan.configs[0]
    num_blocks = plan.num_blocks(_free_bytes(plan.device) - plan.weight_bytes)
    limits = choose_limits(options, window=config.max_position, num_blocks=num_blocks, on_gpu=plan.on_gpu)
    _log_plan(plan)
    draft_model = None
    try:
        models = [_load(plan, number, num_blocks) for number in range(len(plan.configs))]
        attention = _attention(models[0].attention)
        if plan.on_gpu:
            from kvasir.worker.startup_gpu import open_on_gpu

            opened = open_on_gpu(options, models, plan.num_blocks)
            executors, num_blocks, limits = opened.executors, opened.num_blocks, opened.limits
            attention = f"{attention}, {opened.graphs}"[:256]
        else:
            executors = _open_on_cpu(options, models, num_blocks)
        if options.draft_model:
            draft_model = DraftModel(
                executors[1],
                num_blocks,
                options.block_size,
                vocab_size=min(each.vocab_size for each in plan.configs),
                window=plan.configs[1].max_position,
                token_work=plan.weight_bytes_of(plan.configs[1]) / plan.weight_bytes_of(config),
                clock=time.monotonic,
            )
    except (MemoryError, torch.OutOfMemoryError, OutOfMemory) as error:
        raise ModelError(
            f"{options.model} does not fit into memory ({error}); give less --kv-memory, or --max-step-tokens."
        ) from None
    return Loaded(
        executor=executors[0],
        is_ahead=plan.on_gpu,
        num_blocks=num_blocks,
        bytes_per_block=plan.block_bytes,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        limits=limits,
        fingerprint=model_fingerprint(options.model),
        dtype=plan.dtype_name,
        device=plan.device.type,
        attention=attention,
        grammars=_load_grammars(Path(options.model), config.vocab_size, config.eos_token_ids),
        draft_model=draft_model,
    )


def _choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch finds no CUDA device here; use --device cpu or auto.")
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _plan(options: Options, device: torch.device) -> _Plan:
    """Read the configurations and see that the weights fit."""
    folders = [folder for folder in (options.model, options.draft_model) if folder]
    configs = [read_config(Path(folder)) for folder in folders]
    if options.draft_model:
        check_same_tokenizer(Path(options.model), Path(options.draft_model))
    dtype = resolve_dtype(options.dtype, configs[0], device)
    packing = choose_packing(dtype, device, weight_bytes(configs[0], dtype, Packing(), device))
    plan = _Plan(options, device, folders, configs, dtype, packing)
    if plan.weight_bytes > _free_bytes(device):
        raise ModelError(
            f"{' and '.join(folders)} need {gib(plan.weight_bytes)} for weights in {plan.dtype_name}, but only "
            f"{gib(_free_bytes(device))} are free on {device.type}; use a smaller model or a narrower --dtype."
        )
    return plan


def _log_plan(plan: _Plan) -> None:
    is_narrow = not plan.on_gpu and plan.dtype in (torch.bfloat16, torch.float16)
    if is_narrow and (gain := linear.gain_over_fp32(plan.dtype)) < 1:
        hint = "on this CPU --dtype float32 is faster"
        log("slow_dtype", dtype=plan.dtype_name, times_fp32=round(gain, 2), hint=hint)
    is_packed = {"packed": plan.packing.packs} if not plan.on_gpu else {}
    log("loading", device=plan.device.type, dtype=plan.dtype_name, weight_bytes=plan.weight_bytes, **is_packed)


def _load(plan: _Plan, number: int, num_blocks: int) -> Model:
    folder = plan.folders[number]
    log("loading", model=folder)
    return load_model(
        folder,
        plan.device,
        plan.dtype,
        block_size=plan.options.block_size,
        working_set_limit_bytes=num_blocks * plan.block_bytes_of(plan.configs[number]),
        packing=plan.packing,
        on_progress=progress("layers"),
    )


def _open_on_cpu(options: Options, models: Sequence[Model], num_blocks: int) -> list[Executor]:
    """Give each model a pool of its own, all over `num_blocks` blocks."""
    executors: list[Executor] = []
    for model in models:
        its = model.config
        shape = (num_blocks, its.num_layers, options.block_size, its.num_kv_heads, its.head_dim)
        kv = KvStore(*shape, model.dtype, model.device)
        # The first step allocates and compiles what every step needs: better before anybody waits for it.
        model.forward([SequenceSlice(0, [0], 0, [0], 1)], kv)
        kv.zero([0])
        executors.append(LocalExecutor(model, kv, sample))
    return executors


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
