"""The worker's end of its link to the gateway."""

from __future__ import annotations

import secrets

import msgspec
import zmq

from kvasir.protocol.codec import Count, Id, encode
from kvasir.protocol.errors import ConfigurationError, InvalidMessage
from kvasir.protocol.messages import REPORTS, Hello
from kvasir.protocol.profile import LinkProfile, apply_profile
from kvasir.protocol.tokens import num_tokens


def open_socket(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """Return a DEALER that dials `endpoint` for as long as it takes.

    Raises:
        ConfigurationError: no such kind of endpoint, or a path that is too long.
    """
    socket = context.socket(zmq.DEALER)
    apply_profile(socket, LinkProfile())
    socket.setsockopt(zmq.IMMEDIATE, 1)  # without a connection a send says so at once
    socket.setsockopt(zmq.ROUTING_ID, b"w" + secrets.token_bytes(15))  # a fixed one could be taken by somebody else
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigurationError(f"--gateway {endpoint}: {error}; give ipc://PATH.") from None
    return socket


def check_hello(hello: Hello) -> None:
    """Refuse to say what no gateway could read: it would pass over it, and the worker say it for ever.

    Raises:
        ConfigurationError: a name that is too long, a number beyond the protocol's bounds.
    """
    try:
        REPORTS.decode(encode(hello))
    except (InvalidMessage, ValueError, OverflowError) as error:  # also text that is none, numbers beyond 64 bits
        raise ConfigurationError(
            f"a gateway could not read what worker {hello.worker_id[:64]!r} would say of itself: {error}"
        ) from None


def request_of(frame: bytes) -> tuple[bytes, int, int] | None:
    """Return (req_id, attempt, seq) of a `Generate` that is invalid otherwise, None if even those cannot be read.

    Every `Generate` is answered, also one that another version of the gateway has sent.
    """
    try:
        raw = msgspec.msgpack.decode(frame)
        if raw["type"] != "generate":
            return None
        fields = msgspec.convert(raw, _RequestFields)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return fields.req_id, fields.attempt, max(0, num_tokens(fields.token_ids) - fields.num_prompt_tokens)


class _RequestFields(msgspec.Struct):
    req_id: Id
    attempt: Count
    token_ids: bytes = b""
    num_prompt_tokens: int = 0
