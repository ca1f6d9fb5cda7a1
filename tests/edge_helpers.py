"""What the edges' tests share: a core that answers from a script, two tenants, the bundled model's text, and the HTTP
routes over them without sockets."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from tokenizers import Tokenizer

from kvasir.gateway.core.api import Cancel, Change, Delta, Finished, ModelInfo, Standing, Submit
from kvasir.gateway.edges.grammar_check import GrammarCheck, GrammarModel
from kvasir.gateway.edges.http_api import HttpApi
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.published import Published
from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.http.response import HttpResponse
from kvasir.gateway.tenants.directory import ApiKey, Caller, PublishedPrefix, Tenant, TenantDirectory, digest_key
from kvasir.gateway.text.answer_parser import find_format
from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.gateway.text.model_text import ModelText, load_text
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.sampling import Grammar
from kvasir.protocol.tokens import pack_tokens

SECRET = b"s" * 32
DEMO = Path(__file__).resolve().parents[1] / "kvasir" / "demo_model"
TEXT = load_text(DEMO)
ALPHA = Tenant("id-alpha", "alpha")
BETA = Tenant("id-beta", "beta", allowed_models=frozenset({"other"}))
ANSWER = "def add(a, b):\n    return a + b  # é😀\n"
CALLER = Caller(ALPHA, "k1")
KEYS = {"alpha": "kv_k1_secret1", "beta": "kv_k2_secret2"}


def make_directory(prefixes: Sequence[PublishedPrefix] = ()) -> TenantDirectory:
    keys = [
        ApiKey(key_id, tenant.id, digest_key(SECRET, key_id, secret))
        for tenant, key_id, secret in ((ALPHA, "k1", "secret1"), (BETA, "k2", "secret2"))
    ]
    return TenantDirectory(SECRET, [ALPHA, BETA, *keys, *prefixes])


class FakeCore:
    """Runs `script(submit)` for each request in a task of `nursery`: token ids to deliver, one step each.

    `hold` true: requests are kept open after their tokens until they are cancelled.
    """

    def __init__(self, script: Callable[[Submit], Sequence[int]], *, max_context: int = 2048) -> None:
        self.script = script
        self.hold = False
        self.fail: Finished | None = None
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.sent_tokens: dict[bytes, int] = {}
        self.closed_ids: set[bytes] = set()
        self.standings: dict[str, Standing] = {}
        self.changes: dict[bytes, tuple[Change, int] | None] = {}
        self.cancelled = trio.Event()
        self.nursery: trio.Nursery | None = None
        info = ModelInfo("demo", "f" * 32, "float32", 16, max_context, 2)
        self.infos = {"demo": info, "other": ModelInfo("other", "e" * 32, "float32", 16, 64, 0)}
        self._open: dict[bytes, Submit] = {}

    def submit(self, *submits: Submit) -> None:
        for submit in submits:
            self.submits.append(submit)
            self._open[submit.req_id] = submit
            self.nursery.start_soon(self._answer, submit)

    def cancel(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        self.cancelled.set()
        submit = self._open.pop(cancel.req_id, None)
        if submit is not None:
            submit.sink.put(
                Finished(cancel.req_id, cancel.reason, submit.num_prompt_tokens, cancel.num_output_tokens or 0)
            )

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        self.sent_tokens[req_id] = num_output_tokens

    def closed(self, req_id: bytes) -> None:
        self.closed_ids.add(req_id)

    def models(self) -> dict[str, ModelInfo]:
        return self.infos

    def standing(self, tenant_id: str, key_id: str) -> Standing | None:
        return self.standings.get(tenant_id)

    def change(self, submit: Submit, previous_id: bytes) -> tuple[Change, int] | None:
        return self.changes.get(previous_id, ("previous_not_found", 0))

    async def _answer(self, submit: Submit) -> None:
        count = 0
        if self.fail is not None:
            del self._open[submit.req_id]
            submit.sink.put(self.fail)
            return
        for token_id in list(self.script(submit))[: submit.max_tokens]:
            await trio.lowlevel.checkpoint()
            if submit.req_id not in self._open:
                return
            logprobs = []
            if submit.sampling.logprobs is not None:
                logprobs = [TokenLogprobs(-0.5, [(token_id, -0.5)][: submit.sampling.logprobs])]
            submit.sink.put(Delta(submit.req_id, pack_tokens([token_id]), logprobs))
            count += 1
        if not self.hold and self._open.pop(submit.req_id, None):
            reason = "length" if count >= submit.max_tokens else "stop"
            submit.sink.put(Finished(submit.req_id, reason, submit.num_prompt_tokens, count, 16, "w0", 1, 0.01))


TEXTS: dict[str, ModelText | None] = {"demo": TEXT, "other": None}


def make_published(directory: TenantDirectory) -> Published:
    return Published(FakeCore(lambda submit: []), directory, TEXTS, SECRET, 16)


class GoodGrammars(GrammarCheck):
    """Calls every grammar of the models with a tokenizer good, without a process that tries it."""

    def __init__(self) -> None:
        super().__init__({"demo": GrammarModel(DEMO, TEXT.vocab_size, TEXT.eos_token_ids)})

    def verdict_nowait(self, tenant_id: str, model: str, grammar: Grammar) -> bool:
        return model in self._models or super().verdict_nowait(tenant_id, model, grammar)


def make_preparer(
    core: FakeCore,
    directory: TenantDirectory | None = None,
    text: ModelText = TEXT,
    grammars: GrammarCheck | None = None,
) -> Preparer:
    """Return the way in, with `text` for the models "demo" and "twin" (which is not served unless a test says so)."""
    texts = {**TEXTS, "demo": text, "twin": text}
    return Preparer(
        core, make_published(directory or make_directory()), texts, SECRET, 16, grammars=grammars or GoodGrammars()
    )


def make_text(template: str, special: Sequence[str] = (), tool_parser: str = "auto") -> ModelText:
    """Return the bundled model's tokenizer with another chat template, and further special tokens."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens(list(special))
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"}
    size, answers = tokenizer.get_vocab_size(), find_format(template, tool_parser)
    return ModelText(tokenizer, ChatTemplate(template, tokens), size, TEXT.eos_token_ids, answers=answers)


