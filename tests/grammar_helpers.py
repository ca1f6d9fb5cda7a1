"""What the tests of structured output share: schemas by kind, and the bundled model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvasir.protocol.grammars import load_tokenizer, make_matcher
from kvasir.protocol.sampling import Constraint, Grammar, Sampling

DEMO = Path(__file__).resolve().parents[1] / "kvasir" / "demo_model"
EOS = (0, 4)
VOCAB = 4096
TOKENIZER = load_tokenizer(DEMO, VOCAB, EOS)


def schema_grammar(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


def held_to(grammar: Grammar, **options: Any) -> Sampling:
    return Sampling(constraint=Constraint(grammar=grammar), **options)


def accepts(schema: Any, instance: Any) -> bool:
    """Return whether answers may be `instance`, as `json.dumps` writes it."""
    return matches(schema_grammar(schema), json.dumps(instance, ensure_ascii=False))


def matches(grammar: Grammar, text: str) -> bool:
    matcher = make_matcher(TOKENIZER, grammar)
    token_ids = TOKENIZER.tokenize_bytes(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def schemas() -> Iterator[tuple[str, Any]]:
    """Yield 300 schemas by kind, each satisfiable within some hundred tokens."""
    scalars: list[Any] = [
        {"type": "boolean"},
        {"type": "null"},
        {"const": "on"},
        {"enum": ["red", "green", 3, None]},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "string", "maxLength": 6},
    ]
    for index in range(50):
        low, step = index * 7 - 100, index % 5 + 1
        yield (
            "numbers with bounds",
            [
                {"type": "integer", "minimum": low, "maximum": low + 13 * step},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 50},
                {"type": "number", "minimum": low / 8, "maximum": low / 8 + 3.5},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1 + index},
                {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 1000},
            ][index % 5],
        )
        yield "enums", {"enum": [f"{chr(97 + index % 26)}{n}" for n in range(index % 9 + 1)] + [index, True, None]}
        yield (
            "patterns",
            {
                "type": "string",
                "pattern": [
                    f"^[a-f]{{1,{step}}}-\\d{{{step}}}$",
                    "^(ab|cd)+$",
                    "^[A-Z][a-z]{2,5}$",
                    "\\d{3}",
                    "^\\w+@\\w+\\.org$",
                ][index % 5],
                **({"maxLength": 40} if index % 5 == 3 else {}),
            },
        )
        inner = scalars[index % 6]
        for depth in range(index % 4 + 1):
            inner = {
                "type": "object",
                "properties": {f"k{depth}": inner, "other": scalars[(index + depth) % 6]},
                "required": [f"k{depth}"] if index % 2 else [f"k{depth}", "other"],
                "additionalProperties": False,
            }
        yield "nested", inner
        members = [scalars[index % 6], {"type": "array", "items": scalars[(index + 1) % 6], "maxItems": index % 4 + 1}]
        yield "unions", {"anyOf": members} if index % 2 else {"type": ["integer", "null", "boolean"]}
        yield (
            "recursive",
            {
                "$ref": "#/$defs/node",
                "$defs": {
                    "node": {
                        "type": "object",
                        "properties": {
                            "value": scalars[index % 6],
                            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": index % 3},
                        },
                        "required": ["value", "next"] if index % 2 else ["value", "children"],
                        "additionalProperties": False,
                    }
                },
            },
        )
