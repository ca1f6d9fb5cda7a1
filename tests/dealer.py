"""A client's or worker's side of a ZeroMQ link, on Trio: the gateway itself only binds."""

from __future__ import annotations

from typing import Any

import zmq

from kvasir.protocol.link import Link
from kvasir.protocol.profile import LinkProfile, apply_profile


def open_dealer(context: zmq.Context[Any], endpoint: str, profile: LinkProfile | None = None) -> Link:
    """Return a link over a DEALER connected to `endpoint` (it keeps trying; nothing is queued before it is up)."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    apply_profile(socket, profile or LinkProfile())
    socket.connect(endpoint)
    return Link(socket)
