"""The worker's end of its link to the gateway."""

from __future__ import annotations

import secrets

import zmq

from kvasir.protocol.codec import encode
from kvasir.protocol.errors import ConfigurationError, InvalidMessage
from kvasir.protocol.messages import REPORTS, Hello
from kvasir.protocol.profile import LinkProfile, apply_profile


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
