"""Keys of the demonstration tenants: made once, kept beside the gateway's state, readable by this user only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kvasir.cli.admin_client import ask
from kvasir.paths import state_dir
from kvasir.protocol.admin_messages import (
    Done,
    KeyCreate,
    KeyCreated,
    TenantCreate,
    TenantDelete,
    TenantReply,
    TenantShow,
)
from kvasir.protocol.errors import AuthenticationFailed, ConfigurationError, NotFound


def key_path(tenant: str) -> Path:
    """Return where the key of a demonstration tenant is kept."""
    return state_dir() / f"{tenant}.key"


def stored_key(tenant: str = "demo") -> str | None:
    """Return the key that an earlier `kvasir up` or `kvasir demo` kept, or None."""
    try:
        return key_path(tenant).read_text().strip() or None
    except OSError:
        return None


def find_key(given: str | None) -> str:
    """Return the API key to use: the one given, else $KVASIR_API_KEY, else that of the demonstration tenant.

    Raises:
        AuthenticationFailed: there is none of them.
    """
    key = given or os.environ.get("KVASIR_API_KEY") or stored_key()
    if not key:
        raise AuthenticationFailed("no API key: give --api-key, set KVASIR_API_KEY, or start with `kvasir up`")
    return key


def obtain_key(tenant: str, socket: Path | None = None) -> str:
    """Return a working key of a demonstration tenant; the tenant and the key are made if need be.

    Raises:
        KvasirError: the gateway cannot be asked, or the key cannot be kept.
    """
    try:
        known = ask(TenantShow(name=tenant), TenantReply, path=socket)
    except NotFound:
        known = ask(TenantCreate(name=tenant), TenantReply, path=socket)
    valid = {key.id for key in known.keys if key.revoked_at is None}
    kept = stored_key(tenant)
    if kept is not None and kept.split("_")[1:2] and kept.split("_")[1] in valid:
        return kept
    key = ask(KeyCreate(tenant=tenant, label="demonstration"), KeyCreated, path=socket).key
    _keep(key_path(tenant), key)
    return key


@contextlib.contextmanager
def borrowed_key(tenant: str, socket: Path | None = None) -> Iterator[str]:
    """Give a working key of a demonstration tenant. One that was not there before goes at the end, with its key."""
    try:
        ask(TenantShow(name=tenant), TenantReply, path=socket)
        is_ours = False
    except NotFound:
        is_ours = True
    try:
        yield obtain_key(tenant, socket)
    finally:
        if is_ours:
            ask(TenantDelete(name=tenant), Done, path=socket)
            key_path(tenant).unlink(missing_ok=True)


def _keep(path: Path, key: str) -> None:
    try:
        path.unlink(missing_ok=True)  # an old file may have a mode of its own
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
            sink.write(key + "\n")
    except OSError as error:
        raise ConfigurationError(f"cannot keep the key in {path}: {error.strerror}; make the folder writable") from None
