"""Which addresses only this machine can reach."""

from __future__ import annotations


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine's own. A name may resolve to anything: only `localhost` is believed."""
    parts = host.split(".")
    is_ipv4 = len(parts) == 4 and parts[0] == "127" and all(part.isdecimal() for part in parts)
    return is_ipv4 or host.strip("[]") in ("localhost", "::1")


def is_private(endpoint: str) -> bool:
    """Return whether a ZeroMQ endpoint can be reached from this machine alone: ipc, or tcp on a loopback address."""
    kind, _, rest = endpoint.partition("://")
    return kind == "ipc" or (kind == "tcp" and is_loopback(rest.rpartition(":")[0]))
