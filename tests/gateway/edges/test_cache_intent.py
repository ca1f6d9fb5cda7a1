"""What a request says about caching in others' words, and which word wins."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvasir.gateway.http.parser import HttpRequest
from tests.edge_helpers import KEYS, FakeExchange, House, decoded, run

USER = {"role": "user", "content": "x"}
BREAKPOINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}
EPHEMERAL = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
EXPLICIT = {"prompt_cache_options": {"mode": "explicit"}}


PATH = "/v1/chat/completions"


def parts(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "x", **more}]}]


CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": [USER]}, None),
    ({"messages": [USER], "prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit"}}, None),
    ({"messages": [USER], **EXPLICIT}, "one_shot"),
    ({"messages": parts(**BREAKPOINT), **EXPLICIT}, "open"),
    ({"messages": parts(**EPHEMERAL)}, "open"),
    ({"messages": [USER], **EPHEMERAL}, "open"),
    ({"messages": [USER], "prompt_cache_options": {"ttl": "30m"}}, "open"),
    ({"messages": [USER], "prompt_cache_retention": "24h"}, "open"),
    ({"messages": [USER], "cache_hint": "closing", **EXPLICIT}, "closing"),
]
RESPONSES: list[tuple[dict[str, Any], str | None]] = [
    ({"input": "x"}, None),
    ({"input": "x", **EXPLICIT}, "one_shot"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", **BREAKPOINT}]}], **EXPLICIT}, "open"),
    ({"input": "x", "prompt_cache_retention": "in_memory"}, "open"),
]
MESSAGES: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": [USER], "max_tokens": 3}, None),
    ({"messages": [USER], "max_tokens": 3, **EPHEMERAL}, "open"),
    ({"messages": parts(**EPHEMERAL), "max_tokens": 3}, "open"),
    ({"messages": [USER], "max_tokens": 3, "system": [{"type": "text", "text": "s", **EPHEMERAL}]}, "open"),
    ({"messages": [USER], "max_tokens": 3, "cache_hint": "one_shot", **EPHEMERAL}, "one_shot"),
]
CASES = [
    (path, body, hint)
    for path, cases in (("/v1/chat/completions", CHATS), ("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES))
    for body, hint in cases
]


def hint_of(path: str, body: dict[str, Any], **headers: str) -> str | None:
    hints = []

    async def main(house: House) -> None:
        all_headers = {"host": "x", "authorization": f"Bearer {KEYS['alpha']}", **headers}
        content = json.dumps({"model": "demo", **body}).encode()
        request = HttpRequest("POST", path, all_headers, content, keep_alive=True)
        response = await house.api(request, FakeExchange(content))  # type: ignore[arg-type]
        assert response is not None and response.status == 200, response and response.body
        hints.append(house.core.submits[0].cache_hint)

    run(main)
    return hints[0]


@pytest.mark.parametrize(("path", "body", "hint"), CASES)
def test_others_words_become_a_hint_and_ours_wins(path: str, body: dict[str, Any], hint: str | None) -> None:
    assert hint_of(path, body) == hint


@pytest.mark.parametrize(("path", "body", "hint"), CASES)
def test_a_final_session_is_closing_unless_the_body_says_more(
    path: str, body: dict[str, Any], hint: str | None
) -> None:
    final = {"x-dynamo-session-final": "true"}
    keeps = "cache_hint" in body or hint == "one_shot"
    assert hint_of(path, body, **final) == (hint if keeps else "closing")
    assert hint_of(path, body, **{"x-dynamo-session-final": "false"}) == hint


@pytest.mark.parametrize(
    ("headers", "fields", "no_store"),
    [
        ({}, {}, False),
        ({}, {"no_store": True}, True),
        ({"cache-control": "no-cache, No-Store"}, {}, True),
        ({"cache-control": "no-cache"}, {"no_store": False}, False),
    ],
)
def test_a_request_may_ask_to_leave_nothing_behind(
    headers: dict[str, str], fields: dict[str, Any], no_store: bool
) -> None:
    house = House()

    async def main(house: House) -> None:
        known = {"host": "x", "authorization": f"Bearer {KEYS['alpha']}", **headers}
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "x " * 40}], **fields}).encode()
        response = await house.api(HttpRequest("POST", PATH, known, body, keep_alive=True), FakeExchange(body))  # type: ignore[arg-type]
        assert house.core.submits[0].no_store == no_store
        assert (decoded(response)["usage"]["prompt_tokens_details"]["cache_write_tokens"] == 0) == no_store
        memories = house.api._preparer._memories
        assert bool(memories) != no_store, "the gateway remembers none of its words"

    run(main, house)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_cache_options": {"ttl": "30m"}, "prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"prompt_cache_retention": "forever"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "none"}}, "prompt_cache_options.mode"),
        ({"cache_control": {"type": "persistent"}}, "cache_control.type"),
        ({"no_store": True, "retention": [{"priority": 1}]}, "retention"),
    ],
)
def test_what_contradicts_itself_or_is_unknown_is_refused(fields: dict[str, Any], param: str) -> None:
    async def main(house: House) -> None:
        response, _ = await house.ask("/v1/chat/completions", {"model": "demo", "messages": [USER], **fields})
        assert response is not None and response.status == 400 and decoded(response)["error"]["param"] == param

    run(main)
