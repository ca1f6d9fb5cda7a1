"""Answers held to grammars in the engine: their streams do not depend on where and with whom they are computed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvasir.protocol.messages import Generate
from kvasir.protocol.sampling import Constraint, Grammar, ReasoningBudget, Sampling
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.grammars import grammars as grammars_module
from kvasir.worker.grammars.grammars import Grammars
from kvasir.worker.model.model import Model
from kvasir.worker.speculation.lookup import Lookup
from kvasir.worker.speculation.speculator import Speculator
from kvasir.worker.speculation.track import Experience
from tests.engine_helpers import FixedCosts, Rig, Stream, make_generate
from tests.grammar_engine import SIZE, load, make_draft_model, make_engine, run
from tests.grammar_helpers import EOS, TOKENIZER, VOCAB, held_to, matches, schema_grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 4, "maxItems": 6},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return load()


def make_request(index: int, grammar: Grammar | None = None, **options: Any) -> Generate:
    sampling = held_to(grammar or schema_grammar(PERSON), temperature=0.9, seed=index)
    given = {"req_id": b"%d" % index, "sampling": sampling, "size": SIZE} | options
    return make_generate([9, 30 + index] * 10, given.pop("max_tokens", 160), **given)


def text_of(stream: Stream) -> str:
    return TOKENIZER.decode_bytes([token_id for token_id in stream.token_ids if token_id not in EOS]).decode()


def test_a_batch_and_a_tiny_pool_with_preemptions_change_nothing(model: Model) -> None:
    commands = [make_request(index) for index in range(5)]
    alone = [run(make_engine(model), command)[0] for command in commands]
    tight = make_engine(model, num_blocks=14)
    together = run(tight, *commands)
    assert tight.num_preempted > 0
    assert [stream.token_ids for stream in together] == [stream.token_ids for stream in alone]
    assert len({tuple(stream.token_ids) for stream in together}) == 5
    assert {stream.finish_reason for stream in together} == {"stop"}


def test_forks_have_the_tokens_of_separate_requests(model: Model) -> None:
    samplings = [
        held_to(schema_grammar(PERSON), temperature=0.9, seed=1),
        held_to(schema_grammar(PERSON), temperature=0.9, seed=2),
        held_to(Grammar("choice", '["yes", "no"]'), temperature=0.9, seed=3),
        Sampling(temperature=0.9, seed=4),
    ]
    choices = [
        make_generate([9, 30] * 12, 160, req_id=b"%d" % index, sampling=sampling, size=SIZE)
        for index, sampling in enumerate(samplings)
    ]
    alone = [run(make_engine(model), choice)[0].token_ids for choice in choices]
    engine = make_engine(model)
    for choice in choices:
        engine.submit(choice)
    while engine.is_preparing:  # else those that are ready begin alone
        time.sleep(0.001)
    streams: dict[bytes, list[int]] = {choice.req_id: [] for choice in choices}
    while engine.has_work:
        for output in engine.step().outputs:
            streams[output.req_id] += unpack_tokens(output.token_ids)
    assert engine.num_forked == 3
    assert list(streams.values()) == alone


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[Generate, Stream]]:
    """Requests held by grammars, reasoning, penalties and constraints, and the answer to each computed alone."""
    bias = {EOS[0]: 50.0}
    reasoning = Constraint(
        reasoning=ReasoningBudget(12, 6), grammar=Grammar("choice", '["yes, yes, yes", "no, no, no"]')
    )
    commands = [
        *(make_request(index) for index in range(4)),
        make_request(4, sampling=Sampling(temperature=0.0, constraint=reasoning, logit_bias=bias, logprobs=2)),
        make_request(5, sampling=Sampling(temperature=0.8, seed=3, top_p=0.9, presence_penalty=0.5), max_tokens=60),
        make_request(6, sampling=Sampling(temperature=0.0, frequency_penalty=0.1, logprobs=1), max_tokens=60),
        make_request(7, sampling=Sampling(temperature=0.0, constraint=Constraint(min_tokens=9, bad_words=[[30]]))),
    ]
    return [(command, run(make_engine(model), command)[0]) for command in commands]


@pytest.mark.parametrize("drafts", ["lookup", "a model of the same mind", "a model of another mind"])
def test_drafts_change_no_answer_whatever_holds_it(
    model: Model, alone: list[tuple[Generate, Stream]], drafts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts come from what was said before, and from draft models. One of the same mind is wrong nowhere, unless it
    draws otherwise than the engine."""
    commands = [command for command, _ in alone]
    engine = make_engine(model)
    draft_model = None if drafts == "lookup" else make_draft_model(engine, is_of_same_mind="same" in drafts)
    engine.speculator = Speculator(Lookup(), draft_model)
    engine.speculator.costs = FixedCosts()
    runs: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Experience, "count", lambda _, *run: runs.append(run))
    for _ in range(2):  # the second time with the answers of the first to draw on
        together = run(engine, *commands)
        assert [(s.token_ids, s.finish_reason) for s in together] == [(s.token_ids, s.finish_reason) for _, s in alone]
    runs = [run for run in runs if run[0] == ("lookup" if draft_model is None else "model")]
    num_drafted, num_accepted = (sum(run[i] for run in runs) for i in (1, 2))
    assert 100 < num_accepted < num_drafted
    num_wrong_runs = sum(run[2] < run[1] for run in runs)
    if "same" in drafts:  # some answers end while there are drafts left
        assert num_wrong_runs <= 2 * len(commands) < len(runs) / 3
    else:
        assert num_wrong_runs > 2 * len(commands)


