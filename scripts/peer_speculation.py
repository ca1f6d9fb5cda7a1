"""Our drafts by lookup beside vLLM's n-gram speculation, each as it is served, and both beside themselves without.

    python scripts/bench_engine.py --speculate --peer vllm --env DIR [--batch 1,8] [--prompt 256] [--tokens 256]

The model has to say what can be looked up, without loops, and the same in both servers. So it is made: Llama-shaped
with random weights (139 M parameters, fp32), but what its layers add is scaled down, and the head's rows are the
embeddings in the order of one long cycle of tokens, so that after each token it says the next one of the cycle. A
prompt of `edit` holds a piece of the cycle with tokens changed, dropped and put in (one in 25), and ends with what
stood before the piece, so that the answer is the piece without those edits. That of `new` holds other tokens: there
is nothing to look up. Every request has a `cache_salt` of its own, so that none is answered from the answers of
others.

vLLM gets five tokens after a match of two to four, as in its documentation, and Intel's OpenMP, as it asks for. Rates
count the whole request, prompt and all. Its n-grams are found by numba, which takes OpenMP's threads, and so undoes
`OMP_NUM_THREADS=1`: the model computes with as many as there are cores, unless `NUMBA_NUM_THREADS` says one as well.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import secrets
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.engine_peer import Contender, send_all, write_random_model
from scripts.fleet.environment import MODEL_NAME, Server, ServerSettings, make_vllm, running, vllm_server
from scripts.fleet.gateway import Gateway, running_gateway

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
FIRST_TOKEN = 10  # those before it are special
EDITS = 0.04
ADDED = 0.001  # what the layers' outputs are scaled by
KINDS = ("edit", "new")


@dataclass(frozen=True)
class Figures:
    tokens_per_s: float
    cpu_s: float  # per request


def compare(
    folder: Path, batches: list[int], num_prompt: int, num_tokens: int, rounds: int, per_connection: int, port: int
) -> list[dict[str, Any]]:
    """Print and return the medians of `rounds` rounds of every kind of prompt and number of connections."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="peer") as scratch:
        home = Path(scratch)
        cycle = write_cycle_model(home / "model")
        with contenders(home / "model", folder, home, port) as all_of_them:
            check_answers(all_of_them, cycle, num_prompt)
            print(
                f"{num_prompt} + {num_tokens} tokens, fp32, one thread each; medians of {rounds} rounds, and over off"
            )
            names = [one.name for one in all_of_them]
            print(
                f"{'kind':>5} {'conns':>5}" + "".join(f"{name:>24}" for name in names) + "   tokens/s (CPU s/request)"
            )
            for kind in KINDS:
                for batch in batches:
                    found: dict[str, list[Figures]] = {name: [] for name in names}
                    for number in range(rounds):
                        dice = random.Random(f"{kind} {batch} {number}")
                        prompts = [
                            make_prompt(kind, cycle, num_prompt, num_tokens, dice)
                            for _ in range(batch * per_connection)
                        ]
                        for one in all_of_them if number % 2 == 0 else reversed(all_of_them):
                            found[one.name].append(measure(one, prompts, num_tokens, batch))
                    medians = {
                        name: Figures(
                            *(statistics.median(values) for values in zip(*map(_fields, figures), strict=True))
                        )
                        for name, figures in found.items()
                    }
                    cells = [f"{f.tokens_per_s:.1f} ({f.cpu_s:.2f})" for f in medians.values()]
                    print(f"{kind:>5} {batch:5}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
                    gains = {
                        name: medians[name].tokens_per_s / medians[f"{name} off"].tokens_per_s
                        for name in ("kvasir", "vllm")
                    }
                    less = {name: medians[f"{name} off"].cpu_s / medians[name].cpu_s for name in gains}
                    print(" " * 11 + "; ".join(f"{n}: {gains[n]:.2f}x tokens/s, CPU 1/{less[n]:.2f}" for n in gains))
                    row = {name: vars(figures) for name, figures in medians.items()}
                    rows.append({"kind": kind, "connections": batch, **row, "gains": gains, "cpu_gains": less})
    return rows


@contextlib.contextmanager
def contenders(model: Path, folder: Path, home: Path, port: int) -> Iterator[list[Contender]]:
    program = make_vllm(folder)
    servers: list[Server] = []
    for i, options in enumerate((["--speculative-config", json.dumps(NGRAM)], [])):
        settings = ServerSettings("vllm", port + 4 * i, None, 340, max_model_len=2048, model=model)
        server = vllm_server(program, settings, home / f"vllm{i}.log", *options)
        server.set_env(LD_PRELOAD=str(program.parents[1] / "lib" / "libiomp5.so"), NUMBA_NUM_THREADS="1")
        servers.append(server)
    with (
        running(servers),
        running_gateway([], port + 10, model, "--speculate lookup") as on,
        running_gateway([], port + 11, model, "--speculate off") as off,
    ):
        ours: list[tuple[str, int, Gateway]] = [("kvasir", port + 10, on), ("kvasir off", port + 11, off)]
        both = [Contender(name, its_port, gateway.key("bench"), gateway.pid) for name, its_port, gateway in ours]
        names = ("vllm", "vllm off")
        both += [Contender(n, s.settings.port, "none", s.pid) for n, s in zip(names, servers, strict=True)]
        yield both
        for line in servers[0].metrics():
            if line.startswith(
                ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
            ):
                print(line)
        for worker in on.status().workers:
            print(*worker.drafts)


def write_cycle_model(folder: Path) -> list[int]:
    """Write the model; return its cycle of tokens."""
    write_random_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= ADDED
    cycle = random.Random(0).sample(range(FIRST_TOKEN, config["vocab_size"]), config["vocab_size"] - FIRST_TOKEN)
    head, embedding = torch.zeros_like(weights["model.embed_tokens.weight"]), weights["model.embed_tokens.weight"]
    head[[*cycle[1:], cycle[0]]] = embedding[cycle]
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return cycle


def make_prompt(kind: str, cycle: list[int], num_prompt: int, num_tokens: int, dice: random.Random) -> list[int]:
    """Return `num_prompt` tokens, after whose last one the model goes on along its cycle."""
    first = dice.randrange(len(cycle) - num_tokens - 1)
    piece = cycle[first + 1 : first + 1 + num_tokens]
    others = [*set(cycle) - set(piece)]
    held: list[int] = []
    if kind == "edit":
        for token in piece:
            if dice.random() > EDITS / 3:  # else it is dropped
                held.append(token if dice.random() > EDITS / 3 else dice.choice(others))
            if dice.random() < EDITS / 3:
                held.append(dice.choice(others))
        held = [cycle[first], *held][: num_prompt - 8]
    around = dice.choices(others, k=num_prompt - len(held) - 1)
    return [*around[: len(around) // 2], *held, *around[len(around) // 2 :], cycle[first]]


def check_answers(all_of_them: list[Contender], cycle: list[int], num_prompt: int) -> None:
    """All contenders have to say what the cycle says.

    Raises: RuntimeError.
    """
    prompt = make_prompt("edit", cycle, num_prompt, 64, random.Random(5))
    texts = {one.name: complete(one, prompt, 64) for one in all_of_them}
    if len({*texts.values()}) > 1:
        raise RuntimeError(f"the answers differ: {texts}")


def complete(one: Contender, prompt: list[int], num_tokens: int) -> str:
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body["cache_salt"] = secrets.token_hex(8)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {one.key}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", one.port, timeout=600)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{one.name}: {answer.status} {text[:500]!r}")
    done = json.loads(text)
    if done["usage"]["completion_tokens"] != num_tokens:
        raise RuntimeError(f"{one.name}: {num_tokens} tokens were asked for: {done['usage']}")
    return str(done["choices"][0]["text"])


def measure(one: Contender, prompts: list[list[int]], num_tokens: int, num_connections: int) -> Figures:
    _, wall_s, cpu_s = send_all(one, prompts, num_connections, lambda prompt: complete(one, prompt, num_tokens))
    return Figures(len(prompts) * num_tokens / wall_s, cpu_s / len(prompts))


def _fields(figures: Figures) -> tuple[float, float]:
    return figures.tokens_per_s, figures.cpu_s
