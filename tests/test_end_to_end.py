"""One box as people use it: two tenants, a published prefix, both edges, the command line, real text."""

from __future__ import annotations

import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import openai
import pytest

from kvasir import Client
from kvasir.cli.admin_client import ask
from kvasir.protocol.admin_messages import ExplainQuery, ExplainReply
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, PromptTooLong, UnknownModel
from tests.box import Box, open_box

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    token = tmp_path_factory.mktemp("secrets") / "token"
    token.write_text("scraper\n")
    with open_box(extra=("--metrics-token-file", str(token))) as box:
        yield box


def client(box: Box, tenant: str) -> Client:
    return Client(box.client_endpoint, box.key(tenant), timeout_s=60)


def long_text() -> str:
    """Some hundred tokens that nobody has sent before."""
    return "".join(f"def function_{uuid.uuid4().hex[:8]}(value):\n    return value + {i}\n" for i in range(12))


def test_equal_prompts_are_cached_for_their_tenant_alone(box: Box) -> None:
    text = long_text()
    with client(box, "alpha") as alpha, client(box, "beta") as beta:
        first = alpha.generate(text, max_tokens=8, temperature=0)
        assert first.usage.cached_tokens == 0
        assert first.text
        assert beta.generate(text, max_tokens=8, temperature=0).usage.cached_tokens == 0
        again = alpha.generate(text, max_tokens=8, temperature=0)
        assert again.usage.cached_tokens >= again.usage.prompt_tokens - 17
        assert again.text == first.text


def test_a_published_text_is_cached_for_every_tenant_until_it_is_removed(box: Box, tmp_path) -> None:
    text = long_text()
    (tmp_path / "prefix.txt").write_text(text)
    box.kvasir("prefix", "publish", "shared-code", "--file", str(tmp_path / "prefix.txt"))
    with client(box, "alpha") as alpha, client(box, "beta") as beta:
        assert alpha.generate(text + "# a", max_tokens=4).usage.cached_tokens == 0
        shared = beta.generate(text + "# b", max_tokens=4).usage
        assert shared.cached_tokens >= shared.prompt_tokens - 40
        box.kvasir("prefix", "remove", "shared-code")
        assert beta.generate(text + "# c" * 40, max_tokens=4).usage.cached_tokens == 0


def test_a_published_system_prompt_is_shared_in_chats(box: Box, tmp_path) -> None:
    system = "You are a careful Python programmer. " + long_text()
    (tmp_path / "system.txt").write_text(system)
    box.kvasir("prefix", "publish", "system-prompt", "--file", str(tmp_path / "system.txt"))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Write a function."}]
    with client(box, "alpha") as alpha, client(box, "beta") as beta:
        assert alpha.chat(messages, max_tokens=4).usage.cached_tokens == 0
        messages[1]["content"] = "Something else entirely, please."
        assert beta.chat(messages, max_tokens=4).usage.cached_tokens > 200


def test_the_next_turn_of_a_conversation_hits_its_own_answer(box: Box) -> None:
    with client(box, "alpha") as alpha:
        prompt = list(range(300, 364))
        first = alpha.generate(prompt, max_tokens=64, temperature=0.8, seed=1, ignore_eos=True)
        turn = prompt + list(first.token_ids)
        assert len(turn) == 128
        assert alpha.generate([*turn, 5, 6, 7], max_tokens=2).usage.cached_tokens >= 112


def test_the_public_openai_client_streams_and_completes(box: Box) -> None:
    with openai.OpenAI(base_url=box.http_url + "/v1", api_key=box.key("alpha"), max_retries=0, timeout=60) as api:
        assert [model.id for model in api.models.list()] == ["demo"]
        chat = api.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Write a function"}], max_tokens=24, temperature=0
        )
        assert chat.choices[0].message.content
        stream = api.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Write a function"}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == chat.choices[0].message.content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None
        completion = api.completions.create(model="demo", prompt="import os\n", max_tokens=8, temperature=0)
        assert completion.choices[0].text
        with pytest.raises(openai.NotFoundError, match="demo"):
            api.chat.completions.create(model="nothing", messages=[{"role": "user", "content": "x"}])
    with (
        openai.OpenAI(base_url=box.http_url + "/v1", api_key="kv_wrong_key", max_retries=0) as api,
        pytest.raises(openai.AuthenticationError),
    ):
        api.models.list()


