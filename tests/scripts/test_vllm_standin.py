"""The stand-in for vLLM, as tests use it: tokens that go on elsewhere, its ways to die, faults on the event port."""

from __future__ import annotations

import json
import random
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
from scripts.standin.events import EventOptions
from scripts.standin.routes import StandinOptions
from scripts.standin.server import Standin
from scripts.vllm_standin import running_standin

pytestmark = pytest.mark.timeout(60)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vllm_standin.py"
GREEDY = {"temperature": 0, "ignore_eos": True}
Test = Callable[[Standin], Awaitable[None]]


def run_with(test: Test, **options: Any) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with running_standin(StandinOptions(**options)) as standin:
                await test(standin)

    trio.run(main)


class Answer:
    """An answer as it comes: `status`, then events of a stream as they arrive, then `is_whole`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = b""
        self.status = 0
        self.is_whole = False

    async def read_head(self) -> None:
        while b"\r\n\r\n" not in self._data:
            self._data += await self._stream.receive_some()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ")[1])
        self._is_chunked = b"chunked" in head

    async def next_event(self) -> Any:
        """Return the next event, or None at the answer's end; `is_whole` then says whether it was sent to its end."""
        while b"\n\n\r\n" not in self._data:
            data = await self._stream.receive_some()
            if not data:
                self.is_whole = self._data == b"0\r\n\r\n"
                return None
            self._data += data
        chunk, _, self._data = self._data.partition(b"\n\n\r\n")
        text = chunk.partition(b"data: ")[2]
        return text.decode() if text == b"[DONE]" else json.loads(text)

    async def text(self) -> str:
        async for data in self._stream:
            self._data += data
        return self._data.decode()


@asynccontextmanager
async def asking(
    standin: Standin, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> AsyncIterator[Answer]:
    host, _, port = standin.url.removeprefix("http://").partition(":")
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"Content-Length: {len(data)}", *(f"{key}: {value}" for key, value in (headers or {}).items()), "", ""]
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all("\r\n".join(lines).encode() + data)
        answer = Answer(stream)
        await answer.read_head()
        yield answer


def body_for(token_ids: list[int], max_tokens: int = 8, salt: str | None = None, **sampling: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"token_ids": token_ids, "sampling_params": {**GREEDY, "max_tokens": max_tokens, **sampling}}
    if salt is not None:
        body["cache_salt"] = salt
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


async def generate(standin: Standin, body: dict[str, Any], **how: Any) -> tuple[list[int], int, Any]:
    """Return tokens, cached tokens and how it ended: a finish reason, or the error's code."""
    tokens: list[int] = []
    cached, end = -1, None
    async with asking(standin, "/inference/v1/generate", body, **how) as answer:
        while (event := await answer.next_event()) is not None:
            if event == "[DONE]":
                return tokens, cached, end
            if "error" in event:
                end = event["error"]["code"]
                continue
            for choice in event["choices"]:
                tokens += choice["token_ids"]
                end = choice["finish_reason"]
            if event["usage"] is not None:
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens, cached, "cut"


async def get(standin: Standin, path: str) -> tuple[int, str]:
    async with asking(standin, path) as answer:
        return answer.status, await answer.text()


async def start_stream(standin: Standin, nursery: trio.Nursery, body: dict[str, Any]) -> trio.MemoryReceiveChannel[Any]:
    """Start a request that nobody waits for; returns once its first token is here. The channel gets how it ends."""
    outbox, ends = trio.open_memory_channel[Any](1)
    has_begun = trio.Event()

    async def follow() -> None:
        end: Any = "cut"
        async with asking(standin, "/inference/v1/generate", body) as answer:
            while (event := await answer.next_event()) is not None:
                has_begun.set()
                if "error" in event:
                    end = event["error"]["code"]
                elif event != "[DONE]" and event["choices"]:
                    end = event["choices"][0]["finish_reason"] or end
        outbox.send_nowait(end)

    nursery.start_soon(follow)
    await has_begun.wait()
    return ends


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_goes_on_identically_elsewhere_and_a_sampled_or_penalised_one_does_not() -> None:
    async def test(standin: Standin) -> None:
        prompt = prompt_tokens(1, 50)
        cases: tuple[tuple[dict[str, Any], bool], ...] = (
            ({}, True),
            ({"temperature": 0.7, "seed": 5}, False),
            ({"presence_penalty": 2.0}, False),
        )
        for sampling, is_equal in cases:
            whole, _, _ = await generate(standin, body_for(prompt, 400, **sampling))
            again, _, _ = await generate(standin, body_for(prompt, 400, **sampling))
            assert whole == again
            async with running_standin() as other:
                rest, _, _ = await generate(other, body_for(prompt + whole[:200], 200, **sampling))
            assert (whole[:200] + rest == whole) == is_equal

    run_with(test)


