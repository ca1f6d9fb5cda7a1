"""What `fleet_check.py` shows of a gateway before servers: exact predictions, tenants apart, streams that survive."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam

from scripts.fleet.chat import ChatLoad, Turn, make_client, stream_chat, words
from scripts.fleet.environment import CacheFigures, EvictionCounter, Server
from scripts.fleet.gateway import Gateway

LONG_ANSWER_TOKENS = 200
DEATH_TIMEOUT_S = 60
SETTLE_S = 1.0  # the last events and counters have come by then


@dataclass(frozen=True, slots=True)
class Exactness:
    """A phase of chat. The figures of the servers' own counters are beside those that the gateway told its clients."""

    num_in_flight: int
    num_requests: int
    num_exact: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_over: int  # tokens promised and not found
    num_under: int
    num_evicted: int
    servers: CacheFigures

    @property
    def exact_share(self) -> float:
        return self.num_exact / self.num_requests

    @property
    def hit_share(self) -> float:
        """By the servers' own counters."""
        return self.servers.num_hit / max(1, self.servers.num_queried)

    @property
    def error_share(self) -> float:
        """The sum of |predicted - actual| over the prompt tokens."""
        return (self.num_over + self.num_under) / self.num_prompt_tokens

    @property
    def is_told_right(self) -> bool:
        """Whether clients were told of exactly the cached tokens that the servers count."""
        return self.servers == CacheFigures(self.num_prompt_tokens, self.num_cached_tokens)


def check_exactness(load: ChatLoad, servers: Sequence[Server], num_turns: int, num_in_flight: int) -> Exactness:
    before = _figures(servers)
    evictions = EvictionCounter(servers)
    try:
        turns = load.run(num_turns, num_in_flight)
        time.sleep(SETTLE_S)
    finally:
        evictions.close()
    differences = [turn.num_predicted - turn.num_cached for turn in turns]
    return Exactness(
        num_in_flight,
        len(turns),
        differences.count(0),
        sum(turn.num_prompt for turn in turns),
        sum(turn.num_cached for turn in turns),
        sum(difference for difference in differences if difference > 0),
        -sum(difference for difference in differences if difference < 0),
        evictions.num_removed,
        _figures(servers) - before,
    )


@dataclass(frozen=True, slots=True)
class Isolation:
    """Cached tokens of one prompt, sent twice by a tenant and then once by another; by the servers' own counters."""

    num_prompt: int
    own_hit: int
    other_hit: int


def check_isolation(gateway: Gateway, keys: Sequence[str], servers: Sequence[Server]) -> Isolation:
    prompt: list[ChatCompletionMessageParam] = [{"role": "user", "content": words(random.Random(99), 400)}]
    first, second = (make_client(gateway, key) for key in keys[:2])

    def ask(client: OpenAI) -> tuple[Turn, int]:
        before = _figures(servers)
        turn = stream_chat(gateway, client, prompt, 4)
        time.sleep(SETTLE_S)
        return turn, (_figures(servers) - before).num_hit

    ask(first)
    turn, own_hit = ask(first)
    _, other_hit = ask(second)
    return Isolation(turn.num_prompt, own_hit, other_hit)


@dataclass(frozen=True, slots=True)
class Survival:
    """Streams over the kill -9 of one of two servers, compared with the same answers when nobody died."""

    num_streams: int
    num_on_the_dead: int
    num_whole: int
    num_equal: int
    num_moved: int
    errors: tuple[str, ...]
    longest_pause_s: float
    back_after_s: float  # from starting the server again until its worker serves


def check_survival(gateway: Gateway, keys: Sequence[str], servers: Sequence[Server], num_streams: int) -> Survival:
    chance = random.Random(7)
    # 1. The answers undisturbed.
    asked: list[tuple[OpenAI, list[ChatCompletionMessageParam]]] = []
    calm: list[Turn] = []
    for i in range(num_streams):
        client = make_client(gateway, keys[i % len(keys)])
        asked.append((client, [{"role": "user", "content": words(chance, 30)}]))
        calm.append(stream_chat(gateway, *asked[i], LONG_ANSWER_TOKENS, is_whole_length=True))
    # 2. All at once, and a server dies when each has begun.
    begun = [threading.Event() for _ in asked]
    last_chunk_at = [0.0] * num_streams
    pauses = [0.0] * num_streams

    def follow(i: int) -> Turn | str:
        def on_chunk() -> None:
            now = time.monotonic()
            if begun[i].is_set():
                pauses[i] = max(pauses[i], now - last_chunk_at[i])
            last_chunk_at[i] = now
            begun[i].set()

        try:
            return stream_chat(gateway, *asked[i], LONG_ANSWER_TOKENS, is_whole_length=True, on_chunk=on_chunk)
        except OpenAIError as error:
            return repr(error)

    with ThreadPoolExecutor(num_streams) as pool:
        following = [pool.submit(follow, i) for i in range(num_streams)]
        for event in begun:
            event.wait(DEATH_TIMEOUT_S)
        workers = gateway.status().workers
        victim = max(workers, key=lambda worker: worker.num_in_flight)
        dead = servers[int(victim.id.rpartition("-")[2])]  # workers are numbered as their upstreams were given
        dead.kill()
        ends = [each.result(DEATH_TIMEOUT_S) for each in following]
    # 3. It comes back, with an empty cache and events from 0.
    gateway.wait_ready(len(servers) - 1)
    dead.start()
    dead.wait_up()
    began = time.monotonic()
    gateway.wait_ready(len(servers))
    back_after_s = time.monotonic() - began
    turns = [(end, calm[i]) for i, end in enumerate(ends) if isinstance(end, Turn)]
    return Survival(
        num_streams=num_streams,
        num_on_the_dead=victim.num_in_flight,
        num_whole=sum(turn.num_answer == LONG_ANSWER_TOKENS for turn, _ in turns),
        num_equal=sum(turn.text == expected.text for turn, expected in turns),
        num_moved=sum(turn.num_attempts > 1 for turn, _ in turns),
        errors=tuple(end for end in ends if isinstance(end, str)),
        longest_pause_s=max(pauses),
        back_after_s=back_after_s,
    )


def _figures(servers: Sequence[Server]) -> CacheFigures:
    return sum((server.cache_figures() for server in servers), CacheFigures())
