"""What the core is told at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvasir.gateway.core.requests import QueueConfig
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.gateway.routing.router import RouterConfig


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Times in seconds. `models` empty: whatever workers bring is served. A request is dispatched at most
    1 + `max_redispatches` times; after `max_deaths` deaths of workers it is suspected of poison, see `endings`.
    `root(fingerprint, dtype)`: of a model's chains."""

    public_namespace: bytes
    block_size: int = 16
    models: frozenset[str] = frozenset()
    queue: QueueConfig = field(default_factory=QueueConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    no_worker_timeout_s: float = 30.0
    max_redispatches: int = 3
    max_deaths: int = 2
    max_explained: int = 1_024
    root: Callable[[str, str], bytes] = lambda fingerprint, dtype: bytes(16)
