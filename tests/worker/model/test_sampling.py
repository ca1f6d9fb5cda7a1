"""Draws: the batched path against its readable duplicate, independence of the batch, and what each parameter means."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvasir.protocol.sampling import Constraint, ReasoningBudget, Sampling
from kvasir.worker.engine.step import OutOfMemory, Sampled, SampleRow
from kvasir.worker.model import draws as draws_module
from kvasir.worker.model import sampling
from kvasir.worker.model.draws import all_exponentials, draw_plain, exponentials, row_keys
from kvasir.worker.model.memory import memory_errors
from kvasir.worker.model.sampling import sample, start_draws

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.5])  # tokens 1 and 3 are equally likely


def make_row(
    position: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> SampleRow:
    return SampleRow(Sampling(**params), position, output or [], counts_of(prompt or [], output or []))


def counts_of(prompt: list[int], output: list[int]) -> dict[int, int]:
    return {**dict.fromkeys(prompt, 0), **Counter(output)}


def draws(logits: Tensor, count: int = 4000, **params: Any) -> Counter[int]:
    """Draw at `count` positions in one batch."""
    rows = [make_row(position, **params) for position in range(count)]
    return Counter(result.token_id for result in sample(logits.repeat(count, 1), rows))


def noise_of(seed: int, position: int, token_id: int) -> float:
    """The noise of one token, written out with Python's integers."""
    key = xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed, position))

    def hashed(number: int) -> int:
        x = (number * 0x9E3779B97F4A7C15 + key) % (1 << 64)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
        return x ^ x >> 31

    def exponential(bits: int) -> float:
        return -math.log1p(-((bits >> 11) + 0.5) * 2.0**-53)

    of_block = hashed((1 << 40) + token_id // 64)
    least = exponential(of_block) / 64
    return least if of_block % 64 == token_id % 64 else least + exponential(hashed(token_id))


@torch.inference_mode()
def sample_one(logits: Tensor, row: SampleRow) -> Sampled:
    """Draw one token from `logits` [vocab], written out: every filter over the sorted vocabulary."""
    params, logits = row.params, logits.double()
    log_probabilities = logits.log_softmax(dim=0)
    if sampling._is_penalised(params):
        logits = logits.clone()
        sampling._penalise(logits, row)
    if params.temperature == 0:
        token_id = int(logits.argmax())
    else:
        weights = ((logits - logits.max()) / params.temperature).exp()
        order = weights.argsort(descending=True, stable=True).tolist()  # equal weights stay in the order of ids
        if params.top_k:
            order = order[: params.top_k]
        total, before = float(weights[order].sum()), 0.0
        kept: list[int] = []
        for candidate in order:
            weight = float(weights[candidate])
            if kept and (before >= params.top_p * total or weight < params.min_p * float(weights[kept[0]])):
                break
            kept.append(candidate)
            before += weight
        token_id = min(
            (i for i in kept if weights[i] > 0),
            key=lambda i: noise_of(params.seed, row.position, i) / float(weights[i]),
        )
    if params.logprobs is None:
        return Sampled(token_id)
    values, ids = log_probabilities.topk(min(params.logprobs, len(log_probabilities)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(log_probabilities[token_id]), top)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[SampleRow]]:
    vocab = draw(st.sampled_from([5, 80, 700]))
    count = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    logits = torch.randn(count, vocab, generator=generator) * draw(st.sampled_from([0.01, 1.0, 6.0]))
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    ids = st.lists(st.integers(0, vocab - 1), max_size=6)
    rows = []
    for _ in range(count):
        params = Sampling(
            temperature=draw(st.sampled_from([0.0, 1e-3, 0.7, 1.0, 5.0])),
            top_k=draw(st.sampled_from([0, 0, 1, 3, 70, 10_000])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-9])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
            presence_penalty=draw(st.sampled_from([0.0, 1.5])),
            frequency_penalty=draw(st.sampled_from([0.0, -0.5])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            logit_bias=draw(st.sampled_from([{}, {2: -100.0, 4: 1.0, 99_999: 5.0}])),
            seed=draw(st.integers(0, 1 << 62)),
            logprobs=draw(st.sampled_from([None, 0, 3])),
            constraint=draw(st.sampled_from([None, None, Constraint(3), Constraint(0, [1, 2, 4], [[2], [0, 1]])])),
        )
        output = draw(ids)
        rows.append(SampleRow(params, draw(st.integers(0, 1 << 20)), output, counts_of(draw(ids), output), {1, 3}))
    return logits.double(), rows


@settings(max_examples=150)
@given(batches())
def test_batched_draws_equal_the_readable_twin(batch: tuple[Tensor, list[SampleRow]]) -> None:
    logits, rows = batch
    expected = [sample_one(logits[i], row) for i, row in enumerate(rows)]
    for actual in (sample(logits.clone(), rows), start_draws(logits.clone(), rows).read()):
        assert [result.token_id for result in actual] == [result.token_id for result in expected]
        assert [result.logprob for result in actual] == pytest.approx([result.logprob for result in expected])
        assert [len(result.top_logprobs) for result in actual] == [len(result.top_logprobs) for result in expected]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05, "temperature": 0.8}])
