"""Every field of every dialect over a live edge, sent by the public openai and anthropic clients.

A field that is honoured must change what the core is asked or what the client gets; one that is harmless must change
neither; a wrong value, or a field that is refused, must be an error of the client's own kind that names it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import anthropic
import msgspec
import openai
import pytest
import trio

from kvasir.gateway.core.api import Submit
from kvasir.gateway.edges.grammar_check import GrammarCheck, GrammarModel
from tests.chat_templates import FAMILIES
from tests.edge_helpers import FakeCore, make_text
from tests.gateway.edges.corpus import BASES, Asked, body_of, corpus
from tests.grammar_helpers import DEMO, EOS, VOCAB
from tests.http_helpers import KEY, open_edge

pytestmark = pytest.mark.timeout(120)
EXTRA = (
    "{% if documents %}{{ documents | tojson }}{% endif %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
)
TEXT = make_text(EXTRA + FAMILIES["qwen3"], ["<think>", "</think>"])
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
WRITTEN = f"<think>\nHm.\n</think>\n\nLet me.<|user|>\n{CALLED}\n{CALLED}"
SCRIPT = [*TEXT._tokenizer.encode(WRITTEN, add_special_tokens=False).ids, *TEXT.eos_token_ids[:1]]


class Clients:
    """The two clients against one edge. `core` records what they ask for."""

    def __init__(self, port: int, core: FakeCore) -> None:
        url = f"http://127.0.0.1:{port}"
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)
        self._anthropic = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=20)
        self._core = core
        self._routes: dict[str, Callable[..., Any]] = {
            "chat": self._openai.chat.completions.create,
            "completions": self._openai.completions.create,
            "responses": self._openai.responses.create,
            "anthropic": self._anthropic.messages.create,
        }
        self._known: dict[str, Any] = {}

    def close(self) -> None:
        self._openai.close()
        self._anthropic.close()

    def seen(self, place: str, fields: dict[str, Any], raw: str = "") -> Any:
        """Send a request; return what the core was asked and what the client got, without ids and times.

        `raw`: a field that is sent as it is, whatever the client makes of its like.
        """
        route, body = body_of(place, fields)
        create = self._routes[route]
        names = inspect.signature(create).parameters
        mine = {name: value for name, value in body.items() if name in names and name != raw}
        more = {name: value for name, value in body.items() if name not in mine}
        mine |= {name: value for name, value in BASES[route].items() if name == raw and name in names}
        num_before = len(self._core.submits)
        answer = create(**mine, extra_body=more)
        whole = [answer]
        if body.get("stream") is True:  # how the text is cut into pieces is a matter of time
            [first, *_, last] = answer
            whole = [first, last]
        got = json.dumps([event.model_dump(mode="json") for event in whole])
        submits = self._core.submits[num_before:]
        for submit in submits:
            got = got.replace(submit.req_id.hex()[:24], "ID").replace(submit.req_id.hex()[24:], "")
        return [_plain(submit) for submit in submits], re.sub(r'"created(_at)?": [\d.]+', "", got)

    def plain(self, asked: Asked) -> Any:
        """Return `seen` of the request without the field."""
        key = json.dumps([asked.place, asked.plain])
        if key not in self._known:
            self._known[key] = self.seen(asked.place, asked.plain)
        return self._known[key]

    def error(self, asked: Asked) -> openai.APIStatusError | anthropic.APIStatusError | None:
        """Send a request that is to be refused."""
        try:
            self.seen(asked.place, {**asked.plain, asked.field: asked.bad}, raw=asked.field)
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            return error
        return None


def _plain(submit: Submit) -> Any:
    lasts = None if submit.deadline is None else submit.deadline - submit.arrived
    return msgspec.structs.replace(submit, req_id=b"", sink=None, arrived=0.0, deadline=lasts)  # type: ignore[arg-type]


def problem_of(clients: Clients, asked: Asked) -> str | None:
    """Return what is wrong with how a field's good value is taken."""
    plain = clients.plain(asked)
    if asked.verdict == "refused":
        return None
    changed = clients.seen(asked.place, {**asked.plain, asked.field: asked.good}) != plain
    counts = asked.verdict == "honoured" and not asked.is_same
    return None if changed == counts else f"changes {'something' if changed else 'nothing'}"


def problem_of_bad(clients: Clients, asked: Asked) -> str | None:
    """Return what is wrong with how a field's bad value is refused."""
    error = clients.error(asked)
    if asked.verdict == "harmless":
        return None if error is None else str(error)
    if error is None:
        return "is not refused"
    if not isinstance(error, openai.BadRequestError | anthropic.BadRequestError) and asked.field != "model":
        return f"is a {type(error).__name__}"
    where = {"message": "messages[0].", "stream_options": "stream_options."}.get(asked.place, "") + asked.param
    if asked.verdict == "refused" and f"{where} is not supported here" not in str(error):
        return str(error)
    if isinstance(error, anthropic.APIStatusError):
        return None if asked.param in str(error) else f"does not name {asked.param}: {error}"
    return None if error.param == where and error.code else f"has param {error.param!r}, code {error.code!r}: {error}"


def test_every_field_counts_or_is_refused_by_name_as_the_table_says() -> None:
    problems: list[str] = []
    num_requests = 0

    def work(clients: Clients) -> None:
        nonlocal num_requests
        for asked in corpus():
            for check in (problem_of, problem_of_bad):
                num_requests += 1
                try:
                    found = check(clients, asked)
                except Exception as error:  # the client's own: all are told, not the first
                    found = repr(error)
                if found is not None:
                    problems.append(f"{asked.place} {asked.field} ({asked.verdict}): {check.__name__}: {found}")
        clients.close()

    async def main() -> None:
        check = GrammarCheck({"demo": GrammarModel(DEMO, VOCAB, EOS)})
        async with (
            open_edge(script=lambda submit: SCRIPT, text=TEXT, grammars=check) as opened,
            trio.open_nursery() as n,
        ):
            n.start_soon(check.run)
            opened.core.infos["twin"] = msgspec.structs.replace(opened.core.infos["demo"], name="twin")
            await trio.to_thread.run_sync(work, Clients(opened.port, opened.core))
            n.cancel_scope.cancel()

    trio.run(main)
    assert not problems, "\n".join(problems)
    assert num_requests > 500
