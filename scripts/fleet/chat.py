"""Multi-turn chat of several tenants through the unmodified `openai` client, some number of requests in flight."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from scripts.fleet.environment import MODEL_NAME
from scripts.fleet.gateway import Gateway

TEXT = (
    "the cache of a server keeps blocks that many prompts share so when one box is slow another answers and no word is "
    "lost while tenants wait in a queue each with its own key budget and weight until a worker takes what it can run"
)
WORDS = TEXT.split()
CONTEXT_TOKENS = 1300  # a conversation that has grown beyond it begins anew
ANSWER_TOKENS = 24
REQUEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. `num_cached` is what the server itself has found, `num_predicted` what the router had expected."""

    request_id: str
    text: str
    finish_reason: str
    num_prompt: int
    num_answer: int
    num_cached: int
    num_predicted: int
    num_attempts: int
    first_token_s: float


@dataclass(slots=True)
class Conversation:
    client: OpenAI
    system: str
    messages: list[ChatCompletionMessageParam] = field(default_factory=list)

    def begin(self) -> None:
        self.messages = [{"role": "system", "content": self.system}]


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=count))


def make_client(gateway: Gateway, key: str) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=REQUEST_TIMEOUT_S)


def stream_chat(
    gateway: Gateway,
    client: OpenAI,
    messages: Sequence[ChatCompletionMessageParam],
    max_tokens: int,
    *,
    is_whole_length: bool = False,
    on_chunk: Callable[[], object] = lambda: None,
) -> Turn:
    """Stream one greedy answer to its end, which is `max_tokens` with `is_whole_length`, whatever the model wants.

    Raises:
        openai.OpenAIError: it ended with an error.
    """
    began = time.monotonic()
    first_token_s = -1.0
    text, finish_reason, request_id, usage = "", "", "", None
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": is_whole_length},
    )
    for chunk in stream:
        request_id, usage = chunk.id, chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                if first_token_s < 0:
                    first_token_s = time.monotonic() - began
                text += choice.delta.content
            finish_reason = choice.finish_reason or finish_reason
        on_chunk()
    assert usage is not None and usage.prompt_tokens_details is not None
    num_predicted, num_attempts = gateway.predicted(request_id)
    return Turn(
        request_id,
        text,
        finish_reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens_details.cached_tokens or 0,
        num_predicted,
        num_attempts,
        first_token_s,
    )


class ChatLoad:
    """Conversations that go on for as long as `run` is called, in an order that a seed decides."""

    def __init__(self, gateway: Gateway, keys: Sequence[str], conversations_per_tenant: int, seed: int) -> None:
        self._gateway = gateway
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._idle: list[Conversation] = []
        for key in keys:
            client = make_client(gateway, key)
            system = words(self._chance, 150)
            self._idle += [Conversation(client, system) for _ in range(conversations_per_tenant)]
        for conversation in self._idle:
            conversation.begin()

    def run(self, num_turns: int, num_in_flight: int, pause_s: float = 0.0) -> list[Turn]:
        """Do `num_turns` turns, `num_in_flight` at a time, with a pause after each."""
        turns: list[Turn] = []
        numbers = iter(range(num_turns))

        def work() -> None:
            while True:
                with self._lock:
                    if next(numbers, None) is None:
                        return
                    conversation = self._idle.pop(self._chance.randrange(len(self._idle)))
                    conversation.messages.append({"role": "user", "content": words(self._chance, 40)})
                turn = stream_chat(self._gateway, conversation.client, conversation.messages, ANSWER_TOKENS)
                conversation.messages.append({"role": "assistant", "content": turn.text})
                if turn.num_prompt > CONTEXT_TOKENS:
                    conversation.begin()
                with self._lock:
                    turns.append(turn)
                    self._idle.append(conversation)
                time.sleep(pause_s)

        with ThreadPoolExecutor(num_in_flight) as pool:
            for done in [pool.submit(work) for _ in range(num_in_flight)]:
                done.result()
        return turns
