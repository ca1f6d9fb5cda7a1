"""The tools that a request offers, checked: what the chat template is given, and what the parser of calls needs."""

from __future__ import annotations

import re
from typing import Any

from kvasir.gateway.text.json_input import read_json
from kvasir.gateway.text.tool_calls import Tools
from kvasir.protocol.errors import BadRequest

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def read_tools(raw: bytes) -> list[dict[str, Any]]:
    """Return the tools in the JSON list `raw`, each as OpenAI's chat completions have it.

    Raises:
        BadRequest: no list of functions, or a name that no model could be given; says which one.
    """
    tools: list[dict[str, Any]] = read_json(raw, list[dict[str, Any]], "tools")
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"{len(tools)} tools are more than the {MAX_TOOLS} that are allowed", param="tools")
    for index, tool in enumerate(tools):
        _check(tool, f"tools[{index}]")
    return tools


def schemas_of(tools: list[dict[str, Any]]) -> Tools:
    """Return the schemas of the parameters by the names of the functions."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def _check(tool: dict[str, Any], where: str) -> None:
    if tool.get("type") != "function":
        raise BadRequest(
            f"{where} is of type {str(tool.get('type'))[:40]!r}; only functions can be called", param=where
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{where} has no function", param=f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(
            f"{where}: a name has 1 to 128 letters, digits and _ . : -, not {str(name)[:80]!r}",
            param=f"{where}.function.name",
        )
    if function.get("strict") not in (None, True, False):
        raise BadRequest(f"{where}: strict is true or false", param=f"{where}.function.strict")
    if not isinstance(function.get("parameters") or {}, dict):
        raise BadRequest(f"{where}: parameters is a JSON schema", param=f"{where}.function.parameters")
