"""How requests end, and what does not belong to them: pure decisions about outputs and lost attempts.

Poison is a request that kills its workers. A worker's death counts against every request that it may have been
computing: those with tokens in this attempt, and the prompts of its next step. Requests that only waited there are not
blamed. Who has seen `max_deaths` such deaths is a suspect: it runs once more, alone on a worker. If that one dies
too, the request is poison; else it was in bad company, or had bad luck.
"""

from __future__ import annotations

import msgspec

from kvasir.gateway.core.request import Request
from kvasir.protocol.errors import DeadlineExceeded, KvasirError, RequestFailed
from kvasir.protocol.messages import Hello, Output
from kvasir.protocol.tokens import TOKEN_BYTES, num_tokens, view_tokens


class End(msgspec.Struct, frozen=True):
    """Why a request is over; `error` is what its client is told if that is no success."""

    reason: str
    error: KvasirError | None = None
    is_poison: bool = False


def misfit(request: Request, output: Output) -> str | None:
    """Return what is wrong with an output of the current attempt, or None.

    Links keep the order and lose nothing while they live, so that anything but the next token (or a repetition, which
    does no harm) means that the worker is out of step and cannot be believed.
    """
    packed = output.token_ids
    num_delivered = request.num_delivered
    is_repetition = output.seq < num_delivered and output.finish_reason is None
    if len(packed) % TOKEN_BYTES or (output.seq != num_delivered and not is_repetition):
        return f"output of {len(packed)} bytes at {output.seq}, expected whole tokens at {num_delivered}"
    if output.seq + num_tokens(packed) > request.submit.max_tokens:
        return f"more than the {request.submit.max_tokens} tokens asked for"
    num_cached = max(output.num_cached_tokens or 0, output.guessed_cached_tokens or 0)
    if num_cached > request.num_tokens:
        return f"{num_cached} tokens cached of a prompt of {request.num_tokens}"
    if packed and (largest := max(view_tokens(packed))) >= request.submit.vocab_size:
        return f"token id {largest} of a vocabulary of {request.submit.vocab_size}"
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


def end_without_worker(
    request: Request, now: float, max_redispatches: int, max_deaths: int, *, is_death: bool
) -> End | None:
    """Return how a request ends whose worker is lost or handed it back, None if it goes on elsewhere.

    `is_death`: the worker died while it may have been computing this request. Marks it as a suspect if due.
    """
    reason = request.end_of_delivered()
    if reason is not None:
        return End(reason)
    deadline = request.submit.deadline
    if deadline is not None and deadline <= now:
        return End("deadline", deadline_exceeded(request, "when its worker was lost"))
    request.num_deaths += is_death
    if is_death and request.is_suspect:
        text = f"{request.num_deaths} workers died while they had this request, the last with no other; not tried again"
        return End("error", RequestFailed(text), is_poison=True)
    request.is_suspect = request.num_deaths >= max_deaths
    if request.attempt > max_redispatches:
        text = f"given up after {request.attempt} attempts: every worker was lost or handed the request back"
        return End("error", RequestFailed(text))
    return None


def end_of_answer(request: Request, hello: Hello) -> End | None:
    """Return the end of a request that a worker like that of `hello` cannot go on with from prompt + delivered tokens;
    None if it can.

    To an engine that lacks something delivered tokens are a part of the prompt, at which neither presence and frequency
    penalties nor grammars look.
    """
    sampling, lacks = request.submit.sampling, hello.lacks
    if not request.delivered:
        return None
    if (sampling.presence_penalty or sampling.frequency_penalty) and "resumed_penalties" in lacks:
        what = "presence or frequency penalties"
    elif sampling.constraint is not None and sampling.constraint.grammar and "resumed_grammars" in lacks:
        what = "a grammar"
    else:
        return None
    text = (
        f"its worker was lost after {request.num_delivered} tokens, and {hello.engine} cannot go on with {what} as if "
        "nothing had happened; send the request again"
    )
    return End("error", RequestFailed(text))


def deadline_exceeded(request: Request, where: str) -> DeadlineExceeded:
    """Return the error for a request whose deadline passed; `where` completes "the deadline passed ..."."""
    submit = request.submit
    allowed_s = (submit.deadline or submit.arrived) - submit.arrived
    return DeadlineExceeded(
        f"the deadline of {allowed_s:.1f} s passed {where}; allow more time or ask for fewer tokens"
    )