def test_a_draw_is_the_same_alone_in_any_batch_and_in_any_place(params: dict[str, Any]) -> None:
    logits = torch.randn(40, 500) * 3
    rows = [make_row(i * 7, seed=i, **params) for i in range(40)]
    alone = [sample(logits[i : i + 1].clone(), [rows[i]])[0].token_id for i in range(40)]
    order = random.Random(0).sample(range(40), 40)
    others = [make_row(3, temperature=0.0), make_row(4, top_k=5)]
    mixed = sample(torch.cat((logits[order], torch.randn(2, 500))), [rows[i] for i in order] + others)
    assert [mixed[order.index(i)].token_id for i in range(40)] == alone


def noise(num_rows: int, vocab: int) -> Tensor:
    """Return [num_rows, vocab]: the noise at `num_rows` positions."""
    return all_exponentials(
        row_keys([make_row(position, seed=3) for position in range(num_rows)], LOGITS.device), vocab
    )


def test_noise_is_fixed_for_ever_and_the_same_asked_for_singly_or_all_at_once() -> None:
    rows = [make_row(0, seed=0), make_row(12345, seed=1 << 62)]
    keys = row_keys(rows, LOGITS.device)
    everything = all_exponentials(keys, 200)
    golden = [
        [2.7878949385260587, 2.5668434812276177, 0.22428289201563242],
        [0.8946103041717102, 0.1515076249559048, 0.9739108077361831],
    ]  # other values would change running requests
    assert everything[:, [0, 1, 199]].tolist() == [pytest.approx(row, rel=1e-14) for row in golden]
    for row, expected in zip(rows, everything, strict=True):
        assert [noise_of(row.params.seed, row.position, i) for i in range(200)] == pytest.approx(expected.tolist())
    ids = torch.tensor([[5, 199, 64, 5], [0, 0, 63, 128]])
    assert torch.equal(exponentials(keys, ids), everything.gather(1, ids))


def test_noise_is_exponential_and_independent_within_a_block_and_across_blocks() -> None:
    """The blocks are a way to make it, which must not show: neither in one token nor in two."""
    values = noise(4000, 130)
    ordered = values.flatten().sort().values
    uniform = 1 - (-ordered).exp()
    expected = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert (uniform - expected).abs().max() * len(uniform) ** 0.5 < 1.95  # Kolmogorov–Smirnov at 0.1 %
    normal = torch.erfinv(2 * (1 - (-values).exp()).clamp(1e-12, 1 - 1e-12) - 1) * 2**0.5
    correlation = torch.corrcoef(normal.t()) - torch.eye(130)
    assert correlation.abs().max() < 5 / 4000**0.5
    assert (values[1:] * values[:-1]).mean() == pytest.approx(1.0, abs=0.02), "positions follow each other by chance"
    pair = torch.minimum(values[:, :64], values[:, 1:65])
    assert pair.mean() == pytest.approx(0.5, abs=0.005) and (pair**2).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("vocab", [1, 63, 64, 500, 4096])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0, 40.0])
