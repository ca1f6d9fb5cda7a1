"""Agents by the frameworks that people write them with, over a live edge: LangChain and LiteLLM.

Each runs the same loop: a scripted model calls a tool, gets the result, and answers. LiteLLM is large: its tests
are skipped where it is not installed: `pip install -c constraints.txt -e '.[litellm]'`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import trio

from kvasir.gateway.core.api import Finished, Submit
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.errors import Overloaded
from kvasir.protocol.tokens import unpack_tokens
from tests.edge_helpers import ANSWER, TEXT, FakeCore
from tests.gateway.edges.test_tools import ARGUMENTS, TOOL, WRITTEN, model
from tests.http_helpers import KEY, open_edge

pytestmark = pytest.mark.timeout(120)
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices when it is imported
FAMILIES = [family for family in WRITTEN if family != "llama3.1"]  # whose template takes one call at a time
RESULT = "forty-two"
ASKED = [{"role": "user", "content": "Add."}]


def agent(text: ModelText, family: str) -> Callable[[Submit], list[int]]:
    """Return a model that calls tools until it is told what they found."""

    def script(submit: Submit) -> list[int]:
        prompt = text._tokenizer.decode(unpack_tokens(submit.token_ids), skip_special_tokens=False)
        answer = f"It is {RESULT}." if RESULT in prompt else WRITTEN[family]
        return [*text._tokenizer.encode(answer, add_special_tokens=False).ids, *text.eos_token_ids[:1]]

    return script


def with_edge(work: Callable[[str, FakeCore], None], **edge: Any) -> None:
    """Run `work` in a thread, with the address of an edge."""

    async def main() -> None:
        async with open_edge(**edge) as opened:
            await trio.to_thread.run_sync(work, f"http://127.0.0.1:{opened.port}", opened.core)

    trio.run(main)


# ---- LangChain ---------------------------------------------------------------------------------------------------


def langchain(url: str, **options: Any) -> Any:
    module = pytest.importorskip("langchain_openai", reason="of the dev dependencies")
    return module.ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model="demo", max_retries=0, timeout=20, **options)


def test_langchain_chats_and_streams_over_both_routes() -> None:
    pytest.importorskip("langchain_openai", reason="of the dev dependencies")

    def work(url: str, core: FakeCore) -> None:
        for options in ({}, {"use_responses_api": True}):
            chat = langchain(url, temperature=0.5, stream_usage=True, **options)
            whole = chat.invoke("Add.")
            assert whole.text == ANSWER and whole.usage_metadata["input_token_details"]["cache_read"] == 16
            assert core.submits[-1].sampling.temperature == 0.5
            chunks = list(chat.stream("Add."))
            assert "".join(chunk.text for chunk in chunks) == ANSWER and len(chunks) > 3
            totals = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
            assert totals[-1]["total_tokens"] == whole.usage_metadata["total_tokens"]

    with_edge(work)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_langchain_agent_calls_its_tools_and_answers(family: str, streams: bool) -> None:
    pytest.importorskip("langchain_openai", reason="of the dev dependencies")
    text = model(family)

    def work(url: str, core: FakeCore) -> None:
        bound = langchain(url).bind_tools([TOOL])
        turns: list[Any] = list(ASKED)
        for _ in range(3):
            said = sum_of(bound.stream(turns)) if streams else bound.invoke(turns)
            turns.append(said)
            if not said.tool_calls:
                break
            assert [(call["name"], call["args"]) for call in said.tool_calls] == [("add", ARGUMENTS)] * 2
            assert said.response_metadata["finish_reason"] == "tool_calls"
            turns += [{"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in said.tool_calls]
        assert turns[-1].text == f"It is {RESULT}." and len(core.submits) == 2

    with_edge(work, script=agent(text, family), text=text)


def test_langchain_gets_structured_output_by_schema_and_by_a_forced_call() -> None:
    pytest.importorskip("langchain_openai", reason="of the dev dependencies")
    text = model("qwen3")
    schema = {"title": "add", "description": "d", **TOOL["function"]["parameters"]}  # type: ignore[dict-item]
    written = {"json_schema": json.dumps(ARGUMENTS), "function_calling": f"{json.dumps(ARGUMENTS)}}}\n</tool_call>"}

    for method, answer in written.items():

        def work(url: str, core: FakeCore, method: str = method) -> None:
            for strict in (None, True):
                asked = langchain(url).with_structured_output(schema, method=method, strict=strict)
                assert asked.invoke("Add.") == ARGUMENTS
                constraint = core.submits[-1].sampling.constraint
                assert constraint is not None and constraint.grammar is not None

        ids = text._tokenizer.encode(answer, add_special_tokens=False).ids
        with_edge(work, script=lambda submit, ids=ids: [*ids, text.eos_token_ids[0]], text=text)


def sum_of(chunks: Any) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first = first + chunk
    return first


# ---- LiteLLM -----------------------------------------------------------------------------------------------------


def litellm(url: str, dialect: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import
        module = pytest.importorskip("litellm", reason="of the extra `litellm`")
    base = f"{url}/v1" if dialect == "openai" else url
    options = {"messages": ASKED, "api_base": base, "api_key": KEY, "timeout": 20, "num_retries": 0, **options}
    return module.completion(model=options.pop("model", f"{dialect}/demo"), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_litellm_chats_and_streams_in_both_dialects(dialect: str) -> None:
    pytest.importorskip("litellm", reason="of the extra `litellm`")

    def work(url: str, core: FakeCore) -> None:
        whole = litellm(url, dialect, temperature=0.5)
        assert whole.choices[0].message.content == ANSWER and whole.choices[0].finish_reason == "stop"
        assert whole.usage.prompt_tokens_details.cached_tokens == 16
        assert core.submits[-1].sampling.temperature == 0.5
        chunks = list(litellm(url, dialect, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
        assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [
            whole.usage.completion_tokens
        ]

    with_edge(work)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_litellm_agent_calls_its_tools_and_answers(family: str, dialect: str) -> None:
    pytest.importorskip("litellm", reason="of the extra `litellm`")
    text = model(family)

    def work(url: str, core: FakeCore) -> None:
        turns: list[Any] = list(ASKED)
        for _ in range(3):
            choice = litellm(url, dialect, messages=turns, tools=[TOOL], max_tokens=500).choices[0]
            turns.append(choice.message)
            if not choice.message.tool_calls:
                break
            assert choice.finish_reason == "tool_calls"
            found = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert found == [("add", ARGUMENTS)] * 2
            turns += [{"role": "tool", "tool_call_id": c.id, "content": RESULT} for c in choice.message.tool_calls]
        assert turns[-1].content == f"It is {RESULT}." and len(core.submits) == 2

    with_edge(work, script=agent(text, family), text=text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_litellm_tells_our_errors_apart(dialect: str) -> None:
    module = pytest.importorskip("litellm", reason="of the extra `litellm`")

    def work(url: str, core: FakeCore) -> None:
        def refused(kind: type[Exception], **options: Any) -> None:
            for stream in (False, True):
                with pytest.raises(module.exceptions.APIError if kind is None else kind) as caught:
                    list(litellm(url, dialect, stream=stream, **options))
                assert type(caught.value) is kind, repr(caught.value)

        refused(module.ContextWindowExceededError, messages=[{"role": "user", "content": "x y " * 3000}])
        refused(module.NotFoundError, model=f"{dialect}/gone")
        refused(module.AuthenticationError, api_key="kv_k1_wrong")
        refused(module.BadRequestError, temperature=-1)
        core.fail = Finished(b"", "error", 1, 0, error=Overloaded("the queue is full", retry_after_s=7).info())
        refused(module.RateLimitError)

    with_edge(work, text=TEXT)
