"""What one sequence holds and what it is: its block table, and the chain that identifies its full blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from cache.block_pool import PUBLIC, Block
from cache.policy import Use
from protocol.prefix import extend_chain, split_hashes
from protocol.tokens import TOKEN_BYTES, pack_tokens


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order; every one of them is referenced by this table.

    `block_ids` is what the model reads and only ever grows, until `free` empties it. The first `num_published` blocks
    are resident under this sequence's hashes. Where another sequence had published the same block first, ours stays
    private and `twins[index]` is the published one, referenced too, so that the chain below it has a parent.
    `use` is what is known about the request, `visit` the eviction policy's own note.
    """

    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    twins: dict[int, Block] = field(default_factory=dict)
    use: Use | None = None
    visit: object | None = None
    publishable: bool = True  # False after a hash collision: nothing further can be published under this chain

    def references(self) -> list[int]:
        """Return the block id of every reference that this table holds."""
        return self.block_ids + [twin.block_id for twin in self.twins.values()]


class Chain:
    """Who the full blocks of a sequence are: per block its hash and its packed tokens, and the two zones' namespaces.

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
        self.tokens = [packed_tokens[i : i + size] for i in range(0, len(packed_tokens) - size + 1, size)]
        if len(self.hashes) != len(self.tokens):
            raise ValueError(f"{len(self.hashes)} prefix hashes for {len(self.tokens)} full blocks")

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
            self.tokens.append(tokens)

    def namespace_of(self, index: int) -> bytes:
        return self.public_namespace if index < self.num_public_blocks else self.namespace

    def owner_of(self, index: int) -> str:
        return PUBLIC if index < self.num_public_blocks else self.owner
