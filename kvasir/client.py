"""The blocking client."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self, Unpack, overload

from kvasir._answers import Chunk, Completion
from kvasir._pump import Pump
from kvasir._requests import Messages, Options, encode_request
from kvasir._session import BaseClient, BaseStream, models_of
from kvasir.protocol.client_messages import ModelCard, ModelsRequest
from kvasir.protocol.codec import Message
from kvasir.protocol.errors import DeadlineExceeded, KvasirError


class Client(BaseClient):
    """A client of one gateway: `with Client() as client: print(client.generate("import").text)`.

    `endpoint`: default $KVASIR_ENDPOINT, else the socket of this user's `kvasir up`. `api_key`: default
    $KVASIR_API_KEY. `timeout_s`: how long each wait for a request's next sign of life may take; bound a whole request
    with the option `deadline_s`. May be used by several threads at once, with any number of streams open. It reconnects
    by itself: a request that the lost gateway had raises `ConnectionLost`, the next one goes to the new gateway.

    Raises:
        AuthenticationFailed: there is no API key.
        ConfigurationError: the endpoint is malformed.
    """

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]) -> Stream: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: bool, **options: Unpack[Options]
    ) -> Completion | Stream: ...
    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | Stream:
        """Continue `prompt` (text or token ids); see `Options`. With `stream` return a `Stream` at once.

        Raises:
            KvasirError: one of its leaves in `kvasir.errors`; a `Stream` raises while it is read.
            TypeError: an unknown option.
        """
        return self._complete(prompt, None, stream, options)

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Completion: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]) -> Stream: ...
    @overload
    def chat(self, messages: Messages, *, stream: bool, **options: Unpack[Options]) -> Completion | Stream: ...
    def chat(self, messages: Messages, *, stream: bool = False, **options: Unpack[Options]) -> Completion | Stream:
        """Answer `messages`, each `{"role": …, "content": …}`, with the model's chat template; else as `generate`."""
        return self._complete(None, messages, stream, options)

    def models(self) -> list[ModelCard]:
        """Return the models that this key may use.

        Raises:
            KvasirError: as `generate`.
        """
        call_id = self._pump.next_id()
        mailbox: queue.SimpleQueue[Message | KvasirError] = queue.SimpleQueue()
        self._pump.send(call_id, encode_request(ModelsRequest(call_id, self._api_key)), mailbox)
        try:
            return models_of(_get(mailbox, self._timeout_s))
        finally:
            self._pump.cancel(call_id)  # does nothing once it is answered

    def close(self) -> None:
        """Disconnect; what is in flight is cancelled and raises `ConnectionLost`. Idempotent."""
        self._pump.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _complete(
        self, prompt: str | Sequence[int] | None, messages: Messages | None, stream: bool, options: Options
    ) -> Completion | Stream:
        answer = Stream(*self._request(prompt, messages, options))
        if stream:
            return answer
        with answer:
            for _ in answer:
                pass
        return answer.result


class Stream(BaseStream):
    """An answer as it comes: iterate over its `Chunk`s; afterwards `result` is the whole `Completion`.

    Leaving it early, by `close`, the end of a `with` block, an exception, a timeout or garbage collection, cancels the
    request. For one thread at a time.
    """

    def __init__(self, pump: Pump, frames: Mapping[int, bytes], timeout_s: float) -> None:
        self._mailbox: queue.SimpleQueue[Message | KvasirError] = queue.SimpleQueue()
        super().__init__(pump, frames, timeout_s, self._mailbox)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        chunk = None
        try:
            while chunk is None and not self._answers.is_complete:
                chunk = self._answers.add(_get(self._mailbox, self._timeout_s))
        except BaseException:
            self._cancel()
            raise
        if chunk is None:
            self._ended = True
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Cancel the request unless it has ended. Idempotent, does not wait."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cancel()


def _get(mailbox: queue.SimpleQueue[Message | KvasirError], timeout_s: float) -> Message | KvasirError:
    try:
        return mailbox.get(timeout=timeout_s)
    except queue.Empty:
        raise DeadlineExceeded(f"no sign of life of the request for {timeout_s:g} s; it was cancelled") from None
