"""Preparer: what is refused and how, the zones of a prompt, and that nobody's namespace is anybody else's."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import msgspec
import pytest
import trio

from kvasir.gateway.core.api import Delta, Finished, Submit
from kvasir.gateway.edges.answer import Answer
from kvasir.gateway.edges.models import models_of
from kvasir.gateway.tenants.directory import Caller, PublishedPrefix, Tenant
from kvasir.protocol.client_messages import ChatMessage, ChatOptions, CompletionRequest
from kvasir.protocol.errors import BadRequest, KvasirError, PermissionDenied, PromptTooLong, Unavailable, UnknownModel
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt, split_hashes
from kvasir.protocol.sampling import RetentionHint, SamplingOptions
from kvasir.protocol.terms import Terms
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from tests.edge_helpers import ALPHA, BETA, CALLER, SECRET, TEXT, FakeCore, make_directory, make_preparer

SYSTEM = "You are a careful assistant who knows the standard library of Python by heart. " * 8


class Nowhere:
    def put(self, event: object) -> None:
        raise AssertionError("nothing was submitted")


def prepare(request: CompletionRequest, tenant: Tenant = ALPHA, prefixes: tuple[PublishedPrefix, ...] = ()) -> Submit:
    preparer = make_preparer(FakeCore(lambda submit: []), make_directory(prefixes))
    preparer._clock = lambda: 100.0
    return trio.run(preparer.prepare, request, Caller(tenant, "k1"), Nowhere())


def prepare_for_vllm(request: CompletionRequest, prefixes: tuple[PublishedPrefix, ...] = ()) -> Submit:
    core = FakeCore(lambda submit: [])
    lacks = frozenset({"public_zone", "retention", "bad_words", "logprobs", "max_reasoning_tokens", "no_store"})
    core.infos["demo"] = msgspec.structs.replace(core.infos["demo"], engine="vllm", lacks=lacks)
    return trio.run(make_preparer(core, make_directory(prefixes)).prepare, request, CALLER, Nowhere())


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"id": 1, "api_key": "", "model": "demo", **fields})


def test_a_prompt_becomes_token_ids_and_hashes_in_the_tenants_own_namespace() -> None:
    submit = prepare(ask(text=SYSTEM, max_tokens=7, deadline_s=2.5))
    ids = TEXT.encode(SYSTEM)
    root = derive_root(SECRET, "f" * 32, "float32")
    own = derive_namespace(SECRET, "tenant", ALPHA.id)
    assert unpack_tokens(submit.token_ids) == ids
    assert submit.prefix_hashes == hash_prompt(root, b"", own, pack_tokens(ids), 0, 16)
    assert (submit.num_prompt_tokens, submit.max_tokens, submit.deadline) == (len(ids), 7, 102.5)
    assert (submit.num_public_tokens, submit.namespace, submit.tenant_id) == (0, own, ALPHA.id)


def test_an_engine_without_a_public_zone_gets_the_whole_prompt_in_the_tenants_namespace() -> None:
    prefix = PublishedPrefix("support", SYSTEM, None)
    own = derive_namespace(SECRET, "tenant", ALPHA.id)

    submit = prepare_for_vllm(ask(text=SYSTEM), (prefix,))

    root = derive_root(SECRET, "f" * 32, "float32")
    assert prepare(ask(text=SYSTEM), prefixes=(prefix,)).num_public_tokens > 0, "the control"
    assert submit.num_public_tokens == 0
    assert submit.prefix_hashes == hash_prompt(root, b"", own, submit.token_ids, 0, 16)


def test_an_alias_is_the_first_of_its_models_that_has_a_worker_and_that_its_tenant_may_use() -> None:
    core = FakeCore(lambda submit: [])
    model = core.infos["demo"]
    core.infos |= {name: msgspec.structs.replace(model, name=name) for name in ("large", "secret")}
    core.infos["demo"] = msgspec.structs.replace(model, num_workers=1)
    core.infos["large"] = msgspec.structs.replace(core.infos["large"], num_workers=1)
    aliases = {"gpt-4o": ["secret", "large", "demo"], "large": ["large", "demo"], "gone": ["nowhere"]}
    tenant = dataclasses.replace(ALPHA, terms=Terms(aliases=aliases), allowed_models=frozenset({"large", "demo"}))
    assert {name: info.name for name, info in models_of(tenant, core.infos).items()} == {
        "demo": "demo",
        "large": "large",
        "gpt-4o": "large",
    }
    core.infos["large"] = msgspec.structs.replace(core.infos["large"], num_workers=0)
    preparer = make_preparer(core, make_directory())
    for name in ("gpt-4o", "large", "demo"):
        submit = trio.run(preparer.prepare, ask(text="x", model=name), Caller(tenant, "k1"), Nowhere())
        assert submit.model == "demo"
    with pytest.raises(UnknownModel, match="'gone' is not served here; served: demo, gpt-4o, large"):
        trio.run(preparer.prepare, ask(text="x", model="gone"), Caller(tenant, "k1"), Nowhere())
    with pytest.raises(UnknownModel, match="gpt-4o"):
        trio.run(preparer.prepare, ask(text="x", model="gpt-4o"), CALLER, Nowhere())  # another tenant's
    with pytest.raises(PermissionDenied):
        trio.run(preparer.prepare, ask(text="x", model="secret"), Caller(tenant, "k1"), Nowhere())


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("retention", {"retention": [RetentionHint()]}),
        ("no_store", {"no_store": True}),
        ("bad_words", {"sampling": SamplingOptions(bad_words=["no"])}),
        ("logprobs", {"sampling": SamplingOptions(logprobs=0)}),
        ("max_reasoning_tokens", {"chat": ChatOptions(max_reasoning_tokens=5)}),
    ],
)
def test_what_an_engine_lacks_is_refused_by_name(field: str, asked: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=f"{field} is not supported for model 'demo', which vllm computes") as caught:
        prepare_for_vllm(ask(text=SYSTEM, **asked))
    assert caught.value.param == field


@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_published_text_is_the_public_zone_of_whoever_may_use_it(form: str) -> None:
    gamma, delta = Tenant("id-gamma", "gamma"), Tenant("id-delta", "delta")
    prefix = PublishedPrefix("support", SYSTEM, frozenset({ALPHA.id, gamma.id}))

    def request(user: str) -> CompletionRequest:
        if form == "text":
            return ask(text=SYSTEM + user)
        return ask(messages=[ChatMessage("system", SYSTEM), ChatMessage("user", user)])

    mine = prepare(request("first question"), ALPHA, (prefix,))
    theirs = prepare(request("another one"), gamma, (prefix,))
    outsider = prepare(request("first question"), delta, (prefix,))
    assert mine.num_public_tokens == theirs.num_public_tokens > len(TEXT.encode(SYSTEM)) - 32
    num_public = mine.num_public_tokens // 16
    assert split_hashes(mine.prefix_hashes)[:num_public] == split_hashes(theirs.prefix_hashes)[:num_public]
    assert outsider.num_public_tokens == 0
    assert not set(split_hashes(outsider.prefix_hashes)) & set(split_hashes(mine.prefix_hashes))


def test_tenants_share_no_hash_and_groups_share_all() -> None:
    left, right = Tenant("1", "a", sharing="group:g"), Tenant("2", "b", sharing="group:g")
    request = ask(text=SYSTEM)
    assert prepare(request, left).prefix_hashes == prepare(request, right).prefix_hashes
    alone = split_hashes(prepare(request, Tenant("g", "g")).prefix_hashes)
    assert not set(alone) & set(split_hashes(prepare(request, left).prefix_hashes))


def test_a_request_without_a_hint_gets_its_tenants_default_and_one_with_a_hint_keeps_it() -> None:
    chatty = dataclasses.replace(ALPHA, cache_hint="open")
    assert prepare(ask(text="x"), ALPHA).cache_hint is None
    assert prepare(ask(text="x"), chatty).cache_hint == "open"
    assert prepare(ask(text="x", cache_hint="one_shot"), chatty).cache_hint == "one_shot"


@pytest.mark.parametrize(
    ("fields", "error", "words", "param"),
    [
        ({"model": "gone", "text": "x"}, UnknownModel, "served: demo", "model"),
        ({"model": "", "text": "x"}, BadRequest, "name one of", "model"),
        ({"text": "x", "token_ids": pack_tokens([1])}, BadRequest, "exactly one", "prompt"),
        ({}, BadRequest, "exactly one", "prompt"),
        ({"text": ""}, BadRequest, "empty", "prompt"),
        ({"token_ids": b"abc"}, BadRequest, "whole number", None),
        ({"token_ids": pack_tokens([4_000_000])}, BadRequest, "4000000 is not in the vocabulary", "prompt"),
        ({"text": "x", "max_tokens": 0}, BadRequest, "at least 1, not 0", "max_tokens"),
        ({"text": "x", "max_tokens": -3}, BadRequest, "at least 1, not -3", "max_tokens"),
        ({"text": "x", "max_tokens": 5000}, PromptTooLong, "ask for at most", "max_tokens"),
        ({"token_ids": pack_tokens([5] * 2048)}, PromptTooLong, "2048 tokens", "prompt"),
        ({"text": "word " * 400_000}, PromptTooLong, "2000000 characters cannot fit", "prompt"),
        ({"messages": []}, BadRequest, "empty", "messages"),
        ({"text": "x", "stop": ["a"], "want_text": False}, BadRequest, "stop strings need text", "stop"),
        ({"text": "x", "stop_token_ids": [99999]}, BadRequest, "99999", "stop_token_ids"),
        ({"text": "x", "sampling": SamplingOptions(logit_bias={-1: 1.0})}, BadRequest, "-1", "logit_bias"),
        ({"text": "x", "deadline_s": 0.0}, BadRequest, "positive", "deadline_s"),
        ({"text": "x", "deadline_s": 1e300}, BadRequest, "up to 1e9", "deadline_s"),
        ({"text": "\ud800"}, BadRequest, "surrogate", None),
    ],
)
def test_a_wrong_request_is_refused_with_its_field(
    fields: dict[str, Any], error: type[KvasirError], words: str, param: str | None
) -> None:
    with pytest.raises(error, match=words) as caught:
        prepare(ask(**fields))
    assert caught.value.param == param


def test_models_are_refused_to_tenants_that_may_not_use_them_or_while_they_load() -> None:
    with pytest.raises(PermissionDenied, match="beta may not use"):
        prepare(ask(text="x"), BETA)
    core = FakeCore(lambda submit: [])
    core.infos["demo"] = type(core.infos["demo"])("demo", "", "", 16, 0, 0)
    with pytest.raises(Unavailable, match="still being loaded"):
        make_preparer(core).prepare_nowait(ask(text="x"), CALLER, Nowhere())


def test_a_long_text_is_tokenised_in_a_thread_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ask(text=SYSTEM * 20, max_tokens=1)
    core = FakeCore(lambda submit: [], max_context=1 << 20)

    async def main() -> None:
        preparer = make_preparer(core)
        assert preparer.prepare_nowait(ask(text="short"), CALLER, Nowhere()) is not None
        assert preparer.prepare_nowait(request, CALLER, Nowhere()) is None
        with pytest.raises(UnknownModel):
            preparer.prepare_nowait(ask(text=request.text, model="gone"), CALLER, Nowhere())
        threaded = await preparer.prepare(request, CALLER, Nowhere())
        monkeypatch.setattr("kvasir.gateway.edges.prepare.QUICK_CHARS", len(request.text or ""))
        inline = preparer.prepare_nowait(request, CALLER, Nowhere())
        assert inline is not None
        assert (threaded.token_ids, threaded.prefix_hashes) == (inline.token_ids, inline.prefix_hashes)
        assert threaded.req_id != inline.req_id

    trio.run(main)


def test_the_words_of_a_tenant_are_remembered_for_its_sharing_scope_alone() -> None:
    """What is remembered makes a text quicker, which the clock would tell to anybody who shares the memory."""
    preparer = make_preparer(FakeCore(lambda submit: []))
    left, right = Tenant("1", "a", sharing="group:g"), Tenant("2", "b", sharing="group:g")
    assert preparer._memory("demo", left) is preparer._memory("demo", right)
    assert preparer._memory("demo", ALPHA) is not preparer._memory("demo", left)
    assert preparer._memory("other", ALPHA) is not preparer._memory("demo", ALPHA)
    assert preparer._memory("demo", ALPHA) is preparer._memory("demo", ALPHA)


def test_what_a_request_leaves_out_of_sampling_is_the_models_own() -> None:
    left_out = prepare(ask(text="x", sampling=SamplingOptions(seed=3))).sampling
    assert (left_out.temperature, left_out.top_p, left_out.top_k, left_out.seed) == (0.7, 0.95, 0, 3)
    given = prepare(ask(text="x", sampling=SamplingOptions(temperature=1.0, top_p=1.0))).sampling
    assert (given.temperature, given.top_p) == (1.0, 1.0)


def test_the_token_that_ended_an_answer_is_not_shown_whether_it_is_special_or_not() -> None:
    """Here `end_token_ids` holds the ids of plain words."""
    ids = TEXT.encode("import os")
    for ignore_eos, shown in ((False, "import"), (True, "import os")):
        core = FakeCore(lambda submit: [])
        preparer = make_preparer(core)
        text = copy.copy(TEXT)
        text.eos_token_ids = (ids[-1],)
        preparer._texts = {"demo": text}
        preparer._clock = lambda: 0.0
        request = ask(text="x", ignore_eos=ignore_eos)
        answer = Answer(core, lambda event: None)
        submit = preparer.prepare_nowait(request, CALLER, answer)
        assert submit is not None
        preparer.begin(answer, request, submit)
        answer.put(Delta(submit.req_id, pack_tokens(ids)))
        answer.put(Finished(submit.req_id, "stop", 1, len(ids)))
        piece = answer.take()
        assert (piece.text, piece.token_ids) == (shown, pack_tokens(ids))
