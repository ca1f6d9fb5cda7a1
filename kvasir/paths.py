"""Where a Kvasir of this user lives: the one place that the SDK and the command line ask.

Each socket has a folder of its own, whose mode and group say who may dial it (docs/systemd.md).
"""

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


def admin_socket() -> Path:
    """Return the socket of operators: $KVASIR_ADMIN_SOCKET, else that of this user's `kvasir up`."""
    configured = os.environ.get("KVASIR_ADMIN_SOCKET")
    return Path(configured) if configured else local_admin_socket()


def local_admin_socket() -> Path:
    """Return the admin socket of this user's `kvasir up`, whatever the environment says."""
    return run_dir() / "admin" / "admin.sock"


def worker_endpoint() -> str:
    """Return where workers find the gateway of this user's `kvasir up`."""
    return f"ipc://{run_dir() / 'workers' / 'workers.sock'}"


def client_endpoint() -> str:
    """Return where clients find the gateway: $KVASIR_ENDPOINT, else the socket of this user's `kvasir up`."""
    return os.environ.get("KVASIR_ENDPOINT") or local_client_endpoint()


def local_client_endpoint() -> str:
    """Return where clients find the gateway of this user's `kvasir up`, whatever the environment says."""
    return f"ipc://{run_dir() / 'clients' / 'client.sock'}"
