"""The engine over a small transformer: cached, chunked, batched and preempted streams equal the plain single run.

In float64, where keys and values recomputed in another batch differ too little to change a draw.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvasir.cache.kv_store import KvStore
from kvasir.cache.prefix_cache import PrefixCache
from kvasir.protocol.messages import Generate, Output
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.executor import LocalExecutor
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.model.loader import load_model
from kvasir.worker.model.model import Model
from kvasir.worker.model.sampling import sample
from tests.engine_helpers import PUBLIC_SPACE, Stream, make_generate
from tests.model_helpers import SMALL

SIZE = 16
SEEDED = Sampling(temperature=0.8, top_p=0.95, seed=7)
GREEDY_BUT_VARIED = Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(tiny_folder, "cpu", torch.float64)


def make_engine(loaded: Model, *, num_blocks: int = 256, max_step_tokens: int = 256, max_requests: int = 16) -> Engine:
    config = loaded.config
    kv = KvStore(num_blocks, config.num_layers, SIZE, config.num_kv_heads, config.head_dim, loaded.dtype, "cpu")
    kv.data.fill_(float("nan"))  # whoever reads what was never written will know
    kv.zero(range(num_blocks))
    engine = Engine(
        LocalExecutor(loaded, kv, sample),
        PrefixCache(num_blocks, SIZE),
        EngineLimits(max_requests, max_step_tokens, min(config.max_position, num_blocks * SIZE)),
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        check=True,
    )
    engine.public_namespace = PUBLIC_SPACE
    return engine


def run(engine: Engine, *commands: Generate) -> list[Stream]:
    streams = {command.req_id: Stream() for command in commands}
    for command in commands:
        engine.submit(command)
    while engine.has_work:
        for output in engine.step().outputs:
            stream = streams[output.req_id]
            stream.token_ids += unpack_tokens(output.token_ids)
            stream.finish_reason = output.finish_reason
            stream.num_cached = output.num_cached_tokens if stream.num_cached is None else stream.num_cached
    return list(streams.values())


def make_request(
    index: int, max_tokens: int = 24, sampling: Sampling = GREEDY_BUT_VARIED, length: int | None = None
) -> Generate:
    generator = torch.Generator().manual_seed(index)
    prompt = torch.randint(5, SMALL["vocab_size"], (length or 20 + 23 * index,), generator=generator).tolist()
    return make_generate(prompt, max_tokens, req_id=b"%d" % index, sampling=sampling, size=SIZE, ignore_eos=True)


@pytest.mark.parametrize("sampling", [SEEDED, GREEDY_BUT_VARIED])
def test_a_cached_prefill_equals_a_cold_one_token_for_token(loaded: Model, sampling: Sampling) -> None:
    engine = make_engine(loaded)
    cold = run(engine, make_request(3, sampling=sampling))[0]
    warm = run(engine, make_request(3, sampling=sampling))[0]
    assert (cold.num_cached, warm.num_cached) == (0, 80)
    assert warm.token_ids == cold.token_ids
    assert len(set(cold.token_ids)) > 4, "too uniform to tell streams apart"


def test_a_batch_equals_each_alone_and_chunks_equal_the_whole(loaded: Model) -> None:
    commands = [make_request(i, sampling=(GREEDY_BUT_VARIED, SEEDED)[i % 2]) for i in range(6)]
    alone = [run(make_engine(loaded), command)[0].token_ids for command in commands]
    together = run(make_engine(loaded, max_step_tokens=37), *commands)
    assert [stream.token_ids for stream in together] == alone


def test_preemption_and_a_tiny_pool_change_nothing(loaded: Model) -> None:
    commands = [make_request(i, 40, length=30) for i in range(5)]
    alone = [run(make_engine(loaded), command)[0].token_ids for command in commands]
    engine = make_engine(loaded, num_blocks=12)
    assert [stream.token_ids for stream in run(engine, *commands)] == alone
    assert engine.num_preempted > 0


def run_outputs(engine: Engine, commands: list[Generate]) -> list[list[Output]]:
    outputs: dict[bytes, list[Output]] = {command.req_id: [] for command in commands}
    for command in commands:
        engine.submit(command)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.req_id].append(output)
    return list(outputs.values())


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("length", [5, 15, 16, 17, 64, 100])
def test_choices_of_one_prompt_have_the_tokens_and_log_probabilities_of_separate_requests(
    loaded: Model, length: int, is_cached: bool
) -> None:
    samplings = [
        Sampling(temperature=0.8, top_p=0.95, seed=7, logprobs=3),
        Sampling(temperature=0.8, top_p=0.95, seed=8, logprobs=3),
        Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=3),
        Sampling(temperature=1.3, min_p=0.02, seed=9, logit_bias={7: 4.0}, logprobs=3),
    ]
    prompt = torch.randint(5, SMALL["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)).tolist()
    choices = [
        make_generate(prompt, 20, req_id=b"%d" % i, sampling=sampling, size=SIZE, ignore_eos=True)
        for i, sampling in enumerate(samplings)
    ]
    alone = [run_outputs(make_engine(loaded), [choice])[0] for choice in choices]
    engine = make_engine(loaded, max_step_tokens=48)
    if is_cached:
        run_outputs(engine, choices[:1])
    together = run_outputs(engine, choices)
    assert engine.num_forked == 3
    for mine, its in zip(together, alone, strict=True):
        assert [output.token_ids for output in mine] == [output.token_ids for output in its]
        logprobs = [[(entry.logprob, *entry.top) for out in stream for entry in out.logprobs] for stream in (mine, its)]
        for (value, *top), (expected, *expected_top) in zip(*logprobs, strict=True):
            assert value == pytest.approx(expected, abs=1e-9)
            assert dict(top) == pytest.approx(dict(expected_top), abs=1e-9)
    assert len({b"".join(output.token_ids for output in stream) for stream in together}) == 4


def test_a_request_moved_in_mid_stream_draws_the_same_tokens(loaded: Model) -> None:
    for sampling in (SEEDED, GREEDY_BUT_VARIED):
        command = make_request(2, 30, sampling)
        whole = run(make_engine(loaded), command)[0].token_ids
        prompt = unpack_tokens(command.token_ids)
        for num_delivered in (1, 10, 29):
            rest = make_generate(
                prompt,
                30 - num_delivered,
                delivered=whole[:num_delivered],
                sampling=sampling,
                size=SIZE,
                attempt=2,
                ignore_eos=True,
            )
            assert whole[:num_delivered] + run(make_engine(loaded), rest)[0].token_ids == whole
