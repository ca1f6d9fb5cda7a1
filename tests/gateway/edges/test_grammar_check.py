"""Grammars are tried where they can do no harm: a hostile one gets a clear answer soon, and others do not notice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from kvasir.gateway.edges.grammar_check import MAX_WAITING_OF_TENANT, GrammarCheck, GrammarModel
from kvasir.gateway.text.grammar_helper import TOO_MUCH
from kvasir.protocol.errors import BadRequest, Overloaded, Unavailable
from kvasir.protocol.sampling import Grammar
from tests.grammar_helpers import DEMO, EOS, VOCAB, schema_grammar

GOOD = schema_grammar({"type": "object", "properties": {"a": {"type": "integer"}}})
DEEP = "start: " + " ".join(f"r{i}" for i in range(3000))
DEEP += "".join(f'\nr{i}: "a" | r{(i + 1) % 3000}' for i in range(3000))  # overflows the stack
CHAIN = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"minLength": 1}}
HOSTILE = {
    "a chain of rules": Grammar("lark", DEEP[:65_536]),
    "nested parentheses": Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "nested arrays": Grammar("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "references that double": schema_grammar({"$ref": "#/$defs/d0", "$defs": CHAIN}),
    "a product of unions": schema_grammar(
        {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 99 + i}]} for i in range(40)]}
    ),
    "repeated repetitions": Grammar("regex", "((((\\w{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "half a megabyte of states": Grammar("regex", "(.*a){200}.{200}b"),
    "an unknown reference": schema_grammar({"$ref": "http://10.0.0.1/schema"}),
    "no JSON": Grammar("json_schema", '{"type":'),
    "no grammar": Grammar("lark", "start: ("),
    "a panic's kin": Grammar("lark", "start: /a/ & ~/a/ \n%llguidance {}"),
}


@asynccontextmanager
async def open_check() -> AsyncIterator[GrammarCheck]:
    check = GrammarCheck({"demo": GrammarModel(DEMO, VOCAB, EOS)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(check.run)
        with trio.fail_after(60):
            await check.verdict("t", "demo", GOOD)  # the helper is up
            yield check
        nursery.cancel_scope.cancel()


async def refusal(check: GrammarCheck, grammar: Grammar, tenant: str = "t") -> str:
    try:
        await check.verdict(tenant, "demo", grammar)
    except BadRequest as error:
        assert error.param == "grammar"
        return error.message
    return ""


def run(body: Any) -> None:
    async def main() -> None:
        async with open_check() as check:
            await body(check)

    trio.run(main)


def test_a_good_grammar_is_tried_once_per_tenant() -> None:
    async def body(check: GrammarCheck) -> None:
        assert check.verdict_nowait("t", "demo", GOOD)
        assert not check.verdict_nowait("other", "demo", GOOD)
        await check.verdict("other", "demo", GOOD)
        assert check._num_tried == 2

    run(body)


def test_hostile_grammars_are_refused_or_harmless_within_a_second_and_a_good_one_is_not_held_up() -> None:
    async def body(check: GrammarCheck) -> None:
        took: dict[str, float] = {}
        said: dict[str, str] = {}

        async def attack(name: str, grammar: Grammar) -> None:
            start = time.monotonic()
            said[name] = await refusal(check, grammar, name)
            took[name] = time.monotonic() - start

        for name, grammar in HOSTILE.items():
            await attack(name, grammar)
            assert took[name] < 5.0, (name, took[name], "0.8 s is the bound, the rest is for slow machines")
        assert said["a chain of rules"] == TOO_MUCH, "its process died"
        for name in ("nested arrays", "an unknown reference", "no JSON", "no grammar", "a product of unions"):
            assert said[name], name
        start = time.monotonic()
        assert await refusal(check, schema_grammar({"type": "string", "maxLength": 7})) == ""
        assert time.monotonic() - start < 5.0
        assert check._process.returncode is None

    run(body)


@pytest.mark.parametrize(
    "grammar",
    [
        schema_grammar({"$ref": "#"}),
        Grammar("regex", r"x[^\s\S]"),
        Grammar("lark", "start: a\na: b\nb: a"),
    ],
    ids=lambda grammar: grammar.text,
)
def test_a_grammar_that_nothing_can_match_is_refused_in_our_words(grammar: Grammar) -> None:
    async def body(check: GrammarCheck) -> None:
        assert "nothing can match the grammar" in await refusal(check, grammar)

    run(body)


def test_a_refused_grammar_is_remembered_and_refused_at_once() -> None:
    async def body(check: GrammarCheck) -> None:
        bad = schema_grammar({"type": "array", "contains": {}})
        assert "contains" in await refusal(check, bad)
        with pytest.raises(BadRequest, match="contains"):
            check.verdict_nowait("t", "demo", bad)
        assert check._num_tried == 2

    run(body)


def test_a_helper_that_hangs_or_dies_is_replaced() -> None:
    async def body(check: GrammarCheck) -> None:
        process = check._process
        async with trio.open_nursery() as nursery:
            outcome: list[str] = []

            async def ask() -> None:
                try:
                    await check.verdict("t", "demo", Grammar("regex", "ab*"))
                except Unavailable as error:
                    outcome.append(error.message)

            os.kill(process.pid, signal.SIGSTOP)
            nursery.start_soon(ask)
            await trio.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)
        assert outcome == ["the grammar could not be checked just now; try again"]
        await check.verdict("t", "demo", Grammar("regex", "ab*"))
        assert check._process is not process

    run(body)


def test_one_tenant_cannot_have_all_the_places() -> None:
    async def body(check: GrammarCheck) -> None:
        refused = 0

        async def ask(number: int) -> None:
            nonlocal refused
            try:
                await check.verdict("greedy", "demo", Grammar("regex", f"a{{{number}}}"))
            except Overloaded:
                refused += 1

        async with trio.open_nursery() as nursery:
            for number in range(1, 40):
                nursery.start_soon(ask, number)
            await trio.lowlevel.checkpoint()
            await check.verdict("modest", "demo", GOOD)
        assert refused == 39 - MAX_WAITING_OF_TENANT - 1
        assert not check._turns
        assert check._num_waiting == 0

    run(body)


def test_a_model_without_a_tokenizer_takes_no_grammar() -> None:
    with pytest.raises(BadRequest, match="no tokenizer"):
        GrammarCheck({}).verdict_nowait("t", "oracle", GOOD)


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if, then"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"contains": {}}, "contains"),
        ({"propertyNames": {}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"dependencies": {"a": ["b"]}}, "dependencies"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"unevaluatedItems": False}, "unevaluatedItems"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        ({"type": "string", "nullable": True}, "nullable"),
        ({"properties": {"a": {"nullable": True}}}, "nullable"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ],
)
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name(schema: Any, name: str) -> None:
    from kvasir.protocol.grammars import make_matcher
    from tests.grammar_helpers import TOKENIZER

    with pytest.raises(BadRequest) as caught:
        make_matcher(TOKENIZER, Grammar("json_schema", json.dumps(schema)))
    assert name in caught.value.message
