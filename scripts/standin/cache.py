"""The stand-in's block cache: what vLLM's block pool does with ids, hashes and events, without any KV bytes.

Only full blocks are cached, under a hash chained over the whole prefix; the cache salt goes into the first block and so
separates everything after it. Equal blocks are never merged: each copy is stored and removed with an event of its own.
Free blocks wait in one queue; a cached one is found there until it reaches the front and is taken for something else.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvasir.protocol.tokens import pack_tokens

HashForm = Literal["int", "bytes"]
Event = dict[str, Any]


@dataclass(slots=True)
class Block:
    block_id: int
    num_references: int = 0
    block_hash: bytes | None = None  # set while its content can be found


def hash_block(parent: bytes | None, token_ids: Sequence[int], salt: str | None) -> bytes:
    """Return 32 bytes, equal on all servers. `salt` only with a first block."""
    hasher = hashlib.blake2b(parent or b"", digest_size=32)
    hasher.update(pack_tokens(token_ids))
    if parent is None and salt is not None:
        hasher.update(b"salt" + salt.encode())
    return hasher.digest()


class BlockCache:
    """Blocks, reference counts, the queue of free ones, and the events that have not been taken yet.

    As in vLLM one block of `num_blocks` is the null block, which is never given out.
    """

    def __init__(self, num_blocks: int, block_size: int, hash_form: HashForm = "int") -> None:
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._hash_form = hash_form
        self._blocks = [Block(block_id) for block_id in range(1, num_blocks)]
        self._free: OrderedDict[int, Block] = OrderedDict((block.block_id, block) for block in self._blocks)
        self._copies: dict[bytes, dict[int, Block]] = {}  # oldest copy first
        self._events: deque[Event] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of blocks that running requests hold, as `vllm:kv_cache_usage_perc` says it."""
        return 1 - len(self._free) / self.num_usable

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> list[Block]:
        """Return the cached run a prompt of `num_tokens` may use: never its last token, which must be computed."""
        found = []
        for block_hash in hashes[: (num_tokens - 1) // self.block_size]:
            copies = self._copies.get(block_hash)
            if copies is None:
                break
            found.append(next(iter(copies.values())))
        return found

    def hold(self, blocks: Iterable[Block]) -> None:
        """Reference matched blocks, so that they are not taken."""
        for block in blocks:
            if block.num_references == 0:
                del self._free[block.block_id]
            block.num_references += 1

    def allocate(self, count: int) -> list[Block]:
        """Take `count` blocks from the front of the queue, forgetting what was cached in them. The caller has checked
        that there are as many."""
        taken = []
        for _ in range(count):
            _, block = self._free.popitem(last=False)
            self._forget(block)
            block.num_references = 1
            taken.append(block)
        return taken

    def free(self, blocks: Sequence[Block]) -> None:
        """Let go of a request's block table. Its last block is the first to be taken; blocks without content before
        all that can be found."""
        found: list[Block] = []
        empty: list[Block] = []
        for block in reversed(blocks):
            block.num_references -= 1
            if block.num_references == 0:
                (empty if block.block_hash is None else found).append(block)
        for block in reversed(empty):
            self._free[block.block_id] = block
            self._free.move_to_end(block.block_id, last=False)
        for block in found:
            self._free[block.block_id] = block

    def store(
        self, table: Sequence[Block], first: int, end: int, hashes: Sequence[bytes], tokens: Sequence[int], **told: Any
    ) -> None:
        """Make blocks `first:end` of a request's table findable, with one event. `told`: salt and session id."""
        for index in range(first, end):
            block = table[index]
            block.block_hash = hashes[index]
            self._copies.setdefault(hashes[index], {})[block.block_id] = block
        salt, session_id = told.get("salt"), told.get("session_id")
        event: Event = {
            "type": "BlockStored",
            "block_hashes": [self._outside(hashes[index]) for index in range(first, end)],
            "parent_block_hash": self._outside(hashes[first - 1]) if first else None,
            "token_ids": list(tokens[first * self.block_size : end * self.block_size]),
            "block_size": self.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [[salt] if salt is not None and index == 0 else None for index in range(first, end)],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        if session_id is not None:
            event["session_id"] = session_id
        self._events.append(event)

    def reset(self) -> bool:
        """Forget everything that is cached; refused while any block is referenced."""
        if len(self._free) < self.num_usable:
            return False
        self._copies.clear()
        for block in self._blocks:
            block.block_hash = None
        self._events.append({"type": "AllBlocksCleared"})
        return True

    def take_events(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    def check_integrity(self, tables: Iterable[Sequence[Block]]) -> None:
        """Assert that references are those of `tables`, the queue holds the rest, and hashes find their blocks."""
        counts: dict[int, int] = {}
        for table in tables:
            for block in table:
                counts[block.block_id] = counts.get(block.block_id, 0) + 1
        for block in self._blocks:
            assert block.num_references == counts.get(block.block_id, 0)
            assert (block.block_id in self._free) == (block.num_references == 0)
            if block.block_hash is not None:
                assert self._copies[block.block_hash][block.block_id] is block
        assert sum(map(len, self._copies.values())) == sum(block.block_hash is not None for block in self._blocks)

    def _forget(self, block: Block) -> None:
        if block.block_hash is None:
            return
        copies = self._copies[block.block_hash]
        del copies[block.block_id]
        if not copies:
            del self._copies[block.block_hash]
        self._events.append(
            {
                "type": "BlockRemoved",
                "block_hashes": [self._outside(block.block_hash)],
                "medium": "GPU",
                "group_idx": 0,
            }
        )
        block.block_hash = None

    def _outside(self, block_hash: bytes) -> int | bytes:
        return block_hash if self._hash_form == "bytes" else int.from_bytes(block_hash[-8:], "big")
