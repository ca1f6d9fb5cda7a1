"""A core that answers from a script, a directory with two tenants, and the bundled model's text: what edges need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from kvasir.gateway.core.api import Cancel, Delta, Finished, ModelInfo, Submit
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.published import Published
from kvasir.gateway.tenants.directory import ApiKey, PublishedPrefix, Tenant, TenantDirectory, digest_key
from kvasir.gateway.text.model_text import ModelText, load_text
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.tokens import pack_tokens

SECRET = b"s" * 32
DEMO = Path(__file__).resolve().parents[1] / "kvasir" / "demo_model"
TEXT = load_text(DEMO)
ALPHA = Tenant("id-alpha", "alpha")
BETA = Tenant("id-beta", "beta", allowed_models=frozenset({"other"}))
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
        self.cancelled = trio.Event()
        self.nursery: trio.Nursery | None = None
        info = ModelInfo("demo", "f" * 32, "float32", 16, max_context, 2)
        self.infos = {"demo": info, "other": ModelInfo("other", "e" * 32, "float32", 16, 64, 0)}
        self._open: dict[bytes, Submit] = {}

    def submit(self, submit: Submit) -> None:
        self.submits.append(submit)
        self._open[submit.req_id] = submit
        assert self.nursery is not None
        self.nursery.start_soon(self._answer, submit)

    def cancel(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        self.cancelled.set()
        submit = self._open.pop(cancel.req_id, None)
        if submit is not None:
            submit.sink.put(
                Finished(cancel.req_id, cancel.reason, submit.num_prompt_tokens, cancel.num_output_tokens or 0)
            )

    def models(self) -> dict[str, ModelInfo]:
        return self.infos

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


def make_preparer(core: FakeCore, directory: TenantDirectory | None = None) -> Preparer:
    return Preparer(core, make_published(directory or make_directory()), TEXTS, SECRET, 16)
