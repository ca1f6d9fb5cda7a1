"""The command line's end of the admin socket: one command, one reply, a deadline."""

from __future__ import annotations

import getpass
import os
import re
import socket
import struct
from pathlib import Path
from typing import TypeVar

import zmq
from msgspec import structs

from kvasir.paths import admin_socket
from kvasir.protocol.admin_messages import ADMIN_REPLIES, MAX_ADMIN_FRAME_BYTES, AdminCommand, AdminFailed, AdminReply
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import (
    BadRequest,
    ConnectionLost,
    InvalidMessage,
    PermissionDenied,
    TooLarge,
    Unavailable,
    from_info,
)
from kvasir.protocol.profile import LinkProfile, apply_profile

R = TypeVar("R", bound=AdminReply)
TIMEOUT_S = 20.0


def ask(command: AdminCommand, reply: type[R], *, path: Path | None = None, timeout_s: float = TIMEOUT_S) -> R:
    """Send `command` to the gateway and return its reply, which is a `reply`. Blocking.

    Raises:
        BadRequest: a text is not UTF-8, or empty or too long where it must not be.
        ConnectionLost: no gateway is running there.
        PermissionDenied: the socket belongs to another user.
        TooLarge: the command does not fit a frame.
        Unavailable: the gateway does not answer within `timeout_s`.
        KvasirError: what the gateway refused it with.
    """
    path = path or admin_socket()
    try:
        frame = encode(structs.replace(command, actor=_actor()))
    except UnicodeEncodeError:
        raise BadRequest("what was given is not UTF-8") from None
    if len(frame) > MAX_ADMIN_FRAME_BYTES:
        raise TooLarge(f"this is {len(frame)} bytes, at most {MAX_ADMIN_FRAME_BYTES} bytes fit; send a shorter text")
    pid = listener(path)
    # Not the shared context: a process that forks or threads must not inherit an admin socket.
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        apply_profile(dealer, LinkProfile())
        dealer.connect(f"ipc://{path}")
        dealer.send(frame)
        if not dealer.poll(int(timeout_s * 1000)):
            raise Unavailable(
                f"the gateway at {path} does not answer for {timeout_s:g} s; look at its log, then restart it"
            )
        try:
            answer = ADMIN_REPLIES.decode(dealer.recv())
        except InvalidMessage as unread:
            raise _other_version(path, pid, f"its answer is {unread.message}") from None
    finally:
        context.destroy(linger=0)
    if isinstance(answer, AdminFailed):
        error = from_info(answer.error)
        misfit = re.search(r"Expected (.*) - at ", error.message) if isinstance(error, InvalidMessage) else None
        if misfit and error.param:  # the operator's own words
            raise BadRequest(f"{error.param}: expected {misfit[1].replace('`str`', 'a text')}")
        if isinstance(error, InvalidMessage):
            raise _other_version(path, pid, f"it finds the command {error.message}")
        raise error
    if not isinstance(answer, reply):
        raise _other_version(path, pid, f"it answered {type(answer).__name__}")
    return answer


def is_listening(path: Path) -> bool:
    """Return whether somebody listens on the socket: a file left by a dead gateway does not count."""
    try:
        listener(path)
    except (ConnectionLost, PermissionDenied):
        return False
    return True


def listener(path: Path) -> int | None:
    """Return the id of the process that listens on the socket; None if the system does not say.

    Raises:
        ConnectionLost: no gateway is running there.
        PermissionDenied: the socket belongs to another user.
    """
    # ZeroMQ would keep trying to connect for as long as we wait; a plain socket knows at once.
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2.0)
            probe.connect(str(path))
            if not hasattr(socket, "SO_PEERCRED"):
                return None
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return pid or None  # 0: in another container
    except PermissionError:
        raise PermissionDenied(f"{path} belongs to another user; run this as the gateway's user") from None
    except OSError:  # missing, refused, too long, not a socket
        raise ConnectionLost(f"no gateway is running at {path}; start one with `kvasir up`") from None


def _other_version(path: Path, pid: int | None, reason: str) -> InvalidMessage:
    stop = f"stop process {pid} (`kvasir down`, or `kill {pid}`)" if pid else "stop it (`kvasir down`)"
    return InvalidMessage(f"the gateway at {path} is of another version: {stop} and start it again; {reason}")


def _actor() -> str:
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry
        name = "?"
    return f"{name[:100]} (uid {os.getuid()}, pid {os.getpid()})"
