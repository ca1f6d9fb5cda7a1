"""What single request fields do, from the body of a request to what the core is given and the client gets."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.gateway.core.api import Submit
from kvasir.protocol.prefix import derive_namespace
from kvasir.protocol.sampling import Constraint
from kvasir.protocol.tokens import unpack_tokens
from tests.edge_helpers import ALPHA, ANSWER, KEYS, SECRET, TEXT, House, decoded, run

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100}
TEXT_BODY = {"model": "demo", "prompt": "import os", "max_tokens": 100}


def ask(body: dict[str, Any], house: House | None = None, key: str = KEYS["alpha"]) -> tuple[Any, Submit]:
    """Return the decoded answer (events where it was streamed) and what the core got."""
    used, found = house or House(), []

    async def main(house: House) -> None:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response, exchange = await house.ask(path, body, key=key)
        found.append(exchange.events()[:-1] if response is None else decoded(response))

    run(main, used)
    return found[0], used.core.submits[0] if used.core.submits else None  # type: ignore[return-value]


def refused(body: dict[str, Any]) -> tuple[str, str]:
    answer, submit = ask(body)
    assert submit is None
    return answer["error"]["param"], answer["error"]["message"]


def test_what_constrains_the_draw_reaches_the_worker_in_token_ids() -> None:
    _, submit = ask({**CHAT, "min_tokens": 3, "allowed_token_ids": [5, 6], "bad_words": ["import", " os"]})
    words = [*TEXT.word_forms("import"), *TEXT.word_forms(" os")]
    assert submit.sampling.constraint == Constraint(3, [5, 6], words)
    assert all("".join(map(TEXT.decode, [ids])).strip() in ("import", "os") for ids in words)
    assert ask(CHAT)[1].sampling.constraint is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"min_tokens": 101}, "min_tokens", "more than the 100"),
        ({"min_tokens": -1}, "min_tokens", ">= 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "is empty"),
        ({"allowed_token_ids": [1 << 30]}, "allowed_token_ids", "not in the vocabulary"),
        ({"bad_words": [""]}, "bad_words", "length >= 1"),
        ({"bad_words": ["x"] * 129}, "bad_words", "length <= 128"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "not 0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "not -2"),
        ({"cache_salt": ""}, "cache_salt", "is empty"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "no variable 'x'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "Expected `object`"),
        ({"enable_thinking": True, "chat_template_kwargs": [1]}, "chat_template_kwargs", "Expected `object`"),
        ({"enable_thinking": True}, "chat_template_kwargs", "no variable 'enable_thinking'"),
        ({"documents": [{"text": "x"}]}, "documents", "knows no documents"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "knows no reasoning_effort"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "needs"),
    ],
)
def test_wrong_values_are_refused_with_their_field(fields: dict[str, Any], param: str, words: str) -> None:
    found, message = refused({**CHAT, **fields})
    assert found == param and words in message


def test_null_and_nothing_are_as_if_left_out() -> None:
    names = (
        "tools",
        "documents",
        "chat_template_kwargs",
        "min_tokens",
        "bad_words",
        "cache_salt",
        "echo",
        "tool_choice",
    )
    assert ask({**CHAT, **dict.fromkeys(names)})[1].token_ids == ask(CHAT)[1].token_ids
    assert (
        ask({**CHAT, "tools": [], "documents": [], "chat_template_kwargs": {}})[1].token_ids == ask(CHAT)[1].token_ids
    )


def test_echo_puts_the_prompt_first_whole_and_streamed() -> None:
    whole, _ = ask({**TEXT_BODY, "echo": True, "prompt": ["import os", "x"]})
    assert [choice["text"] for choice in whole["choices"]] == ["import os" + ANSWER, "x" + ANSWER]
    ids, _ = ask({**TEXT_BODY, "echo": True, "prompt": TEXT.encode("import os")})
    assert ids["choices"][0]["text"] == "import os" + ANSWER
    events, _ = ask({**TEXT_BODY, "echo": True, "stream": True})
    assert events[0]["choices"][0]["text"] == "import os"
    assert "".join(event["choices"][0]["text"] for event in events) == "import os" + ANSWER
    assert refused({**TEXT_BODY, "echo": True, "logprobs": 1})[0] == "echo"


def test_a_chat_goes_on_with_its_last_message_and_can_show_it() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Sure: "}]  # type: ignore[misc]
    body = {**CHAT, "messages": messages, "continue_final_message": True}
    plain, submit = ask(body)
    assert plain["choices"][0]["message"]["content"] == ANSWER
    prompt = TEXT._tokenizer.decode(unpack_tokens(submit.token_ids), skip_special_tokens=False)
    assert prompt.endswith("<|assistant|>Sure:"), "this template trims"
    assert ask({**body, "echo": True})[0]["choices"][0]["message"]["content"] == "Sure: " + ANSWER
    assert ask({**body, "echo": True, "stream": True})[0][0]["choices"][0]["delta"]["content"] == "Sure: "
    bare = ask({**CHAT, "add_generation_prompt": False})[1]
    assert ask(CHAT)[1].num_prompt_tokens == bare.num_prompt_tokens + 1


@pytest.mark.parametrize("body", [CHAT, TEXT_BODY])
def test_token_ids_come_back_where_they_are_asked_for(body: dict[str, Any]) -> None:
    whole, submit = ask({**body, "return_token_ids": True})
    events, _ = ask({**body, "return_token_ids": True, "stream": True})
    prompt, answer = unpack_tokens(submit.token_ids), TEXT.encode(ANSWER)
    place = whole if "messages" in body else whole["choices"][0]
    assert (place["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, answer)
    first = events[0] if "messages" in body else events[0]["choices"][0]
    assert first["prompt_token_ids"] == prompt
    assert [i for event in events for i in event["choices"][0].get("token_ids", [])] == answer
    assert "token_ids" not in str(ask(body)[0])


def test_truncation_keeps_the_end_of_the_prompt() -> None:
    ids = list(range(300, 340))
    assert unpack_tokens(ask({**TEXT_BODY, "prompt": ids, "truncate_prompt_tokens": 7})[1].token_ids) == ids[-7:]
    assert unpack_tokens(ask({**TEXT_BODY, "prompt": ids, "truncate_prompt_tokens": 99})[1].token_ids) == ids
    long = [300 + i % 50 for i in range(5000)]
    kept = unpack_tokens(ask({**TEXT_BODY, "prompt": long, "truncate_prompt_tokens": -1})[1].token_ids)
    assert kept == long[-(2048 - 100) :]


def test_a_salt_makes_a_namespace_within_the_tenants_own() -> None:
    plain, one, same, two = (ask({**CHAT, **more})[1] for more in ({}, *({"cache_salt": s} for s in "aab")))
    assert one.namespace == same.namespace == derive_namespace(SECRET, "tenant", ALPHA.id, "a")
    assert len({plain.namespace, one.namespace, two.namespace}) == 3
    assert one.tenant_id == plain.tenant_id and one.root == plain.root
    assert derive_namespace(SECRET, "tenant", "x", "y") != derive_namespace(SECRET, "tenant", "xy")


def test_what_stopped_an_answer_can_be_part_of_it_and_min_tokens_comes_before_it() -> None:
    def content(**fields: Any) -> str:
        return str(ask({**CHAT, **fields})[0]["choices"][0]["message"]["content"])

    assert content(stop=["return"]) == "def add(a, b):\n    "
    assert content(stop=["return"], include_stop_str_in_output=True) == "def add(a, b):\n    return"
    num_tokens = next(n for n in range(99) if "return" in TEXT.decode(TEXT.encode(ANSWER)[:n]))
    assert content(stop=["return"], min_tokens=num_tokens - 1) == "def add(a, b):\n    "
    assert content(stop=["return"], min_tokens=num_tokens) == ANSWER


def test_special_tokens_are_shown_where_that_is_asked_for() -> None:
    special = TEXT._tokenizer.token_to_id("<|user|>")
    script = lambda submit: [*TEXT.encode("import"), special, *TEXT.encode("os")]  # noqa: E731
    assert ask(CHAT, House(script))[0]["choices"][0]["message"]["content"] == "importos"
    shown = ask({**CHAT, "skip_special_tokens": False}, House(script))[0]["choices"][0]["message"]["content"]
    assert shown == "import<|user|>os"


def test_many_prompts_fit_one_request_within_a_bound() -> None:
    answer, _ = ask({**TEXT_BODY, "prompt": [f"x{i}" for i in range(100)], "n": 2, "max_tokens": 1})
    assert [choice["index"] for choice in answer["choices"]] == list(range(200))
    assert refused({**TEXT_BODY, "prompt": ["x"] * 100, "n": 3})[0] == "prompt"
