"""How often an answer has other tokens after a hand-over, or with drafts, in fp32 and bf16, on the CPU.

Answers to random prompts are computed in batches. Each is then given up in mid-stream and continued by a fresh engine
from its prompt and the tokens delivered, in other company: what the gateway does when a worker dies. Keys and values
that were computed one by one are then computed in one prefill, so that logits differ in their last bits.

With drafts, the same batches are computed once more with some of every answer's tokens drafted, three in ten of them
wrong: several tokens of a sequence are then computed at once, which rounds otherwise.

    python scripts/handover.py [--model FOLDER] [--answers 96] [--tokens 128]

A rate is the number of answers that differ anywhere over the number of tokens compared, up to the first difference.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_engine import ROOT, make_engine, run_engine

from kvasir.protocol.sampling import Sampling
from kvasir.worker.speculation.costs import StepCosts
from kvasir.worker.speculation.proposer import Draft, Reader, Text
from kvasir.worker.speculation.speculator import Speculator

BATCH = 8
DRAWS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


@dataclass(slots=True)
class Rate:
    """Over all answers of one kind."""

    num_answers: int = 0
    num_differing: int = 0
    num_tokens: int = 0  # compared

    def add(self, expected: list[int], actual: list[int]) -> None:
        same = next((i for i, pair in enumerate(zip(expected, actual, strict=True)) if pair[0] != pair[1]), None)
        self.num_answers += 1
        self.num_differing += same is not None
        self.num_tokens += len(expected) if same is None else same + 1


def measure(folder: Path, dtype: str, params: dict[str, float], num_answers: int, num_tokens: int) -> Rate:
    rng, rate = random.Random(0), Rate()
    prompts = [rng.choices(range(10, 4000), k=rng.randint(20, 90)) for _ in range(num_answers)]
    samplings = [Sampling(**params, seed=i) for i in range(num_answers)]
    whole: list[list[int]] = []
    for first in range(0, num_answers, BATCH):
        some = slice(first, first + BATCH)
        engine = make_engine(folder, 90 + num_tokens, BATCH, dtype)
        whole += run_engine(engine, prompts[some], num_tokens, samplings=samplings[some]).answers
    order = rng.sample(range(num_answers), num_answers)  # other company
    for first in range(0, num_answers, BATCH):
        some_ids, cut = order[first : first + BATCH], rng.randint(1, num_tokens // 2)
        engine = make_engine(folder, 90 + num_tokens, BATCH, dtype)
        resumed = [prompts[i] + whole[i][:cut] for i in some_ids]
        answers = run_engine(engine, resumed, num_tokens - cut, samplings=[samplings[i] for i in some_ids]).answers
        for i, answer in zip(some_ids, answers, strict=True):
            rate.add(whole[i][cut:], answer)
    return rate


class Guesser:
    """Proposes what the answers go on with, seven tokens in ten right."""

    name = "lookup"

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self._answers, self._rng = answers, random.Random(1)

    def open(self, text: Text) -> Reader:
        answer = self._answers[tuple(text.prompt_ids)]
        return GuesserReader(text, answer, self._rng)

    def close(self, text: Text) -> None: ...

    def forget(self, tenant: str) -> None: ...


@dataclass
class GuesserReader:
    text: Text
    answer: list[int]
    rng: random.Random

    def propose(self, limit: int) -> Draft:
        done = len(self.text.output_ids)
        right = self.answer[done : done + min(limit, self.rng.randrange(5))]
        return Draft([token if self.rng.random() < 0.7 else token ^ 1 for token in right], 4)


class FreeDrafts(StepCosts):
    """Drafts cost nothing: whatever is proposed is computed."""

    def relative(self, num_sequences: int) -> tuple[float, float]:
        return 0.0, 0.0


def measure_drafts(folder: Path, dtype: str, params: dict[str, float], num_answers: int, num_tokens: int) -> Rate:
    rng, rate = random.Random(0), Rate()
    prompts = [rng.choices(range(10, 4000), k=rng.randint(20, 90)) for _ in range(num_answers)]
    samplings = [Sampling(**params, seed=i) for i in range(num_answers)]
    for first in range(0, num_answers, BATCH):
        some = slice(first, first + BATCH)
        found: list[list[list[int]]] = []
        for drafts in (False, True):
            engine = make_engine(folder, 90 + num_tokens, BATCH, dtype)
            if drafts:
                proposer = Guesser(dict(zip(map(tuple, prompts[some]), found[0], strict=True)))
                engine.speculator = Speculator(proposer)
                engine.speculator.costs = FreeDrafts()
            found.append(run_engine(engine, prompts[some], num_tokens, samplings=samplings[some]).answers)
        for expected, actual in zip(*found, strict=True):
            rate.add(expected, actual)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "kvasir" / "demo_model")
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':9} {'dtype':9} {'draw':28} {'differing answers':>18} {'differences per 1,000 tokens':>29}")
    for what, measured in (("hand-over", measure), ("drafts", measure_drafts)):
        for dtype in ("float32", "bfloat16"):
            for name, params in DRAWS.items():
                rate = measured(options.model, dtype, params, options.answers, options.tokens)
                share, each = f"{rate.num_differing} of {rate.num_answers}", rate.num_differing / rate.num_tokens
                print(f"{what:9} {dtype:9} {name:28} {share:>18} {1000 * each:29.2f}", flush=True)


if __name__ == "__main__":
    main()
