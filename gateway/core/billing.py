"""Whether a request may begin and go on, what it has come to, and when that is known for good: the core's side of
limits, budgets and the ledger.

    admit -> enter (a row is written) -> cover, sent ... -> finished, closed -> the row is settled

Ties `Admission` to the clocks and to the ledger. A bill is settled when all its requests have finished and their ends
have been sent, so that a gateway which is killed in between bills nobody for what never arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvasir.gateway.core.admission import GRANT_TOKENS, Admission, Bill, Share
from kvasir.gateway.core.api import Finished, Standing, Submit
from kvasir.gateway.core.ledger import Ledger
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.terms import NO_TERMS, Price, Terms

_FREE = Price()


class Billing:
    """See the module. `terms` and `price` return what is in force now for a payer (a tenant's or key's id) and a model.

    `wall_clock` returns seconds since the epoch: budgets have calendars. Limits go by the core's monotonic clock.
    `ledger` None: nothing is written down, and nothing waits for it.
    """

    def __init__(
        self,
        terms: Callable[[str], Terms] = lambda payer_id: NO_TERMS,
        price: Callable[[str], Price] = lambda model: _FREE,
        ledger: Ledger | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.admission = Admission(terms, price)
        self._terms = terms
        self._ledger = ledger
        self._wall_clock = wall_clock
        self._open: dict[bytes, Share] = {}  # by request, until it is finished and closed
        self._unsaved: dict[bytes, Bill] = {}

    def admit(self, submits: Sequence[Submit], now: float) -> list[Share] | KvasirError:
        """Return a share per request of one API request, or why it may not begin."""
        ledger = self._ledger
        refusal = None if ledger is None else ledger.refusal()
        admitted = refusal or self.admission.admit(submits, now, self._wall_clock())
        if ledger is not None and isinstance(admitted, KvasirError):
            ledger.refused(submits[0].tenant_id, submits[0].key_id, submits[0].model)
        return admitted

    def enter(self, shares: Sequence[Share]) -> None:
        """Have a row written for an API request, unless the queue has refused all that it asks for."""
        bill, ledger = shares[0].bill, self._ledger
        if ledger is None:
            bill.is_written = True
        elif not bill.num_unfinished:
            ledger.refused(bill.tenant_id, bill.key_id, bill.model)
        else:
            for req_id, share in zip(bill.req_ids, shares, strict=True):
                if not share.is_finished:
                    self._open[req_id] = share
            ledger.reserve(bill)

    def cover(self, share: Share, num_tokens: int, now: float) -> bool:
        """Ask for more output tokens, so that a request may deliver `num_tokens` in all; return whether it may."""
        wanted = min(max(GRANT_TOKENS, num_tokens - share.num_granted), share.max_tokens - share.num_granted)
        self.admission.grow(share, wanted, now)
        return num_tokens <= share.num_granted

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        """Note how many tokens of an answer its client has been sent. Unknown requests are ignored."""
        share = self._open.get(req_id)
        if share is None or num_output_tokens <= share.num_sent:
            return
        bill = share.bill
        if not share.num_sent:
            bill.sent_prompt += share.num_prompt
            bill.sent_cached += min(share.num_cached, share.num_prompt)
        bill.sent_output += num_output_tokens - share.num_sent
        share.num_sent = num_output_tokens
        self._unsaved[bill.bill_id] = bill

    def finished(self, share: Share, end: Finished) -> None:
        """Book the end of a request."""
        self.admission.settle(share, end, self._wall_clock())
        share.is_finished = True
        if share.is_closed or end.req_id not in self._open:
            self._close(end.req_id, share)

    def closed(self, req_id: bytes) -> None:
        """Note that the client of a request has been sent its end, or wants none. Unknown requests are ignored."""
        share = self._open.get(req_id)
        if share is not None and not share.is_closed:
            share.is_closed = True
            if share.is_finished:
                self._close(req_id, share)

    def tick(self) -> None:
        """Have written what running requests' clients have been sent since the last call. Call it some ten times/s."""
        if self._unsaved and self._ledger is not None:
            unsaved, self._unsaved = self._unsaved, {}
            self._ledger.save(list(unsaved.values()))

    def weight(self, tenant_id: str) -> int:
        """Return a tenant's weight in the queue."""
        return self._terms(tenant_id).weight

    def standing(self, tenant_id: str, key_id: str, now: float) -> Standing | None:
        """Return what is left of a caller's limits."""
        return self.admission.standing(tenant_id, key_id, now)

    @property
    def ledger_error(self) -> str:
        """Why nothing new is admitted, empty while the ledger can be written."""
        refusal = None if self._ledger is None else self._ledger.refusal()
        return "" if refusal is None else refusal.message

    @property
    def num_open(self) -> int:
        """Requests whose rows are not settled yet."""
        return len(self._open)

    def _close(self, req_id: bytes, share: Share) -> None:
        """Settle the row if this was the last request of its bill."""
        is_entered = self._open.pop(req_id, None) is not None
        bill = share.bill
        bill.num_open -= 1
        if not bill.num_open and is_entered and self._ledger is not None:
            self._unsaved.pop(bill.bill_id, None)
            self._ledger.settle(bill)
