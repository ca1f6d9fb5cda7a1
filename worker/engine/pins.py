"""Published prefixes whose blocks a worker keeps in its cache."""

from __future__ import annotations

from kvasir.cache.block_pool import PUBLIC
from kvasir.cache.block_table import Chain
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import Generate, Pin
from kvasir.protocol.prefix import HASH_BYTES
from kvasir.protocol.sampling import Sampling

_OWN_ID = b"\0prewarm\0"  # begins the ids of our own requests; the gateway's are 16 random bytes


class Pins:
    """The prefixes to be pinned, by name; some of their blocks may not be resident yet."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._chains: dict[str, Chain] = {}

    def pin(self, command: Pin, namespace: bytes) -> tuple[int, Generate | None]:
        """Pin a prefix of the public `namespace`.

        Return how many of its blocks are resident now, and a request that computes the others if that is asked for.

        Raises:
            BadRequest: the command contradicts itself.
        """
        try:
            chain = Chain(
                owner=PUBLIC,
                root=command.root,
                public_namespace=namespace,
                namespace=namespace,
                num_public_blocks=len(command.prefix_hashes) // HASH_BYTES,
                block_size=self._cache.block_size,
                packed_tokens=command.token_ids,
                packed_hashes=command.prefix_hashes,
            )
        except ValueError as error:
            raise BadRequest(f"prefix {command.name!r} cannot be pinned: {error}") from None
        self._chains[command.name] = chain
        num_pinned = self._cache.pin(command.name, chain)
        is_complete = num_pinned == len(chain)
        return num_pinned, _prewarming(command, chain) if command.prewarm and not is_complete else None

    def unpin(self, name: str) -> None:
        self._chains.pop(name, None)
        self._cache.unpin(name)

    def clear(self) -> None:
        for name in list(self._chains):
            self.unpin(name)

    def renew(self) -> None:
        """Pin the blocks of all prefixes that have become resident."""
        for name, chain in self._chains.items():
            if self._cache.num_pinned(name) < len(chain):
                self._cache.pin(name, chain)


def is_prewarming(req_id: bytes) -> bool:
    """Return whether a request is a `Pins`' own: nobody waits for its outputs."""
    return req_id.startswith(_OWN_ID)


def _prewarming(command: Pin, chain: Chain) -> Generate:
    """Return a request of the owner `PUBLIC` that computes the prefix."""
    num_tokens = len(chain) * chain.block_size
    return Generate(
        req_id=_OWN_ID + command.prefix_hashes[-HASH_BYTES:],
        attempt=0,
        tenant=PUBLIC,
        token_ids=command.token_ids,
        num_prompt_tokens=num_tokens,
        root=command.root,
        prefix_hashes=command.prefix_hashes,
        num_public_tokens=num_tokens,
        namespace=chain.namespace,
        max_tokens=1,
        sampling=Sampling(temperature=0.0),
    )
