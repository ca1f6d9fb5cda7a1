"""Grammars as texts in llguidance's notation, against what its own package makes of them."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from kvasir.protocol.call_grammar import JSON_OPTIONS
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.grammars import LIMITS
from kvasir.protocol.lark import lark_of
from kvasir.protocol.sampling import Grammar, ReasoningBudget
from tests.grammar_helpers import TOKENIZER, matches, schema_grammar

END, START = 3, 2  # any two tokens of the model's


def held(
    grammar: Grammar, text: str, before: list[int] | None = None, reasoning: ReasoningBudget | None = None
) -> bool:
    """Return whether an answer of the tokens `before` and of `text` is one, as an engine sees it that gets our text."""
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(lark_of(grammar, reasoning)), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = [*(before or []), *TOKENIZER.tokenize_bytes(text.encode())]
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


PIECES = ["a", "b+", "/", r"\/", r"\\", "\n", r"\n", '"', "[/]", "\t", " ", "|", r"\."]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_a_regular_expression_is_quoted_as_the_package_does(text: str) -> None:
    theirs = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    assert lark_of(Grammar("regex", text)) == f"%llguidance {{}}\n{theirs}"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "of": {"enum": ["a", 1, None, 'say "%json"\n']}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "answer", ['{"name":"x"}', '{"name": "x", "of": 1}', '{"of":1}', "{}", '{"name":"too long"}', '{"name":"x","y":1}']
)
def test_a_schema_holds_the_same_answers_as_the_package_s_own_way_to_read_it(answer: str) -> None:
    """The package's own way to read a schema, which none of ours takes, is the oracle."""
    grammar = schema_grammar(SCHEMA)
    native = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    matcher = LLMatcher(TOKENIZER, native, log_level=0, limits=LIMITS)
    token_ids = TOKENIZER.tokenize_bytes(answer.encode())
    is_held = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
    assert held(grammar, answer) == is_held == matches(grammar, answer)


@given(st.lists(st.text(string.printable, min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
def test_each_choice_is_one(choices: list[str]) -> None:
    grammar = Grammar("choice", json.dumps(choices))
    assert all(held(grammar, choice) for choice in choices)
    assert not held(grammar, max(choices, key=len) + "?")


def test_an_answer_may_reason_before_what_is_held() -> None:
    grammar, thought = schema_grammar(SCHEMA), TOKENIZER.tokenize_bytes(b"well,\nlet me see")
    inside, before = ReasoningBudget(END), ReasoningBudget(END, start=START)
    answer = '{"name":"x"}'
    assert held(grammar, answer, [*thought, END], inside)
    assert held(grammar, answer, [START, *thought, END], before)
    assert held(grammar, answer, [], before)
    assert not held(grammar, answer, [], inside), "it would be taken for reasoning"
    assert not held(grammar, answer, [*thought, END], before)
    assert not held(grammar, "{}", [*thought, END], inside)
    assert not held(grammar, answer, thought, inside)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "no valid JSON"),
        (Grammar("json_schema", "3"), "no object"),
        (Grammar("choice", "[]"), "at least one"),
        (Grammar("calls", "{}"), "tools cannot be read"),
    ],
)
def test_what_is_no_grammar_is_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        lark_of(grammar)
