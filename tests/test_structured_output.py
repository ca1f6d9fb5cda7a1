"""Structured output through a whole box: by the public client, under hostile grammars, and over a killed worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.box import DEMO_MODEL, Box, open_box
from tests.chat_templates import FAMILIES
from tests.gateway.edges.test_grammar_check import HOSTILE
from tests.readme import curl_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 8, "maxItems": 12},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TOOL = {"type": "function", "function": {"name": "save", "parameters": PERSON}}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The bundled model with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("model")
    for file in DEMO_MODEL.iterdir():
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = json.dumps({**settings, "chat_template": FAMILIES["qwen2.5"]})
    (folder / "tokenizer_config.json").write_text(template)
    with open_box(model=str(folder), workers=2, worker_args="--deterministic --kv-memory 256M") as box:
        yield box


def api(box: Box) -> openai.OpenAI:
    return openai.OpenAI(base_url=box.http_url + "/v1", api_key=box.key("alpha"), max_retries=0, timeout=60)


def answer(client: openai.OpenAI, seed: int, on_text: Callable[[int], None] = lambda num_chars: None) -> str:
    """Return one streamed answer that has come to its end: content, or the arguments of a call if `seed` is odd.

    `on_text` is told of every piece how long it is: how many pieces there are says nothing, since workers draft.
    """
    asked: dict[str, Any] = {"response_format": FORMAT}
    if seed % 2:
        asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": f"Describe person {seed}."}],
        temperature=0.9,
        seed=seed,
        stream=True,
        **asked,
    )
    text, names, reason = "", [], None
    for chunk in stream:
        delta, num_before = chunk.choices[0].delta, len(text)
        text += delta.content or ""
        for call in delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            text += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
        on_text(len(text) - num_before)
    assert (names, reason) == ((["save"], "tool_calls") if seed % 2 else ([], "stop"))
    return text


def test_the_public_client_gets_answers_that_are_valid(box: Box) -> None:
    with api(box) as client:
        for seed in range(4):
            jsonschema.validate(json.loads(answer(client, seed)), PERSON)
        chosen = client.completions.create(
            model="demo", prompt="x", max_tokens=20, n=2, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
        )
        assert {choice.text for choice in chosen.choices} <= {"yes", "no"}
        whole = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}, seed=3
        )
        if whole.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(whole.choices[0].message.content or ""), dict)
        with pytest.raises(openai.BadRequestError, match="uses not, which") as caught:
            bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
            client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "x"}], response_format=bad
            )
        assert caught.value.param == "response_format"


def test_the_command_in_the_readme(box: Box) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    command = curl_command("structured").replace("http://127.0.0.1:8000", box.http_url)
    command = command.replace("$KVASIR_API_KEY", box.key("alpha"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    content = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert json.loads(content) in ({"prime": True}, {"prime": False})


def test_hostile_grammars_are_answered_and_kill_no_worker(box: Box) -> None:
    pids = {worker["pid"] for worker in box.workers()}
    fields = {"lark": "grammar", "regex": "regex", "json_schema": "json"}
    with api(box) as client:
        for name, grammar in HOSTILE.items():
            begun = time.monotonic()
            try:
                client.completions.create(
                    model="demo",
                    prompt="x",
                    max_tokens=40,
                    extra_body={"structured_outputs": {fields[grammar.kind]: grammar.text}},
                )
            except openai.BadRequestError:
                assert time.monotonic() - begun < 8, name
            except openai.APIStatusError as error:
                assert "too complex" in str(error) or "compiled" in str(error), name
    assert {worker["pid"] for worker in box.workers()} == pids


def test_killing_a_worker_in_mid_stream_changes_no_answer(box: Box) -> None:
    def run(on_text: Callable[[int], None] = lambda num_chars: None) -> list[str]:
        texts, failures = [""] * 6, []

        def one(seed: int) -> None:
            try:
                with api(box) as client:
                    texts[seed] = answer(client, seed, on_text)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert not failures, failures
        return texts

    expected = run()
    victim = box.workers()[0]["pid"]
    num_left, lock = sum(map(len, expected)) // 3, threading.Lock()

    def countdown(num_chars: int) -> None:
        nonlocal num_left
        with lock:
            is_due = 0 < num_left <= num_chars
            num_left -= num_chars
            if is_due:
                os.kill(victim, signal.SIGKILL)

    assert run(countdown) == expected
    assert num_left <= 0
    for text in expected:
        jsonschema.validate(json.loads(text), PERSON)
