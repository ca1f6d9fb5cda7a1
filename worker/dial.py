"""The worker's end of its link to the gateway."""

from __future__ import annotations

import secrets

import zmq

from kvasir.protocol.errors import ConfigurationError
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
