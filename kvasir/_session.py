"""What both clients share: a connection, whose requests go over it, and what is under way.

The blocking and the async client differ only in how they wait (`_pump.Mailbox`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from kvasir._answers import Answers, Completion
from kvasir._pump import CONNECT_TIMEOUT_S, Mailbox, Pump
from kvasir._requests import Messages, Options, encode_request, make_request
from kvasir.paths import client_endpoint
from kvasir.protocol.client_messages import ModelCard, ModelList
from kvasir.protocol.codec import Message
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, from_info

DEFAULT_TIMEOUT_S = 60.0
MAX_CHOICES = 64


class BaseClient:
    """A connection, and whose requests go over it."""

    def __init__(
        self,
        endpoint: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._api_key = choose_api_key(api_key)
        self._timeout_s = timeout_s
        self._pump = Pump(endpoint or client_endpoint(), connect_timeout_s=connect_timeout_s)

    def _request(
        self, prompt: str | Sequence[int] | None, messages: Messages | None, options: Options
    ) -> tuple[Pump, dict[int, bytes], float]:
        """Return what a stream is made of: connection, frames by call id, and timeout."""
        num_choices = options.get("n", 1)
        if not 1 <= num_choices <= MAX_CHOICES:
            raise BadRequest(f"n must be between 1 and {MAX_CHOICES}, not {num_choices}", param="n")
        first = make_request(self._pump.next_id(), self._api_key, prompt, messages, options)
        requests = [first]
        for number in range(1, num_choices):
            sampling = msgspec.structs.replace(first.sampling, seed=_mix(first.sampling.seed, number))
            requests.append(msgspec.structs.replace(first, id=self._pump.next_id(), sampling=sampling))
        frames = {request.id: encode_request(request) for request in requests}
        return self._pump, frames, options.get("timeout_s", self._timeout_s)


class BaseStream:
    """One prompt under way: sent when it is made, cancelled when it is garbage before its end."""

    def __init__(self, pump: Pump, frames: Mapping[int, bytes], timeout_s: float, mailbox: Mailbox) -> None:
        self._pump = pump
        self._call_ids = list(frames)
        self._timeout_s = timeout_s
        self._answers = Answers(self._call_ids)
        self._ended = False
        for call_id, frame in frames.items():
            pump.send(call_id, frame, mailbox)

    @property
    def result(self) -> Completion:
        """The whole answer.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if self._answers.completion is None:
            raise RuntimeError("the stream has no result: it has not been read to its end")
        return self._answers.completion

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._cancel()

    def _cancel(self) -> None:
        if not self._ended:
            self._ended = True
            for call_id in self._call_ids:
                self._pump.cancel(call_id)


def models_of(message: Message | Exception) -> list[ModelCard]:
    """Return the models in the answer to a `ModelsRequest`.

    Raises:
        KvasirError: the request failed, or the connection did.
    """
    if isinstance(message, Exception):
        raise message
    error = getattr(message, "error", None)
    if error is not None:
        raise from_info(error)
    assert isinstance(message, ModelList)
    return message.models


def choose_api_key(given: str | None) -> str:
    """Return the API key to use.

    Raises:
        AuthenticationFailed: there is none.
    """
    key = given or os.environ.get("KVASIR_API_KEY")
    if not key:
        raise AuthenticationFailed("no API key: pass api_key=… or set KVASIR_API_KEY (kvasir key create TENANT)")
    return key


def _mix(seed: int, choice: int) -> int:
    """Return the seed of another answer to the same prompt."""
    return (seed + choice * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
