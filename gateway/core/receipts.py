"""Why recent requests went where they went, and what was not cached there: one receipt per attempt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from kvasir.gateway.core.api import Change, Submit
from kvasir.gateway.core.misses import Miss, Prompts, change, explain, is_worth_a_reason
from kvasir.gateway.core.request import Request
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.gateway.routing.router import Decision


class Receipt(msgspec.Struct, eq=False):
    """One attempt: the router's decision, with the terms of every candidate, and what came of it.

    `waited_s` in the queue, `held_s` of that for the worker that it wanted to have room. `lead`: tokens that its tenant
    had been charged more than fair. `num_cached_tokens`: what the worker found, once it has said so; `miss`: why no
    more, if there should be more.
    """

    decision: Decision
    waited_s: float
    held_s: float
    lead: float
    num_cached_tokens: int | None = None
    miss: Miss | None = None


class Receipts:
    """Keeps those of the last `max_requests` requests, and what it takes to say why a prompt was not cached."""

    def __init__(self, max_requests: int, block_size: int) -> None:
        self._max_requests = max_requests
        self._block_size = block_size
        self._prompts = Prompts()
        self._receipts: OrderedDict[bytes, list[Receipt]] = OrderedDict()  # by request, the oldest first

    def add(self, req_id: bytes, receipt: Receipt) -> None:
        """Keep the receipt of an attempt that was sent just now."""
        receipts = self._receipts.get(req_id)
        if receipts is not None:
            receipts.append(receipt)
            return
        self._receipts[req_id] = [receipt]
        if len(self._receipts) > self._max_requests:
            self._receipts.popitem(last=False)

    def matched(
        self,
        request: Request,
        worker_id: str,
        num_cached_tokens: int,
        index_of: Callable[[str], PrefixIndex | None],
        now: float,
    ) -> None:
        """Write down what a worker has found cached for the current attempt, and why no more. `index_of`: see
        `misses.explain`."""
        submit = request.submit
        is_worth = is_worth_a_reason(submit)
        receipts = self._receipts.get(submit.req_id)
        if receipts is not None:
            receipt = receipts[-1]
            receipt.num_cached_tokens = num_cached_tokens
            if request.attempt == 1 and is_worth:
                size, decision = self._block_size, receipt.decision
                receipt.miss = explain(submit, self._prompts, num_cached_tokens, size, decision, index_of, now)
        if is_worth and not submit.no_store:
            self._prompts.add(submit, worker_id)

    def change(self, submit: Submit, previous_id: bytes) -> tuple[Change, int] | None:
        """As `CoreApi.change`."""
        return change(submit, self._prompts.of(submit.tenant_id, previous_id), self._block_size)

    def of(self, req_id: bytes) -> list[Receipt] | None:
        """Return the receipts of a recent request, one per attempt; None if it is not known any more."""
        return self._receipts.get(req_id)

    def find(self, request: str) -> list[Receipt] | None:
        """Return the same for the newest request whose id, in hexadecimal, begins like `request` (what clients see
        before a dash is no part of it)."""
        start = request.rpartition("-")[2].lower()
        newest_first = reversed(self._receipts)
        return next((self._receipts[req_id] for req_id in newest_first if _begins(req_id, start)), None)


def _begins(req_id: bytes, start: str) -> bool:
    return bool(start) and req_id.hex().startswith(start)
