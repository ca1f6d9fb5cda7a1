"""Hold the public JSON-Schema-Test-Suite against our grammars, in both directions.

    pip download --no-deps --no-binary jsonschema jsonschema==4.26.0 && tar xzf jsonschema-4.26.0.tar.gz
    python scripts/check_schemas.py jsonschema-4.26.0/json [--draft draft2020-12] [--verbose]

(The source package of `jsonschema` brings the suite along.) For every schema of the suite either a keyword is refused
by name, or what the suite calls valid can be written and what it calls invalid cannot. Properties come in the order of
the schema, numbers in the form that their type has: an instance counts as written if one of its forms is. Exits with 1
if anything invalid can be written, or a schema is refused without naming what is at fault.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

from kvasir.protocol.errors import BadRequest
from kvasir.protocol.grammars import load_tokenizer, make_matcher
from kvasir.protocol.sampling import Grammar

DEMO = Path(__file__).resolve().parents[1] / "kvasir" / "demo_model"
MAX_FORMS = 2000
_DATA = {"const", "enum", "default", "examples"}


def forms(instance: Any) -> Iterator[Any]:
    """Yield `instance` with its properties in every order, and whole numbers with and without a fraction."""
    if isinstance(instance, dict):
        for order in permutations(instance.items()):
            for values in product(*[list(forms(value)) for _, value in order]):
                yield dict(zip([name for name, _ in order], values, strict=True))
    elif isinstance(instance, list):
        yield from map(list, product(*[list(forms(value)) for value in instance]))
    elif isinstance(instance, float) and instance.is_integer():
        yield from (instance, int(instance))
    else:
        yield instance


class Check:
    """What came of the suite: counts by what happened, and what is wrong."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(DEMO, 4096, (0, 4))
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # by what is said
        self.wrong: list[str] = []
        self.strict: list[str] = []

    def group(self, keyword: str, group: dict[str, Any]) -> None:
        schema = group["schema"]
        where = f"{keyword}: {group['description']}"
        grammar = Grammar("json_schema", json.dumps(schema))
        try:
            made = make_matcher(self.tokenizer, grammar)
        except BadRequest as error:
            self.counts["schemas refused"] += 1
            self.refused[error.message] += 1
            if schema is not False and not _is_named(error.message, schema):
                self.wrong.append(f"{where}: refused without a name: {error.message}")
            return
        self.counts["schemas held to"] += 1
        for test in group["tests"]:
            written = any(self._accepts(made, form) for form in islice(forms(test["data"]), MAX_FORMS))
            what = f"{where}: {test['description']}: {json.dumps(test['data'])}"
            if written and not test["valid"]:
                self.counts["invalid, but written"] += 1
                self.wrong.append(f"invalid, but written: {what}")
            elif test["valid"] and not written:
                self.counts["valid, but not written"] += 1
                self.strict.append(what)
            else:
                self.counts["instances agreed on"] += 1

    def _accepts(self, made: Any, instance: Any) -> bool:
        matcher = made.deep_copy()
        token_ids = self.tokenizer.tokenize_bytes(json.dumps(instance, ensure_ascii=False).encode("utf-8", "replace"))
        return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


def _is_named(message: str, schema: Any) -> bool:
    """Return whether a refusal names a keyword (perhaps of what is referred to), or says that nothing is valid."""
    said = ("the JSON schema uses ", "the JSON schema refers to ", "the JSON schema allows nothing")
    return message.startswith(said) or any(name in message for name in _words(schema))


def _words(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for name, value in schema.items():
            yield name
            if name not in _DATA:
                yield from _words(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _words(value)
    elif isinstance(schema, str) and len(schema) > 2:
        yield schema


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the suite; it has a folder tests/")
    parser.add_argument("--draft", default="draft2020-12")
    parser.add_argument("--optional", action="store_true", help="the optional tests, too (formats and such)")
    parser.add_argument("--verbose", action="store_true", help="list what is valid and cannot be written")
    options = parser.parse_args()
    tests = options.folder / "tests" / options.draft
    files = sorted(tests.glob("*.json")) + (sorted(tests.glob("optional/**/*.json")) if options.optional else [])
    if not files:
        sys.exit(f"there are no tests in {tests}; give the folder of the JSON-Schema-Test-Suite")
    check = Check()
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            check.group(file.stem, group)
    for message, count in check.refused.most_common():
        print(f"{count:5} schemas refused: {message}")
    for what in check.strict if options.verbose else ():
        print(f"valid, but not written: {what}")
    for what in check.wrong:
        print(f"WRONG {what}")
    for what, count in check.counts.items():
        print(f"{count:5} {what}")
    sys.exit(bool(check.wrong))


if __name__ == "__main__":
    main()
