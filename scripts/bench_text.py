"""What a conversation's next turn costs the gateway before the core sees it, with and without knowing its text.

    python scripts/bench_text.py [--tokens 100000] [--new 2000] [--rounds 5]

CPU of one turn of the bundled model's dialect, of which all but the last messages were sent before: the body read, the
template rendered, the text tokenised, the prompt hashed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kvasir.gateway.edges.openai_requests import read_chat
from kvasir.gateway.edges.prepare import MAX_PIECES_BYTES
from kvasir.gateway.text.model_text import ModelText, load_text
from kvasir.gateway.text.piece_cache import Memory, Pieces
from kvasir.protocol.prefix import hash_prompt

ROOT = Path(__file__).resolve().parent.parent
MESSAGE_CHARS = 3_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=2_000, help="of them in the last messages")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    text = load_text(ROOT / "kvasir" / "demo_model")
    costs: dict[str, list[float]] = {"read": [], "tokenised, known": [], "tokenised, unknown": [], "hashed": []}
    num_tokens = 0
    for number in range(args.rounds):
        chance = random.Random(number)
        old = messages(text, args.tokens - args.new, chance)
        turn = [*old, *messages(text, args.new, chance)]
        body = msgspec.json.encode({"model": "demo", "messages": turn})
        memory = Memory(os.urandom(16), Pieces(MAX_PIECES_BYTES))
        text.pack_chat(read_chat(msgspec.json.encode({"model": "demo", "messages": old})).requests[0].messages, memory)
        asked = timed(costs["read"], lambda body=body: read_chat(body))
        chat = asked.requests[0].messages
        packed = timed(costs["tokenised, known"], lambda chat=chat, memory=memory: text.pack_chat(chat, memory))
        assert packed == timed(costs["tokenised, unknown"], lambda chat=chat: text.pack_chat(chat))
        timed(costs["hashed"], lambda packed=packed: hash_prompt(b"r" * 16, b"p" * 16, b"n" * 16, packed, 0, 16))
        num_tokens = len(packed) // 4
    print(f"a turn of {num_tokens} tokens, some {args.new} of them new; ms of CPU, median of {args.rounds}")
    for name, taken in costs.items():
        print(f"{name:20}{statistics.median(taken):8.2f}")
    known = [sum(each) for each in zip(*(costs[name] for name in costs if name != "tokenised, unknown"), strict=True)]
    print(f"{'all, known':20}{statistics.median(known):8.2f}")


def messages(text: ModelText, num_tokens: int, chance: random.Random) -> list[dict[str, str]]:
    """Return messages of about `num_tokens` tokens of this repository's code, by turns of user and assistant."""
    source = "".join(path.read_text() for path in sorted((ROOT / "gateway").rglob("*.py")))
    found: list[dict[str, str]] = []
    while num_tokens > 0:
        start = chance.randrange(len(source) - MESSAGE_CHARS)
        content = source[start : start + MESSAGE_CHARS]
        found.append({"role": "assistant" if len(found) % 2 else "user", "content": content})
        num_tokens -= len(text.encode(content))
    return found


def timed(taken: list[float], work: Callable[[], Any]) -> Any:
    start = time.thread_time_ns()
    result = work()
    taken.append((time.thread_time_ns() - start) / 1e6)
    return result


if __name__ == "__main__":
    main()
