"""The gateway's settings: one frozen value, made from the command line and handed down. Nothing here is global."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model to serve: its public name, its folder (tokenizer, template; workers of our own read the weights).

    `upstreams`: URLs of vLLM servers that compute it, a worker before each; else there are `num_workers` of our own.
    """

    name: str
    path: Path
    num_workers: int
    worker_args: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()
    tool_parser: str = "auto"  # how it writes calls of tools, see gateway/text/answer_parser.py


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything a gateway needs to know before it starts. Times in seconds."""

    state_dir: Path  # SQLite's databases, deployment secret, lock: survives
    run_dir: Path  # sockets, made anew at every start; laid out as kvasir/paths.py says
    models: tuple[ModelConfig, ...]
    database: str = ""  # PostgreSQL's URL; empty: SQLite in state_dir
    http: tuple[str, int] | None = ("127.0.0.1", 8000)
    cors_origins: tuple[str, ...] = ()  # whose pages may call the HTTP routes; "*": all
    metrics_token: str = ""  # what a scraper of /metrics sends; empty: metrics are off
    access_log: bool = True  # one line per request
    zmq_endpoints: tuple[str, ...] = ()
    block_size: int = 16
    stall_s: float = 15.0  # a worker that makes no step for so long, with work, is lost
    restart_delays_s: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)
    drain_s: float = 30.0

    @property
    def admin_endpoint(self) -> str:
        return f"ipc://{self.run_dir / 'admin' / 'admin.sock'}"

    @property
    def worker_endpoint(self) -> str:
        return f"ipc://{self.run_dir / 'workers' / 'workers.sock'}"

    @property
    def client_endpoints(self) -> tuple[str, ...]:
        return (f"ipc://{self.run_dir / 'clients' / 'client.sock'}", *self.zmq_endpoints)
