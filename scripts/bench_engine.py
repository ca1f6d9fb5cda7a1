"""Prefill and decode rates of our engine beside `transformers` generate and its continuous batching.

Same weights, same random prompts, greedy, one torch thread, everything in one run and taken in turns:

    python scripts/bench_engine.py [--model FOLDER] [--batch 1,8,32] [--plain] [--bf16] [--json FILE]

Prefill is the time until the last sequence has its first token, decode the time from there to the end; for
`transformers` generate the two are told apart by a second run that stops after one token, for its continuous batching
by its own time stamps of the tokens. "call" counts generated tokens over the whole call: prefill, decode and, for
continuous batching, what `generate_batch` needs to start and to stop.

`--peer vllm --env DIR` compares whole servers instead, see `scripts/engine_peer.py`, and `--speculate` decoding with
and without drafts (`scripts/bench_speculation.py`); both together compare drafts with those of the other server
(`scripts/peer_speculation.py`).

Last come `--choices` choices of one prompt (`n` of the HTTP edge): forked, and as requests of as many tenants that
share a namespace, who can share full blocks but not fork.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.model.linear import Packing
from kvasir.worker.model.loader import load_model, read_config
from kvasir.worker.model.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 16
SPACE = derive_namespace(b"benchmark", "tenant")


@dataclass(frozen=True)
class Times:
    """Seconds of one run; the answers, to see that all computed the same."""

    prefill_s: float
    decode_s: float
    call_s: float
    answers: list[list[int]]
    num_prefilled: int = 0  # prompt tokens computed
    num_steps: int = 0
    idle_s: float = 0.0  # of the call, a step: in which its engine computed nothing


def make_engine(
    folder: Path,
    num_tokens: int,
    max_requests: int,
    dtype: str = "float32",
    packing: Packing | None = None,
) -> Engine:
    model = load_model(folder, "cpu", dtype, packing=packing)
    config = model.config
    num_blocks = 2 * max_requests * (num_tokens // BLOCK_SIZE + 2)
    shape = (num_blocks, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return Engine(
        LocalExecutor(model, KvStore(*shape, dtype=model.dtype, device="cpu"), sample),
        PrefixCache(num_blocks, BLOCK_SIZE),
        EngineLimits(max_requests=max_requests, max_step_tokens=2048, max_context=config.max_position),
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
    )


def run_engine(
    engine: Engine,
    prompts: list[list[int]],
    num_tokens: int,
    tenants: list[str] | None = None,
    samplings: list[Sampling] | None = None,
) -> Times:
    """Submit everything at once and step until it is done, greedily without `samplings`. `tenants`: whose each is."""
    root = derive_root(b"benchmark", "model", "float32")
    answers: dict[bytes, int] = {}
    begin, step_s, num_steps = time.perf_counter(), 0.0, 0
    for i, prompt in enumerate(prompts):
        packed = pack_tokens(prompt)
        hashes = hash_prompt(root, SPACE, SPACE, packed, 0, BLOCK_SIZE)
        command = Generate(
            req_id=i.to_bytes(16, "big"),
            attempt=1,
            tenant=tenants[i] if tenants else "benchmark",
            token_ids=packed,
            num_prompt_tokens=len(prompt),
            root=root,
            prefix_hashes=hashes,
            num_public_tokens=0,
            namespace=SPACE,
            max_tokens=num_tokens,
            sampling=samplings[i] if samplings else Sampling(temperature=0.0),
            ignore_eos=True,
        )
        engine.submit(command)
    answers = {i.to_bytes(16, "big"): [] for i in range(len(prompts))}
    prefilled = begin
    num_prefilled = 0
    while engine.has_work:
        report = engine.step()
        num_steps += 1
        num_prefilled += report.load.num_prefill_tokens
        step_s += report.load.step_s
        for output in report.outputs:
            if not answers[output.req_id]:
                prefilled = time.perf_counter()
            answers[output.req_id] += memoryview(output.token_ids).cast("I").tolist()
    end = time.perf_counter()
    idle_s = (end - begin - step_s) / num_steps
    return Times(
        prefilled - begin, end - prefilled, end - begin, list(answers.values()), num_prefilled, num_steps, idle_s
    )


def compare_choices(engine: Engine, prompts: list[list[int]], count: int, num_tokens: int) -> dict[str, Times]:
    """Ask for `count` answers to each of `prompts`, forked and not, in turns; return the median of each."""
    tenants = {"forked": ["benchmark"] * count, "separate": [f"tenant-{i}" for i in range(count)]}
    seen: dict[str, list[Times]] = {name: [] for name in tenants}
    for i, prompt in enumerate(prompts):
        name = list(tenants)[i % 2]
        seen[name].append(run_engine(engine, [prompt] * count, num_tokens, tenants[name]))
    return {name: sorted(times, key=lambda t: t.prefill_s)[len(times) // 2] for name, times in seen.items()}


def make_reference(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def greedy_config(num_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def run_generate(model: Any, prompts: list[list[int]], num_tokens: int) -> Times:
    ids = torch.tensor(prompts)
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(1))
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy_config(num_tokens))
    total = time.perf_counter() - begin
    return Times(first, total - first, total, out[:, ids.shape[1] :].tolist())


def run_continuous(model: Any, prompts: list[list[int]], num_tokens: int) -> Times:
    from transformers import ContinuousBatchingConfig

    pages = sum(-(-(len(prompt) + num_tokens) // 256) + 1 for prompt in prompts)
    config = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=2048)
    called = time.perf_counter()
    results = model.generate_batch(
        prompts,
        generation_config=greedy_config(num_tokens),
        continuous_batching_config=config,
        record_timestamps=True,
    )
    call_s = time.perf_counter() - called
    outputs = list(results.values())
    begin = min(output.lifespan[0] for output in outputs)
    prefilled = max(output.timestamps[0] for output in outputs)
    end = max(output.timestamps[-1] for output in outputs)
    return Times(prefilled - begin, end - prefilled, call_s, [list(output.generated_tokens) for output in outputs])


def best_of(runs: dict[str, Callable[[list[list[int]]], Times]], prompts: list[list[list[int]]]) -> dict[str, Times]:
    """Run every contender on every set of prompts, in turns; the fastest prefill and decode of each count."""
    seen: dict[str, list[Times]] = {name: [] for name in runs}
    for batch in prompts:
        for name, run in runs.items():
            seen[name].append(run(batch))
        answers = [seen[name][-1].answers for name in runs]
        if any(answer != answers[0] for answer in answers):
            warnings.warn("the contenders' answers differ (ties in rounding?)", stacklevel=1)
    return {
        name: Times(
            min(t.prefill_s for t in times),
            min(t.decode_s for t in times),
            min(t.call_s for t in times),
            times[0].answers,
            host_s=min(t.host_s for t in times),
        )
        for name, times in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled model; with --peer a random one")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, comma-separated")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens per sequence")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--choices", type=int, default=4, help="choices of one prompt")
    parser.add_argument("--choices-prompt", type=int, default=600, help="prompt tokens that they share")
    parser.add_argument(
        "--no-continuous", action="store_true", help="leave out the continuous batching of transformers"
    )
    parser.add_argument("--plain", action="store_true", help="also our engine with matrices that are not packed")
    parser.add_argument("--bf16", action="store_true", help="also our engine in bfloat16, whose answers differ")
    parser.add_argument("--no-transformers", action="store_true", help="our engine alone")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--peer", choices=("vllm",), help="compare whole servers")
    parser.add_argument("--env", type=Path, metavar="DIR", help="where the peer's environment is, or is made")
    parser.add_argument("--peer-cells", default="8x128,32x128,8x2048:1920,32x2048:1920", metavar="CELLS")
    parser.add_argument("--peer-requests", type=int, default=4, metavar="N", help="per connection (default 4)")
    parser.add_argument("--port", type=int, default=18600, help="the first of the ports that a peer takes")
    parser.add_argument("--worker-args", default="", help="of our worker beside a peer")
    parser.add_argument("--speculate", action="store_true", help="drafts instead (bench_speculation.py), and no peers")
    parser.add_argument("--cells", default="", metavar="CELLS", help="with --speculate: some, such as chat,random,0.0")
    parser.add_argument(
        "--draft-layers", type=int, metavar="N", help="with --speculate: a draft model for one of N layers"
    )
    options = parser.parse_args()
    if options.peer is not None:
        if options.env is None:
            parser.error("--peer takes --env DIR")
        from scripts import engine_peer

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
        if options.speculate:
            from scripts import peer_speculation

            batches = [int(size) for size in options.batch.split(",")]
            sizes = (options.prompt, options.tokens, options.repeats, options.peer_requests, options.port)
            rows = peer_speculation.compare(options.env, batches, *sizes)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
            return
        cells = [engine_peer.Cell.parse(text) for text in options.peer_cells.split(",")]
        found = engine_peer.compare(
            options.model,
            options.env,
            cells,
            options.tokens,
            options.repeats,
            options.peer_requests,
            options.port,
            options.worker_args,
        )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    options.model = options.model or ROOT / "kvasir" / "demo_model"
    torch.set_num_threads(1)
    batches = [int(size) for size in options.batch.split(",")]
    if options.speculate:
        from scripts import bench_speculation

        setting = (batches, options.prompt, options.tokens, options.repeats)
        if options.draft_layers:
            rows = bench_speculation.compare_draft_model(options.model, options.draft_layers, *setting)
        else:
            only = [name for name in options.cells.split(",") if name]
            rows = bench_speculation.compare(options.model, *setting, only)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    longest = max(options.prompt, options.choices_prompt) + options.tokens
    engine = make_engine(options.model, longest, max(*batches, options.choices))
    vocab_size = read_config(options.model).vocab_size
    runs: dict[str, Callable[[list[list[int]]], Times]] = {
        "kvasir": lambda prompts: run_engine(engine, prompts, options.tokens),
    }
    if options.plain:
        plain = make_engine(options.model, longest, max(batches), packing=Packing())
        runs["plain"] = lambda prompts: run_engine(plain, prompts, options.tokens)
    if options.bf16:
        narrow = make_engine(options.model, longest, max(batches), "bfloat16")
        runs["bf16"] = lambda prompts: run_engine(narrow, prompts, options.tokens)
    if not options.no_transformers:
        reference = make_reference(options.model)
        runs["generate"] = lambda prompts: run_generate(reference, prompts, options.tokens)
        if not options.no_continuous:
            runs["continuous"] = lambda prompts: run_continuous(reference, prompts, options.tokens)
    generator = torch.Generator().manual_seed(0)
    rows = []
    print(f"{options.prompt} prompt + {options.tokens} generated tokens, fp32, one thread: tokens/s (kvasir / it)")
    print(f"{'batch':>5} {'':8}" + "".join(f"{name:>22}" for name in runs))
    for size in batches:
        shape = (options.repeats, size, options.prompt)
        prompts = torch.randint(10, vocab_size, shape, generator=generator).tolist()
        times = best_of(runs, prompts)
        counts = {"prefill": options.prompt, "decode": options.tokens - 1, "call": options.tokens}
        for phase, count_each in counts.items():
            count = size * count_each
            rates = {name: count / getattr(t, f"{phase}_s") for name, t in times.items()}
            ratios = {name: rates["kvasir"] / rate for name, rate in rates.items()}
            cells = (f"{rates[name]:13.0f} ({ratios[name]:5.2f}x)" for name in runs)
            print(f"{size:5} {phase:8}" + "".join(f"{cell:>22}" for cell in cells))
            rows.append({"batch": size, "phase": phase, "tokens_per_s": rates, "kvasir_ratio": ratios})
    prompts = torch.randint(10, vocab_size, (6 * options.repeats, options.choices_prompt), generator=generator).tolist()
    choices = {}
    print(f"{options.choices} choices of one prompt of {options.choices_prompt} tokens:")
    for name, times in compare_choices(engine, prompts, options.choices, options.tokens).items():
        print(
            f"{name:>14}: all begun after {1e3 * times.prefill_s:6.1f} ms, {times.num_prefilled} prompt tokens computed"
        )
        choices[name] = {"begun_s": times.prefill_s, "num_prefilled": times.num_prefilled}
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        setting = {"model": str(options.model), "prompt": options.prompt, "tokens": options.tokens}
        result = {"machine": machine, "setting": setting, "rows": rows, "choices": choices}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
