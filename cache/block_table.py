"""The block table of a sequence, and the chain of hashes that identifies its full blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from kvasir.cache.block_pool import PUBLIC
from kvasir.cache.run import Run
from kvasir.protocol.prefix import extend_chain, split_hashes
from kvasir.protocol.sampling import CacheHint, RetentionHint
from kvasir.protocol.tokens import TOKEN_BYTES, pack_tokens


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order.

    `block_ids` is what the model reads and only ever grows, until `free` empties it. The first `num_published` blocks
    are resident under this sequence's hashes: `last` is the run that ends with them, and this table references it and
    all before it. The blocks after them are this table's alone. So are those at the indices in `duplicates`:
    another sequence had published the same blocks first, and what is below them builds on those.
    `hint` and `retention` are what the request says about its future use, `visit` is the eviction policy's own note.
    """

    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    last: Run | None = None
    duplicates: list[int] = field(default_factory=list)
    hint: CacheHint | None = None
    retention: tuple[RetentionHint, ...] = ()
    visit: object | None = None
    leaves_nothing: bool = False  # by its request's wish, no block of its is ever published
    has_collided: bool = False  # nothing further can be published under this chain

    @property
    def publishable(self) -> bool:
        return not (self.leaves_nothing or self.has_collided)

    def runs(self) -> Iterator[Run]:
        """Yield every run that this table references, the deepest first."""
        run = self.last
        while run is not None:
            yield run
            run = run.parent

    def private_ids(self) -> list[int]:
        """Return the ids of the blocks that are this table's alone."""
        return [*self.block_ids[self.num_published :], *(self.block_ids[i] for i in self.duplicates)]

    def renewed(self) -> BlockTable:
        """Return an empty table for the same request."""
        return replace(self, block_ids=[], num_published=0, last=None, duplicates=[], has_collided=False)


class Chain:
    """The identity of a sequence's full blocks: their hashes, their packed tokens, and the namespaces of its zones.

    The first `num_public_blocks` blocks are in `public_namespace` and owned by the operator, the rest in `namespace`
    and owned by `owner`.
    """

    __slots__ = (
        "block_size",
        "hashes",
        "namespace",
        "num_public_blocks",
        "owner",
        "public_namespace",
        "root",
        "tokens",
    )

    def __init__(
        self,
        *,
        owner: str,
        root: bytes,
        public_namespace: bytes,
        namespace: bytes,
        num_public_blocks: int,
        block_size: int,
        packed_tokens: bytes = b"",
        packed_hashes: bytes = b"",
    ) -> None:
        """Take the hashes of the full blocks of `packed_tokens` as given; `extend` computes more."""
        self.owner = owner
        self.root = root
        self.public_namespace = public_namespace
        self.namespace = namespace
        self.num_public_blocks = num_public_blocks
        self.block_size = block_size
        size = block_size * TOKEN_BYTES
        self.hashes = split_hashes(packed_hashes)
        num_blocks = len(packed_tokens) // size
        self.tokens = packed_tokens[: num_blocks * size]
        if len(self.hashes) != num_blocks:
            raise ValueError(f"{len(self.hashes)} prefix hashes for {num_blocks} full blocks")

    def __len__(self) -> int:
        return len(self.hashes)

    def extend(self, token_ids: list[int]) -> None:
        """Chain on the full blocks of `token_ids`, which follow the last block so far."""
        packed = pack_tokens(token_ids)
        size = self.block_size * TOKEN_BYTES
        for start in range(0, len(packed) - size + 1, size):
            index = len(self.hashes)
            parent = self.hashes[-1] if index else self.root
            tokens = packed[start : start + size]
            self.hashes.append(extend_chain(parent, self.namespace_of(index), tokens, self.block_size))
            self.tokens += tokens

    def tokens_of(self, start: int, end: int) -> bytes:
        """Return the packed tokens of the blocks start..end-1."""
        size = self.block_size * TOKEN_BYTES
        return self.tokens[start * size : end * size]

    def namespace_of(self, index: int) -> bytes:
        return self.public_namespace if index < self.num_public_blocks else self.namespace

    def owner_of(self, index: int) -> str:
        return PUBLIC if index < self.num_public_blocks else self.owner

    def zone_end(self, index: int, end: int) -> int:
        """Return where the zone of block `index` ends, `end` at most."""
        return min(end, self.num_public_blocks) if index < self.num_public_blocks else end

    def num_shared(self, run: Run, end: int) -> int:
        """Return how many blocks of `run`, whose parent is this chain's, are this chain's as well, before `end`."""
        start = run.start
        if run.namespace != self.namespace_of(start):
            return 0
        num_blocks = min(len(run), self.zone_end(start, end) - start)
        tokens = self.tokens_of(start, start + num_blocks)
        if run.tokens.startswith(tokens):
            return num_blocks
        size = self.block_size * TOKEN_BYTES
        return _num_leading(num_blocks, lambda i: run.tokens.startswith(tokens[: (i + 1) * size]))

    def num_alike(self, run: Run, end: int) -> int:
        """Return how many blocks of `run`, whose parent is this chain's, have this chain's hashes, before `end`: what
        `num_shared` will say unless hashes collide, in O(log n)."""
        start, ours = run.start, self.hashes
        num_blocks = min(len(run), end - start)
        if ours[start + num_blocks - 1] == run.hash_of(num_blocks - 1):
            return num_blocks
        return _num_leading(num_blocks, lambda i: ours[start + i] == run.hash_of(i))


def _num_leading(count: int, holds: Callable[[int], bool]) -> int:
    """Return how many of 0..count-1 hold, given that all that hold come first."""
    return bisect_left(range(count), True, key=lambda i: not holds(i))