class FakeExchange:
    """Has the body of a request, and collects what is streamed."""

    def __init__(self, body: bytes = b"") -> None:
        self._body = body
        self.status: int | None = None
        self.has_begun = False
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.ended = False
        self.was_cut = False

    async def body(self, owner: str = "") -> bytes:
        return self._body

    def drop_body(self) -> None:
        self._body = b""

    def begin(self, status: int, content_type: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.has_begun = True
        self.status, self.headers = status, {"content-type": content_type, **dict(headers)}

    async def write(self, data: bytes) -> None:
        self.pieces.append(data)

    async def end(self, data: bytes = b"") -> None:
        self.pieces.append(data)
        self.ended = True

    def cut(self) -> None:
        self.was_cut = True

    def events(self) -> list[Any]:
        """The decoded events, [DONE] as None."""
        blocks = b"".join(self.pieces).decode().split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        return [None if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


class House:
    """The routes over a scripted core; `script` gives the token ids of an answer."""

    def __init__(
        self,
        script: Callable[[Submit], Sequence[int]] = lambda submit: TEXT.encode(ANSWER),
        metrics_token: str = "",
        text: ModelText = TEXT,
    ) -> None:
        self.core = FakeCore(script)
        self.directory = directory = make_directory()
        self.lines: list[dict[str, Any]] = []
        self.api = HttpApi(
            self.core,
            make_preparer(self.core, directory, text),
            directory,
            lambda: b"metrics\n",
            metrics_token=metrics_token,
            access=lambda event, **fields: self.lines.append(fields),
        )

    async def ask(
        self, path: str, body: Any = None, *, method: str = "POST", key: str | None = KEYS["alpha"]
    ) -> tuple[HttpResponse | None, FakeExchange]:
        headers = {"host": "x"} if key is None else {"host": "x", "authorization": f"Bearer {key}"}
        content = b"" if body is None else json.dumps(body).encode()
        exchange = FakeExchange(content)
        request = HttpRequest(method, path, headers, content, keep_alive=True)
        return await self.api(request, exchange), exchange  # type: ignore[arg-type]


def run(main: Callable[[House], Awaitable[None]], house: House | None = None) -> None:
    async def with_nursery() -> None:
        used = house or House()
        async with trio.open_nursery() as nursery:
            used.core.nursery = nursery
            await main(used)
            nursery.cancel_scope.cancel()

    trio.run(with_nursery)


def decoded(response: HttpResponse | None) -> Any:
    return json.loads(response.body)
