"""Where a Kvasir of this user lives: the one place that the SDK and the command line ask."""

from __future__ import annotations

import os
from pathlib import Path


def home_dir() -> Path:
    """Return the folder of everything that `kvasir up` keeps: $KVASIR_HOME, else ~/.local/state/kvasir."""
    configured = os.environ.get("KVASIR_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".local" / "state" / "kvasir"


def state_dir() -> Path:
    """Return the folder of what survives: database, deployment secret, demonstration keys."""
    return home_dir() / "state"


def run_dir() -> Path:
    """Return the folder of the sockets."""
    return home_dir() / "run"


def client_endpoint() -> str:
    """Return where clients find the gateway: $KVASIR_ENDPOINT, else the socket of this user's `kvasir up`."""
    return os.environ.get("KVASIR_ENDPOINT") or f"ipc://{run_dir() / 'client.sock'}"
