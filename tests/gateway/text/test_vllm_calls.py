"""Well-formed calls are read as vLLM's own parsers read them (recorded by `scripts/record_vllm_calls.py`).

Where a call is broken, or text comes after one, they differ: there vLLM drops what it cannot read, or gives a whole
call back as text; here all text stays, and a call that is cut off is given as far as it came.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvasir.gateway.text.answer_parser import TOOL_PARSERS
from kvasir.protocol.client_messages import TextPart, ToolCallPart

RECORDED = json.loads((Path(__file__).parent / "vllm_calls.json").read_text())
OUR_NAMES = {"llama3_json": "llama3"}


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_calls_are_read_as_vllm_does(size: int) -> None:
    assert len(RECORDED["texts"]) == 56
    for each in RECORDED["texts"]:
        family, text = each["family"], each["text"]
        parser = TOOL_PARSERS[OUR_NAMES.get(family, family)](RECORDED["tools"])
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
        calls: list[list[Any]] = []
        for part in parts:
            if isinstance(part, ToolCallPart) and part.name:
                calls.append([part.name, ""])
            elif isinstance(part, ToolCallPart):
                calls[part.index][1] += part.arguments
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
        assert [[name, json.loads(arguments)] for name, arguments in calls] == each["calls"], (family, text)
        assert content.strip() == each["content"].strip(), (family, text)