def test_leaving_blocks_out_changes_no_draw(vocab: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    logits[1, 1:], logits[2, :-1] = -torch.inf, -torch.inf  # as where a grammar allows one token
    rows = [make_row(i, seed=i, temperature=(0.5, 1.0, 1e-300)[i % 3]) for i in range(40)]
    monkeypatch.setattr(draws_module, "_FEW", 0)
    by_blocks = draw_plain(logits, rows)
    monkeypatch.setattr(draws_module, "_FEW", 1 << 60)
    assert by_blocks == draw_plain(logits, rows)


def test_few_draws_change_where_logits_differ_in_their_last_bits() -> None:
    """What hand-over lives from. One uniform that inverts the cumulative distribution changes a fifth of these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 4096, generator=generator) * 2
    rows = [make_row(i, seed=i) for i in range(500)]
    changed = sample(logits + torch.randn(logits.shape, generator=generator) * 0.02, rows)
    same = sum(a.token_id == b.token_id for a, b in zip(sample(logits.clone(), rows), changed, strict=True))
    assert same / 500 > 0.97


def test_frequencies_follow_the_distribution() -> None:
    counts = draws(LOGITS, temperature=2.0)
    for token_id, probability in enumerate((LOGITS / 2).softmax(0).tolist()):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


def test_greedy_takes_the_most_likely_token_and_ignores_the_seed() -> None:
    assert draws(torch.tensor([1.0, 2.0, 5.0]), count=50, temperature=0.0, seed=9) == {2: 50}


def test_top_k_leaves_k_tokens_and_lower_ids_win_ties() -> None:
    assert set(draws(LOGITS, top_k=1)) == {1}
    assert set(draws(LOGITS, top_k=3)) == {1, 2, 3}


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    probabilities = LOGITS.softmax(0)
    assert set(draws(LOGITS, top_p=float(probabilities[1]) - 0.01)) == {1}
    assert set(draws(LOGITS, top_p=float(probabilities[1]) + 0.01)) == {1, 3}
    assert set(draws(LOGITS, top_p=float(probabilities[1]) * 2 + 0.01)) == {1, 2, 3}


def test_top_p_counts_what_top_k_left() -> None:
    assert set(draws(LOGITS, top_k=2, top_p=0.49)) == {1}
    assert set(draws(LOGITS, top_k=2, top_p=0.51)) == {1, 3}


def test_min_p_is_measured_against_the_most_likely_token() -> None:
    assert set(draws(LOGITS, min_p=math.exp(-1.01))) == {1, 2, 3}
    assert set(draws(LOGITS, min_p=math.exp(-0.99))) == {1, 3}


def test_top_p_over_a_flat_large_vocabulary_looks_beyond_the_first_candidates() -> None:
    counts = draws(torch.zeros(3000), count=500, top_p=0.5)
    assert max(counts) < 1500 and len(counts) > 300


def test_presence_penalty_counts_once_and_frequency_penalty_each_time() -> None:
    logits = torch.zeros(1, 3)
    sample(logits, [make_row(output=[0, 0, 0, 1], presence_penalty=1.0)])
    assert logits.tolist() == [[-1.0, -1.0, 0.0]]
    logits = torch.zeros(1, 3)
    sample(logits, [make_row(prompt=[2], output=[0, 0, 0, 1], frequency_penalty=0.5)])
    assert logits.tolist() == [[-1.5, -0.5, 0.0]]


def test_repetition_penalty_covers_prompt_and_output_and_pushes_both_signs_down() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    sample(logits, [make_row(prompt=[0, 0], output=[1], repetition_penalty=2.0)])
    assert logits.tolist() == [[1.0, -4.0, 2.0]]


def test_bias_can_forbid_and_force_tokens() -> None:
    assert set(draws(LOGITS, logit_bias={1: -100.0, 3: -100.0})) == {0, 2, 4, 5}
    assert set(draws(LOGITS, logit_bias={4: 100.0})) == {4}


def constrained(constraint: Constraint, output: list[int], stop: frozenset[int] = frozenset({1, 3})) -> set[int]:
    """Return which tokens are drawn at 1,500 positions after `output`."""
    rows = [SampleRow(Sampling(constraint=constraint), position, output, {}, stop) for position in range(1500)]
    return {drawn.token_id for drawn in sample(LOGITS.repeat(1500, 1), rows) if drawn is not None}


def test_no_stop_token_is_drawn_before_min_tokens() -> None:
    assert constrained(Constraint(min_tokens=2), [9]) == {0, 2, 4, 5}
    assert constrained(Constraint(min_tokens=2), [9, 9]) == {0, 1, 2, 3, 4, 5}


def test_only_allowed_tokens_are_drawn_those_beyond_the_vocabulary_aside() -> None:
    assert constrained(Constraint(allowed_token_ids=[0, 5, 99_999]), []) == {0, 5}


def test_a_bad_word_is_kept_from_its_end_and_only_after_its_beginning() -> None:
    two, one = Constraint(bad_words=[[7, 8, 1]]), Constraint(bad_words=[[1]])
    assert 1 not in constrained(two, [6, 7, 8]) and 1 not in constrained(one, [])
    assert 1 in constrained(two, [7, 8, 6]) and 1 in constrained(two, [8])


@pytest.mark.parametrize("start", [None, 0])
def test_reasoning_is_ended_when_its_budget_is_used_up_and_then_no_more(start: int | None) -> None:
    constraint = Constraint(bad_words=[[4]], reasoning=ReasoningBudget(4, 2, start))
    begun = [] if start is None else [0]
    free = {0, 1, 2, 3, 5}
    assert constrained(constraint, [*begun, 5]) == free
    assert constrained(constraint, [*begun, 5, 5]) == {4}
    assert constrained(constraint, [*begun, 5, 5, 4]) == free
    if start is not None:
        assert constrained(constraint, [5, 5, 5, 5]) == free, "this answer does not reason"


def test_where_a_constraint_leaves_nothing_the_allowed_tokens_count_alone() -> None:
    assert constrained(Constraint(5, [1, 3], [[1]]), []) == {1, 3}
    assert constrained(Constraint(5, bad_words=[[0], [2], [4], [5]]), []) == {0, 1, 2, 3, 4, 5}
    assert constrained(Constraint(allowed_token_ids=[99_999]), []) == {0, 1, 2, 3, 4, 5}


def test_logprobs_are_those_of_the_model_before_temperature_and_penalties() -> None:
    expected = LOGITS.log_softmax(0).tolist()
    row = make_row(temperature=0.0, logit_bias={4: 100.0}, logprobs=2)
    (result,) = sample(LOGITS[None].clone(), [row])
    assert result.token_id == 4
    assert result.logprob == pytest.approx(expected[4])
    assert [value for _, value in result.top_logprobs] == pytest.approx([expected[1], expected[3]])
    assert sample(LOGITS[None].clone(), [make_row(logprobs=0)])[0].top_logprobs == ()
    assert sample(LOGITS[None].clone(), [make_row()])[0].logprob is None


def test_a_vanishing_temperature_is_greedy_without_overflow() -> None:
    assert set(draws(torch.tensor([1.0, 2.0, 1.5]), count=20, temperature=1e-300)) == {1}


def test_rows_that_are_not_finite_draw_nothing_and_the_others_draw_as_ever() -> None:
    logits = LOGITS.repeat(4, 1)
    logits[1, 2], logits[2, 0], logits[3, 1] = torch.nan, torch.inf, -torch.inf
    rows = [make_row(temperature=t, seed=5) for t in (0.0, 0.0, 1.0, 1.0)]
    good = [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in (0, 3)]
    draws = start_draws(logits.clone(), rows)
    assert sample(logits, rows) == draws.read() == [good[0], None, None, good[1]]
    assert draws.ids.tolist()[1:3] == [0, 0], "the next step is fed with what is no token"


@pytest.mark.parametrize("scale", [0.05, 1.0, 5.0])
def test_a_device_that_is_not_waited_for_draws_the_same_from_a_large_vocabulary(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 20_000, generator=generator) * scale
    logits[:10] = logits[:10].mul(8).round()  # many ties, also where a filter cuts
    filters = [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.5}, {"min_p": 0.3}, {}]
    rows = [make_row(i, seed=3, temperature=0.9, **filters[i % 5]) for i in range(40)]
    assert start_draws(logits.clone(), rows).read() == sample(logits.clone(), rows)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_lack_of_memory_is_told_in_the_engines_words(error: Exception) -> None:
    with pytest.raises(OutOfMemory), memory_errors():
        raise error


def test_the_cpu_allocator_is_told_apart_from_other_runtime_errors() -> None:
    with pytest.raises(OutOfMemory, match="allocate"), memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        torch.zeros(2) @ torch.zeros(3, 3)
