"""Who may serve, and who still does: pure decisions about workers. The core carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvasir.gateway.core.notices import Cause
from kvasir.gateway.core.worker import Worker
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.messages import Hello


@dataclass(frozen=True, slots=True)
class LivenessConfig:
    """When a worker counts as lost. An idle worker reports each `heartbeat_s`, a busy one with every step."""

    heartbeat_s: float = 1.0
    max_missed_heartbeats: int = 5
    stall_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Served:
    """What a model's workers must agree on; the first worker sets it, and it holds until the gateway restarts."""

    fingerprint: str
    dtype: str


def refusal(hello: Hello, block_size: int, configured: frozenset[str], served: Mapping[str, Served]) -> str | None:
    """Return why the worker may not join, or None. `configured` empty: any model may be served."""
    who = f"worker {hello.worker_id!r}"
    if hello.protocol_version != PROTOCOL_VERSION:
        return (
            f"{who} speaks protocol version {hello.protocol_version}, this gateway {PROTOCOL_VERSION}; "
            "install the same Kvasir release on both"
        )
    if configured and hello.model not in configured:
        return (
            f"{who} serves model {hello.model!r}, this gateway is configured for {', '.join(sorted(configured))}; "
            "give the worker one of these names (--name) or add the model to the gateway"
        )
    if hello.block_size != block_size:
        return (
            f"{who} has blocks of {hello.block_size} tokens, this gateway of {block_size}; "
            f"start the worker with --block-size {block_size}"
        )
    expected = served.get(hello.model)
    if expected is not None and hello.fingerprint != expected.fingerprint:
        return (
            f"{who} has other weights for model {hello.model!r} than the workers before it; point it "
            "at the same folder, or restart the gateway to serve the new weights"
        )
    if expected is not None and hello.dtype != expected.dtype:
        return (
            f"{who} computes model {hello.model!r} in {hello.dtype}, the others in {expected.dtype}; "
            f"start the worker with --dtype {expected.dtype}"
        )
    return None


def failure(worker: Worker, now: float, config: LivenessConfig) -> tuple[Cause, str] | None:
    """Return why `worker` counts as lost, or None while it is alive.

    The link may answer heartbeats while the engine hangs, so the step counter decides. A worker that says it has
    nothing to do while requests were sent to it long ago has lost them.
    """
    if worker.in_flight:
        quiet_s = now - worker.last_step_at
        if quiet_s > config.stall_s:
            return "stalled", f"made no step for {quiet_s:.1f} s with {len(worker.in_flight)} requests to work on"
        oldest = next(iter(worker.in_flight.values()))
        is_idle = not (worker.load.num_running or worker.load.num_waiting)
        if is_idle and worker.loaded_at - oldest.dispatched_at > config.stall_s:
            return "forgot", f"reports no work although {len(worker.in_flight)} requests were sent to it"
        return None
    quiet_s = now - worker.last_report_at
    if quiet_s > config.heartbeat_s * config.max_missed_heartbeats:
        return "silent", f"sent no report for {quiet_s:.1f} s"
    return None
