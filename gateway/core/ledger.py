"""What the core needs of a ledger: a row per API request, on disk before its first token, settled at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvasir.gateway.core.admission import Bill
from kvasir.protocol.errors import KvasirError


class Ledger(Protocol):
    """Synchronous and cheap; writes happen elsewhere. `Core.reserved` is to be told of the rows that are on disk, or
    cannot be written."""

    def refusal(self) -> KvasirError | None:
        """Return why nothing new may begin, None while rows can be written."""

    def reserve(self, bill: Bill) -> None:
        """Write a row for `bill` soon."""

    def save(self, bills: Sequence[Bill]) -> None:
        """Write soon what the clients of running `bills` have been sent so far."""

    def settle(self, bill: Bill) -> None:
        """Write soon what `bill` has come to; it does not change any more."""

    def refused(self, tenant_id: str, key_id: str, model: str) -> None:
        """Count an API request that was refused."""
