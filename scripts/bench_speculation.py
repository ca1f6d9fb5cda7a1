"""Decoding with drafts beside decoding without, step by step in turns (`bench_engine.py --speculate`).

What is computed is the model's own, but what it says is written down: the sampler draws as always, and then a script's
token takes the place of the draw. So a small model, or one of random weights, can be measured on what large ones are
used for, and no answer is a loop. Scripts: `edit` (a file of Python's library, names and lines changed), `json` (a list
of records again, with one field more), `agent` (tool calls that quote what tools said), `chat` (prose after other
prose), `random`. `own` are the model's own answers, with temperature: there the tokens with and without drafts are
compared.

Then drafts of a forced acceptance: each token proposed is the right one with that chance. Engines with and without
drafts take turns step by step, so that whatever else slows the machine slows both. Rates are tokens per second of CPU
time, while the batch is full: from the moment on at which all sequences have their first token, until the first one is
done. "gain" is the rate with drafts over that without.
"accepted" is a share of the tokens drafted, "per run" the tokens that a step with drafts gave a sequence, "per step"
those that any step gave. "±" is the standard error of the gain over the repeats.

With `--draft-layers N` there is a draft model. The two agree naturally: the draft model is the bundled one; the model
has its layers, and more after them up to N, of random weights scaled down, so that it says nearly the same. `agree`:
answers are its own. Otherwise drafts are forced, and the draft model computes all the same. It catches up with every
prompt anew in every run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor, Sampler
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Mask, Sampled, SampleRow
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import sample
from kvasir.worker.model.working_set import WorkingSetAttention
from kvasir.worker.speculation.costs import StepCosts
from kvasir.worker.speculation.draft_model import DraftModel
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.proposer import Draft, Proposer, Text
from kvasir.worker.speculation.speculator import Speculator
from kvasir.worker.speculation.track import Counts, Experience

BLOCK_SIZE = 16
SPACE = derive_namespace(b"benchmark", "tenant")
ROOT_HASH = derive_root(b"benchmark", "model", "float32")
MODULES = [
    "heapq",
    "bisect",
    "textwrap",
    "queue",
    "sched",
    "fnmatch",
    "shlex",
    "graphlib",
    "copy",
    "statistics",
    "string",
    "cmd",
    "csv",
    "dis",
    "glob",
    "netrc",
]


@dataclass(frozen=True)
class Script:
    prompt_ids: list[int]
    answer_ids: list[int] | None  # None: the model's own


@dataclass(frozen=True)
class Run:
    tokens_per_s: float
    answers: list[list[int]]
    per_step: float  # tokens per sequence


class ScriptedSampler:
    """Draws, then says what is written in the script that a row's seed names."""

    def __init__(self) -> None:
        self.scripts: dict[int, Script] = {}

    def __call__(self, logits: Any, rows: Sequence[SampleRow], masks: Sequence[Mask] = ()) -> list[Sampled | None]:
        return [self._say(row, drawn) for row, drawn in zip(rows, sample(logits, rows, masks), strict=True)]

    def _say(self, row: SampleRow, drawn: Sampled | None) -> Sampled | None:
        script = self.scripts.get(row.params.seed)
        if script is None or script.answer_ids is None:
            return drawn
        return Sampled(script.answer_ids[(row.position - len(script.prompt_ids)) % len(script.answer_ids)])


class Forced:
    """Proposes what the script says next, each token with probability `chance`."""

    name = "forced"

    def __init__(self, scripts: Sequence[Script], chance: float) -> None:
        rng = random.Random(1)
        self._drafts = {
            tuple(script.prompt_ids): [t if rng.random() < chance else t ^ 1 for t in script.answer_ids or []]
            for script in scripts
        }

    def open(self, text: Text) -> _ForcedReader:
        return _ForcedReader(text, self._drafts[tuple(text.prompt_ids)])

    def close(self, text: Text) -> None: ...

    def forget(self, tenant: str) -> None: ...


@dataclass
class _ForcedReader:
    text: Text
    drafts: list[int]

    def propose(self, limit: int) -> Draft:
        done = len(self.text.output_ids)
        return Draft(self.drafts[done : done + limit], 4)