def test_answers_end_by_the_model_a_stop_id_the_length_and_not_before_min_tokens() -> None:
    async def test(standin: Standin) -> None:
        prompt = prompt_tokens(2, 20)
        whole, _, end = await generate(standin, body_for(prompt, 30))
        assert (len(whole), end) == (30, "length")
        tokens, _, end = await generate(standin, body_for(prompt, 30, stop_token_ids=[whole[9]]))
        assert (tokens, end) == (whole[:10], "stop")
        tokens, _, _ = await generate(standin, body_for(prompt, 30, stop_token_ids=[whole[9]], min_tokens=15))
        assert len(tokens) >= 15 and tokens[9] != whole[9]
        standin.set_options(eos_per_mille=100)
        tokens, _, end = await generate(standin, body_for(prompt, 400, ignore_eos=False))
        assert end == "stop" and tokens[-1] in standin.options.engine.eos_token_ids

    run_with(test)


# ---- the cache and its events ----------------------------------------------------------------------------------------


class Follower:
    """Counts copies by hash, as the events say. `gaps`: numbers that were not the next."""

    def __init__(self) -> None:
        self.copies: dict[Any, int] = {}
        self.seqs: list[int] = []
        self.tokens: dict[Any, tuple[Any, list[int], Any]] = {}

    def apply(self, seq: int, payload: bytes) -> None:
        self.seqs.append(seq)
        for event in msgspec.msgpack.decode(payload)[1]:
            if event["type"] == "AllBlocksCleared":
                self.copies.clear()
            elif event["type"] == "BlockRemoved":
                for block_hash in event["block_hashes"]:
                    self.copies[block_hash] -= 1
                    if not self.copies[block_hash]:
                        del self.copies[block_hash]
            else:
                for block_hash in event["block_hashes"]:
                    self.copies[block_hash] = self.copies.get(block_hash, 0) + 1


@asynccontextmanager
async def following(standin: Standin) -> AsyncIterator[Follower]:
    follower = Follower()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(standin.event_endpoints[0][0])
    link = Link(socket)

    async def receive() -> None:
        while True:
            for topic, seq, payload in await link.receive():
                assert topic == b"kv"
                follower.apply(int.from_bytes(seq, "big"), payload)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            nursery.start_soon(receive)
            await trio.sleep(0.2)  # a subscription takes a moment, and what is published before it is lost
            yield follower
            nursery.cancel_scope.cancel()
    finally:
        link.close()
        context.destroy(linger=0)


