"""The executor of a device that is not waited for, on the CPU, beside the one that computes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import SequenceSlice
from kvasir.worker.model.device_executor import DeviceExecutor, Forward
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.memory import memory_errors
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import sample
from tests.engine_helpers import PUBLIC_SPACE, make_generate
from tests.model_helpers import SMALL

SIZE = 16


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(tiny_folder, "cpu", torch.float64)  # where a row is the same in any batch


class Run:
    """An engine over `model`, on a device or not, and the answers it has given."""

    def __init__(self, model: Model, forward: Forward | None, num_blocks: int = 64) -> None:
        config = model.config
        shape = (num_blocks, config.num_layers, SIZE, config.num_kv_heads, config.head_dim)
        self.kv = kv = KvStore(*shape, dtype=model.dtype, device="cpu", has_spare=True)
        self.engine = Engine(
            LocalExecutor(model, kv, sample) if forward is None else DeviceExecutor(forward, kv),
            PrefixCache(num_blocks, SIZE),
            EngineLimits(16, 128, 512),
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            is_ahead=forward is not None,
            check=True,
        )
        self.engine.public_namespace = PUBLIC_SPACE
        self.num_ahead = 0
        self.answers: dict[bytes, list[Any]] = {}
        self.errors: dict[bytes, str] = {}

    def take(self, commands: list[Generate]) -> None:
        for command in commands:
            self.answers[command.req_id] = []
            self.engine.submit(command)
        while self.engine.has_work:
            for output in self.engine.step().outputs:
                top = [[token_id for token_id, _ in entry.top] for entry in output.logprobs]
                self.answers[output.req_id] += [unpack_tokens(output.token_ids), top, output.finish_reason]
                if output.error:
                    self.errors[output.req_id] = output.error
            self.num_ahead += bool(self.engine._flights)


def make_commands(more: int = 0, count: int = 12) -> list[Generate]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 0.7, "top_k": 9, "min_p": 0.01},
    ]
    generator = torch.Generator().manual_seed(4)
    commands = []
    for i in range(count):
        prompt = torch.randint(5, SMALL["vocab_size"], (7 + 11 * (i % 5),), generator=generator).tolist()
        sampling = Sampling(seed=i, **kinds[i % 4])
        commands.append(make_generate(prompt, 20 + i + more, req_id=b"%d" % i, sampling=sampling, size=SIZE))
    commands.append(make_generate(prompt, 9, req_id=b"fork", sampling=Sampling(seed=99), size=SIZE))
    return commands


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_draws_that_stay_on_the_device_give_the_same_answers(model: Model, num_blocks: int) -> None:
    plain, device = Run(model, None, num_blocks), Run(model, model.forward, num_blocks)
    more = 30 if num_blocks == 12 else 0  # answers that outgrow the pool
    plain.take(make_commands(more))
    device.take(make_commands(more))
    assert device.answers == plain.answers
    assert device.num_ahead > 10, "no step was launched before the one before was read"
    assert (device.engine.num_preempted > 0) == bool(more)


def test_penalties_and_constraints_wait_for_their_tokens_and_give_the_same(model: Model) -> None:
    samplings = [Sampling(temperature=0.0, repetition_penalty=1.3), Sampling(seed=3, presence_penalty=0.8)]
    commands = [
        make_generate([7, 8, 9 + i], 25, req_id=b"%d" % i, sampling=s, size=SIZE) for i, s in enumerate(samplings)
    ]
    plain, device = Run(model, None), Run(model, model.forward)
    plain.take(commands)
    device.take(commands)
    assert device.answers == plain.answers and device.num_ahead == 0


class Failing:
    """A model that lacks memory in step `at`, as torch says it, or has no finite logits for the first row there."""

    def __init__(self, model: Model, at: int, kind: str) -> None:
        self._model, self._at, self._kind = model, at, kind
        self.num_steps = 0

    @torch.inference_mode()
    def __call__(self, slices: list[SequenceSlice], kv: KvStore, drawn: Tensor | None) -> Tensor:
        self.num_steps += bool(slices)
        logits = self._model.forward(slices, kv, drawn)
        if slices and self.num_steps == self._at:
            if self._kind == "memory":
                with memory_errors():
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            logits[0] = torch.nan
        return logits


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_step_without_memory_costs_no_answer(model: Model, at: int) -> None:
    plain, failing = Run(model, None), Failing(model, at, "memory")
    device = Run(model, failing)
    plain.take(make_commands())
    device.take(make_commands())
    assert device.engine.num_out_of_memory == 1 and not device.errors
    assert {i: tokens_of(answer) for i, answer in device.answers.items()} == {
        i: tokens_of(answer) for i, answer in plain.answers.items()
    }


def test_a_row_that_is_not_finite_ends_its_sequence_alone_though_the_next_step_was_fed_with_it(model: Model) -> None:
    plain, device = Run(model, None), Run(model, Failing(model, 9, "nan"))
    plain.take(make_commands())
    device.take(make_commands())
    assert list(device.errors) == [b"0"] and "not finite" in device.errors[b"0"]
    assert {i: a for i, a in device.answers.items() if i != b"0"} == {
        i: a for i, a in plain.answers.items() if i != b"0"
    }


def tokens_of(answer: list[Any]) -> list[int]:
    return [token_id for part in answer[::3] for token_id in part]
