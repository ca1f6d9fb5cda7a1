"""The deployment's secret: random bytes in a file that only the gateway's user may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from kvasir.protocol.errors import StoreError

DEPLOYMENT_SECRET_BYTES = 32


def load_secret(path: Path, *, is_new: bool) -> bytes:
    """Return the secret in the file at `path`, made if the database that goes with it `is_new`.

    Raises:
        StoreError: it is missing, cannot be read or written, or is no secret.
    """
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        if not is_new:
            raise StoreError(
                f"{path} is missing, and the database was made with it; restore it from a backup"
            ) from None
        secret = secrets.token_bytes(DEPLOYMENT_SECRET_BYTES)
        _write_durably(path, secret)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; it must be readable by the gateway's user") from None
    if len(secret) != DEPLOYMENT_SECRET_BYTES:
        raise StoreError(f"{path} holds {len(secret)} bytes instead of {DEPLOYMENT_SECRET_BYTES}; restore a backup")
    return secret


def _write_durably(path: Path, content: bytes) -> None:
    """Make the file whole or not at all, readable by its owner only."""
    temporary = path.with_suffix(".new")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the directory writable") from None
