"""Traces of requests, replayed through the product's cache code: the inside of `replay_trace.py cache`.

One block of a trace is one block of the cache, of one synthetic token each: the block's id. Time is the trace's, equal
stamps spread over the time to the next one. A request's blocks are free again as soon as they are computed (time in
use is not modelled, for no policy). The first `num_blocks` blocks of a request that is larger than the cache take part.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from kvasir.cache.block_table import BlockTable, Chain
from kvasir.cache.policies import POLICIES
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.prefix import derive_namespace, derive_root, extend_chain
from kvasir.protocol.sampling import CacheHint
from kvasir.protocol.tokens import TOKEN_BYTES, pack_tokens

ROOT = derive_root(b"replay", "trace", "float32")
PUBLIC = derive_namespace(b"replay", "public")
SPACE = derive_namespace(b"replay", "tenant", "replay")


@dataclass(frozen=True, slots=True)
class Request:
    """`time_s` from the start; `block_ids` of the prompt, of which each stands for all before it too. `session`: which
    conversation it belongs to, None if the trace does not say; `is_sub`: to a sub-agent of it."""

    time_s: float
    num_tokens: int
    block_ids: list[int]
    num_output_tokens: int = 1
    session: int | None = None
    is_sub: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """`block_tokens`: how many tokens a block of the trace has, found from the lengths. Of its distinct blocks
    `num_whole` are full of them."""

    name: str
    requests: list[Request]
    block_tokens: int
    num_distinct: int
    num_whole: int
    hashes: dict[int, bytes] = field(default_factory=dict)
    tokens: dict[int, bytes] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return sum(len(request.block_ids) for request in self.requests)

    def chain(self, request: Request) -> Chain:
        """Return the product's identity of the blocks of `request`. What is the same is computed once per trace."""
        chain = Chain(
            owner="replay", root=ROOT, public_namespace=PUBLIC, namespace=SPACE, num_public_blocks=0, block_size=1
        )
        parent = ROOT
        hashes, tokens = self.hashes, self.tokens
        for block_id in request.block_ids:
            digest = hashes.get(block_id)
            if digest is None:
                tokens[block_id] = pack_tokens((block_id,))
                digest = hashes[block_id] = extend_chain(parent, SPACE, tokens[block_id], 1)
            parent = digest
        chain.hashes = [hashes[block_id] for block_id in request.block_ids]
        chain.tokens = b"".join(tokens[block_id] for block_id in request.block_ids)
        return chain


@dataclass(frozen=True, slots=True)
class Result:
    """Hits over all requests, in blocks and in tokens, and the CPU time of the replay."""

    num_hits: int
    num_hit_tokens: int
    cpu_s: float


