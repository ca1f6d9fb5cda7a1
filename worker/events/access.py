"""Who may read block events: which endpoints are safe, the keys, and the ZAP handler that asks for them.

CURVE without a ZAP handler lets every key in. Ours knows the allowed keys; any doubt is a refusal.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import zmq
from zmq.utils import z85

from kvasir.protocol.address import is_private
from kvasir.protocol.errors import ConfigurationError

ZAP_DOMAIN = b"kv-events"


def check_endpoint(option: str, endpoint: str, *, has_key: bool, insecure: bool) -> None:
    """Refuse what others could read: tcp beyond this machine without CURVE, unless that is asked for by name.

    Raises:
        ConfigurationError: that, or no endpoint at all.
    """
    address = endpoint.removeprefix("connect:")
    kind, _, rest = address.partition("://")
    if kind not in ("tcp", "ipc") or not rest:
        raise ConfigurationError(
            f"{option} {endpoint!r} is no endpoint; give ipc://PATH, tcp://HOST:PORT, or connect:tcp://HOST:PORT."
        )
    if address != endpoint and has_key:
        raise ConfigurationError(
            f"{option} {endpoint!r}: a key protects a bound socket; leave out connect: or the key."
        )
    if not (is_private(address) or has_key or insecure):
        raise ConfigurationError(
            f"{option} {endpoint!r} can be read by whoever reaches it, and block events tell what tenants ask. Give "
            "--kv-events-key and --kv-events-clients, an address on 127.0.0.1, or --insecure-events if the network is."
        )


def read_secret_key(path: Path) -> bytes:
    """Return the Z85 secret key in `path`: 40 characters and nothing else, or a file that `zmq.auth` wrote.

    Raises:
        ConfigurationError: unreadable, or no such key.
    """
    text = _read("--kv-events-key", path).strip()
    match = re.search(r'secret-key\s*=\s*"([^"]{40})"', text)
    key = (match[1] if match else text).encode()
    try:
        zmq.curve_public(key)
    except (zmq.ZMQError, ValueError, TypeError):
        raise ConfigurationError(f"--kv-events-key {path}: no CURVE secret key of 40 Z85 characters in it.") from None
    return key


def read_client_keys(path: Path) -> frozenset[bytes]:
    """Return the Z85 public keys in `path`, one at the start of each line; lines that begin with "# " are remarks.

    Raises:
        ConfigurationError: unreadable, a line that is no key, or none at all.
    """
    keys = set()
    for number, line in enumerate(_read("--kv-events-clients", path).splitlines(), 1):
        if not line.strip() or line.startswith("# "):
            continue
        key, *_ = line.split()
        try:
            is_key = len(z85.decode(key)) == 32
        except (ValueError, KeyError, IndexError):
            is_key = False
        if not is_key:
            raise ConfigurationError(
                f"--kv-events-clients {path}: line {number} begins with no public key (40 characters)."
            )
        keys.add(key.encode())
    if not keys:
        raise ConfigurationError(f"--kv-events-clients {path} names no key: nobody could connect.")
    return frozenset(keys)


class Gatekeeper:
    """The ZAP handler of one context (rfc.zeromq.org/spec/27). Make it before any server socket is bound."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], client_keys: Iterable[bytes]) -> None:
        self._client_keys = {z85.decode(key) for key in client_keys}
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self, frames: list[bytes]) -> None:
        """Answer one request: 200 for an allowed key, 400 for everything else that has a number."""
        if len(frames) < 4:
            return
        peer, _, _, request_id = frames[:4]
        is_allowed = (
            len(frames) == 9
            and frames[2] == b"1.0"
            and frames[4] == ZAP_DOMAIN
            and frames[7] == b"CURVE"
            and frames[8] in self._client_keys
        )
        status = [b"200", b"OK", b"follower"] if is_allowed else [b"400", b"this key is not known here", b""]
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([peer, b"", b"1.0", request_id, *status, b""], zmq.NOBLOCK)


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{option} {path}: {error}; give a text file that this user can read.") from None