def test_several_choices_answer_as_one_alone_and_their_prompt_is_counted_once(box: Box) -> None:
    prompt = "import os\n\n\ndef walk(folder):\n" * 12
    with openai.OpenAI(base_url=box.http_url + "/v1", api_key=box.key("choosy"), max_retries=0, timeout=60) as api:
        several = api.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, n=4)
        one = api.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
    assert [choice.text for choice in several.choices] == [one.choices[0].text] * 4
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens == 4 * one.usage.completion_tokens
    assert several.usage.prompt_tokens_details.cached_tokens == 0


def test_curl_as_the_readme_prints_it(box: Box) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    from tests.readme import curl_command

    command = curl_command().replace("http://127.0.0.1:8000", box.http_url).replace("$KVASIR_API_KEY", box.key("alpha"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert '"choices"' in done.stdout and '"cached_tokens"' in done.stdout


def test_wrong_requests_are_typed_errors_in_the_sdk(box: Box) -> None:
    with client(box, "alpha") as alpha:
        with pytest.raises(UnknownModel, match="demo"):
            alpha.generate("x", model="nothing", max_tokens=1)
        with pytest.raises(BadRequest, match="max_tokens"):
            alpha.generate("x", max_tokens=0)
        with pytest.raises(PromptTooLong):
            alpha.generate([5] * 100_000, max_tokens=1)
        with pytest.raises(BadRequest):
            alpha.generate([4_000_000], max_tokens=1)
        assert alpha.generate("import", max_tokens=2).usage.completion_tokens <= 2
    with (
        Client(box.client_endpoint, "kv_nobody_nothing", timeout_s=20) as stranger,
        pytest.raises(AuthenticationFailed),
    ):
        stranger.generate("x", max_tokens=1)


def test_a_revoked_key_and_a_disabled_tenant_stop_at_once(box: Box) -> None:
    key = box.key("gamma")
    with Client(box.client_endpoint, key, timeout_s=20) as gamma:
        gamma.generate("x", max_tokens=1)
        box.kvasir("tenant", "disable", "gamma")
        with pytest.raises(AuthenticationFailed):
            gamma.generate("x", max_tokens=1)
        box.kvasir("tenant", "enable", "gamma")
        gamma.generate("x", max_tokens=1)
        [listed] = box.json("key", "list", "gamma")["keys"]
        box.kvasir("key", "revoke", listed["id"])
        with pytest.raises(AuthenticationFailed):
            gamma.generate("x", max_tokens=1)


def test_a_second_gateway_on_the_same_directory_is_refused_in_one_line(box: Box) -> None:
    done = box.kvasir(
        "gateway", "--state-dir", str(box.home / "state"), "--run-dir", str(box.home / "run"), check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(box.process.pid) in done.stderr


def test_health_and_metrics_answer(box: Box) -> None:
    import urllib.request

    with urllib.request.urlopen(box.http_url + "/health", timeout=10) as answer:
        assert answer.status == 200
    scrape = urllib.request.Request(box.http_url + "/metrics", headers={"authorization": "Bearer scraper"})
    with urllib.request.urlopen(scrape, timeout=10) as answer:
        text = answer.read().decode()
    assert "# TYPE kvasir_" in text


def test_what_the_router_expects_to_be_cached_is_cached_while_blocks_are_evicted() -> None:
    """The index against the workers' own count, of every request, on pools that hold a few of the conversations."""
    chance, talks, receipts = random.Random(1), [list[int]() for _ in range(8)], []
    with open_box(worker_args="--kv-memory 12M") as box:
        admin = box.home / "run" / "admin" / "admin.sock"
        with client(box, "acme") as sdk:
            for _ in range(100):
                talk = chance.choice(talks)
                if len(talk) > 800:
                    talk.clear()
                talk += [chance.randrange(3, 4_000) for _ in range(40 if talk else 250)]
                answer = sdk.generate(list(talk), max_tokens=2)
                receipts += ask(ExplainQuery(request=answer.request_id), ExplainReply, path=admin).receipts
    assert [r["decision"]["chosen"]["num_cached_tokens"] for r in receipts] == [
        r["num_cached_tokens"] for r in receipts
    ]
    assert sum(r["num_cached_tokens"] > 0 for r in receipts) > 40
    assert any(r["miss"] is not None and r["miss"]["cause"] == "evicted" for r in receipts)