@dataclass
class ForcedSampler:
    """Draws for a draft model: what the script says, with probability `chance`; without a script what it would say."""

    scripts: dict[int, Script]
    chance: float
    rng: random.Random

    def __call__(self, logits: Any, rows: Sequence[SampleRow], masks: Sequence[Mask] = ()) -> list[Sampled | None]:
        drawn = sample(logits, rows, masks)
        return [self._say(row) if self.scripts else draw for row, draw in zip(rows, drawn, strict=True)]

    def _say(self, row: SampleRow) -> Sampled:
        script = self.scripts[row.params.seed]
        assert script.answer_ids is not None
        right = script.answer_ids[(row.position - len(script.prompt_ids)) % len(script.answer_ids)]
        return Sampled(right if self.rng.random() < self.chance else right ^ 1)


class Arm:
    """An engine that decodes scripts, beside others over the same weights."""

    def __init__(self, model: Model, num_tokens: int, max_requests: int) -> None:
        self.sampler = ScriptedSampler()
        num_blocks = 4 * max_requests * (num_tokens // BLOCK_SIZE + 2)
        own = Model(model.config, model.weights, WorkingSetAttention(model.config))
        self.engine = Engine(
            make_executor(own, num_blocks, self.sampler),
            PrefixCache(num_blocks, BLOCK_SIZE),
            EngineLimits(max_requests=max_requests, max_step_tokens=1024, max_context=model.config.max_position),
            vocab_size=model.config.vocab_size,
            eos_token_ids=model.config.eos_token_ids,
            clock=time.process_time,
        )
        self._answers: dict[bytes, list[int]] = {}
        self._seconds = 0.0
        self._num_steps = self._num_tokens = 0
        self._is_full = True

    def begin(self, scripts: Sequence[Script], num_tokens: int, temperature: float) -> None:
        self.sampler.scripts = dict(enumerate(scripts))
        self._answers, self._seconds, self._num_steps, self._num_tokens, self._is_full = {}, 0.0, 0, 0, True
        for seed, script in enumerate(scripts):
            packed = pack_tokens(script.prompt_ids)
            command = Generate(
                req_id=seed.to_bytes(16, "big"),
                attempt=1,
                tenant="benchmark",
                token_ids=packed,
                num_prompt_tokens=len(script.prompt_ids),
                root=ROOT_HASH,
                prefix_hashes=hash_prompt(ROOT_HASH, SPACE, SPACE, packed, 0, BLOCK_SIZE),
                num_public_tokens=0,
                namespace=SPACE,
                max_tokens=num_tokens,
                sampling=Sampling(temperature=temperature, seed=seed),
                ignore_eos=True,
            )
            self._answers[command.req_id] = []
            self.engine.submit(command)

    def step(self) -> None:
        """Compute a step. It counts if all sequences have their first token and none is done."""
        counts, began = self._is_full and all(self._answers.values()), time.process_time()
        outputs = self.engine.step().outputs
        if counts:
            self._seconds += time.process_time() - began
        for output in outputs:
            token_ids = unpack_tokens(output.token_ids)
            self._answers[output.req_id] += token_ids
            self._num_tokens += counts * len(token_ids)
            self._num_steps += counts
            self._is_full &= output.finish_reason is None

    def end(self) -> Run:
        answers = list(self._answers.values())
        return Run(self._num_tokens / self._seconds, answers, self._num_tokens / self._num_steps)


def make_executor(model: Model, num_blocks: int, sampler: Sampler) -> LocalExecutor:
    config = model.config
    shape = (num_blocks, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return LocalExecutor(model, KvStore(*shape, dtype=model.dtype, device="cpu"), sampler)


def run(arms: Sequence[Arm], scripts: Sequence[Script], num_tokens: int, temperature: float) -> list[Run]:
    """Decode all `scripts` at once in every arm, in turns."""
    for arm in arms:
        arm.begin(scripts, num_tokens, temperature)
    while any(arm.engine.has_work for arm in arms):
        for arm in arms:
            if arm.engine.has_work:
                arm.step()
    return [arm.end() for arm in arms]


# ---- what is said -------------------------------------------------------------------------------------------------


def make_scripts(kind: str, count: int, tokenizer: Tokenizer, num_prompt: int, num_answer: int) -> list[Script]:
    rng = random.Random(kind)
    if kind == "random":
        vocab = tokenizer.get_vocab_size()
        sizes = [(num_prompt - rng.randrange(num_prompt // 4), num_answer) for _ in range(count)]
        return [Script(*([rng.randrange(10, vocab) for _ in range(n)] for n in size)) for size in sizes]
    scripts = []
    for i in range(count):
        prompt, answer = _TEXTS[kind](i, rng)
        prompt_ids, answer_ids = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
        scripts.append(Script(prompt_ids, None if kind == "own" else answer_ids[:num_answer]))
        assert kind == "own" or len(answer_ids) >= num_answer, (kind, len(answer_ids))
    return scripts


def _source(i: int, rng: random.Random, num_lines: int) -> list[str]:
    lines = inspect.getsource(importlib.import_module(MODULES[i % len(MODULES)])).splitlines()
    first = rng.randrange(max(1, len(lines) - num_lines))
    return lines[first : first + num_lines]


def _edit(i: int, rng: random.Random) -> tuple[str, str]:
    lines = _source(i, rng, 36)
    words = sorted({word for line in lines for word in line.split() if word.isidentifier() and len(word) > 4})
    old, new = rng.choice(words or ["value"]), f"new_{rng.randrange(1000)}"
    edited = []
    for line in lines:
        if rng.random() < 0.04:
            edited.append(f"    # checked {rng.randrange(10_000)}")
        if rng.random() > 0.03:
            edited.append(line.replace(old, new))
    return "Rename a thing in this file.\n" + "\n".join(lines) + "\nThe new file:\n", "\n".join(edited)


def _json(i: int, rng: random.Random) -> tuple[str, str]:
    names = [f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{rng.randrange(1000)}" for _ in range(8)]
    records = [
        {"id": rng.randrange(10**6), "name": name, "price": rng.randrange(10**4) / 100, "tags": rng.sample(names, 2)}
        for name in names
    ]
    prompt = "Add a field.\n" + "\n".join(map(json.dumps, records)) + "\nWith the field:\n"
    return prompt, "\n".join(json.dumps({**record, "stock": rng.randrange(500)}) for record in records)


def _agent(i: int, rng: random.Random) -> tuple[str, str]:
    lines = _source(i, rng, 24)
    path = f"src/{MODULES[i % len(MODULES)]}_{rng.randrange(100)}.py"
    numbers = rng.sample(range(len(lines)), 5)
    seen = "\n".join(f"{path}:{n}: {lines[n].strip()}" for n in sorted(numbers))
    prose = " ".join(" ".join(_source(i + 7 + n, rng, 2)).strip() for n in range(2))
    calls = [json.dumps({"tool": "read_file", "arguments": {"path": path, "first": n, "last": n + 5}}) for n in numbers]
    prompt = f"{calls[0]}\n" + "\n".join(lines) + f"\n{calls[1]}\n{seen}\n"
    answer = f"{prose}\n{calls[2]}\n" + "\n".join(lines[numbers[0] : numbers[0] + 4]) + f"\n{prose[::-1]}\n{calls[3]}\n"
    return prompt, answer + seen + "\n" + calls[4]


def _prose(i: int) -> str:
    module = importlib.import_module(MODULES[i % len(MODULES)])
    texts = [inspect.getdoc(thing) or "" for _, thing in inspect.getmembers(module, callable)]
    return "\n".join([module.__doc__ or "", *dict.fromkeys(texts)])


def _chat(i: int, rng: random.Random) -> tuple[str, str]:
    answer = _prose(i + 5) + _prose(i + 6)
    first = rng.randrange(max(1, len(answer) - 1200))
    return _prose(i)[-1200:] + "\nSo?\n", answer[first:] + _prose(i + 7)


_TEXTS: dict[str, Callable[[int, random.Random], tuple[str, str]]] = {
    "edit": _edit,
    "json": _json,
    "agent": _agent,
    "chat": _chat,
    "own": _chat,
}


# ---- the benchmark ------------------------------------------------------------------------------------------------


def compare(
    folder: Path, batches: Sequence[int], num_prompt: int, num_tokens: int, repeats: int, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Print and return a row per kind, temperature and batch; `only` names some: kinds, or forced chances."""
    torch.set_num_threads(1)
    model = load_model(folder, "cpu", "float32")
    arms = [Arm(model, num_prompt + num_tokens, max(batches)) for _ in range(2)]
    engine = arms[1].engine
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    costs, experience, rows = StepCosts(), Experience(), []
    heads = ("script", "temp", "batch", "off", "on", "gain", "±", "accepted", "per run", "per step")
    print("".join(f"{head:>9}" for head in heads))
    cells: list[tuple[str, float, float | None]] = [
        *((kind, t, None) for kind in ("edit", "json", "agent", "chat", "random") for t in (0.0, 0.7)),
        ("own", 0.7, None),
        *(("random", 0.0, chance) for chance in (0.0, 0.5, 0.8)),
    ]
    for kind, temperature, chance in cells:
        if only and (kind if chance is None else f"{chance:.1f}") not in only:
            continue
        for batch in batches:
            scripts = make_scripts(kind, batch, tokenizer, num_prompt, num_tokens)
            engine.speculator = None
            run(arms, scripts, num_tokens, temperature)  # prompts are cached from here on
            off, on, gains = [], [], []
            for _ in range(repeats):
                proposer: Proposer = Lookup() if chance is None else Forced(scripts, chance)
                engine.speculator = Speculator(proposer)  # remembers no answer of the run before
                engine.speculator.costs, engine.speculator.experience = costs, experience
                before = experience.counts.get(proposer.name, Counts())
                for runs, done in zip((off, on), run(arms, scripts, num_tokens, temperature), strict=True):
                    runs.append(done)
                gains.append(on[-1].tokens_per_s / off[-1].tokens_per_s)
            num_different = sum(a != b for a, b in zip(off[-1].answers, on[-1].answers, strict=True))
            counts = experience.counts.get(proposer.name, Counts()) - before
            row = {
                "script": kind if chance is None else f"{chance:.1f}",
                "temperature": temperature,
                "batch": batch,
                "off": statistics.median(r.tokens_per_s for r in off),
                "on": statistics.median(r.tokens_per_s for r in on),
                "gain": statistics.fmean(gains),
                "gain_error": statistics.stdev(gains) / repeats**0.5 if repeats > 1 else None,
                "drafted": counts.num_drafted,
                "accepted": counts.num_accepted,
                "runs": counts.num_runs,
                "per_step": on[-1].per_step,
                "different_answers": num_different,
            }
            rows.append(row)
            share = f"{counts.num_accepted / counts.num_drafted:.0%}" if counts.num_drafted else "none"
            per_run = f"{1 + counts.num_accepted / counts.num_runs:.1f}" if counts.num_runs else ""
            shown = [row["script"], f"{temperature:.1f}", batch, f"{row['off']:.0f}", f"{row['on']:.0f}"]
            error = "" if row["gain_error"] is None else f"{row['gain_error']:.3f}"
            shown += [f"{row['gain']:.3f}x", error, share, per_run, f"{on[-1].per_step:.2f}"]
            note = f"  {num_different} answers differ" if num_different else ""
            print("".join(f"{value:>9}" for value in shown) + note, flush=True)
    return rows


# ---- a draft model ------------------------------------------------------------------------------------------------


def write_larger(source: Path, folder: Path, num_layers: int, scale: float) -> Path:
    """Write the model in `source` with layers added up to `num_layers`, which add `scale` times random values."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    first, config["num_hidden_layers"] = config["num_hidden_layers"], num_layers
    (folder / "config.json").write_text(json.dumps(config))
    weights, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in list(weights.items()):
        if name.startswith("model.layers.0."):
            for i in range(first, num_layers):
                added = torch.ones_like(tensor)
                if tensor.dim() == 2:
                    added = (torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5).to(tensor.dtype)
                    if "o_proj" in name or "down_proj" in name:
                        added *= scale
                weights[name.replace(".0.", f".{i}.", 1)] = added
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def compare_draft_model(
    source: Path, num_layers: int, batches: Sequence[int], num_prompt: int, num_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Print and return a row per kind of draft, temperature and batch: without drafts, with lookup, with both."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    rows: list[dict[str, Any]] = []
    heads = ("drafts", "temp", "batch", "off", "lookup", "both", "gain", "accepted", "per run", "per step")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_larger(source, Path(scratch) / "model", num_layers, scale=0.5)
        large, model = load_model(folder, "cpu", "float32"), load_model(source, "cpu", "float32")
        config, names = model.config, ("off", "lookup", "both")
        arms = [Arm(large, num_prompt + num_tokens, max(batches)) for _ in names]
        num_blocks = arms[-1].engine.cache.pool.num_blocks
        executor = make_executor(model, num_blocks, sample)
        print(f"a model of {num_layers} layers, a draft model of {config.num_layers}")
        print("".join(f"{head:>9}" for head in heads))
        for chance, temperature in ((None, 0.0), (None, 0.7), (0.0, 0.0), (0.5, 0.0), (0.8, 0.0)):
            for batch in batches:
                kind = "own" if chance is None else "random"
                scripts = make_scripts(kind, batch, tokenizer, num_prompt, num_tokens)
                forced = {} if chance is None else dict(enumerate(scripts))
                executor.sampler = ForcedSampler(forced, chance or 0.0, random.Random(1))
                experience, costs = Experience(), [StepCosts() for _ in names]
                found: dict[str, list[Run]] = {name: [] for name in names}
                for number in range(repeats + 1):
                    for arm, its_costs in zip(arms[1:], costs[1:], strict=True):
                        arm.engine.speculator = Speculator(Lookup())
                        arm.engine.speculator.costs = its_costs
                    assert arms[2].engine.speculator is not None
                    arms[2].engine.speculator.experience = experience
                    arms[2].engine.speculator.model = DraftModel(
                        executor,
                        num_blocks,
                        BLOCK_SIZE,
                        vocab_size=config.vocab_size,
                        window=config.max_position,
                        token_work=config.num_layers / num_layers,
                        clock=time.process_time,
                    )
                    for name, done in zip(names, run(arms, scripts, num_tokens, temperature), strict=True):
                        if number:  # the first run caches prompts, and teaches what drafts cost and are worth
                            found[name].append(done)
                counts = experience.counts.get("model", Counts())
                rates = {name: statistics.median(r.tokens_per_s for r in runs) for name, runs in found.items()}
                gains = [b.tokens_per_s / a.tokens_per_s for a, b in zip(found["off"], found["both"], strict=True)]
                num_different = sum(
                    a != b for a, b in zip(found["off"][-1].answers, found["both"][-1].answers, strict=True)
                )
                label = "agree" if chance is None else f"{chance:.1f}"
                row = {"drafts": label, "temperature": temperature, "batch": batch, **rates}
                row |= {"gain": statistics.median(gains), "drafted": counts.num_drafted}
                row |= {"accepted": counts.num_accepted, "runs": counts.num_runs}
                row |= {"per_step": found["both"][-1].per_step, "different_answers": num_different}
                rows.append(row)
                share = f"{counts.num_accepted / counts.num_drafted:.0%}" if counts.num_drafted else "none"
                per_run = f"{1 + counts.num_accepted / counts.num_runs:.1f}" if counts.num_runs else ""
                shown = [label, f"{temperature:.1f}", batch, *(f"{rate:.0f}" for rate in rates.values())]
                shown += [f"{row['gain']:.2f}x", share, per_run, f"{row['per_step']:.2f}"]
                note = f"  {num_different} answers differ" if num_different else ""
                print("".join(f"{value:>9}" for value in shown) + note, flush=True)
    return rows
