"""News from the core: values that it tells whoever was named as `notify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvasir.protocol.messages import Hello

Cause = Literal["link", "silent", "stalled", "forgot", "protocol", "exited", "replaced", "bye"]
"""Why a worker is gone. All but "bye" are deaths."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker was welcomed."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Rejected:
    """A worker was refused; it was told `reason`."""

    hello: Hello
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone; its `num_requests` unfinished requests go on elsewhere."""

    worker_id: str
    pid: int
    cause: Cause
    reason: str
    num_requests: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A bug: handling one request raised. That request has failed, the others go on."""

    req_id: bytes
    trace: str


Notice = Joined | Rejected | Lost | Broken
