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
    heartbeat_ms: int = 1_000
    heartbeat_timeout_ms: int = 3_000
    handshake_ms: int = 2_000
    reconnect_ms: int = 100
    reconnect_max_ms: int = 5_000
    backlog: int = 1024


def apply_profile(socket: zmq.Socket[bytes], profile: LinkProfile) -> None:
    """Set every option of `profile` on `socket`, before it is bound or connected."""
    for option, value in (
        (zmq.SNDHWM, profile.high_water),
        (zmq.RCVHWM, profile.high_water),
        (zmq.MAXMSGSIZE, profile.max_frame_bytes),
        (zmq.HEARTBEAT_IVL, profile.heartbeat_ms),
        (zmq.HEARTBEAT_TIMEOUT, profile.heartbeat_timeout_ms),
        (zmq.HEARTBEAT_TTL, profile.heartbeat_timeout_ms),
        (zmq.HANDSHAKE_IVL, profile.handshake_ms),
        (zmq.RECONNECT_IVL, profile.reconnect_ms),
        (zmq.RECONNECT_IVL_MAX, profile.reconnect_max_ms),
        (zmq.BACKLOG, profile.backlog),
        (zmq.LINGER, 0),
    ):
        socket.setsockopt(option, value)