@pytest.mark.parametrize("num_delivered", [1, 7, 20])
def test_a_request_handed_over_goes_on_as_if_it_had_stayed(model: Model, num_delivered: int) -> None:
    whole = run(make_engine(model), make_request(3))[0]
    assert len(whole.token_ids) > 20
    resumed = make_request(3, delivered=whole.token_ids[:num_delivered], attempt=2, max_tokens=160 - num_delivered)
    rest = run(make_engine(model), resumed)[0]
    assert whole.token_ids[:num_delivered] + rest.token_ids == whole.token_ids
    assert rest.finish_reason == whole.finish_reason == "stop"


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("choice", '["red", "green", "é\\"\\n"]'), r"red|green|é\"\n"),
        (Grammar("regex", "[ab]{3}-\\d{2}"), r"[ab]{3}-\d{2}"),
        (Grammar("lark", 'start: "<" NAME ">"\nNAME: /[a-z]{1,9}/'), r"<[a-z]{1,9}>"),
        (Grammar("lark", 'root ::= "x" [0-9] | "y"'), r"x[0-9]|y"),
    ],
)
def test_every_kind_of_grammar_ends_the_answer_exactly_where_it_is_complete(
    model: Model, grammar: Grammar, expected: str
) -> None:
    for index in range(4):
        stream = run(make_engine(model), make_request(index, grammar))[0]
        assert stream.finish_reason == "stop", stream.error
        assert re.fullmatch(expected, text_of(stream))
        assert matches(grammar, text_of(stream))


def test_an_answer_ends_only_where_the_grammar_allows_it(model: Model) -> None:
    sampling = held_to(Grammar("regex", "(ab){5,}"), temperature=0.0, logit_bias={EOS[0]: 100.0})
    stream = run(make_engine(model), make_generate([9], 40, sampling=sampling, size=SIZE))[0]
    assert text_of(stream) == "ab" * 5, "the end is by far the likeliest, and comes as soon as it may"
    assert stream.finish_reason == "stop"
    assert stream.token_ids[-1] == EOS[0]


def test_banned_words_and_allowed_tokens_count_within_the_grammar_and_never_against_it(model: Model) -> None:
    grammar = Grammar("choice", '["yes", "no"]')
    for letter, expected in (("y", "no"), ("n", "yes")):
        words = [[token_id] for token_id in range(VOCAB) if TOKENIZER.decode_str([token_id]).startswith(letter)]
        constraint = Constraint(bad_words=words[:256], grammar=grammar)
        command = make_generate([9], 9, sampling=Sampling(temperature=0.0, constraint=constraint), size=SIZE)
        assert text_of(run(make_engine(model), command)[0]) == expected
    constraint = Constraint(allowed_token_ids=[3000], grammar=grammar)  # not one of them
    command = make_generate([9], 9, sampling=Sampling(constraint=constraint), size=SIZE)
    assert text_of(run(make_engine(model), command)[0]) in ("yes", "no")


@pytest.mark.parametrize("start", [None, 11])
def test_reasoning_is_free_cannot_end_the_answer_and_the_grammar_holds_after_it(
    model: Model, start: int | None
) -> None:
    grammar = Grammar("choice", '["yes", "no"]')
    end = 12
    constraint = Constraint(reasoning=ReasoningBudget(end, 6, start), grammar=grammar)
    bias = {EOS[0]: 50.0, **({} if start is None else {start: 100.0})}
    sampling = Sampling(temperature=0.0, repetition_penalty=100.0, logit_bias=bias, constraint=constraint)
    token_ids = run(make_engine(model), make_generate([9], 30, sampling=sampling, size=SIZE))[0].token_ids
    assert end in token_ids[6:8], "the budget ends it, nothing else"
    assert (token_ids[0] == start) == (start is not None)
    assert TOKENIZER.decode_bytes(token_ids[token_ids.index(end) + 1 :]).decode() in ("yes", "no")


