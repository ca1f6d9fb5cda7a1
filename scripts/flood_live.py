"""A tenant floods a real gateway and a worker of known speed: how long others wait, and who gets how much.

    python scripts/flood_live.py [--tenants 31] [--weights 1:2:4] [--seconds 20] [--seed 1]

The worker computes nothing, takes 200 us per token and at most 512 of them in a step. Every prompt is new, has 200
tokens and gets an answer of one, so that the time of an answer is that to its first token. Five parts, one after the
other:

    alone       the first tenant keeps hundreds of requests waiting: what there is to be had
    solo        each of the others, at random times, asks for half of what it would get if all tenants asked for more
    flood       both at once: the others' times, beside those before
    all         every tenant keeps 20 requests waiting: Jain's index of what each gets over its weight
    answers     of two tenants of one weight one asks for answers of 50 tokens to prompts of 10, one for single tokens
                to prompts of 400, and both keep 100 requests waiting: what the first is charged over the second

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir import AsyncClient
from kvasir.cli.admin_client import ask
from kvasir.gateway.core.tenant_queue import OUTPUT_WEIGHT
from kvasir.protocol.admin_messages import Done, KeyCreate, KeyCreated, TenantCreate, TenantReply, TenantSet
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.terms import TermsChange
from scripts.ledger_crash import House, open_house

TOKEN_US = 200
STEP_TOKENS = 512
PROMPT_TOKENS = 200
ENGINE = f"oracle:token_us={TOKEN_US},vocab=3000"
FLOOD_DEPTH, EACH_DEPTH, ANSWERS_DEPTH = 400, 20, 100
LONG_ANSWERS, LONG_PROMPTS = (10, 50), (400, 1)  # tokens of a prompt, of its answer
SETTLE_S = 3.0  # until a part is measured: the rate is learned, the queue is full
WINDOW_S = 0.8  # of a tenant's prefill on a worker, `QueueConfig.window_s`


@dataclass
class Part:
    """What one part has seen since it is measured. `times_s` of answers; `num_answers` of each tenant."""

    times_s: list[float] = field(default_factory=list)
    num_answers: Counter[int] = field(default_factory=Counter)
    num_failed: int = 0


class Crowd:
    """One client per tenant."""

    def __init__(self, house: House, weights: list[int], seed: int) -> None:
        self.weights = weights
        self.rng = random.Random(seed)
        admin = house.home / "run" / "admin" / "admin.sock"
        endpoint = f"ipc://{house.home}/run/clients/client.sock"
        self.clients = []
        for number, weight in enumerate(weights):
            name = f"tenant-{number}"
            ask(TenantCreate(name=name), TenantReply, path=admin)
            ask(TenantSet(name=name, terms=TermsChange(weight=weight)), Done, path=admin)
            key = ask(KeyCreate(tenant=name), KeyCreated, path=admin).key
            self.clients.append(AsyncClient(endpoint, key, timeout_s=120))

    async def part(self, seconds: float, *loads: Callable[[Part, trio.Nursery], Awaitable[None]]) -> Part:
        """Run `loads` together and return what they see after a while, for `seconds`."""
        part = Part()
        async with trio.open_nursery() as nursery:
            for load in loads:
                nursery.start_soon(load, part, nursery)
            await trio.sleep(SETTLE_S)
            part.times_s.clear()
            part.num_answers.clear()
            await trio.sleep(seconds)
            found = Part(list(part.times_s), Counter(part.num_answers), part.num_failed)
            nursery.cancel_scope.cancel()
        await trio.sleep(1.0)  # what was running is stopped
        return found

    def keep(
        self, numbers: range, depth: int, prompt_tokens: int = PROMPT_TOKENS, max_tokens: int = 1
    ) -> Callable[[Part, trio.Nursery], Awaitable[None]]:
        """Return a load: each of those tenants keeps `depth` requests unanswered. Their times do not count."""

        async def run(part: Part, nursery: trio.Nursery) -> None:
            for _ in range(depth):
                for number in numbers:  # in turn, so that nobody's take all credits before the others have come
                    nursery.start_soon(one, part, number)
                await trio.lowlevel.checkpoint()

        async def one(part: Part, number: int) -> None:
            while True:
                await self._ask(part, number, prompt_tokens, max_tokens, is_timed=False)

        return run

    def come(self, numbers: range, per_s: Callable[[int], float]) -> Callable[[Part, trio.Nursery], Awaitable[None]]:
        """Return a load: each of those tenants asks so often, at random times."""

        async def run(part: Part, nursery: trio.Nursery) -> None:
            for number in numbers:
                nursery.start_soon(ask_on, part, nursery, number)

        async def ask_on(part: Part, nursery: trio.Nursery, number: int) -> None:
            while True:
                await trio.sleep(self.rng.expovariate(per_s(number)))
                nursery.start_soon(self._ask, part, number)

        return run

    async def _ask(
        self, part: Part, number: int, prompt_tokens: int = PROMPT_TOKENS, max_tokens: int = 1, is_timed: bool = True
    ) -> None:
        prompt = [self.rng.randrange(300, 2_900) for _ in range(prompt_tokens)]
        begun = trio.current_time()
        try:
            await self.clients[number].generate(prompt, max_tokens=max_tokens, ignore_eos=True)
        except KvasirError:
            part.num_failed += 1
            return
        part.num_answers[number] += 1
        if is_timed:
            part.times_s.append(trio.current_time() - begun)


async def run(house: House, weights: list[int], seconds: float, seed: int) -> dict[str, float]:
    """Run the four parts and return what they came to."""
    crowd = Crowd(house, weights, seed)
    others = range(1, len(weights))
    alone = (await crowd.part(seconds, crowd.keep(range(1), FLOOD_DEPTH))).num_answers.total() / seconds

    def half(number: int) -> float:
        return alone * weights[number] / sum(weights) / 2

    solo = await crowd.part(seconds, crowd.come(others, half))
    flood = await crowd.part(seconds, crowd.come(others, half), crowd.keep(range(1), FLOOD_DEPTH))
    everyone = await crowd.part(seconds, crowd.keep(range(len(weights)), EACH_DEPTH))
    pair = [0, next(number for number in others if weights[number] == weights[0])]
    kinds = list(zip(pair, (LONG_ANSWERS, LONG_PROMPTS), strict=True))
    both = await crowd.part(seconds, *[crowd.keep(range(n, n + 1), ANSWERS_DEPTH, *kind) for n, kind in kinds])
    charged = [both.num_answers[n] * (prompt + OUTPUT_WEIGHT * answer) for n, (prompt, answer) in kinds]
    rates = [everyone.num_answers[number] / weight for number, weight in enumerate(weights)]
    limit_s = percentile(solo.times_s, 0.99) + WINDOW_S + STEP_TOKENS * TOKEN_US / 1e6
    num_others = len(flood.times_s) + flood.num_failed
    return {
        "alone_per_s": alone,
        "solo_p50_s": percentile(solo.times_s, 0.5),
        "solo_p99_s": percentile(solo.times_s, 0.99),
        "flood_p50_s": percentile(flood.times_s, 0.5),
        "flood_p99_s": percentile(flood.times_s, 0.99),
        "limit_s": limit_s,
        "goodput": sum(time_s <= limit_s for time_s in flood.times_s) / max(1, num_others),
        "flood_per_s": flood.num_answers.total() / seconds,
        "all_per_s": everyone.num_answers.total() / seconds,
        "jain": sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates)),
        "long_answers_over_prompts": charged[0] / charged[1],
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


@contextmanager
def flooded_house() -> Iterator[House]:
    """Start a gateway and its worker."""
    with open_house(engine=ENGINE, worker_args=("--max-step-tokens", str(STEP_TOKENS))) as house:
        yield house


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=31)
    parser.add_argument("--weights", default="1:2:4", help="of the tenants, in turn")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    turn = [int(weight) for weight in args.weights.split(":")]
    weights = [turn[number % len(turn)] for number in range(args.tenants)]
    with flooded_house() as house:
        found = trio.run(run, house, weights, args.seconds, args.seed)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
