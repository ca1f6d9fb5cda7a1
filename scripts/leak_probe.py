"""What one tenant can learn of another by the clock: it guesses, and takes the time. A real gateway and worker.

    python scripts/leak_probe.py [--probes 2000] [--guess 256] [--seed 1]

The attacker tells two cases apart by the time until its first token. Each is tried `--probes` times, in random order.
How well is the area under the ROC curve: 0.5 is guessing, 1 is certainty.

    private     the victim has just sent the attacker's prompt, or another one. Must be 0.5: never a hit of one's own.
    published   the control: the prompt begins with a published text, or does not. Caches are for this difference.
    load        a prompt of the victim's is being computed while the attacker asks for something else: was it cached, or
                not? Whoever shares a worker waits for it; no order of requests takes that away. (A quarter as many.)

Prints a JSON line; exit code 1 if `private` is off 0.5 by more than three standard deviations, or any private
prompt was told to be cached, or the control does not show what it should.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir import Client
from kvasir.gateway.text.model_text import load_text
from scripts.ledger_crash import DEMO_MODEL, House, open_house

MIN_CONTROL = 0.9
TAIL_TOKENS = 8
VICTIM_TOKENS = 512
FIRST_ID, LAST_ID = 300, 2_900  # of the bundled model: no special tokens
Times = tuple[list[float], list[float]]
"""Seconds to the first token, in either case."""


class Probe:
    """Two tenants' connections, and prompts that nobody has sent before."""

    def __init__(self, house: House, num_guessed: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.num_guessed = num_guessed
        endpoint = f"ipc://{house.home}/run/clients/client.sock"
        self.victim, self.attacker = (
            Client(endpoint, house.kvasir("key", "create", name)["key"]) for name in ("victim", "attacker")
        )
        self.most_cached = 0  # tokens of any prompt of the attacker's, as it is told

    def fresh(self, num: int) -> list[int]:
        return [self.rng.randint(FIRST_ID, LAST_ID) for _ in range(num)]

    def ask(self, client: Client, prompt: Sequence[int]) -> float:
        """Return the seconds until the first token of an answer of one."""
        begun = time.perf_counter()
        with client.generate(prompt, max_tokens=1, ignore_eos=True, stream=True) as stream:
            next(stream)
            took_s = time.perf_counter() - begun
            for _ in stream:
                pass
        if client is self.attacker:
            self.most_cached = max(self.most_cached, stream.result.usage.cached_tokens)
        return took_s

    def private(self, is_right: bool) -> float:
        guess = self.fresh(self.num_guessed)
        self.ask(self.victim, [*(guess if is_right else self.fresh(self.num_guessed)), *self.fresh(TAIL_TOKENS)])
        return self.ask(self.attacker, [*guess, *self.fresh(TAIL_TOKENS)])

    def published(self, text: list[int], is_right: bool) -> float:
        return self.ask(self.attacker, [*(text if is_right else self.fresh(len(text))), *self.fresh(TAIL_TOKENS)])

    def load(self, is_right: bool) -> float:
        prompt = self.fresh(VICTIM_TOKENS)
        self.ask(self.victim, prompt if is_right else self.fresh(VICTIM_TOKENS))
        with self.victim.generate(prompt, max_tokens=1, ignore_eos=True, stream=True) as stream:
            took_s = self.ask(self.attacker, self.fresh(TAIL_TOKENS))
            for _ in stream:
                pass
        return took_s


def collect(probe: Probe, num: int, measure: Callable[[bool], float]) -> Times:
    """Measure both cases `num` times each, in random order."""
    order = [True] * num + [False] * num
    probe.rng.shuffle(order)
    times: Times = ([], [])
    for is_right in order:
        times[is_right].append(measure(is_right))
    return times


def auc(times: Times) -> float:
    """Return how often a time of the second case is below one of the first, ties counted half."""
    wrong, right = sorted(times[0]), times[1]
    above = sum(len(wrong) - (bisect_left(wrong, each) + bisect_right(wrong, each)) / 2 for each in right)
    return above / (len(wrong) * len(right))


def run(num_probes: int, num_guessed: int, seed: int) -> dict[str, float]:
    """Return the area under the curve per channel, and `most_cached` tokens of the attacker's private prompts."""
    with open_house(engine=str(DEMO_MODEL)) as house:
        for name in ("victim", "attacker"):
            house.kvasir("tenant", "create", name)
        probe = Probe(house, num_guessed, seed)
        for _ in range(20):  # processes that have just started are slow
            probe.private(False)
        found = {"private": auc(collect(probe, num_probes, probe.private)), "most_cached": probe.most_cached}
        text = load_text(DEMO_MODEL)
        published = text.decode_all(probe.fresh(num_guessed))
        (house.home / "text").write_text(published)
        house.kvasir("prefix", "publish", "control", "--file", str(house.home / "text"))
        ids = text.encode(published)
        probe.ask(probe.victim, [*ids, *probe.fresh(TAIL_TOKENS)])
        found["published"] = auc(collect(probe, num_probes, lambda is_right: probe.published(ids, is_right)))
        found["load"] = auc(collect(probe, max(1, num_probes // 4), probe.load))
        for client in (probe.victim, probe.attacker):
            client.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=2_000, help="of each case")
    parser.add_argument("--guess", type=int, default=256, help="tokens of the guessed prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = run(args.probes, args.guess, args.seed)
    sigma = math.sqrt((2 * args.probes + 1) / (12 * args.probes**2))  # of the area, where there is nothing to see
    print(json.dumps({**found, "three_sigma": 3 * sigma}))
    is_private = abs(found["private"] - 0.5) <= 3 * sigma and not found["most_cached"]
    return 0 if is_private and found["published"] >= MIN_CONTROL else 1


if __name__ == "__main__":
    sys.exit(main())
