"""How requests end, and what does not belong to them: pure decisions about outputs and lost attempts."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.gateway.core.request import Request
from kvasir.protocol.errors import DeadlineExceeded, KvasirError, RequestFailed
from kvasir.protocol.messages import Output
from kvasir.protocol.tokens import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class End:
    """Why a request is over; `error` is what its client is told if that is no success."""

    reason: str
    error: KvasirError | None = None
    is_poison: bool = False


def misfit(request: Request, output: Output) -> str | None:
    """Return what is wrong with an output of the current attempt, or None.

    Links keep the order and lose nothing while they live, so that anything but the next token (or a repetition, which
    does no harm) means that the worker is out of step and cannot be believed.
    """
    num_bytes = len(output.token_ids)
    num_delivered = len(request.delivered) // TOKEN_BYTES
    is_repetition = output.seq < num_delivered and output.finish_reason is None
    if num_bytes % TOKEN_BYTES or (output.seq != num_delivered and not is_repetition):
        return f"output of {num_bytes} bytes at {output.seq}, expected whole tokens at {num_delivered}"
    if output.seq + num_bytes // TOKEN_BYTES > request.submit.max_tokens:
        return f"more than the {request.submit.max_tokens} tokens asked for"
    return None


def last_word(request: Request, output: Output, worker_id: str) -> End:
    """Return the end that a worker's final output means."""
    reason = output.finish_reason
    assert reason is not None
    if reason == "deadline":
        return End(reason, deadline_exceeded(request, "on its worker"))
    if reason == "error":
        text = f"worker {worker_id!r} refused the request: {output.error or 'no reason given'}"
        return End(reason, RequestFailed(text))
    return End(reason)


def end_without_worker(request: Request, now: float, max_redispatches: int, max_deaths: int) -> End | None:
    """Return how a request ends whose worker is lost or handed it back, None if it goes on elsewhere."""
    reason = request.end_of_delivered()
    if reason is not None:
        return End(reason)
    deadline = request.submit.deadline
    if deadline is not None and deadline <= now:
        return End("deadline", deadline_exceeded(request, "when its worker was lost"))
    if request.num_deaths >= max_deaths:
        text = f"{request.num_deaths} workers died while they had this request; it is not tried again"
        return End("error", RequestFailed(text), is_poison=True)
    if request.attempt > max_redispatches:
        text = f"given up after {request.attempt} attempts: every worker was lost or handed the request back"
        return End("error", RequestFailed(text))
    return None


def deadline_exceeded(request: Request, where: str) -> DeadlineExceeded:
    """Return the error for a request whose deadline passed; `where` completes "the deadline passed ..."."""
    submit = request.submit
    allowed_s = (submit.deadline or submit.arrived) - submit.arrived
    return DeadlineExceeded(
        f"the deadline of {allowed_s:.1f} s passed {where}; allow more time or ask for fewer tokens"
    )
