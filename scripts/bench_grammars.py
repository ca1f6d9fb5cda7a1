"""What grammars cost: steps of an engine with and without them, and masks for a large vocabulary.

    python scripts/bench_grammars.py [--batch 8] [--tokens 96] [--rounds 5] [--vocab 128000]

Steps: `--batch` requests decode on the bundled model, free and held to a JSON schema, in turns in one run; the figure
is the ratio of processor times (all threads) and of the fastest times per step. Masks: one JSON schema over a tokenizer
of `--vocab` tokens made of words from Python's own library, tokens drawn at random among those allowed.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from llguidance import LLTokenizer, TokenizerWrapper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.grammars import load_tokenizer, make_matcher
from kvasir.protocol.messages import Generate
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt
from kvasir.protocol.sampling import Constraint, Grammar, Sampling
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.grammars.grammars import Grammars
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.sampling import sample

MODEL = Path(__file__).resolve().parent.parent / "kvasir" / "demo_model"
BLOCK_SIZE = 16
ITEM = (
    '{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer","minimum":0},"tags":{"type":"array",'
    '"items":{"enum":["red","green","blue"]}},"on":{"type":"boolean"},"day":{"type":"string","format":"date"}},'
    '"required":["name","age","tags","on","day"],"additionalProperties":false}'
)
SCHEMA = Grammar("json_schema", '{"type":"array","minItems":500,"items":' + ITEM + "}")


def make_engine() -> Engine:
    model = load_model(MODEL, "cpu", torch.float32)
    config = model.config
    num_blocks = 1024
    kv = KvStore(num_blocks, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, torch.float32, "cpu")
    eos = config.eos_token_ids
    return Engine(
        LocalExecutor(model, kv, sample),
        PrefixCache(num_blocks, BLOCK_SIZE),
        EngineLimits(64, 512, config.max_position),
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        grammars=Grammars(load_tokenizer(MODEL, config.vocab_size, eos), eos),
    )


def run_steps(engine: Engine, batch: int, num_tokens: int, grammar: Grammar | None) -> tuple[float, float]:
    """Return processor time and the shortest time of a decode step of `batch` requests, both in seconds per step."""
    root, space = derive_root(b"benchmark", "demo", "float32"), derive_namespace(b"benchmark", "tenant")
    constraint = None if grammar is None else Constraint(grammar=grammar)
    for index in range(batch):
        packed = pack_tokens([int(x) for x in np.random.default_rng().integers(5, 4096, 31)])
        sampling = Sampling(temperature=0.8, seed=index, constraint=constraint)
        hashes = hash_prompt(root, bytes(16), space, packed, 0, BLOCK_SIZE)
        engine.submit(
            Generate(
                req_id=b"%d" % index,
                attempt=1,
                tenant="a",
                token_ids=packed,
                num_prompt_tokens=31,
                root=root,
                prefix_hashes=hashes,
                num_public_tokens=0,
                namespace=space,
                max_tokens=num_tokens,
                sampling=sampling,
                ignore_eos=True,
            )
        )
    while engine.is_preparing:
        time.sleep(0.001)
    steps: list[float] = []
    used_s = 0.0
    while engine.has_work:
        used, begun = time.process_time(), time.perf_counter()
        report = engine.step()
        if report.load.num_decode_tokens == batch:
            used_s += time.process_time() - used
            steps.append(time.perf_counter() - begun)
    assert len(steps) >= num_tokens // 2, "the answers ended too soon to be compared"
    return used_s / len(steps), min(steps)


def large_tokenizer(size: int) -> LLTokenizer:
    counts: Counter[bytes] = Counter()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:1500]:
        for word in re.findall(rb" ?[A-Za-z]+|[0-9]{1,3}| ?[^A-Za-z0-9\s]+|\s+", path.read_bytes()):
            counts.update(word[:end] for end in range(2, len(word) + 1))
    made = [bytes([byte]) for byte in range(256)] + [word for word, _ in counts.most_common(size)]
    unique = list(dict.fromkeys(made))[: size - 1]
    unique += [b"filler%d" % number for number in range(size - 1 - len(unique))]

    class Words:
        eos_token_id = size - 1
        bos_token_id = None
        tokens = [*unique, b"<eos>"]
        special_token_ids = [size - 1]

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return LLTokenizer(TokenizerWrapper(Words()), eos_token=size - 1)


def mask_times(tokenizer: LLTokenizer, num_tokens: int) -> list[float]:
    matcher, times = make_matcher(tokenizer, SCHEMA), []
    draw = random.Random(1)
    for _ in range(num_tokens):
        begun = time.perf_counter()
        mask = matcher.compute_bitmask()
        times.append(time.perf_counter() - begun)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        if not matcher.consume_token(int(draw.choice(np.flatnonzero(bits[: tokenizer.vocab_size])))):
            raise SystemExit(f"the matcher failed: {matcher.get_error()}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=128_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = make_engine()
    free: list[tuple[float, float]] = []
    held: list[tuple[float, float]] = []
    for _ in range(args.rounds + 1):  # the first of each warms up
        free.append(run_steps(engine, args.batch, args.tokens, None))
        held.append(run_steps(engine, args.batch, args.tokens, SCHEMA))
    for name, index in (("processor time", 0), ("fastest step", 1)):
        without, with_ = (min(run[index] for run in runs[1:]) for runs in (free, held))
        print(
            f"batch {args.batch}, {name}: {1e3 * without:.2f} ms free, {1e3 * with_:.2f} ms held to a schema: "
            f"{with_ / without:.3f}x"
        )
    times = sorted(1e6 * each for each in mask_times(large_tokenizer(args.vocab), 2000))
    p99 = quantiles(times, n=100)[98]
    print(f"mask, {args.vocab} tokens: median {median(times):.0f} us, 99 % {p99:.0f} us, longest {times[-1]:.0f} us")


if __name__ == "__main__":
    main()