def load_trace(path: Path, limit: int | None = None) -> Trace:
    """Read a trace (one JSON object per line: t_ms, in_len, out_len, hash_ids; gzipped if the name ends in .gz).

    Raises:
        ValueError: a line is not of that form, or an id has two parents.
    """
    requests: list[Request] = []
    parents: dict[int, int] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(requests) == limit:
                break
            try:
                row = json.loads(line)
                block_ids = [int(block_id) for block_id in row["hash_ids"]]
                session = row.get("session")
                request = Request(
                    float(row["t_ms"]) / 1000,
                    int(row["in_len"]),
                    block_ids,
                    int(row["out_len"]),
                    None if session is None else int(session),
                    row.get("type") == "sub",
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; expected an object with t_ms, in_len, out_len and hash_ids"
                ) from None
            for parent, block_id in zip([-1, *block_ids], block_ids, strict=False):
                if parents.setdefault(block_id, parent) != parent:
                    raise ValueError(f"{path}, line {number}: block {block_id} has two parents; ids must be chained")
            requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no request")
    requests = list(_spread(requests))
    size = _block_tokens(requests)
    num_whole = len({block_id for r in requests for block_id in r.block_ids[: r.num_tokens // size]})
    return Trace(path.name.split(".")[0], requests, size, len(parents), num_whole)


def replay(
    trace: Trace,
    policy: str | Callable[[int], Any],
    num_blocks: int,
    *,
    hints: Sequence[CacheHint | None] | None = None,
    sessions: Sequence[int] | None = None,
) -> Result:
    """Replay `trace` through a `PrefixCache` of `num_blocks` blocks under `policy`, one of the product's by its name.

    `hints`: one per request. `sessions`: one per request, for a policy that has an attribute `session`. Where it can
    `close` one, it does so after a request that says that nothing follows.
    """
    made = (POLICIES[policy] if isinstance(policy, str) else policy)(num_blocks)
    cache = PrefixCache(num_blocks, 1, made)
    num_hits = num_hit_tokens = 0
    cpu_s = 0.0
    for i, request in enumerate(trace.requests):
        chain = trace.chain(request)
        length = min(len(chain), num_blocks)
        if length < len(chain):
            del chain.hashes[length:]
            chain.tokens = chain.tokens[: length * TOKEN_BYTES]
        start = time.process_time()
        table = BlockTable(hint=hints[i] if hints is not None else None)
        cache.advance(request.time_s)
        if sessions is not None:
            made.session = sessions[i]
        num_found = cache.match(chain, table, length)
        allocated = cache.allocate(chain, table, length - num_found)
        assert allocated is not None
        cache.insert(chain, table, length)
        cache.free(table)
        if sessions is not None and table.hint in ("one_shot", "closing") and hasattr(made, "close"):
            made.close(sessions[i])
        cpu_s += time.process_time() - start
        num_hits += num_found
        num_hit_tokens += min(num_found * trace.block_tokens, request.num_tokens)
    cache.check_integrity([])
    return Result(num_hits, num_hit_tokens, cpu_s)


def replay_optimum(trace: Trace, num_blocks: int) -> Result:
    """Replay `trace` as `optimum_hits` says."""
    start = time.process_time()
    hits = optimum_hits(trace.requests, num_blocks)
    num_hit_tokens = sum(
        min(found * trace.block_tokens, request.num_tokens) for found, request in zip(hits, trace.requests, strict=True)
    )
    return Result(sum(hits), num_hit_tokens, time.process_time() - start)


def optimum_hits(requests: Sequence[Request], num_blocks: int) -> list[int]:
    """The most hits that any policy can have, per request, leaf first or not: the block whose next use is farthest
    goes, the deeper one on a tie. It may decline to keep a block of the request that it has just served.

    A block's next use is never later than its child's, so what is kept is closed under parents: the rule costs the
    optimum nothing, and Belady's argument holds. A lazy heap over blocks by next use.
    """
    next_use = _next_uses(requests)
    key_of: dict[int, int] = {}  # resident blocks -> what they are ordered by: next use, then depth
    heap: list[tuple[int, int]] = []
    hits = []
    for request, nexts in zip(requests, next_use, strict=True):
        block_ids = request.block_ids
        hits.append(next((i for i, block_id in enumerate(block_ids) if block_id not in key_of), len(block_ids)))
        for depth, (block_id, use) in enumerate(zip(block_ids, nexts, strict=True)):
            key = -(use << 24 | depth)
            key_of[block_id] = key
            heappush(heap, (key, block_id))
        while len(key_of) > num_blocks:
            key, block_id = heappop(heap)
            if key_of.get(block_id) == key:
                del key_of[block_id]
        if len(heap) > 4 * num_blocks + 100_000:
            heap = sorted((key, block_id) for block_id, key in key_of.items())
    return hits


def honest_hints(trace: Trace) -> list[CacheHint]:
    """What a client that knows its own plans would say of every request: does the conversation go on after it?

    Taken from the trace's future, for a report of what such a hint is worth.
    """
    goes_on, is_first = _links(trace.requests)[:2]
    return ["open" if on else "one_shot" if first else "closing" for on, first in zip(goes_on, is_first, strict=True)]


def chains(trace: Trace) -> list[int]:
    """Return the number of the chain that every request belongs to: each goes on with the one before."""
    found: list[int] = []
    for i, before in enumerate(_links(trace.requests)[2]):
        found.append(i if before is None else found[before])
    return found


def _links(requests: Sequence[Request]) -> tuple[list[bool], list[bool], list[int | None]]:
    """Return of every request whether another goes on with it, whether it goes on with none, and with which it does."""
    owner: dict[int, int] = {}  # block -> the last request that used it
    trunk = [0] * len(requests)
    is_first = [True] * len(requests)
    goes_on = [False] * len(requests)
    before: list[int | None] = [None] * len(requests)
    for i, request in enumerate(requests):
        block_ids = request.block_ids
        known = next((n for n, block_id in enumerate(block_ids) if block_id not in owner), len(block_ids))
        trunk[i] = known
        if known:
            last = owner[block_ids[known - 1]]
            if known > trunk[last] and 2 * (known - trunk[last]) >= len(requests[last].block_ids) - trunk[last]:
                goes_on[last], is_first[i], trunk[i], before[i] = True, False, trunk[last], last
        for block_id in block_ids:
            owner[block_id] = i
    return goes_on, is_first, before


def _spread(requests: list[Request]) -> Iterator[Request]:
    """Spread requests with equal stamps evenly over the time to the next stamp."""
    first, step = 0, 1.0
    while first < len(requests):
        stamp = requests[first].time_s
        last = first
        while last < len(requests) and requests[last].time_s == stamp:
            last += 1
        if last < len(requests):
            step = requests[last].time_s - stamp
        for i in range(first, last):
            request = requests[i]
            yield replace(request, time_s=stamp + step * (i - first) / (last - first))
        first = last


def _block_tokens(requests: list[Request]) -> int:
    """The power of two that explains all lengths, with or without a partial last block; else what fits on average."""
    for size in (1 << i for i in range(16)):
        if all(len(r.block_ids) in (r.num_tokens // size, -(-r.num_tokens // size)) for r in requests):
            return size
    return max(1, round(sum(r.num_tokens for r in requests) / max(1, sum(len(r.block_ids) for r in requests))))


def _next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """Per request and block the number of the next request that uses the block; past the end if none does."""
    seen: dict[int, int] = {}
    never = len(requests)
    uses: list[list[int]] = []
    for i in range(len(requests) - 1, -1, -1):
        block_ids = requests[i].block_ids
        uses.append([seen.get(block_id, never) for block_id in block_ids])
        for block_id in block_ids:
            seen[block_id] = i
    uses.reverse()
    return uses
