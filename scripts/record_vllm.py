"""Records what a vLLM server says, for `tests/worker/upstream/recorded`: run it again when a new version comes out.

    python scripts/record_vllm.py SCENARIO --url http://127.0.0.1:8300 --out FOLDER [--kv-events tcp://127.0.0.1:5557]
        [--kv-events-replay tcp://127.0.0.1:5558] [--engine-pid PID] [--server-pid PID]

Each scenario needs a server started for it, with the demonstration model and these settings:

    usual     VLLM_SERVER_DEV_MODE=1, --block-size 32 --num-gpu-blocks-override 20 --max-model-len 512
              --enable-scale-out --enable-prompt-tokens-details --kv-events-config with topic "kv", buffer_steps 200
    closed    the same without dev mode and --enable-scale-out, VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0
    narrow    as usual, with --max-num-queued-reqs 0
    killed    as usual; --engine-pid is killed in mid-stream
    ended     as usual; --server-pid gets SIGTERM in mid-stream

Paths of the machine, times and what nobody reads are taken out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq

GENERATE, COMPLETIONS, ABORT = "/inference/v1/generate", "/v1/completions", "/inference/v1/abort_requests"
ROOT = "/models/demo"
PATIENCE_S = 30.0
KEPT_METRICS = re.compile(
    r"(# TYPE )?(process_start_time_seconds|vllm:(num_requests_(running|waiting)|kv_cache_usage_perc"
    r"|prefix_cache_\w+_total|num_preemptions_total|prompt_tokens_total|prompt_tokens_cached_total|generation_tokens_total"
    r"|request_success_total|iteration_tokens_total(_count|_sum)?|cache_config_info))[ {]"
)
KEPT_INFO = {
    "model_config": ("model", "dtype", "max_model_len", "served_model_name", "max_logprobs"),
    "cache_config": ("block_size", "enable_prefix_caching", "num_gpu_blocks"),
    "parallel_config": ("data_parallel_size",),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens"),
}


def prompt_tokens(seed: int, count: int) -> list[int]:
    return [10 + (seed * 7919 + i * 104729 + i * i % 97) % 4000 for i in range(count)]


@dataclass(slots=True)
class Server:
    """Where a server is, and what can be done to it in mid-stream besides aborting: `kill_engine`, `terminate`."""

    url: str
    kv_events: str | None = None
    kv_events_replay: str | None = None
    deeds: dict[str, Callable[[], object]] = field(default_factory=dict)
    settle_s: float = 0.4  # the events of an answer have come by then


class Recorder:
    """Plays exchanges one after the other and keeps them, each with the event batches that it caused."""

    def __init__(self, server: Server) -> None:
        self.exchanges: list[dict[str, Any]] = []
        self._server = server
        address = urlsplit(server.url)
        self._address = (address.hostname or "127.0.0.1", address.port or 80)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._events: zmq.Socket[bytes] | None = None
        if server.kv_events is not None:
            self._events = self._context.socket(zmq.SUB)
            self._events.setsockopt(zmq.RCVHWM, 0)
            self._events.setsockopt(zmq.SUBSCRIBE, b"")
            self._events.connect(server.kv_events)
            time.sleep(server.settle_s)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def get(self, name: str, path: str) -> None:
        self._exchange(name, "GET", path, None)

    def post(self, name: str, path: str, body: Any, **how: Any) -> dict[str, Any]:
        """Post `body` (JSON, or text as it is) and return the exchange.

        `after_tokens` and `deed`: once so many chunks with tokens have come, do it: "abort" or one of the server's.
        `is_open_ended`: how many chunks come is chance.
        """
        return self._exchange(name, "POST", path, body, **how)

    def replay(self, name: str, start: int) -> None:
        """Ask for batches from `start` on and keep how the answer begins and ends."""
        assert self._server.kv_events_replay is not None
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.connect(self._server.kv_events_replay)
        dealer.send_multipart([b"", start.to_bytes(8, "big")])
        messages: list[list[bytes]] = []
        while not messages or messages[-1][-2] != b"\xff" * 8:
            if not dealer.poll(round(PATIENCE_S * 1000)):
                raise TimeoutError(f"no end of the replay from {start}")
            messages.append(dealer.recv_multipart())
        dealer.close(linger=0)
        shown = [[frame.hex() for frame in _cleaned_frames(frames)] for frames in (*messages[:-1][:2], messages[-1])]
        self.exchanges.append({"name": name, "replay_from": start, "messages": shown})

    def _exchange(
        self,
        name: str,
        method: str,
        path: str,
        body: Any,
        *,
        headers: dict[str, str] | None = None,
        after_tokens: int = 0,
        deed: str | None = None,
        is_open_ended: bool = False,
    ) -> dict[str, Any]:
        data = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(data)}"]
        lines += ["Content-Type: application/json", *(f"{key}: {value}" for key, value in (headers or {}).items())]
        answer = b""
        with socket.create_connection(self._address, timeout=PATIENCE_S) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
            while part := connection.recv(1 << 16):
                answer += part
                if deed is not None and answer.count(b'"token_ids":[') >= after_tokens:
                    self._do(deed, answer, path)
                    deed = None
        exchange: dict[str, Any] = {"name": name, "method": method, "path": path, "body": body}
        if headers:
            exchange["headers"] = headers
        if is_open_ended or after_tokens:
            exchange["is_open_ended"] = True
        exchange |= _read_answer(answer, path)
        exchange["events"] = self._take_events() if path in (GENERATE, COMPLETIONS) else []
        self.exchanges.append(exchange)
        return exchange

    def _do(self, deed: str, answer: bytes, path: str) -> None:
        if deed != "abort":
            self._server.deeds[deed]()
            return
        found = re.search(rb'"(?:request_)?id":"([^"]+)"', answer)
        assert found is not None
        name = found[1].decode() + ("-0" if path == COMPLETIONS else "")
        data = json.dumps({"request_ids": [name]}).encode()
        with socket.create_connection(self._address, timeout=PATIENCE_S) as connection:
            head = f"POST {ABORT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            while connection.recv(1 << 16):
                pass

    def _take_events(self) -> list[list[str]]:
        batches = []
        while self._events is not None and self._events.poll(round(self._server.settle_s * 1000)):
            batches.append([frame.hex() for frame in _cleaned_frames(self._events.recv_multipart())])
        return batches


def _read_answer(answer: bytes, path: str) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    is_whole = True
    if headers.get("transfer-encoding") == "chunked":
        chunks = body
        body, is_whole = b"", False
        while chunks and not is_whole:
            size, _, chunks = chunks.partition(b"\r\n")
            length = int(size, 16)
            body, chunks, is_whole = body + chunks[:length], chunks[length + 2 :], length == 0
    kept = {key: headers[key] for key in ("content-type", "server", "transfer-encoding", "vary") if key in headers}
    content = _clean(body.decode(), path)
    return {"status": int(first.split()[1]), "answer_headers": kept, "is_whole": is_whole, "answer": content}


def _clean(text: str, path: str) -> str:
    if path == "/metrics":
        return "".join(line + "\n" for line in text.splitlines() if KEPT_METRICS.match(line))
    text = re.sub(r'"created":\d+', '"created":1', text)
    if path == "/v1/models":
        return re.sub(r'"root":"[^"]+"', f'"root":"{ROOT}"', text)
    if path.startswith("/server_info") and "vllm_config" in text:
        info = json.loads(text)["vllm_config"]
        info["model_config"]["model"] = ROOT
        kept = {part: {name: info[part][name] for name in names} for part, names in KEPT_INFO.items()}
        return json.dumps({"vllm_config": kept})
    return text


def _cleaned_frames(frames: Sequence[bytes]) -> list[bytes]:
    """The same frames with 0 for the time."""
    if not frames[-1]:
        return list(frames)
    _, events, rank = msgspec.msgpack.decode(frames[-1])
    return [*frames[:-1], msgspec.msgpack.encode([0.0, events, rank])]


# ---- scenarios -------------------------------------------------------------------------------------------------------

USAGE = {"include_usage": True}


def generate_body(seed: int, length: int, max_tokens: int = 1, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "seed": 1, "max_tokens": max_tokens, "ignore_eos": True, **more.pop("sampling", {})}
    body = {"model": "demo", "token_ids": prompt_tokens(seed, length), "sampling_params": sampling, "stream": True}
    return {**body, "stream_options": USAGE, **more}


def completion_body(seed: int, length: int, max_tokens: int = 3, **more: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompt": prompt_tokens(seed, length), "max_tokens": max_tokens, "temperature": 0}
    asked = {"seed": 1, "ignore_eos": True, "stream": True, "return_token_ids": True, "stream_options": USAGE}
    return {**body, **asked, **more}


def play_usual(recorder: Recorder) -> None:
    for path in ("/v1/models", "/version", "/health", "/kv_event_sources", "/server_info?config_format=json"):
        recorder.get(path, path)
    recorder.get("metrics of a server that has done nothing", "/metrics")
    recorder.get("a path that is not there", "/nope")
    _play_generate(recorder)
    _play_refusals(recorder)
    _play_completions(recorder)
    _play_cache(recorder)
    recorder.get("metrics at the end", "/metrics")
    recorder.replay("replay from the start", 0)
    recorder.replay("replay beyond the end", 10**9)


def _play_generate(recorder: Recorder) -> None:
    post = functools.partial(recorder.post, path=GENERATE)
    post("a greedy stream", body=generate_body(1, 40, 3))
    post("the same, cached, without usage", body=generate_body(1, 40, 3, stream_options=None))
    post("usage in every chunk", body=generate_body(1, 40, 2, stream_options={**USAGE, "continuous_usage_stats": True}))
    for count in (0, 1, 2):
        post(f"logprobs {count}", body=generate_body(1, 40, 2, sampling={"logprobs": count}))
    post("prompt returned", body=generate_body(2, 5, 2, return_token_ids=True))
    post("an id of the caller's", body=generate_body(2, 5, 2, request_id="mine"))
    post("an id in a header", body=generate_body(2, 5, 2), headers={"X-Request-Id": "mine"})
    whole = post("no stream", body=generate_body(1, 40, 4, stream=False))
    post("no stream, with logprobs", body=generate_body(1, 40, 2, stream=False, sampling={"logprobs": 1}))
    fourth = json.loads(whole["answer"])["choices"][0]["token_ids"][3]
    post("ended by a stop id", body=generate_body(1, 40, 9, sampling={"stop_token_ids": [fourth]}))
    ending = {"temperature": 1.0, "seed": 0, "ignore_eos": False}
    post("ended by the model", body=generate_body(3, 5, 400, sampling=ending), is_open_ended=True)
    post("cut at the context's end", body=generate_body(4, 510, 100))
    post("aborted in mid-stream", body=generate_body(5, 40, 400), after_tokens=3, deed="abort")
    again = generate_body(5, 40, 400, stream_options=None)
    post("aborted, without usage", body=again, after_tokens=3, deed="abort")
    recorder.post("an abort of nothing", ABORT, {"request_ids": ["generate-tokens-none"]})
    recorder.post("an abort without ids", ABORT, {})
    recorder.post("an abort that is no JSON", ABORT, "{")


def _play_refusals(recorder: Recorder) -> None:
    for is_stream in (True, False):
        post = functools.partial(recorder.post, path=GENERATE)
        how = "stream" if is_stream else "no stream"
        post(f"too long, {how}", body=generate_body(1, 600, stream=is_stream))
        post(f"as long as the context, {how}", body=generate_body(1, 512, stream=is_stream))
        post(f"beyond the vocabulary, {how}", body=generate_body(1, 5, stream=is_stream, token_ids=[5, 999999]))
        many = generate_body(1, 5, stream=is_stream, sampling={"logprobs": 50})
        post(f"too many logprobs, {how}", body=many)
    refused: dict[str, dict[str, Any]] = {
        "a negative id": {"token_ids": [5, -1]},
        "an empty prompt": {"token_ids": []},
        "a negative temperature": {"sampling": {"temperature": -1}},
        "max_tokens 0": {"sampling": {"max_tokens": 0}},
        "top_p 7": {"sampling": {"top_p": 7}},
        "max_tokens no number": {"sampling": {"max_tokens": "x"}},
        "two greedy answers": {"sampling": {"n": 2}},
        "no parameters": {"sampling_params": None},
        "an unknown model": {"model": "nope"},
        "an empty salt": {"cache_salt": ""},
    }
    for name, more in refused.items():
        recorder.post(name, GENERATE, generate_body(1, 5, **more))
    recorder.post("no JSON", GENERATE, "{nope")


def _play_completions(recorder: Recorder) -> None:
    post = functools.partial(recorder.post, path=COMPLETIONS)
    post("completion, stream", body=completion_body(1, 40))
    post("completion, stream without usage", body=completion_body(1, 40, stream_options=None))
    continuous = {**USAGE, "continuous_usage_stats": True}
    post("completion, usage in every chunk", body=completion_body(1, 40, stream_options=continuous))
    post("completion, logprobs", body=completion_body(1, 40, logprobs=2))
    post("completion, no stream", body=completion_body(1, 40, stream=False, stream_options=None))
    post("completion, salted", body=completion_body(1, 40, cache_salt="salt-c"))
    post("completion, too long", body=completion_body(1, 600))
    post("completion, beyond the vocabulary", body=completion_body(1, 5, prompt=[5, 99999]))
    post("completion, aborted", body=completion_body(5, 40, 400), after_tokens=3, deed="abort")


def _play_cache(recorder: Recorder) -> None:
    """Stores, copies, salts, generated blocks and evictions, from an empty cache on."""

    def post(name: str, seed: int, length: int, max_tokens: int = 1, **more: Any) -> dict[str, Any]:
        headers = more.pop("headers", None)
        return recorder.post(name, GENERATE, generate_body(seed, length, max_tokens, **more), headers=headers)

    recorder.post("the cache is cleared", "/reset_prefix_cache", {})
    post("two blocks, salted; the clearing comes first", 20, 70, cache_salt="salt-a")
    post("two more of the same chain", 20, 130, cache_salt="salt-a")
    post("exactly two blocks: a copy of the second", 20, 64, cache_salt="salt-a")
    post("again: another copy", 20, 64, cache_salt="salt-a")
    post("another salt", 20, 64, cache_salt="salt-b")
    post("no salt", 21, 64)
    post("20 + 12 tokens: nothing", 22, 20, 12)
    post("20 + 13 tokens: the block", 22, 20, 13)
    post("prompt and answer fill blocks", 23, 100, 100)
    post("a session's header", 24, 40, headers={"X-Session-ID": "session-1"})
    post("evictions", 25, 400)
    post("evictions again", 26, 300)
    post("what is left of the first chain", 20, 130, cache_salt="salt-a")
    post("what is left of the last", 26, 300)


def play_closed(recorder: Recorder) -> None:
    recorder.post("tokens in are off", GENERATE, generate_body(1, 40))
    recorder.post("aborts are off", ABORT, {"request_ids": []})
    recorder.post("completion with a salt: hashes are bytes", COMPLETIONS, completion_body(1, 70, 1, cache_salt="s"))
    recorder.post("completion, further", COMPLETIONS, completion_body(1, 130, 1, cache_salt="s"))
    recorder.get("/server_info?config_format=json", "/server_info?config_format=json")
    recorder.post("no reset", "/reset_prefix_cache", {})


def play_narrow(recorder: Recorder) -> None:
    recorder.post("queue full, stream", GENERATE, generate_body(1, 40))
    recorder.post("queue full, no stream", GENERATE, generate_body(1, 40, stream=False))
    recorder.post("completion, queue full", COMPLETIONS, completion_body(1, 40))


def play_killed(recorder: Recorder) -> None:
    recorder.post("the engine is killed", GENERATE, generate_body(1, 40, 400), after_tokens=3, deed="kill_engine")


def play_ended(recorder: Recorder) -> None:
    recorder.post("the server is told to stop", GENERATE, generate_body(1, 40, 400), after_tokens=3, deed="terminate")


SCENARIOS = {
    "usual": play_usual,
    "closed": play_closed,
    "narrow": play_narrow,
    "killed": play_killed,
    "ended": play_ended,
}


def record(scenario: str, server: Server) -> list[dict[str, Any]]:
    """Play a scenario against `server`, whatever it is, and return its exchanges."""
    recorder = Recorder(server)
    try:
        SCENARIOS[scenario](recorder)
    finally:
        recorder.close()
    return recorder.exchanges


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--kv-events")
    parser.add_argument("--kv-events-replay")
    parser.add_argument("--engine-pid", type=int)
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    deeds: dict[str, Callable[[], object]] = {}
    if given.engine_pid is not None:
        deeds["kill_engine"] = functools.partial(os.kill, given.engine_pid, signal.SIGKILL)
    if given.server_pid is not None:
        deeds["terminate"] = functools.partial(os.kill, given.server_pid, signal.SIGTERM)
    exchanges = record(given.scenario, Server(given.url, given.kv_events, given.kv_events_replay, deeds))
    given.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(exchange, ensure_ascii=False) for exchange in exchanges)
    (given.out / f"{given.scenario}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
