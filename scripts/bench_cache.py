"""What one 4,096-token prompt costs the prefix cache's bookkeeping, in pools of 10^4, 10^5 and 10^6 blocks.

    python scripts/bench_cache.py [--peer-dir FOLDER] [--sizes 10000,100000,1000000] [--rounds 31] [--json FILE]

Pools are filled with published, idle prompts of 256 blocks of 16 tokens. Then, in turns and in one process, every
system over every pool takes a prompt that is resident (hit) and one that is new (miss, so that 256 blocks are evicted):
match + allocate + publish is timed. Timed by themselves are the release that follows, and the upkeep before it: what
a policy does between requests, which come every `SECONDS_PER_PROMPT` here. CPU time of the thread, so
that what else the machine does counts little; medians over rounds, also of the ratios between pools; fewer rounds for a
system that takes more than `BUDGET_S`. "evict" is asked for directly: 256 blocks at a time, per block. Bytes of
bookkeeping per block are what `tracemalloc` sees grow while 10^5 blocks are filled (token ids that the cache keeps
included), plus the storage of tensors kept.

`kvasir`, with the default policy, is handed prefix hashes, as a worker is by the gateway; `kvasir + hash` also computes
them, which the other two do in some way as well, and is what they should be compared with. Peers are read from
--peer-dir: `mini-sglang` (github.com/sgl-project/mini-sglang: radix cache, cache manager) and `nano-vllm`
(github.com/GeeeekExplorer/nano-vllm: block manager), on CPU tensors. mini-sglang's C++ comparison of token ids is
replaced by numpy's here, which takes about 7 us of its time. Every system gets the prompt in the form it likes: packed
bytes, a list, a tensor.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.policies import DEFAULT_POLICY, POLICIES
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt

SIZE = 16  # tokens per block
LENGTH = 256  # blocks per prompt
VOCAB = 32_000
BYTES_AT = 100_000  # blocks in the pool whose bookkeeping is weighed
SECONDS_PER_PROMPT = 0.1  # on the clock of our caches
BUDGET_S = 20.0  # per system, pool and kind
ROOT = derive_root(b"benchmark", "model", "float32")
SPACE = derive_namespace(b"benchmark", "tenant")

Tokens = npt.NDArray[np.int32]


class System(Protocol):
    """A prefix cache over `num_blocks` blocks. What is timed is `upkeep`, done between requests, then `take`: match,
    allocate, publish; `release` ends it."""

    name: str

    def prepare(self, tokens: Tokens) -> Any:
        """Return the prompt in the form that `take` likes."""

    def upkeep(self) -> None:
        """Let time pass, and do what the system does meanwhile."""

    def take(self, prompt: Any) -> int:
        """Return how many blocks were found resident."""

    def release(self) -> None: ...

    def evict(self, num_blocks: int) -> bool:
        """Evict; False if this cannot be asked for by itself."""

    def extra_bytes(self) -> int:
        """Return what `tracemalloc` does not see."""


class Kvasir:
    name = "kvasir"
    policy = DEFAULT_POLICY

    def __init__(self, num_blocks: int) -> None:
        self.cache = PrefixCache(num_blocks, SIZE, POLICIES[self.policy](num_blocks))
        self.chain: Chain
        self.table = BlockTable()
        self.now = 0.0

    def prepare(self, tokens: Tokens) -> tuple[bytes, bytes]:
        packed = tokens.astype("<u4").tobytes()
        return packed, hash_prompt(ROOT, SPACE, SPACE, packed, 0, SIZE)

    def upkeep(self) -> None:
        self.now += SECONDS_PER_PROMPT
        self.cache.advance(self.now)

    def take(self, prompt: tuple[bytes, bytes]) -> int:
        packed, hashes = prompt
        cache, table = self.cache, self.table
        chain = Chain(
            owner="tenant",
            root=ROOT,
            public_namespace=SPACE,
            namespace=SPACE,
            num_public_blocks=0,
            block_size=SIZE,
            packed_tokens=packed,
            packed_hashes=hashes,
        )
        num_matched = cache.match(chain, table, LENGTH - 1)
        assert cache.allocate(chain, table, LENGTH - num_matched) is not None
        cache.insert(chain, table, LENGTH)
        return num_matched

    def release(self) -> None:
        self.cache.free(self.table)
        self.cache.take_events()

    def evict(self, num_blocks: int) -> bool:
        return self.cache.evict(num_blocks) == num_blocks

    def extra_bytes(self) -> int:
        return 0


class KvasirHashing(Kvasir):
    name = "kvasir + hash"

    def take(self, prompt: tuple[bytes, bytes]) -> int:
        packed = prompt[0]
        return super().take((packed, hash_prompt(ROOT, SPACE, SPACE, packed, 0, SIZE)))


class KvasirLru(KvasirHashing):
    name = "kvasir lru + hash"
    policy = "lru"


class NanoVllm:
    name = "nano-vllm"

    def __init__(self, num_blocks: int) -> None:
        self.manager = self.block_manager.BlockManager(num_blocks, SIZE)
        self.sequence: Any = None

    @classmethod
    def load(cls, folder: Path) -> None:
        make_package("nanovllm", folder / "nanovllm")
        cls.make_sequence = importlib.import_module("nanovllm.engine.sequence").Sequence
        cls.make_sequence.block_size = SIZE
        cls.block_manager: Any = importlib.import_module("nanovllm.engine.block_manager")

    def prepare(self, tokens: Tokens) -> list[int]:
        return [INTS[token] for token in tokens.tolist()]  # shared numbers: lists of references

    def upkeep(self) -> None:
        pass

    def take(self, prompt: list[int]) -> int:
        self.sequence = sequence = type(self).make_sequence(prompt)
        num_cached: int = self.manager.can_allocate(sequence)
        assert num_cached >= 0
        self.manager.allocate(sequence, num_cached)
        sequence.num_scheduled_tokens = len(sequence) - sequence.num_cached_tokens
        self.manager.hash_blocks(sequence)
        return num_cached

    def release(self) -> None:
        self.manager.deallocate(self.sequence)

    def evict(self, num_blocks: int) -> bool:
        return False  # happens one by one when a block is allocated

    def extra_bytes(self) -> int:
        return 0


class MiniSglang:
    name = "mini-sglang"

    def __init__(self, num_blocks: int) -> None:
        self.manager = self.cache_module.CacheManager(num_blocks, SIZE, self.torch.empty(0), "radix")
        self.handle: Any = None

    @classmethod
    def load(cls, folder: Path) -> None:
        """Import what the radix cache needs of the package, and nothing that needs a GPU."""
        cls.torch: Any = importlib.import_module("torch")
        cls.torch.set_num_threads(1)
        root = folder / "python" / "minisgl"
        for name in ("", ".utils", ".kernel", ".scheduler"):
            make_package("minisgl" + name, root / name.removeprefix("."))
        context = SimpleNamespace(page_size=SIZE)
        sys.modules["minisgl.core"] = module = ModuleType("minisgl.core")
        vars(module).update(get_global_ctx=lambda: context, Req=object)
        misc = importlib.import_module("minisgl.utils.misc")
        registry = importlib.import_module("minisgl.utils.registry")
        utils, kernel = vars(sys.modules["minisgl.utils"]), vars(sys.modules["minisgl.kernel"])
        utils.update(align_down=misc.align_down, div_ceil=misc.div_ceil, Registry=registry.Registry)
        kernel.update(fast_compare_key=compare)
        cls.cache_module: Any = importlib.import_module("minisgl.scheduler.cache")

    def prepare(self, tokens: Tokens) -> Any:
        return self.torch.from_numpy(tokens.copy())

    def upkeep(self) -> None:
        pass

    def take(self, prompt: Any) -> int:
        manager, tree = self.manager, self.manager.prefix_cache
        found = tree.match_prefix(prompt[:-1]).cuda_handle
        manager.lock(found)
        num_cached: int = found.cached_len // SIZE
        fresh = manager._page_to_token(manager._allocate(LENGTH - num_cached))
        indices = self.torch.cat([found.get_matched_indices(), fresh]) if num_cached else fresh
        cached_len, self.handle = tree.insert_prefix(prompt, indices)
        manager.unlock(found)
        manager._free(indices[found.cached_len : cached_len])
        manager.lock(self.handle)
        return num_cached

    def release(self) -> None:
        self.manager.unlock(self.handle)

    def evict(self, num_blocks: int) -> bool:
        manager = self.manager
        evicted = manager.prefix_cache.evict(num_blocks * SIZE)
        manager.free_slots = self.torch.cat([manager.free_slots, evicted[::SIZE]])
        return True

    def extra_bytes(self) -> int:
        storages = {}
        nodes = [self.manager.prefix_cache.root_node]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            for tensor in (getattr(node, "_key", None), getattr(node, "_value", None)):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


INTS = list(range(VOCAB))


def compare(x: Any, y: Any) -> int:
    """Return how many leading token ids of two tensors are equal."""
    length = min(len(x), len(y))
    differs = x.numpy()[:length] != y.numpy()[:length]
    first = int(differs.argmax())
    return first if length and differs[first] else length


def make_package(name: str, folder: Path) -> None:
    """Stand in for a package without running its `__init__`; its modules are found in `folder`."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


