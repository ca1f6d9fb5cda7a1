"""Record how vLLM's own parsers read well-formed calls of tools, for `tests/gateway/text/test_vllm_calls.py`.

    DIR/vllm/bin/python scripts/record_vllm_calls.py > tests/gateway/text/vllm_calls.json

`DIR`: where `fleet_check.py --env DIR` has made vLLM's environment; it runs with that Python. What the parsers take for
special tokens is added to the bundled model's tokenizer.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
TOOLS: dict[str, dict[str, Any]] = {
    "add": {
        "a": {"type": "integer"},
        "x": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "o": {"type": "object"},
        "s": {"type": "string"},
    },
    "write": {"path": {"type": "string"}, "content": {"type": "string"}},
    "now": {},
}
CALLS: list[list[tuple[str, dict[str, Any]]]] = [
    [("now", {})],
    [("add", {"a": 1})],
    [("add", {"a": -7, "x": 1.5, "flag": True, "items": [1, "é", [None]], "o": {"k": {"}": "]"}}})],
    [("add", {"s": 'say "hi"\\ \t{}[];'}), ("now", {})],
    [("write", {"path": "a.py", "content": "\n  if 1 < 2:\n    x = {'a': \"b\"}\n"})],
    [("write", {"path": "ü/日本.txt", "content": "null"}), ("write", {"path": "", "content": "7"}), ("add", {"a": 3})],
    [("add", {"o": {}, "items": []}), ("add", {"o": {"a": [{"b": {}}]}})],
    [("write", {"path": "x", "content": "line one\nline two, ends in a blank "})],
]


def written(family: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Return `calls` as a model of the family writes them."""
    texts = [json.dumps(arguments, ensure_ascii=False) for _, arguments in calls]
    pairs = [(name, text) for (name, _), text in zip(calls, texts, strict=True)]
    match family:
        case "hermes":
            return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in pairs)
        case "llama3_json":
            return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in pairs)
        case "mistral":
            return "".join(f"[TOOL_CALLS]{n}{a}" for n, a in pairs)
    return "\n".join(f"<tool_call>\n<function={n}>\n{_tags(a)}</function>\n</tool_call>" for n, a in calls)


def _tags(arguments: dict[str, Any]) -> str:
    values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
    return "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())


def main() -> None:
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "kvasir" / "demo_model")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    schemas = {name: {"type": "object", "properties": properties} for name, properties in TOOLS.items()}
    tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in schemas.items()]
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], tools=tools)
    found = []
    for family in ("hermes", "qwen3_coder", "llama3_json", "mistral"):
        make = ToolParserManager.get_tool_parser(family)
        for calls in CALLS:
            for before in ("", "So, at first.\n") if family != "llama3_json" else ("",):
                text = before + written(family, calls)
                parsed = make(tokenizer, request.tools).extract_tool_calls(text, request)
                read = [(call.function.name, json.loads(call.function.arguments)) for call in parsed.tool_calls]
                found.append({"family": family, "text": text, "content": parsed.content or "", "calls": read})
    json.dump({"vllm": version("vllm"), "tools": schemas, "texts": found}, sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