def test_without_the_token_that_begins_reasoning_the_grammar_holds_from_the_first_one(model: Model) -> None:
    constraint = Constraint(reasoning=ReasoningBudget(12, start=11), grammar=Grammar("choice", '["yes", "no"]'))
    sampling = Sampling(temperature=0.0, logit_bias={11: -100.0}, constraint=constraint)
    command = make_generate([9], 30, sampling=sampling, size=SIZE)
    assert text_of(run(make_engine(model), command)[0]) in ("yes", "no")


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(model: Model) -> None:
    good, bad = run(make_engine(model), make_request(1), make_request(2, schema_grammar({"not": {}})))
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "uses not" in bad.error
    assert good.finish_reason == "stop"


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(model: Model) -> None:
    grammar = Grammar("regex", r"\w{1,2000}\d{1,2000}" * 10)
    sampling = held_to(grammar, temperature=100.0, seed=1)
    good, bad = run(make_engine(model), make_request(1), make_request(2, sampling=sampling, max_tokens=1500))
    assert (bad.finish_reason, good.finish_reason) == ("error", "stop")
    assert "too complex" in bad.error


def test_an_engine_without_grammars_refuses_them() -> None:
    rig = Rig()
    stream = rig.submit(make_generate([1, 2], sampling=held_to(Grammar("regex", "a"))))
    rig.run()
    assert (stream.finish_reason, stream.error) == ("error", "this worker cannot hold answers to grammars")


class SlowGrammars(Grammars):
    """Compiles when told to."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, EOS)
        self.go = threading.Event()

    def open(self, tenant: str, constraint: Constraint, output_ids: Sequence[int]) -> Any:
        self._compiling.submit(lambda: self.go.wait(30))
        return super().open(tenant, constraint, output_ids)


def engine_with(model: Model, grammars: Grammars) -> Engine:
    engine = make_engine(model)
    engine._grammars = grammars
    return engine


def test_others_go_on_while_a_grammar_is_compiled_and_it_can_be_aborted(model: Model) -> None:
    grammars = SlowGrammars()
    engine = engine_with(model, grammars)
    engine.submit(make_request(1))
    engine.submit(make_request(2))
    free = make_generate([5, 6], 5, req_id=b"free", sampling=Sampling(temperature=0.0), size=SIZE, ignore_eos=True)
    engine.submit(free)
    reports = [engine.step() for _ in range(5)]
    assert [output.req_id for report in reports for output in report.outputs] == [b"free"] * 5
    assert not engine.has_work
    assert engine.is_preparing
    assert reports[-1].load.num_waiting == 2
    engine.abort(b"2", 1)
    assert [(output.req_id, output.finish_reason) for output in engine.step().outputs] == [(b"2", "abort")]
    grammars.go.set()
    stream = run_rest(engine)
    assert stream.finish_reason == "stop"


def run_rest(engine: Engine) -> Stream:
    stream, deadline = Stream(), time.monotonic() + 30
    while engine.num_unfinished and time.monotonic() < deadline:
        for output in engine.step().outputs:
            stream.token_ids += unpack_tokens(output.token_ids)
            stream.finish_reason = output.finish_reason
    return stream


def test_a_grammar_that_is_never_compiled_fails_its_request_after_a_while(model: Model) -> None:
    engine = engine_with(model, SlowGrammars())
    now = [100.0]
    engine._clock = lambda: now[0]
    engine.submit(make_request(1))
    assert not engine.step().outputs
    now[0] += 11.0
    [output] = engine.step().outputs
    assert output.finish_reason == "error"
    assert "not compiled within 10 s" in output.error


def test_compiled_grammars_are_kept_per_tenant_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Grammar] = []

    def make(tokenizer: Any, grammar: Grammar) -> Any:
        compiled.append(grammar)
        return original(tokenizer, grammar)

    original: Callable[..., Any] = grammars_module.make_matcher
    monkeypatch.setattr(grammars_module, "make_matcher", make)
    grammars = Grammars(TOKENIZER, EOS)

    def use(tenant: str, number: int) -> None:
        matcher = grammars.open(tenant, Constraint(grammar=Grammar("regex", f"a{{{number}}}")), ())
        deadline = time.monotonic() + 10
        while not matcher.is_ready and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not matcher.error

    use("a", 1)
    use("a", 1)
    assert len(compiled) == 1
    use("b", 1)
    assert len(compiled) == 2, "what one tenant has compiled is not there for others"
    for number in range(2, 20):
        use("b", number)
    use("a", 1)
    assert len(compiled) == 20, "a tenant's own are dropped first"
    use("b", 1)
    assert len(compiled) == 21
    assert len(grammars._compiled) == 17
