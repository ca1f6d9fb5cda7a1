"""One gateway per directory: an advisory lock that the kernel drops when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvasir.protocol.errors import ConfigurationError

LOCK_NAME = "gateway.lock"


@contextlib.contextmanager
def hold_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` (made with mode 0750 if missing) for this process: its sockets and database are ours alone.

    Not reentrant: a directory that serves for state and sockets alike is locked once by the caller. The file stays
    behind, empty of meaning: removing it would let a third process lock another file of the same name.

    Raises:
        ConfigurationError: a live gateway holds it (names the process), or the directory cannot be used.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"cannot use the directory {directory}: {error.strerror}; make it writable or choose another"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigurationError(
                f"another gateway (process {holder}) is running on {directory}; stop it or choose other directories"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