async def replay(standin: Standin, start: int) -> list[tuple[int, bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    endpoint = standin.event_endpoints[0][1]
    assert endpoint is not None
    socket.connect(endpoint)

    def ask() -> list[tuple[int, bytes]]:
        socket.send_multipart([b"", start.to_bytes(8, "big")])
        batches: list[tuple[int, bytes]] = []
        while True:
            assert socket.poll(5000)
            _, _, seq, payload = socket.recv_multipart()
            if seq == b"\xff" * 8:
                return batches
            batches.append((int.from_bytes(seq, "big"), payload))

    try:
        return await trio.to_thread.run_sync(ask)
    finally:
        context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 -- nothing tells
            await trio.sleep(0.01)


def cached_copies(standin: Standin) -> dict[Any, int]:
    cache = standin.engines[0].cache
    return {cache._outside(block_hash): len(blocks) for block_hash, blocks in cache._copies.items()}


def test_events_say_exactly_what_is_cached_under_load_eviction_preemption_and_aborts() -> None:
    async def test(standin: Standin) -> None:
        chance = random.Random(3)
        async with following(standin) as follower:
            for _ in range(12):
                async with trio.open_nursery() as nursery:
                    for _ in range(12):
                        prompt = prompt_tokens(chance.randrange(4), 200)[: chance.randrange(10, 200)]
                        salt = chance.choice([None, "a", "b"])
                        ask = body_for(prompt, chance.randrange(1, 120), salt)
                        patience = 0.05 if chance.random() < 0.2 else 20

                        async def try_to(ask: dict[str, Any] = ask, patience: float = patience) -> None:
                            with trio.move_on_after(patience):
                                await generate(standin, ask)

                        nursery.start_soon(try_to)
                standin.state()
            await until(lambda: follower.copies == cached_copies(standin))
            assert follower.seqs == list(range(len(follower.seqs)))
        counters = standin.engines[0].counters
        assert counters.num_preemptions > 0 and counters.prefix_cache_hits > 0 and counters.finished["abort"] > 0
        assert standin.engines[0].cache.usage == 0

    run_with(test, engine=EngineOptions(num_blocks=20, max_model_len=512, step_ms=0.2))


def test_nothing_is_shared_between_two_salts() -> None:
    async def test(standin: Standin) -> None:
        prompt = prompt_tokens(1, 100)
        assert [(await generate(standin, body_for(prompt, 1, salt)))[1] for salt in ("a", "a", "b", None)] == [
            0,
            96,
            0,
            0,
        ]

    run_with(test)


def test_a_client_that_leaves_frees_its_blocks_at_once() -> None:
    async def test(standin: Standin) -> None:
        with trio.move_on_after(0.2):
            await generate(standin, body_for(prompt_tokens(1, 100), 1900))
        await until(lambda: not standin.engines[0].running)
        standin.state()

    run_with(test)


def test_batches_are_dropped_doubled_and_swapped_on_the_way_and_whole_in_the_replay() -> None:
    async def test(standin: Standin) -> None:
        async with following(standin) as follower:
            for seed, faults in enumerate(({}, {"drop": 1}, {"duplicate": 1}, {"swap": 1}, {}, {})):
                standin.set_faults(**faults)
                await generate(standin, body_for(prompt_tokens(seed, 40), 1))
                await trio.sleep(0.05)
            await until(lambda: len(follower.seqs) == 6)
            assert follower.seqs == [0, 2, 2, 4, 3, 5]
        assert [seq for seq, _ in await replay(standin, 0)] == [2, 3, 4, 5]  # no more than the buffer has
        assert [seq for seq, _ in await replay(standin, 5)] == [5]
        assert await replay(standin, 99) == []

    run_with(test, events=EventOptions(buffer_steps=4))


def test_the_array_form_is_that_of_older_servers() -> None:
    async def test(standin: Standin) -> None:
        async with following(standin) as follower:
            payloads: list[bytes] = []
            follower.apply = lambda seq, payload: payloads.append(payload)  # type: ignore[method-assign]
            await generate(standin, body_for(prompt_tokens(1, 40), 1, "s"))
            await until(lambda: bool(payloads))
        (event,) = msgspec.msgpack.decode(payloads[0])[1]
        assert event[0] == "BlockStored" and len(event[1][0]) == 32 and event[8] == [["s"]]

    run_with(test, engine=EngineOptions(hash_form="bytes"), events=EventOptions(form="array"))


# ---- life and death --------------------------------------------------------------------------------------------------


def test_a_hung_engine_is_silent_while_all_routes_answer_and_goes_on_afterwards() -> None:
    async def test(standin: Standin) -> None:
        async with trio.open_nursery() as nursery:
            ends = await start_stream(standin, nursery, body_for(prompt_tokens(1, 50), 300))
            standin.hang()
            await trio.sleep(0.05)
            before = await get(standin, "/metrics")
            async with asking(standin, "/inference/v1/generate", body_for(prompt_tokens(2, 50), 3)) as answer:
                assert answer.status == 200
                with trio.move_on_after(0.3) as scope:
                    await answer.next_event()
                assert scope.cancelled_caught
                assert before == await get(standin, "/metrics")
                assert (await get(standin, "/health"))[0] == 200
            standin.resume()
            assert await ends.receive() == "length"

    run_with(test)


@pytest.mark.parametrize(("how", "end"), [("kill_engine", 500), ("terminate", "abort"), ("cut", "cut")])
def test_open_streams_end_as_they_do_on_vllm_and_connects_are_refused_until_a_restart(how: str, end: Any) -> None:
    async def test(standin: Standin) -> None:
        url, endpoints, first = standin.url, standin.event_endpoints, json.loads((await get(standin, "/standin"))[1])
        async with following(standin) as follower, trio.open_nursery() as nursery:
            ends = await start_stream(standin, nursery, body_for(prompt_tokens(1, 50), 1500))
            getattr(standin, how)()
            assert await ends.receive() == end
            if how == "kill_engine":
                assert (await get(standin, "/health"))[0] == 503
                assert (await generate(standin, body_for([1, 2, 3])))[2] == 500
            await standin.is_down.wait()
            with pytest.raises(OSError):
                await get(standin, "/health")
            await standin.restart()
            assert (standin.url, standin.event_endpoints) == (url, endpoints)
            assert json.loads((await get(standin, "/standin"))[1])["started_at"] > first["started_at"]
            follower.seqs.clear()
            assert (await generate(standin, body_for(prompt_tokens(1, 50), 1)))[1] == 0  # nothing is cached
            await generate(standin, body_for(prompt_tokens(9, 50), 1))
            # The subscriber has come back by itself; what was published before is lost to it.
            for seed in range(20, 60):
                if follower.seqs:
                    break
                await generate(standin, body_for(prompt_tokens(seed, 50), 1))
                await trio.sleep(0.1)
            published = [seq for seq, _ in await replay(standin, 0)]
            assert published == list(range(len(published)))
            await until(lambda: follower.seqs == published[-len(follower.seqs) :])

    run_with(test)


def test_a_server_told_to_stop_may_also_fall_silent() -> None:
    async def test(standin: Standin) -> None:
        async with trio.open_nursery() as nursery:
            ends = await start_stream(standin, nursery, body_for(prompt_tokens(1, 50), 1500))
            standin.terminate(silent=True)
            with pytest.raises(OSError):
                await get(standin, "/health")
            with trio.move_on_after(0.3) as scope:
                await ends.receive()
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()

    run_with(test)


def test_a_full_queue_is_told_at_once_or_in_the_stream() -> None:
    async def test(standin: Standin) -> None:
        async with asking(standin, "/inference/v1/generate", body_for([1, 2, 3])) as answer:
            assert answer.status == 503
        standin.set_options(refuses_late=True)
        assert (await generate(standin, body_for([1, 2, 3])))[2] == 503
        standin.set_options(max_queued=None)
        assert (await generate(standin, body_for([1, 2, 3])))[2] == "length"

    run_with(test, max_queued=0)


def test_ranks_have_caches_and_event_ports_of_their_own() -> None:
    async def test(standin: Standin) -> None:
        prompt = body_for(prompt_tokens(1, 100), 1)
        to_second = {"X-data-parallel-rank": "1"}
        cached = [(await generate(standin, prompt, headers=how))[1] for how in ({}, to_second, to_second)]
        assert cached == [0, 0, 96]
        assert len({endpoint for pair in standin.event_endpoints for endpoint in pair}) == 4
        assert set(json.loads((await get(standin, "/kv_event_sources"))[1])) == {"0", "1"}

    run_with(test, num_ranks=2)


def test_a_key_guards_the_routes_that_vllm_guards() -> None:
    async def test(standin: Standin) -> None:
        assert (await get(standin, "/v1/models"))[0] == 401
        assert (await get(standin, "/health"))[0] == 200
        assert (await generate(standin, body_for([1, 2]), headers={"Authorization": "Bearer secret"}))[2] == "length"

    run_with(test, api_key="secret")


def test_prefill_takes_the_time_it_is_told_to_take() -> None:
    async def test(standin: Standin) -> None:
        began = trio.current_time()
        await generate(standin, body_for(prompt_tokens(1, 500), 1))
        assert trio.current_time() - began >= 0.25
        began = trio.current_time()
        await generate(standin, body_for(prompt_tokens(1, 500), 1))
        assert trio.current_time() - began < 0.25  # cached

    run_with(test, engine=EngineOptions(prefill_tokens_per_s=2000))


def test_the_command_prints_its_addresses_obeys_and_exits_when_its_engine_is_killed() -> None:
    command = [sys.executable, str(SCRIPT), "--block-size", "16", "--num-blocks", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
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
            time.sleep(1)
            post("kill_engine", exit_after_s=0.1)
            assert process.wait(timeout=20) == 1
        finally:
            process.kill()


def test_blocks_that_do_not_hold_one_request_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--num-blocks", "10"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "raise num_blocks or lower max_model_len" in done.stderr