class Prompts:
    """An endless stream of prompts, the same for every system. All are different from the first block on."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def next(self) -> Tokens:
        return self.rng.integers(0, VOCAB, LENGTH * SIZE, dtype=np.int32)


def fill(systems: list[System], num_blocks: int, prompts: Prompts) -> deque[Tokens]:
    """Fill every pool, a little more than full; return the last prompts."""
    recent: deque[Tokens] = deque(maxlen=8)
    for _ in range(num_blocks // LENGTH + 4):
        tokens = prompts.next()
        for system in systems:
            use(system, tokens)
        recent.append(tokens)
    return recent


@dataclass(slots=True)
class Entry:
    """One system over one pool, and how long it took, in seconds: per kind of work, one figure per round."""

    system: System
    num_blocks: int
    recent: deque[Tokens]
    prompts: Prompts
    times: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, hit: Tokens, miss: Tokens) -> None:
        for kind, tokens in (("hit", hit), ("miss", miss)):
            if sum(self.times.get(kind, ())) < BUDGET_S:
                self._measure(kind, tokens)
        begin = time.thread_time()
        if self.system.evict(LENGTH):
            self._note("evict", (time.thread_time() - begin) / LENGTH)
            use(self.system, self.prompts.next())

    def _measure(self, kind: str, tokens: Tokens) -> None:
        system, prompt = self.system, self.system.prepare(tokens)
        expected = LENGTH - 1 if kind == "hit" else 0
        for _ in range(2):  # once more if a policy has let go of what was to be hit: it is resident then
            start = time.thread_time()
            system.upkeep()
            begin = time.thread_time()
            num_cached = system.take(prompt)
            taken = time.thread_time()
            system.release()
            end = time.thread_time()
            if num_cached == expected:
                break
        assert num_cached == expected, (system.name, kind, num_cached)
        self._note(kind, taken - begin)
        self._note("release", end - taken)
        self._note("upkeep", begin - start)

    def _note(self, kind: str, seconds: float) -> None:
        self.times.setdefault(kind, []).append(seconds)

    def row(self, base: Entry, bytes_per_block: float) -> dict[str, Any]:
        """Return the medians, and the ratios to `base`, another pool of the same system: medians over rounds, too."""
        times = {f"{kind}_us": 1e6 * statistics.median(values) for kind, values in self.times.items()}
        ratios = {
            f"{kind}_ratio": statistics.median(x / y for x, y in zip(self.times[kind], base.times[kind], strict=False))
            for kind in ("hit", "miss")
        }
        return {
            "system": self.system.name,
            "num_blocks": self.num_blocks,
            **times,
            **ratios,
            "bytes_per_block": bytes_per_block,
        }


def use(system: System, tokens: Tokens) -> None:
    system.upkeep()
    system.take(system.prepare(tokens))
    system.release()


def measure(kinds: list[type[Any]], sizes: list[int], rounds: int) -> list[Entry]:
    """Measure all systems over pools of all `sizes` in turns: what the machine does meanwhile hits them alike."""
    entries: list[Entry] = []
    for num_blocks in sizes:
        systems: list[System] = [kind(num_blocks) for kind in kinds]
        prompts = Prompts()
        recent = fill(systems, num_blocks, prompts)
        entries += [Entry(system, num_blocks, recent, prompts) for system in systems]
    gc.collect()
    gc.freeze()  # as a worker does when it is ready
    for turn in range(rounds):
        prompts_of = {e.num_blocks: (e.recent[turn % len(e.recent)], e.prompts.next()) for e in entries[:: len(kinds)]}
        first = turn % len(entries)
        for entry in entries[first:] + entries[:first]:
            entry.measure(*prompts_of[entry.num_blocks])
    gc.unfreeze()
    return entries


def weigh(kind: type[Any], num_blocks: int) -> float:
    """Return bytes of bookkeeping per block."""
    prompts = Prompts()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    system: System = kind(num_blocks)
    recent = fill([system], num_blocks, prompts)
    recent.clear()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return (grown + system.extra_bytes()) / num_blocks


def load_peers(folder: Path | None) -> list[type[Any]]:
    """Return the peers that can be measured; say why others cannot."""
    peers: list[type[Any]] = []
    for peer in (MiniSglang, NanoVllm):
        place = folder / peer.name if folder else None
        if place is None or not place.is_dir():
            print(f"{peer.name}: skipped, there is no {place or '--peer-dir'}")
            continue
        try:
            peer.load(place)
        except ImportError as error:
            print(f"{peer.name}: skipped, {error}")
            continue
        peers.append(peer)
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="folder with mini-sglang/ and nano-vllm/")
    parser.add_argument("--sizes", default="10000,100000,1000000", help="blocks in the pool")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kinds: list[type[Any]] = [Kvasir, KvasirHashing, KvasirLru, *load_peers(args.peer_dir)]
    weights = {kind.name: weigh(kind, BYTES_AT) for kind in kinds}
    print(f"Python {platform.python_version()}, {args.rounds} rounds, microseconds (xN: against the smallest pool)")
    print(
        f"{'system':17} {'blocks':>8} {'hit':>17} {'miss + evict':>17} {'release':>8} {'upkeep':>7} "
        f"{'evict/block':>12} {'bytes/block':>12}"
    )
    rows: list[dict[str, Any]] = []
    first: dict[str, Entry] = {}
    for entry in measure(kinds, sorted(map(int, args.sizes.split(","))), args.rounds):
        name = entry.system.name
        row = entry.row(first.setdefault(name, entry), weights[name])
        evict = f"{row['evict_us']:.2f}" if "evict_us" in row else "in miss"
        cells = [f"{row[f'{kind}_us']:9.0f} (x{row[f'{kind}_ratio']:.2f})" for kind in ("hit", "miss")]
        print(
            f"{name:17} {entry.num_blocks:8} {cells[0]:>17} {cells[1]:>17} {row['release_us']:8.0f} "
            f"{row['upkeep_us']:7.0f} {evict:>12} {row['bytes_per_block']:12.0f}"
        )
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
