"""How many requests, tokens and blocks a worker has room for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.log import log
from kvasir.worker.options import MemorySize, Options

GIB = 1 << 30
MIN_BLOCKS = 8
MAX_BLOCKS = 1 << 20  # bounds a snapshot to 16 MiB


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
            f"--kv-memory asks for {gib(size_bytes)}, but only {gib(free_bytes)} are free for it; give less."
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


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still take, as the kernel and all memory cgroups above it see it."""
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text())[1]) << 10  # type: ignore[index]
    except (OSError, TypeError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        own = re.search(r"^0::/(.*)$", (proc / "self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        own = None
    folder = cgroups / (own[1] if own else "")
    for each in [folder, *folder.parents]:
        if each.is_relative_to(cgroups) and (free := _free_in_cgroup(each)) is not None:
            available = min(available, free)
    return available


def _free_in_cgroup(folder: Path) -> int | None:
    """Return what is left below the limit of a memory cgroup; None if it has none. Cached files count as free: the
    kernel drops them for whoever needs room, and a model that was just read is all cache."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        cached = sum(
            map(int, re.findall(r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE))
        )
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - max(0, used - cached))


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):.1f} MiB"
