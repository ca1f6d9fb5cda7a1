"""Grammars as llguidance (github.com/guidance-ai/llguidance) reads them: one translation for the gateway, which checks
them, and for the worker, which holds answers to them. Needs the package, so nothing imports this but those two.

Its limits bound what a grammar may cost: a step more than some milliseconds, or all its states together more than some
ten megabytes, and it fails. They do not bound everything: a deep recursion can still overflow the stack. So the gateway
tries every grammar in a process that may die (`gateway.text.grammar_helper`), with less stack than the worker has.
"""

from __future__ import annotations

import re
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from kvasir.protocol.errors import BadRequest, ModelError
from kvasir.protocol.lark import lark_of, read_calls, read_schema
from kvasir.protocol.sampling import Grammar

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,  # about 4 ms
    step_max_items=20_000,  # about 1 ms
    max_lexer_states=20_000,  # of 1 to 2 kB each
    verbose_errors=False,
)
_WORDS = (  # of llguidance's errors
    (r"Unimplemented keys: \[(.*?)\]", "uses {}, which answers cannot be held to here; leave it out"),
    (r"Unknown format: (\S+)", "uses format {}, which answers cannot be held to here; leave it out"),
    (r"oneOf constraints are not supported", "uses oneOf with schemas that do not exclude each other; use anyOf"),
    (r"Resource '(.*?)' is not present", "refers to {}, which is not within it; bring what is meant in $defs"),
    (r"Unsatisfiable schema", "allows nothing at all: a part that has to match is false or contradicts itself"),
)
_OURS = re.compile(r"at \d+\(\d+\): (?:failed to compile JSON schema: )?(.*?)\n *1 \| %llguidance", re.DOTALL)
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}  # keywords whose values are schemas by name
_DATA = {"const", "enum", "default", "examples", "example"}  # keywords whose values are no schemas


def load_tokenizer(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """Return the tokenizer of a model folder; takes a second for a large one.

    Raises:
        ModelError: there is none, or it is not one that can be held to grammars.
    """
    if not eos_token_ids:
        raise ModelError(f"{folder} names no token that ends an answer")
    try:
        return LLTokenizer(str(folder / "tokenizer.json"), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (ValueError, OSError) as error:
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be used with grammars: {error}") from None


def make_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of an answer. Does not hold Python's lock while it compiles.

    Raises:
        BadRequest: what is wrong with the grammar.
    """
    matcher = LLMatcher(tokenizer, translate(grammar), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise BadRequest(plain(matcher.get_error()), param="grammar")
    return matcher


def translate(grammar: Grammar) -> str:
    """Return what `LLMatcher` takes.

    Raises:
        BadRequest: no valid JSON, no choice, or a keyword that cannot be honoured.
    """
    match grammar.kind:
        case "json_schema":
            _check_keywords(read_schema(grammar.text))
        case "lark":
            try:
                return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
            except Exception as error:  # of a converter that names none
                raise BadRequest(f"the grammar cannot be read: {error}", param="grammar") from None
        case "calls":
            calls = read_calls(grammar.text)
            for schema in [calls.content or {}, *(tool.schema for tool in calls.tools)]:
                _check_keywords(schema)
    return LLMatcher.grammar_from_lark(lark_of(grammar))


def plain(error: str) -> str:
    """Return what llguidance says, in our words and bounded, without the grammar that we wrote around what was sent."""
    if found := _OURS.match(error):
        error = found[1]
    for pattern, words in _WORDS:
        if found := re.search(pattern, error):
            return f"the JSON schema {words.format(*found.groups())}"[:500].replace('"', "")
    if "NoExtensionBias" in error:
        return "nothing can match the grammar: a part that has to match allows nothing, or has no end"
    return " ".join(error.replace("<non-verbose/>", "").split())[:500]


def _check_keywords(schema: object) -> None:
    unheard = _unheard(schema)
    if unheard is not None:
        raise BadRequest(plain(f'Unimplemented keys: ["{unheard}"]'), param="grammar")


def _unheard(schema: object) -> str | None:
    """Return a keyword in `schema` that llguidance would pass over, obey as its own, or honour by halves.

    It counts a key that occurs twice as two properties.
    """
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            for name in ("nullable", "x-guidance", "$recursiveRef"):
                if name in part:
                    return name
            if isinstance(part.get("minProperties"), (int, float)) and part["minProperties"] > 1:
                return "minProperties above 1"
            for name, value in part.items():
                if name in _BY_NAME and isinstance(value, dict):
                    pending += value.values()
                elif name not in _DATA:
                    pending.append(value)
    return None
