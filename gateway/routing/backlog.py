"""What one worker still has to compute of its requests' prompts, in the order in which it will."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from kvasir.protocol.prefix import HASH_BYTES


class Pending(msgspec.Struct, eq=False):
    """Uncached prompt tokens of one request on their way to a worker, or waiting there.

    `key` orders a backlog: m - a * waited compares like m + a * dispatched, which does not change with time. Of it
    `lead_s` is because its tenant is ahead of the others.
    """

    key: float
    serial: int
    num_tokens: int
    prefix_hashes: bytes
    tenant_id: str = ""
    lead_s: float = 0.0
    is_begun: bool = False  # some of them are computed


class Backlog:
    """The pending prefills of one worker, in the order in which it will compute them."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []  # (key, serial), ascending
        self._pending: list[Pending] = []  # parallel to _order
        self._serial = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    def add(
        self, key: float, num_tokens: int, prefix_hashes: bytes, tenant_id: str = "", lead_s: float = 0.0
    ) -> Pending:
        """Insert a prefill of `num_tokens` and return its entry, which `remove` takes."""
        self._serial += 1
        pending = Pending(key, self._serial, num_tokens, prefix_hashes, tenant_id, lead_s)
        index = bisect_left(self._order, (key, self._serial))
        self._order.insert(index, (key, self._serial))
        self._pending.insert(index, pending)
        self.num_tokens += num_tokens
        return pending

    def remove(self, pending: Pending) -> None:
        """Take out an entry: its prompt is computed, or nobody wants it any more."""
        index = bisect_left(self._order, (pending.key, pending.serial))
        del self._order[index], self._pending[index]
        self.num_tokens -= pending.num_tokens

    def advance(self, num_tokens: int) -> None:
        """Note that the worker has computed `num_tokens`: they are taken from the front, one token stays of each."""
        for pending in self._pending:
            if num_tokens <= 0:
                return
            pending.is_begun = True
            done = min(num_tokens, pending.num_tokens - 1)
            pending.num_tokens -= done
            self.num_tokens -= done
            num_tokens -= done

    def ahead(self, key: float, lead_s: float = 0.0) -> tuple[int, int]:
        """Return (tokens, overtaken): what is computed before a request of `key`, and how many requests it overtakes
        because they are larger. Not counted are those that only wait longer because of their tenants' leads."""
        if not self._order:
            return 0, 0
        index = bisect_left(self._order, (key, self._serial + 1))
        if index == len(self._order):
            return self.num_tokens, 0
        size = key - lead_s
        num_overtaken = sum([pending.key - pending.lead_s > size for pending in self._pending[index:]])
        return sum([pending.num_tokens for pending in self._pending[:index]]), num_overtaken

    def ahead_of_own(self, key: float, tenant_id: str) -> int:
        """Return how many tokens of the same tenant are computed before a request of `key`."""
        index = bisect_left(self._order, (key, self._serial + 1))
        return sum([pending.num_tokens for pending in self._pending[:index] if pending.tenant_id == tenant_id])

    def next_step(self, step_tokens: int) -> list[Pending]:
        """Return the entries that a step with room for `step_tokens` prompt tokens works on: the front ones."""
        found: list[Pending] = []
        for pending in self._pending:
            if step_tokens <= 0:
                break
            found.append(pending)
            step_tokens -= pending.num_tokens
        return found

    @property
    def front_tokens(self) -> int:
        """Tokens of the entry that is computed first; the backlog must not be empty."""
        return self._pending[0].num_tokens

    def leader(self, prefix_hashes: bytes, num_blocks: int) -> Pending | None:
        """Return the first entry that computes the first `num_blocks` of `prefix_hashes`, None if there is none.

        A chained hash stands for the whole prefix, so comparing the last one is enough.
        """
        start, end = (num_blocks - 1) * HASH_BYTES, num_blocks * HASH_BYTES
        wanted = prefix_hashes[start:end]
        return next((pending for pending in self._pending if pending.prefix_hashes[start:end] == wanted), None)
