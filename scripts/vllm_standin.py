"""A vLLM server without a model: its HTTP routes, its KV events, its scheduling and its ways to die, for tests.

It speaks the wire of vLLM 0.32, which `tests/worker/upstream` compares field by field with bytes recorded from a real
server. Tokens are a pure function of the tokens before them, so that an answer which goes on elsewhere can be checked.

    python scripts/vllm_standin.py --port 8300 --block-size 32 --num-blocks 400      prints its addresses as one line
    async with running_standin(StandinOptions()) as standin: ...                     inside a Trio test

Faults: methods of `Standin`, or from outside `POST /standin/COMMAND` with keyword arguments as a JSON object. The
commands are the names in `COMMANDS`; `GET /standin` says how things are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.standin.engine import EngineOptions
from scripts.standin.events import EventOptions
from scripts.standin.routes import StandinOptions
from scripts.standin.server import Standin

__all__ = ["EngineOptions", "EventOptions", "Standin", "StandinOptions", "running_standin"]


@contextlib.asynccontextmanager
async def running_standin(options: StandinOptions | None = None) -> AsyncIterator[Standin]:
    """A stand-in that is up; it ends with the block, and with it every connection."""
    async with trio.open_nursery() as nursery:
        standin = Standin(options or StandinOptions())
        nursery.start_soon(standin.run)
        await standin.is_up.wait()
        try:
            yield standin
        finally:
            nursery.cancel_scope.cancel()


def parse_options(arguments: list[str] | None = None) -> StandinOptions:
    engine, usual = EngineOptions(), StandinOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=usual.model, help="served name")
    add("--root", default=usual.root, help="the folder /v1/models tells")
    add("--host", default=usual.host)
    add("--port", type=int, default=0)
    add("--api-key")
    for name in ("block_size", "num_blocks", "max_model_len", "vocab_size", "eos_per_mille"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(engine, name))
    add("--max-num-seqs", type=int, default=engine.max_num_seqs)
    add("--max-step-tokens", type=int, default=engine.max_step_tokens)
    add("--step-ms", type=float, default=engine.step_ms)
    add("--prefill-tokens-per-s", type=float, default=math.inf)
    add("--max-queued", type=int, help="refuse requests beyond so many unfinished ones")
    add("--ranks", type=int, default=1, help="data-parallel ranks, each with a cache and an event port of its own")
    add("--no-scale-out", action="store_true", help="/inference/... says 403, as vLLM does by default")
    add("--no-cached-tokens", action="store_true", help="usage without cached tokens")
    add("--dev", action="store_true", help="routes of VLLM_SERVER_DEV_MODE")
    add("--no-kv-events", action="store_true")
    add("--kv-events", default=EventOptions().endpoint, metavar="ENDPOINT")
    add("--kv-events-replay", default=EventOptions().replay_endpoint, metavar="ENDPOINT", help="or 'none'")
    add("--topic", default=EventOptions().topic)
    add("--buffer-steps", type=int, default=EventOptions().buffer_steps)
    add("--event-form", choices=("map", "array"), default="map")
    add("--hash-form", choices=("int", "bytes"), default="int")
    given = parser.parse_args(arguments)
    replay = None if given.kv_events_replay == "none" else given.kv_events_replay
    events = EventOptions(given.kv_events, replay, given.topic, given.buffer_steps, given.event_form)
    try:
        of_engine = {
            each.name: getattr(given, each.name) for each in fields(EngineOptions) if hasattr(given, each.name)
        }
        engine = EngineOptions(**of_engine)
    except ValueError as error:
        parser.error(str(error))
    return StandinOptions(
        given.model,
        given.root,
        given.host,
        given.port,
        engine,
        None if given.no_kv_events else events,
        given.ranks,
        not given.no_scale_out,
        not given.no_cached_tokens,
        given.dev,
        given.max_queued,
        given.api_key,
    )


async def serve(options: StandinOptions) -> None:
    """Serve, with the addresses as one line on stdout, until the stand-in is told to die."""
    async with trio.open_nursery() as nursery:
        standin = Standin(options)
        nursery.start_soon(standin.run)
        await standin.is_up.wait()
        ranks = [{"kv_events": pub, "kv_events_replay": replay} for pub, replay in standin.event_endpoints]
        print(json.dumps({"url": standin.url, "ranks": ranks}), flush=True)
        while not standin.is_down.is_set():
            await standin.is_down.wait()
            await trio.sleep(0.2)  # a restart is up again by then
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(serve, parse_options())
    sys.exit(1)  # as vLLM when its engine has died
