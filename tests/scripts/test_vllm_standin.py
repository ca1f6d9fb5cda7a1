"""The stand-in for vLLM where no other test looks: that its events are what it has cached, its ranks, its command.

What it says on the wire is compared with a real server's words in tests/worker/upstream/test_standin.py; how it dies,
and its faults, are what the tests of the upstream worker stand on.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zmq

from kvasir.protocol.link import Link
from scripts.record_vllm import prompt_tokens
from scripts.standin.engine import EngineOptions
from scripts.standin.routes import StandinOptions
from scripts.standin.server import Standin
from scripts.vllm_standin import running_standin

pytestmark = pytest.mark.timeout(60)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vllm_standin.py"


def run_with(test: Callable[[Standin], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with running_standin(StandinOptions(**options)) as standin:
                await test(standin)

    trio.run(main)


async def ask(standin: Standin, path: str, body: Any = None, *lines: str) -> str:
    """Send one request and return all of the answer."""
    host, _, port = standin.url.removeprefix("http://").partition(":")
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: x", "Connection: close", *lines]
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        return b"".join([piece async for piece in stream]).decode()


async def generate(standin: Standin, token_ids: list[int], max_tokens: int, salt: str | None, *lines: str) -> int:
    """Stream an answer to its end; return how many tokens of the prompt were cached."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens}
    body = {"token_ids": token_ids, "sampling_params": sampling, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"cache_salt": salt} if salt else {})
    answer = await ask(standin, "/inference/v1/generate", body, *lines)
    return int(re.findall(r'"cached_tokens": ?(\d+)', answer)[-1])


@asynccontextmanager
async def following(standin: Standin, copies: dict[Any, int], seqs: list[int]) -> AsyncIterator[None]:
    """Count in `copies` how often each block is cached, as the events say, and put their numbers into `seqs`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(standin.event_endpoints[0][0])
    link = Link(socket)

    async def receive() -> None:
        while True:
            for _, seq, payload in await link.receive():
                seqs.append(int.from_bytes(seq, "big"))
                for event in msgspec.msgpack.decode(payload)[1]:
                    change = {"BlockStored": 1, "BlockRemoved": -1}[event["type"]]
                    for block_hash in event["block_hashes"]:
                        copies[block_hash] = copies.get(block_hash, 0) + change

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            nursery.start_soon(receive)
            await trio.sleep(0.2)  # a subscription takes a moment, and what is published before it is lost
            yield
            nursery.cancel_scope.cancel()
    finally:
        link.close()
        context.destroy(linger=0)


def test_events_say_exactly_what_is_cached_under_load_eviction_preemption_and_aborts() -> None:
    async def test(standin: Standin) -> None:
        chance = random.Random(3)
        copies: dict[Any, int] = {}
        seqs: list[int] = []
        cache, counters = standin.engines[0].cache, standin.engines[0].counters
        async with following(standin, copies, seqs):
            for _ in range(12):
                async with trio.open_nursery() as nursery:
                    for _ in range(12):
                        prompt = prompt_tokens(chance.randrange(4), 200)[: chance.randrange(10, 200)]
                        args = (prompt, chance.randrange(1, 120), chance.choice([None, "a", "b"]))
                        patience = 0.05 if chance.random() < 0.2 else 20

                        async def try_to(args: Any = args, patience: float = patience) -> None:
                            with trio.move_on_after(patience):
                                await generate(standin, *args)

                        nursery.start_soon(try_to)
                standin.state()  # checks the caches

            def cached() -> dict[Any, int]:
                return {cache._outside(block_hash): len(blocks) for block_hash, blocks in cache._copies.items()}

            while {block: count for block, count in copies.items() if count} != cached():  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert seqs == list(range(len(seqs)))
        assert counters.num_preemptions > 0 and counters.prefix_cache_hits > 0 and counters.finished["abort"] > 0
        assert cache.usage == 0

    run_with(test, engine=EngineOptions(num_blocks=20, max_model_len=512, step_ms=0.2))


def test_ranks_have_caches_and_event_ports_of_their_own() -> None:
    async def test(standin: Standin) -> None:
        prompt, second = prompt_tokens(1, 100), "X-data-parallel-rank: 1"
        assert [await generate(standin, prompt, 1, None, *rank) for rank in ((), (second,), (second,))] == [0, 0, 96]
        assert len({endpoint for pair in standin.event_endpoints for endpoint in pair}) == 4
        sources = (await ask(standin, "/kv_event_sources")).partition("\r\n\r\n")[2]
        assert set(json.loads(sources)) == {"0", "1"}

    run_with(test, num_ranks=2)


def test_the_command_prints_its_addresses_obeys_and_exits_when_its_engine_is_killed() -> None:
    command = [sys.executable, str(SCRIPT), "--block-size", "16", "--num-blocks", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            addresses = json.loads(process.stdout.readline())
            assert addresses["ranks"][0]["kv_events"].startswith("tcp://127.0.0.1:")

            def post(command: str, **arguments: Any) -> Any:
                data = json.dumps(arguments).encode()
                with urllib.request.urlopen(f"{addresses['url']}/standin/{command}", data, timeout=10) as answer:
                    return json.load(answer)

            assert post("clear") == {"result": True}
            post("set_faults", drop=1)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post("set_faults", nonsense=1)
            post("restart")
            deadline = time.monotonic() + 20
            while True:  # it is away for a moment
                try:
                    post("kill_engine", exit_after_s=0.1)
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert process.wait(timeout=20) == 1
        finally:
            process.kill()


def test_blocks_that_do_not_hold_one_request_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--num-blocks", "10"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "raise num_blocks or lower max_model_len" in done.stderr
