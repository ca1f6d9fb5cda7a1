"""The client for asyncio and Trio: the same calls, awaited."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, Unpack, overload

from kvasir._answers import Chunk, Completion
from kvasir._pump import Pump
from kvasir._requests import Messages, Options, encode_request
from kvasir._session import BaseClient, BaseStream, models_of
from kvasir.protocol.client_messages import ModelCard, ModelsRequest
from kvasir.protocol.codec import Message
from kvasir.protocol.errors import DeadlineExceeded, KvasirError


class AsyncClient(BaseClient):
    """A client of one gateway, for asyncio and Trio alike; arguments as for `Client`.

    Any number of calls may run at once on its one connection. Cancelling one of them cancels its request and nothing
    else. `async with` is optional; a client that is dropped closes itself.

    Raises:
        AuthenticationFailed: there is no API key.
        ConfigurationError: the endpoint is malformed.
    """

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion]: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncStream: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: bool, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion] | AsyncStream: ...
    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """Continue `prompt` (text or token ids); see `Options`. Await it, or with `stream` iterate over it.

        Raises:
            KvasirError: one of its leaves in `kvasir.errors`; an `AsyncStream` raises while it is read.
            TypeError: an unknown option.
        """
        return self._complete(prompt, None, options) if stream else self._collect(prompt, None, options)

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion]: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]) -> AsyncStream: ...
    @overload
    def chat(
        self, messages: Messages, *, stream: bool, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion] | AsyncStream: ...
    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """Answer `messages`, each `{"role": …, "content": …}`, with the model's chat template; else as `generate`."""
        return self._complete(None, messages, options) if stream else self._collect(None, messages, options)

    async def models(self) -> list[ModelCard]:
        """Return the models that this key may use.

        Raises:
            KvasirError: as `generate`.
        """
        call_id = self._pump.next_id()
        mailbox = _open_mailbox()
        self._pump.send(call_id, encode_request(ModelsRequest(call_id, self._api_key)), mailbox)
        try:
            return models_of(await mailbox.get(self._timeout_s))
        finally:
            self._pump.cancel(call_id)  # does nothing once it is answered

    async def aclose(self) -> None:
        """Disconnect; what is in flight is cancelled and raises `ConnectionLost`. Idempotent; takes milliseconds."""
        self._pump.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._pump.close()

    async def _collect(
        self, prompt: str | Sequence[int] | None, messages: Messages | None, options: Options
    ) -> Completion:
        async with self._complete(prompt, messages, options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def _complete(self, prompt: str | Sequence[int] | None, messages: Messages | None, options: Options) -> AsyncStream:
        return AsyncStream(*self._request(prompt, messages, options))


class AsyncStream(BaseStream):
    """An answer as it comes: `async for chunk in stream`; afterwards `result` is the whole `Completion`.

    Leaving it early, by `aclose`, the end of an `async with` block, an exception, a timeout, cancellation of the task
    or garbage collection, cancels the request. (A `break` out of a bare `async for` cancels it once the stream is
    garbage.) For one task at a time.
    """

    def __init__(self, pump: Pump, frames: Mapping[int, bytes], timeout_s: float) -> None:
        self._mailbox = _open_mailbox()
        super().__init__(pump, frames, timeout_s, self._mailbox)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        chunk = None
        try:
            while chunk is None and not self._answers.is_complete:
                chunk = self._answers.add(await self._mailbox.get(self._timeout_s))
        except BaseException:
            self._cancel()
            raise
        if chunk is None:
            self._ended = True
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Cancel the request unless it has ended. Idempotent, does not wait."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._cancel()


class _Mailbox(Protocol):
    def put(self, item: Message | KvasirError) -> None: ...

    async def get(self, timeout_s: float) -> Message | KvasirError: ...


def _open_mailbox() -> _Mailbox:
    """Return a mailbox for the library that runs this task: Trio if it is one of its tasks, else asyncio."""
    trio = sys.modules.get("trio")
    if trio is not None:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            pass
        else:
            return _TrioMailbox(trio)
    return _AsyncioMailbox()


class _AsyncioMailbox:
    def __init__(self) -> None:
        import asyncio

        self._asyncio = asyncio
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Message | KvasirError] = asyncio.Queue()

    def put(self, item: Message | KvasirError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    async def get(self, timeout_s: float) -> Message | KvasirError:
        try:
            async with self._asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            raise _silent(timeout_s) from None


class _TrioMailbox:
    def __init__(self, trio: Any) -> None:
        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()
        self._items: deque[Message | KvasirError] = deque()
        self._lot = trio.lowlevel.ParkingLot()

    def put(self, item: Message | KvasirError) -> None:
        try:
            self._token.run_sync_soon(self._deliver, item)
        except self._trio.RunFinishedError:  # nobody waits any more
            pass

    async def get(self, timeout_s: float) -> Message | KvasirError:
        await self._trio.lowlevel.checkpoint()
        with self._trio.move_on_after(timeout_s):
            while not self._items:
                await self._lot.park()
        if not self._items:
            raise _silent(timeout_s)
        return self._items.popleft()

    def _deliver(self, item: Message | KvasirError) -> None:
        self._items.append(item)
        self._lot.unpark()


def _silent(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no sign of life of the request for {timeout_s:g} s; it was cancelled")
