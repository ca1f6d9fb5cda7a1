"""What `kvasir up` is to start: models and their folders, workers, and the gateway's command line."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import kvasir
from kvasir.paths import run_dir, state_dir
from kvasir.protocol.errors import BadRequest, ConfigurationError

DEMO_MODEL = Path(kvasir.__path__[0]).resolve() / "demo_model"
ASK_TIMEOUT_S = 5.0  # of an upstream
MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class UpPlan:
    """What to start: the options of `up`. `models`: NAME=PATH; `num_workers` per model, but for those of `upstreams`
    (NAME=URL), which have one for each of them; `wait_s`: until all of them must be ready."""

    models: tuple[str, ...]
    num_workers: int
    upstreams: tuple[str, ...] = ()
    http: str = "127.0.0.1:8000"
    zmq: tuple[str, ...] = ()
    insecure: bool = False
    worker_args: str = ""
    cors_origins: tuple[str, ...] = ()
    tool_parsers: tuple[str, ...] = ()
    block_size: int = 16
    drain_s: float = 30.0
    wait_s: float = 600.0

    def workers_of(self) -> dict[str, int]:
        """Return how many workers each model is to have."""
        fronted = [text.partition("=")[0] for text in self.upstreams]
        names = [text.partition("=")[0] for text in self.models]
        return {name: fronted.count(name) or self.num_workers for name in names}

    def gateway_args(self) -> list[str]:
        """Return the gateway's command line."""
        args = ["--state-dir", str(state_dir()), "--run-dir", str(run_dir()), "--http", self.http]
        args += [*_repeated("--model", self.models), *_repeated("--upstream", self.upstreams)]
        args += [*_repeated("--zmq", self.zmq), *["--insecure"][: self.insecure]]
        args += ["--workers", str(self.num_workers), f"--worker-args={self.worker_args}"]
        args += [*_repeated("--tool-parser", self.tool_parsers), *_repeated("--cors-origin", self.cors_origins)]
        return [*args, "--block-size", str(self.block_size), "--drain-s", str(self.drain_s)]


def plan_models(given: Sequence[str], upstreams: Sequence[str] = ()) -> tuple[str, ...]:
    """Return NAME=PATH for each of `given`, which may be a bare path (the folder's name is taken), and for those of
    `upstreams` (NAME=URL), whose servers are asked where it is; default: ours.

    Raises:
        ConfigurationError: a path is no folder.
    """
    if not given and not upstreams:
        return (f"demo={DEMO_MODEL}",)
    models = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).resolve().name, text
        folder = Path(path).expanduser().resolve()
        if not name or not folder.is_dir():
            raise ConfigurationError(f"--model {text!r}: {folder} is no folder; give NAME=PATH of a model folder")
        models.append(f"{name}={folder}")
    for text in upstreams:
        name, equals, url = text.partition("=")
        if not equals or not name or not url.startswith(("http://", "https://")):
            raise BadRequest(f"--upstream {text!r} is no NAME=URL; try {name or 'qwen'}=http://127.0.0.1:8300")
        if not any(model.startswith(f"{name}=") for model in models):
            models.append(f"{name}={_ask_for_folder(name, url)}")
    return tuple(models)


def _ask_for_folder(name: str, url: str) -> Path:
    """Return the folder that a vLLM server has its model from, if it is on this machine: we need its tokenizer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=ASK_TIMEOUT_S) as answer:
            cards = json.loads(answer.read(MAX_ANSWER_BYTES))["data"]
        root = Path(str(cards[0]["root"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigurationError(f"--upstream {name}: {url} does not answer as a vLLM server does: {error}") from None
    if not (root / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"--upstream {name}: its model is {root}, which is no folder with a tokenizer.json on this machine; "
            f"give --model {name}=FOLDER too, with the model's config.json and tokenizer files (no weights are needed)"
        )
    return root


def count_gpus() -> int:
    """Return how many CUDA devices this process may use, without loading torch: those that the driver shows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    if visible is None or not present:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def _repeated(option: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (option, value)]
