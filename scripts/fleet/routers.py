"""The same load through several routers, one after the other: a trace cut to size, text made up from its block ids.

A block id stands for its text and everything before it, so equal ids get equal text. Words are tokens of their own
for the demonstration model's tokenizer, so that a block has as many tokens wherever it stands. Each router begins with
empty caches; what they hit is counted by the servers themselves.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import signal
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scripts.fleet.environment import MODEL, MODEL_NAME, CacheFigures, Server
from scripts.fleet.gateway import running_gateway

MAX_PROMPT_TOKENS = 1900
MAX_ANSWER_TOKENS = 24
ROUTER_BLOCK_SIZE = 32  # a router that follows events knows one block size for all servers
START_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class LoadRequest:
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Leg:
    """What one router made of the load. Hits by the servers' own counters."""

    name: str
    num_requests: int
    num_errors: int
    figures: CacheFigures
    ttft_mean_ms: float
    ttft_p99_ms: float
    requests_per_s: float

    @property
    def hit_share(self) -> float:
        return self.figures.num_hit / max(1, self.figures.num_queried)


def read_load(path: Path, num_requests: int, tokens_per_block: int, one_of: int) -> list[LoadRequest]:
    """Return the first `num_requests` of a trace (all, if it has fewer) of one in `one_of` conversations, each cut to
    what the model can take.

    Thinned by conversation, so that who comes back still does.
    """
    vocabulary = _words(Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    texts: dict[int, str] = {}
    load: list[LoadRequest] = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            ids = row["hash_ids"]
            if random.Random(ids[min(1, len(ids) - 1)]).randrange(one_of):
                continue
            for block_id in ids:
                if block_id not in texts:
                    texts[block_id] = "".join(random.Random(block_id).choices(vocabulary, k=tokens_per_block))
            kept = ids[: MAX_PROMPT_TOKENS // tokens_per_block]
            max_tokens = min(MAX_ANSWER_TOKENS, 1 + row["out_len"] // 16)
            load.append(LoadRequest("".join(texts[block_id] for block_id in kept), max_tokens))
            if len(load) == num_requests:
                break
    if not load:
        raise ValueError(f"{path} has no such request; take more of its conversations")
    return load


def _words(tokenizer: Tokenizer) -> list[str]:
    """Words with the space before them that are one token each, in whatever company."""
    found = [text[1:] for text in tokenizer.get_vocab() if text.startswith("Ġ")]
    plain = [f" {text}" for text in found if text.isascii() and text.isalpha()]
    words = sorted(word for word in plain if len(tokenizer.encode(word * 3).ids) == 3)
    assert len(words) >= 256
    return words


# ---- legs ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def router(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A router as a process; yields its address once it serves the model."""
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve; see {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
                break
            time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def legs(programs: Path, servers: Sequence[Server], port: int, logs: Path) -> dict[str, Callable[[], Any]]:
    """Return, by name, how to start each router: a context manager that yields its address and a key."""
    urls = [server.url for server in servers]
    common = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(port + 1)]
    vllm = [str(programs / "vllm-router"), "--worker-urls", *urls, *common, "--policy"]
    sglang = [str(programs / "sglang-router"), "launch", "--worker-urls", *urls, *common, "--policy"]
    events: list[str] = ["--kv-event-block-size", str(ROUTER_BLOCK_SIZE), "--kv-event-model", MODEL_NAME]
    for server in servers:
        events += ["--kv-event-source", f"{server.url}={server.settings.events}"]
        events += ["--kv-event-replay-source", f"{server.url}={server.settings.replay}"]

    @contextlib.contextmanager
    def kvasir() -> Iterator[tuple[str, str]]:
        with running_gateway(servers, port) as gateway:
            yield gateway.url, gateway.key("trace")

    def other(command: list[str]) -> Callable[[], Any]:
        @contextlib.contextmanager
        def start() -> Iterator[tuple[str, str]]:
            with router(command, port, logs / "routers.log") as url:
                yield url, "none"

        return start

    return {
        "kvasir": kvasir,
        "vllm-router kv_aware": other([*vllm, "kv_aware", *events]),
        "vllm-router cache_aware": other([*vllm, "cache_aware"]),
        "sglang-router cache_aware": other([*sglang, "cache_aware"]),
        "vllm-router round_robin": other([*vllm, "round_robin"]),
    }


def run_leg(
    name: str, start: Callable[[], Any], load: Sequence[LoadRequest], servers: Sequence[Server], num_in_flight: int
) -> Leg:
    for server in servers:
        server.clear_cache()
    with start() as (url, key):
        _send(url, key, LoadRequest(" the", 1))  # whatever is made on first use
        time.sleep(1)
        before = [server.cache_figures() for server in servers]
        began = time.monotonic()
        with ThreadPoolExecutor(num_in_flight) as pool:
            results = list(pool.map(lambda request: _send(url, key, request), load))
        took_s = time.monotonic() - began
        time.sleep(1)
        figures = sum(
            (server.cache_figures() - then for server, then in zip(servers, before, strict=True)), CacheFigures()
        )
    waits = sorted(wait for wait in results if wait is not None)
    return Leg(
        name,
        len(load),
        results.count(None),
        figures,
        1000 * statistics.fmean(waits),
        1000 * waits[len(waits) * 99 // 100],
        len(waits) / took_s,
    )


def _send(url: str, key: str, request: LoadRequest) -> float | None:
    """Stream one greedy answer; return the seconds to its first text, None if it was not answered whole."""
    body: dict[str, Any] = {"model": MODEL_NAME, "prompt": request.prompt, "max_tokens": request.max_tokens}
    body |= {"temperature": 0, "stream": True, "ignore_eos": True}
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=REQUEST_TIMEOUT_S)
    try:
        began = time.monotonic()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            return None
        first_s = None
        for line in answer:
            if line.startswith(b"data: [DONE]"):
                return first_s
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return None
                if first_s is None and event["choices"] and event["choices"][0]["text"]:
                    first_s = time.monotonic() - began
        return None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
