"""A model of vLLM's block cache as far as its KV events go, and the oracle of what an index must hold of it.

It names blocks and chains them in its own way. The oracle hashes every held block's whole prefix anew.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from xxhash import xxh3_128_digest

from kvasir.protocol.prefix import HASH_BYTES, extend_chain, split_hashes
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream.kv_wire import Batch, decode_batch

ROOT = bytes(range(16))
SALT_A, SALT_B = "a0" * 16, "0b" * 16
NAMESPACES = {SALT_A: bytes.fromhex(SALT_A), SALT_B: bytes.fromhex(SALT_B)}


@dataclass(frozen=True)
class Prompt:
    """`image_at`: the block that an image is part of."""

    token_ids: tuple[int, ...]
    salt: str | None = SALT_A
    lora_name: str | None = None
    image_at: int | None = None


@dataclass(frozen=True)
class Block:
    """Block `index` of `prompt`; two prompts that are equal so far share it, by its `name`."""

    prompt: Prompt
    index: int
    name: Any
    parent: Any

    @property
    def is_ours(self) -> bool:
        prompt = self.prompt
        is_plain = prompt.image_at is None or prompt.image_at > self.index
        return prompt.salt in NAMESPACES and prompt.lora_name is None and is_plain


@dataclass
class BlockCacheModel:
    """Holds at most `num_blocks` copies on the GPU; the least recently used ones go first, ends before beginnings."""

    block_size: int = 4
    upstream_block_size: int = 8
    num_blocks: int = 40
    has_byte_hashes: bool = False
    held: list[tuple[Block, str]] = field(default_factory=list)  # copies with their media, least recently used first
    events: list[dict[str, Any]] = field(default_factory=list)

    # ---- what requests do

    def blocks_of(self, prompt: Prompt) -> list[Block]:
        size = self.upstream_block_size
        blocks: list[Block] = []
        name: Any = None
        digest = b""
        for index in range(len(prompt.token_ids) // size):
            keys = [prompt.salt if index == 0 else None, prompt.lora_name, prompt.image_at == index]
            tokens = prompt.token_ids[index * size : (index + 1) * size]
            digest = xxh3_128_digest(digest + msgspec.msgpack.encode([tokens, keys]))
            parent, name = name, digest * 2 if self.has_byte_hashes else int.from_bytes(digest[:8], "big")
            blocks.append(Block(prompt, index, name, parent))
        return blocks

    def run(self, prompt: Prompt, *, is_copied: bool = False) -> None:
        """Compute a prompt: what is not held is stored, what is held is used again, the last block copied on demand."""
        blocks = self.blocks_of(prompt)[: self.num_blocks]
        names = {block.name for block, medium in self.held if medium == "GPU"}
        num_hits = next((i for i, block in enumerate(blocks) if block.name not in names), len(blocks))
        if is_copied and num_hits == len(blocks) > 0:
            num_hits -= 1
        new = blocks[num_hits:]
        self._touch(blocks[:num_hits])
        self.evict(len(new) - (self.num_blocks - self.num_on_gpu))
        self.held += [(block, "GPU") for block in reversed(new)]
        self._touch(blocks)
        if new:
            self.events.append(self.stored(new))

    def evict(self, num_blocks: int) -> None:
        """Evict the least recently used copies, an event each."""
        for copy in [copy for copy in self.held if copy[1] == "GPU"][: max(0, num_blocks)]:
            self.drop(copy)

    def drop(self, copy: tuple[Block, str]) -> None:
        self.held.remove(copy)
        self.events.append(self.removed([copy[0]], copy[1]))

    def offload(self, block: Block, *, has_tokens: bool) -> None:
        """Copy a held block to the CPU; some connectors tell of it by name only."""
        self.held.append((block, "CPU"))
        event = self.stored([block], medium="CPU")
        if not has_tokens:
            event |= {"parent_block_hash": None, "token_ids": [], "block_size": 0, "extra_keys": None}
        self.events.append(event)

    def clear(self) -> None:
        self.held.clear()
        self.events.append({"type": "AllBlocksCleared"})

    @property
    def num_on_gpu(self) -> int:
        return sum(medium == "GPU" for _, medium in self.held)

    def _touch(self, blocks: Sequence[Block]) -> None:
        for block in reversed(blocks):
            copy = (block, "GPU")
            found = next(other for other in self.held if other[0].name == block.name and other[1] == "GPU")
            self.held.remove(found)
            self.held.append(found if found[0] != block else copy)

    # ---- what it tells

    def stored(self, run: Sequence[Block], medium: str = "GPU", group: int = 0, kind: str = "full_attention") -> Any:
        prompt, size = run[0].prompt, self.upstream_block_size
        start, end = run[0].index, run[-1].index + 1
        adapter = [prompt.lora_name] if prompt.lora_name else []
        keys = []
        for index in range(start, end):
            image = [["image", 0]] if prompt.image_at == index else []
            salt = [prompt.salt] if index == 0 and prompt.salt is not None else []
            keys.append([*adapter, *image, *salt] or None)
        return {
            "type": "BlockStored",
            "block_hashes": [block.name for block in run],
            "parent_block_hash": run[0].parent,
            "token_ids": list(prompt.token_ids[start * size : end * size]),
            "block_size": size,
            "lora_id": None,
            "medium": medium,
            "lora_name": prompt.lora_name,
            "extra_keys": keys if any(keys) else None,
            "group_idx": group,
            "kv_cache_spec_kind": kind,
        }

    def removed(self, blocks: Sequence[Block], medium: str = "GPU", group: int = 0) -> Any:
        names = [block.name for block in blocks]
        return {"type": "BlockRemoved", "block_hashes": names, "medium": medium, "group_idx": group}

    def take_payload(self, ts: float = 1.0) -> bytes:
        """Return one step's batch as it goes over the wire."""
        events, self.events = self.events, []
        return msgspec.msgpack.encode([ts, events, 0])

    def take_batch(self) -> Batch:
        return decode_batch(self.take_payload())

    # ---- the oracle

    def our_hashes(self, block: Block) -> list[bytes]:
        end = (block.index + 1) * self.upstream_block_size
        chain = extend_chain(
            ROOT, NAMESPACES[block.prompt.salt or ""], pack_tokens(block.prompt.token_ids[:end]), self.block_size
        )
        return split_hashes(chain[-HASH_BYTES * (self.upstream_block_size // self.block_size) :])

    def resident(self) -> set[bytes]:
        """Return what an exact index holds."""
        return {digest for block, _ in self.held if block.is_ours for digest in self.our_hashes(block)}


class Publisher:
    """A model cache whose batches are numbered and kept for replays, as vLLM does."""

    def __init__(self, num_kept: int = 10_000) -> None:
        self.num_kept = num_kept
        self.clear_odds = 0.0
        self.ts = 0.0
        self.restart()

    def restart(self) -> None:
        self.model = BlockCacheModel(num_blocks=24)
        self.seq = 0
        self.kept: deque[tuple[int, bytes]] = deque(maxlen=self.num_kept)

    def publish(self, rng: random.Random) -> tuple[int, bytes]:
        """Do some work and return its batch."""
        self.model.run(make_prompt(rng), is_copied=rng.random() < 0.3)
        if rng.random() < self.clear_odds:
            self.model.clear()
        self.ts += 1
        batch = self.seq, self.model.take_payload(self.ts)
        self.kept.append(batch)
        self.seq += 1
        return batch

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [batch for batch in self.kept if batch[0] >= start]


def make_prompt(rng: random.Random, max_blocks: int = 6, block_size: int = 8) -> Prompt:
    """Return a prompt that shares its beginning with many others."""
    num_tokens = rng.randrange(max_blocks * block_size + 1)
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        token_ids += [rng.choice((1, 70_000))] * block_size
    odds = rng.random()
    salt = (
        SALT_A
        if odds < 0.5
        else SALT_B
        if odds < 0.85
        else rng.choice((None, "chat", SALT_A.upper(), "0b " * 10 + "0b"))
    )
    lora_name = "other" if rng.random() < 0.1 else None
    image_at = rng.randrange(4) if rng.random() < 0.1 else None
    return Prompt(tuple(token_ids[:num_tokens]), salt, lora_name, image_at)
