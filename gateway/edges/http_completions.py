"""Runs what one HTTP request asks for, and writes what comes back in the client's dialect, whole or as it comes.

A whole answer wakes its connection seldom: as often as there is some work, and when the last choice has ended (or at
every step if its text may end it, which must be looked for as it comes). A streamed one is woken at most once per
engine step, and writes all that came meanwhile in one go. A client that goes away cancels the task that serves it, and
with it its requests.
"""

from __future__ import annotations

from functools import partial

import msgspec
import trio

from kvasir.gateway.core.api import CoreApi, Finished, Submit
from kvasir.gateway.edges.answer import Answer, Piece, Waiter
from kvasir.gateway.edges.cache_intent import says_final, says_no_store
from kvasir.gateway.edges.http_call import HttpCall, json_response
from kvasir.gateway.edges.limit_headers import standing_headers
from kvasir.gateway.edges.openai_requests import Asked
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.writer import Writer, message_id
from kvasir.gateway.http.response import HttpResponse
from kvasir.gateway.tenants.directory import Caller
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.errors import BadRequest

WHOLE_EVENTS = 256  # of an answer that is not streamed are turned into text together
QUICK_LOGPROBS = 2048  # more are written in a thread
MAX_WHOLE_LOGPROBS = 1 << 18  # some five hundred bytes each while they are written
MAX_PREPARED = 8  # prompts of one request, before others go first


class Completions:
    """Makes requests of what was asked and answers of what comes."""

    def __init__(self, core: CoreApi, preparer: Preparer) -> None:
        self._core = core
        self._preparer = preparer
        self._threads = trio.CapacityLimiter(2)

    async def answer(
        self, asked: Asked, caller: Caller, writer_of: type[Writer], call: HttpCall
    ) -> HttpResponse | None:
        """Run `asked` for `caller`; return the answer, None if it was streamed.

        Cancelled: what runs is cancelled too, and what was sent is paid for.

        Raises:
            KvasirError: it was refused; every request of it has ended or will be cancelled.
        """
        requests = asked.requests
        if asked.may_close and says_final(call.request.headers):
            requests = [msgspec.structs.replace(request, cache_hint="closing") for request in requests]
        if says_no_store(call.request.headers):
            requests = [msgspec.structs.replace(request, no_store=True) for request in requests]
        num_events = 1 if asked.stream or _may_end_early(requests[0]) else WHOLE_EVENTS
        waiter = Waiter(len(requests), call.stream.cut, num_events=num_events)
        answers = [Answer(self._core, waiter.wake) for _ in requests]
        submits: list[Submit] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                submit = await self._preparer.prepare(request, caller, answer)
                if len(submits) % asked.num_choices:  # of a prompt with several choices, the first one counts it
                    submit = msgspec.structs.replace(submit, counts_prompt=False)
                self._preparer.begin(answer, request, submit)
                submits.append(submit)
                if len(submits) % MAX_PREPARED == 0:
                    await trio.lowlevel.checkpoint()  # many prompts let others go first
            call.facts["request"] = submits[0].req_id.hex()
            self._core.submit(*submits)
            call.headers.extend(standing_headers(self._core.standing(caller.tenant.id, caller.key_id)))
            text, block_size = self._preparer.text(submits[0].model), self._preparer.block_size
            writer = writer_of(asked, submits, text, block_size)
            if asked.previous:
                writer.change = self._core.change(submits[0], message_id(asked.previous))
            if asked.stream:
                response = await self._stream(answers, waiter, writer, call)
            else:
                response = await self._whole(answers, waiter, writer, call)
        except BadRequest as error:
            _end_all(answers)
            raise asked.renamed(error) from None
        except BaseException:
            _end_all(answers)
            raise
        finally:
            call.facts["tokens"] = sum([answer.num_tokens for answer in answers])
        if response is None:
            _end_all(answers)
        else:
            response.on_sent = partial(_end_all, answers)
        return response

    async def _whole(self, answers: list[Answer], waiter: Waiter, writer: Writer, call: HttpCall) -> HttpResponse:
        pieces = [Piece() for _ in answers]
        num_logprobs = 0
        while any(piece.finished is None for piece in pieces):
            await waiter.wait()
            for piece, answer in zip(pieces, answers, strict=True):
                more = answer.take()
                num_logprobs += sum([1 + len(entry.top) for entry in more.logprobs])
                piece.extend(more)
            if num_logprobs > MAX_WHOLE_LOGPROBS:
                raise BadRequest(
                    f"more than {MAX_WHOLE_LOGPROBS} log probabilities; stream the answer", param="logprobs"
                )
        ends = [_end(piece) for piece in pieces]
        for end in ends:
            if end.error is not None:
                return call.error(end.error)

        def write() -> HttpResponse:
            return json_response(200, writer.whole(pieces, ends), [("x-kvasir-worker", ends[0].worker_id)])

        if num_logprobs <= QUICK_LOGPROBS:
            return write()
        return await trio.to_thread.run_sync(write, limiter=self._threads)

    async def _stream(
        self, answers: list[Answer], waiter: Waiter, writer: Writer, call: HttpCall
    ) -> HttpResponse | None:
        ends: list[Finished | None] = [None] * len(answers)
        await waiter.wait()
        pieces = [answer.take() for answer in answers]
        first = next((piece.finished for piece in pieces if piece.finished and piece.finished.error), None)
        if first is not None and first.error is not None and first.num_output_tokens == 0:
            # Refused before anything was sent: a plain status says it best.
            return call.error(first.error)
        headers = [("cache-control", "no-cache"), *call.id_headers(), *call.headers]
        call.stream.begin(200, "text/event-stream; charset=utf-8", headers)
        out = writer.opening()
        while True:
            for index, piece in enumerate(pieces):
                out += writer.progress(index, piece)
                end = piece.finished
                if end is not None:
                    ends[index] = end
                    out.append(writer.ending(index, end) if end.error is None else writer.failure(end.error))
            if None not in ends:
                break
            await call.stream.write(b"".join(out))
            for answer in answers:
                answer.sent()
            out = []
            await waiter.wait()
            pieces = [answer.take() for answer in answers]
        out.append(writer.closing([end for end in ends if end is not None]))
        await call.stream.end(b"".join(out))
        return None


def _end_all(answers: list[Answer]) -> None:
    """All has been sent, or cannot be: cancel what an error has left running, and close all."""
    for answer in answers:
        answer.cancel()


def _may_end_early(request: CompletionRequest) -> bool:
    """Return whether the text of an answer can end it."""
    return bool(request.stop or request.chat.tool_name) or not request.chat.parallel_tool_calls


def _end(piece: Piece) -> Finished:
    assert piece.finished is not None
    return piece.finished
