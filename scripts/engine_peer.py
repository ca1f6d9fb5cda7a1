"""Kvasir beside another server, each as it is served: the same model folder, client and requests, a thread each.

    python scripts/bench_engine.py --peer vllm --env DIR [--model FOLDER] [--peer-cells 8x128,8x2048:1920]

Without --model the model is Llama-shaped with random weights (139 M parameters, fp32). A cell is connections x prompt
tokens, and how many of these all prompts begin with. Every connection sends the next request when it has its answer.
The two take turns in every cell and round; CPU is that of all processes of a server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scripts.fleet.environment import MODEL, MODEL_NAME, ServerSettings, make_vllm, running, vllm_server
from scripts.fleet.gateway import running_gateway

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 12, 1024, 2816, 16, 4, 64


@dataclass(frozen=True)
class Cell:
    num_connections: int
    num_prompt: int
    num_shared: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        count, _, prompt = text.partition("x")
        length, _, shared = prompt.partition(":")
        return cls(int(count), int(length), int(shared or 0))

    def __str__(self) -> str:
        return f"{self.num_connections} x {self.num_prompt}" + (
            f" ({self.num_shared} shared)" if self.num_shared else ""
        )


@dataclass(frozen=True)
class Contender:
    name: str
    port: int
    key: str
    pid: int  # of the process whose descendants are all that it needs


@dataclass(frozen=True)
class Figures:
    tokens_per_s: float
    cpu_s: float  # per request
    first_s: float  # median time to the first token


def compare(
    model: Path | None,
    folder: Path,
    cells: list[Cell],
    num_tokens: int,
    rounds: int,
    per_connection: int,
    port: int,
    worker_args: str,
) -> list[dict[str, Any]]:
    """Measure every cell `rounds` times with both servers and print the medians."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="peer") as scratch:
        home = Path(scratch)
        weights = model or write_random_model(home / "model")
        vocab_size = json.loads((weights / "config.json").read_text())["vocab_size"]
        with contenders(weights, folder, home, port, worker_args) as both:
            print(f"{num_tokens} generated tokens, fp32, one thread each; medians of {rounds} rounds, Kvasir over it")
            print(f"{'cell':>24} {'':8} {'tokens/s':>9} {'CPU s/request':>14} {'first token s':>14}")
            for cell in cells:
                found: dict[str, list[Figures]] = {one.name: [] for one in both}
                for number in range(rounds):
                    for one in both if number % 2 == 0 else reversed(both):
                        found[one.name].append(measure(one, cell, num_tokens, number, vocab_size, per_connection))
                medians = {name: _median(figures) for name, figures in found.items()}
                for name, figures in medians.items():
                    numbers = f"{figures.tokens_per_s:9.1f} {figures.cpu_s:14.3f} {figures.first_s:14.3f}"
                    print(f"{cell!s:>24} {name:8} {numbers}")
                ours, its = medians["kvasir"], medians["vllm"]
                ratios = [getattr(ours, name) / getattr(its, name) for name in ("tokens_per_s", "cpu_s", "first_s")]
                print(f"{'':24} {'ratio':8} {ratios[0]:8.2f}x {ratios[1]:13.2f}x {ratios[2]:13.2f}x", flush=True)
                rows.append({"cell": str(cell), **{name: vars(figures) for name, figures in medians.items()}})
    return rows


@contextlib.contextmanager
def contenders(model: Path, folder: Path, home: Path, port: int, worker_args: str) -> Iterator[list[Contender]]:
    window = min(2560, json.loads((model / "config.json").read_text())["max_position_embeddings"])
    settings = ServerSettings("vllm", port, None, 340, max_model_len=window, model=model)  # 1 GiB
    server = vllm_server(make_vllm(folder), settings, home / "vllm.log")
    with running([server]), running_gateway([], port + 10, model, worker_args) as gateway:
        ours = Contender("kvasir", port + 10, gateway.key("bench"), gateway.pid)
        yield [ours, Contender("vllm", port, "none", server.pid)]


def measure(one: Contender, cell: Cell, num_tokens: int, number: int, vocab_size: int, per_connection: int) -> Figures:
    """Send `per_connection` requests on each connection and return what they took; the shared part is cached before."""
    generator = torch.Generator().manual_seed(1 + number)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(10, vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    shared = draw(cell.num_shared)
    prompts = [shared + draw(cell.num_prompt - cell.num_shared) for _ in range(cell.num_connections * per_connection)]
    if shared:
        complete(one, [*shared, *draw(8)], 1)
    firsts, wall_s, cpu_s = send_all(
        one, prompts, cell.num_connections, lambda prompt: complete(one, prompt, num_tokens)
    )
    return Figures(len(prompts) * num_tokens / wall_s, cpu_s / len(prompts), statistics.median(firsts))


def send_all(
    one: Contender, prompts: list[list[int]], num_connections: int, send: Callable[[list[int]], Any]
) -> tuple[list[Any], float, float]:
    """Send `prompts` on so many connections, each the next one when `send` returns. Return what it returned, and the
    seconds that passed, and of CPU.

    Raises:
        RuntimeError: one of them failed.
    """
    answers: list[Any] = []
    errors: list[str] = []

    def send_some(mine: list[list[int]]) -> None:
        try:
            answers.extend([send(prompt) for prompt in mine])
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=send_some, args=(prompts[i::num_connections],)) for i in range(num_connections)]
    cpu_s, begin = cpu_seconds(one.pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s, cpu_s = time.perf_counter() - begin, cpu_seconds(one.pid) - cpu_s
    if errors:
        raise RuntimeError(f"{one.name}: {errors[0]}")
    return answers, wall_s, cpu_s


def complete(one: Contender, prompt: list[int], num_tokens: int) -> float:
    """Stream one completion to its end; return the seconds until its first token."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {one.key}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", one.port, timeout=600)) as connection:
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.read(500)!r}")
        first_s, usage = 0.0, None
        while line := answer.readline():
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter() - begin
                usage = json.loads(line[6:]).get("usage") or usage
    if usage is None or usage["completion_tokens"] != num_tokens:
        raise RuntimeError(f"{num_tokens} tokens were asked for: {usage}")
    return first_s


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and of all its descendants."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(member, 0) for member in family) / TICKS_PER_S


def write_random_model(folder: Path) -> Path:
    """Write a checkpoint of random weights with the demonstration model's tokenizer."""
    folder.mkdir(parents=True)
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 4096}
    config |= {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = {
        "model.embed_tokens.weight": random(config["vocab_size"], HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = torch.ones(HIDDEN)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{layer}self_attn.{name}_proj.weight"] = random(rows * HEAD_DIM, HIDDEN)
        weights[f"{layer}self_attn.o_proj.weight"] = random(HIDDEN, HEADS * HEAD_DIM)
        for name in ("gate", "up"):
            weights[f"{layer}mlp.{name}_proj.weight"] = random(INNER, HIDDEN)
        weights[f"{layer}mlp.down_proj.weight"] = random(HIDDEN, INNER)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _median(figures: list[Figures]) -> Figures:
    return Figures(*(statistics.median(values) for values in zip(*(vars(f).values() for f in figures), strict=True)))
