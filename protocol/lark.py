"""A request's grammar as one text in llguidance's notation, a dialect of Lark's: what other engines take, too.

Needs no package: a worker hands the text to the engine that it fronts.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from kvasir.protocol.call_grammar import CallGrammar, calls_in_lark, json_in_lark
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import Grammar, ReasoningBudget

HEADER = "%llguidance {}\n"
MAX_CHOICES = 4096
_ESCAPED = re.compile(r"\\.|[/\n\r\t]", re.DOTALL)  # in a regular expression: what is escaped already, what is to be
_ESCAPES = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def lark_of(grammar: Grammar, reasoning: ReasoningBudget | None = None) -> str:
    """Return `grammar` in llguidance's notation; with `reasoning` an answer reasons before what is held to it:
    where that has begun in the prompt; else if it likes.

    The notation of llama.cpp (`::=`) stays as it is: whoever reads Lark as llguidance does reads that too. A grammar
    of the caller's own is taken as it is, so that it does not go with `reasoning`.

    Raises:
        BadRequest: no valid JSON, no choice, or a caller's grammar with `reasoning`.
    """
    if grammar.kind == "lark":
        if reasoning is not None:
            raise BadRequest("a grammar of your own holds from the first token on; this model reasons", param="grammar")
        is_bare = "::=" in grammar.text or grammar.text.lstrip().startswith("%llguidance")
        return grammar.text if is_bare else HEADER + grammar.text
    if reasoning is None:
        return HEADER + _rules(grammar, "start")
    thought = f"/(.|\\n)*/ <[{reasoning.end}]>"
    before = thought if reasoning.start is None else f"(<[{reasoning.start}]> {thought})?"
    return f"{HEADER}start: {before} answer\n{_rules(grammar, 'answer')}"


def _rules(grammar: Grammar, rule: str) -> str:
    match grammar.kind:
        case "regex":
            return f"{rule}: /{_ESCAPED.sub(lambda found: _ESCAPES.get(found[0], found[0]), grammar.text)}/"
        case "choice":
            return f"{rule}: {' | '.join(json.dumps(choice, ensure_ascii=False) for choice in _choices(grammar.text))}"
        case "calls":
            return calls_in_lark(read_calls(grammar.text), rule)
        case _:
            return f"{rule}: {json_in_lark(read_schema(grammar.text))}"


def read_calls(text: str) -> CallGrammar:
    """Raises BadRequest if `text` is none."""
    calls: CallGrammar = _read(text, CallGrammar, "the tools cannot be read")
    return calls


def _choices(text: str) -> list[str]:
    choices = _read(text, Any, "the choices are no valid JSON")
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise BadRequest("choices are a list of texts, at least one, and none empty", param="grammar")
    if len(choices) > MAX_CHOICES:
        raise BadRequest(f"{len(choices)} choices are more than the {MAX_CHOICES} that are allowed", param="grammar")
    return choices


def read_schema(text: str) -> dict[str, Any]:
    """Raises BadRequest if `text` is no JSON schema."""
    schema = _read(text, Any, "the JSON schema is no valid JSON")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise BadRequest("the JSON schema is no object", param="grammar")
    return schema


def _read(text: str, kind: Any, problem: str) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise BadRequest(f"{problem}: {error}", param="grammar") from None
    except RecursionError:
        raise BadRequest(f"{problem}: it is nested too deeply", param="grammar") from None
