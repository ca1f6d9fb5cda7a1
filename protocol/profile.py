"""The socket options that every ZeroMQ socket of ours sets, on Trio or not."""

from __future__ import annotations

from dataclasses import dataclass

import zmq


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Socket options that matter. libzmq's defaults (no bounds, no heartbeats, endless linger) are all overridden.

    `high_water` bounds whole messages per peer and direction; it is a last resort, not flow control.
    """

    high_water: int = 10_000
    max_frame_bytes: int = 64 << 20
    reconnect_ms: int = 100
    reconnect_max_ms: int = 5_000


def apply_profile(socket: zmq.Socket[bytes], profile: LinkProfile) -> None:
    """Set every option of `profile` on `socket`, before it is bound or connected. Times in ms."""
    for option, value in (
        (zmq.SNDHWM, profile.high_water),
        (zmq.RCVHWM, profile.high_water),
        (zmq.MAXMSGSIZE, profile.max_frame_bytes),
        (zmq.HEARTBEAT_IVL, 1_000),
        (zmq.HEARTBEAT_TIMEOUT, 3_000),
        (zmq.HEARTBEAT_TTL, 3_000),
        (zmq.HANDSHAKE_IVL, 2_000),
        (zmq.RECONNECT_IVL, profile.reconnect_ms),
        (zmq.RECONNECT_IVL_MAX, profile.reconnect_max_ms),
        (zmq.BACKLOG, 1_024),
        (zmq.LINGER, 0),
    ):
        socket.setsockopt(option, value)
