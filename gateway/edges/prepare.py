"""From what a client asks to a checked `Submit`: the one way in, for both edges.

Both edges speak `CompletionRequest`. `Preparer` finds the model, turns the prompt into token ids, checks every number,
and hashes the prompt in its zones: the longest published prefix that the tenant may use (`Published`) in the public
namespace, the rest in the namespace of the tenant's sharing scope. No request gets its namespace from anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeVar

import msgspec
import trio
from xxhash import xxh3_128_digest

from kvasir.gateway.core.api import CoreApi, ModelInfo, PromptParts, Sink, Submit
from kvasir.gateway.edges.answer import Answer
from kvasir.gateway.edges.grammar_check import GrammarCheck
from kvasir.gateway.edges.models import find_model
from kvasir.gateway.edges.published import Published
from kvasir.gateway.edges.request_checks import (
    check_ids,
    check_max_tokens,
    check_prompt,
    check_sampling,
    prompt_field,
    truncate,
    window,
    with_grammar,
)
from kvasir.gateway.edges.turns import FairThreads
from kvasir.gateway.tenants.directory import Caller, Tenant
from kvasir.gateway.text.model_text import QUICK_CHARS, ModelText
from kvasir.gateway.text.piece_cache import Memory, Pieces
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.codec import MAX_TOKEN_ID
from kvasir.protocol.errors import BadRequest, PromptTooLong
from kvasir.protocol.prefix import derive_namespace, derive_root, hash_prompt
from kvasir.protocol.sampling import Constraint, Grammar, Sampling, SamplingOptions
from kvasir.protocol.tokens import unpack_tokens

T = TypeVar("T")
MAX_THREADS = 4
TAIL_BYTES = 64
_SAMPLING = [name for name in Sampling.__struct_fields__ if name != "constraint"]
_SYSTEM_ROLES = ("system", "developer")
_ENCODER = msgspec.msgpack.Encoder()
MAX_MEMORIES = 256  # of words, one per model and sharing scope; some megabytes each when full
MAX_PIECES_BYTES = 128 << 20  # of token ids of long texts, all sharing scopes together: 32 million tokens


class Preparer:
    """Makes `Submit`s.

    `texts`: by model name; None for a model without a tokenizer, which takes token ids only. `secret`: the
    deployment's, from which all namespaces and chain roots are derived.
    """

    def __init__(
        self,
        core: CoreApi,
        published: Published,
        texts: Mapping[str, ModelText | None],
        secret: bytes,
        block_size: int,
        clock: Callable[[], float] = trio.current_time,
        grammars: GrammarCheck | None = None,
    ) -> None:
        self._core = core
        self._grammars = GrammarCheck({}) if grammars is None else grammars
        self._published = published
        self._texts = texts
        self.block_size = block_size
        self._clock = clock
        self._public_namespace = derive_namespace(secret, "public")
        self._salted = partial(derive_namespace, secret)  # salts are callers' own: too many to remember
        self._namespace = cache(self._salted)
        self._root = cache(partial(derive_root, secret))
        self._memories: dict[tuple[str, tuple[str, str]], Memory] = {}
        self._pieces = Pieces(MAX_PIECES_BYTES)
        self._threads = FairThreads(MAX_THREADS)

    def prepare_nowait(self, request: CompletionRequest, caller: Caller, sink: Sink) -> Submit | None:
        """Return `request` of `caller` as a checked `Submit` with a fresh id, whose events will go to `sink`.

        None: its text takes long to tokenise, or its grammar has to be checked first. Use `prepare` then.

        Raises:
            UnknownModel, PermissionDenied, BadRequest, PromptTooLong: the request is wrong; `param` names the field.
            Unavailable: the model is configured, but none of its workers has ever come up yet.
        """
        tenant = caller.tenant
        info = find_model(request.model, tenant, self._core.models())
        if (request.text, request.messages, request.token_ids).count(None) != 2:
            raise BadRequest("give exactly one of text, messages and token_ids", param="prompt")
        if _num_chars(request) > QUICK_CHARS:
            return None
        request = with_grammar(request, info, self._texts.get(info.name))
        if request.grammar is not None and not self._grammars.verdict_nowait(tenant.id, info.name, request.grammar):
            return None
        return self._submit(request, caller, sink, info, self._encode(info, request, tenant))

    async def prepare(self, request: CompletionRequest, caller: Caller, sink: Sink) -> Submit:
        """As `prepare_nowait`, tokenising a long text in a thread and waiting for the verdict on a new grammar. A
        checkpoint only then. Cancelled, it returns at once; the thread ends later by itself."""
        submit = self.prepare_nowait(request, caller, sink)
        if submit is not None:
            return submit
        info = find_model(request.model, caller.tenant, self._core.models())
        tenant = caller.tenant
        request = await self._run(request, tenant, with_grammar, request, info, self._texts.get(info.name))
        _, packed = await self.tokenize(request, tenant)
        return self._submit(request, caller, sink, info, packed)

    async def tokenize(self, request: CompletionRequest, tenant: Tenant) -> tuple[ModelInfo, bytes]:
        """Return the model that `request` names and its prompt as packed token ids; a long text in a thread.

        Raises:
            UnknownModel, PermissionDenied, BadRequest, PromptTooLong, Unavailable: as `prepare_nowait`.
        """
        info = find_model(request.model, tenant, self._core.models())
        if request.grammar is not None:
            await self._grammars.verdict(tenant.id, info.name, request.grammar)
        return info, await self._run(request, tenant, self._encode, info, request, tenant)

    async def _run(self, request: CompletionRequest, tenant: Tenant, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, from a thread if the text of `request` is long."""
        if _num_chars(request) <= QUICK_CHARS:
            return function(*args)
        return await self._threads.run(tenant.id, function, *args)

    def detokenize(self, model: str, token_ids: list[int], tenant: Tenant) -> str:
        """Return the text of `token_ids`, special tokens by their names.

        Raises:
            UnknownModel, PermissionDenied, Unavailable: as `prepare_nowait`.
            BadRequest: a model without a tokenizer, or an id that is not in its vocabulary.
            PromptTooLong: more ids than the model's window has.
        """
        info = find_model(model, tenant, self._core.models())
        if len(token_ids) > info.max_context:
            raise PromptTooLong(f"{window(info)}; these are {len(token_ids)}", param="tokens")
        text = self._texts.get(info.name)
        if text is None:
            raise BadRequest(f"model {info.name!r} has no tokenizer here", param="model")
        check_ids(text, token_ids, "tokens")
        return text.decode_all(token_ids)

    def begin(self, answer: Answer, request: CompletionRequest, submit: Submit) -> None:
        """Make `answer` that of `submit`, to which `request` was prepared: what turns its tokens into text, where text
        is wanted, and what finds the parts of the answer to a conversation."""
        answer.submit = submit
        text = self._texts.get(submit.model)
        if text is None or not request.want_text:
            return
        if request.messages is not None:
            tail = _tail(submit.token_ids)
            answer.parser = text.answers.parser(request.messages, request.chat, tail, submit.req_id)
        ends = (*submit.stop_token_ids, *(() if submit.ignore_eos else text.eos_token_ids))
        answer.detokenizer = text.detokenizer(
            request.stop,
            () if request.include_stop else ends,
            keep_stop=request.include_stop,
            min_tokens=request.sampling.min_tokens,
            skip_special_tokens=request.skip_special_tokens,
            for_parser=answer.parser is not None,
        )

    def text(self, model: str) -> ModelText | None:
        """Return the tokenizer of a model, if it has one."""
        return self._texts.get(model)

    def _encode(self, info: ModelInfo, request: CompletionRequest, tenant: Tenant) -> bytes:
        if request.token_ids is not None:
            return request.token_ids
        text = self._texts.get(info.name)
        if text is None:
            raise BadRequest(f"model {info.name!r} has no tokenizer here; send token ids", param="prompt")
        num_chars = _num_chars(request)
        if num_chars > text.max_chars(info.max_context):
            raise PromptTooLong(
                f"{window(info)}; a prompt of {num_chars} characters cannot fit: shorten it",
                param=prompt_field(request),
            )
        # A salt is to keep others from learning what was sent, by the clock too.
        memory = None if request.cache_salt or request.no_store else self._memory(info.name, tenant)
        try:
            if request.messages is not None:
                return text.pack_chat(request.messages, memory, request.chat)
            return text.pack(request.text or "", memory)
        except (UnicodeEncodeError, TypeError):  # the tokenizer calls a lone surrogate no string
            raise BadRequest("the prompt is no valid Unicode text (a lone surrogate); send valid UTF-8") from None

    def _memory(self, model: str, tenant: Tenant) -> Memory:
        """Return what is known of the texts that the tenant's sharing scope has sent to a model."""
        key = (model, tenant.scope)
        memory = self._memories.pop(key, None)
        if memory is None:
            memory = Memory(os.urandom(16), self._pieces)
            if len(self._memories) >= MAX_MEMORIES:
                del self._memories[next(iter(self._memories))]
        self._memories[key] = memory  # the last used one last
        return memory

    def _submit(self, request: CompletionRequest, caller: Caller, sink: Sink, info: ModelInfo, packed: bytes) -> Submit:
        tenant = caller.tenant
        text = self._texts.get(info.name)
        if request.truncate_prompt_tokens is not None:
            packed = truncate(request, info, packed)
        num_tokens = check_prompt(request, info, text, packed)
        max_tokens = check_max_tokens(request, info, num_tokens)
        check_sampling(request, info, text, max_tokens)
        sampling = self._sampling(request, info.name)
        chat = request.chat
        if "max_reasoning_tokens" in info.lacks:  # refused, or lenient
            chat = msgspec.structs.replace(chat, max_reasoning_tokens=None)
        is_bounded = chat.max_reasoning_tokens is not None
        if text is not None and request.messages is not None and (is_bounded or request.grammar is not None):
            budget = text.answers.reasoning_budget(request.messages, chat, _tail(packed))
            if budget is not None:
                constraint = msgspec.structs.replace(sampling.constraint or Constraint(), reasoning=budget)
                sampling = msgspec.structs.replace(sampling, constraint=constraint)
        now = self._clock()
        root = self._root(info.fingerprint, info.dtype)
        salt = request.cache_salt
        namespace = self._salted(*tenant.scope, salt) if salt else self._namespace(*tenant.scope)
        num_public = 0
        if "public_zone" not in info.lacks:
            num_public = self._published.num_public_tokens(info.name, tenant, packed)
        hashes = hash_prompt(root, self._public_namespace, namespace, packed, num_public, self.block_size)
        return Submit(
            req_id=os.urandom(16),
            tenant_id=tenant.id,
            model=info.name,
            token_ids=packed,
            num_prompt_tokens=num_tokens,
            root=root,
            prefix_hashes=hashes,
            num_public_tokens=num_public,
            namespace=namespace,
            max_tokens=max_tokens,
            sampling=sampling,
            sink=sink,
            arrived=now,
            deadline=None if request.deadline_s is None else now + request.deadline_s,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            cache_hint=request.cache_hint or tenant.cache_hint,
            retention=tuple(request.retention),
            vocab_size=MAX_TOKEN_ID + 1 if text is None else text.vocab_size,
            key_id=caller.key_id,
            is_open_ended=request.max_tokens is None or request.max_tokens > max_tokens,
            parts=_parts(request),
            priority=request.priority,
            no_store=request.no_store,
        )

    def _sampling(self, request: CompletionRequest, model: str) -> Sampling:
        """Return how to draw. An option that is left out has the model's default, else the default of `Sampling`."""
        text, options = self._texts.get(model), request.sampling
        fields = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
        if options.min_tokens or options.allowed_token_ids or options.bad_words or request.grammar is not None:
            fields["constraint"] = _constraint(options, text, request.grammar)
        return Sampling(**fields if text is None else {**text.sampling, **fields})


def _parts(request: CompletionRequest) -> PromptParts | None:
    """Return digests of what a conversation is made of, by which its next turn is compared with it."""
    if request.messages is None:
        return None
    digests = [(m.role in _SYSTEM_ROLES, xxh3_128_digest(_ENCODER.encode(m))) for m in request.messages]
    chat = request.chat
    return PromptParts(
        system=b"".join([digest for is_system, digest in digests if is_system]),
        tools=xxh3_128_digest(chat.tools) if chat.offers_tools else b"",
        messages=tuple([digest for is_system, digest in digests if not is_system]),
    )


def _constraint(options: SamplingOptions, text: ModelText | None, grammar: Grammar | None) -> Constraint:
    if options.bad_words and text is None:
        raise BadRequest("bad_words need a model with a tokenizer", param="bad_words")
    words = [] if text is None else [ids for word in options.bad_words for ids in text.word_forms(word)]
    return Constraint(options.min_tokens, options.allowed_token_ids, words, grammar=grammar)


def _tail(packed: bytes) -> list[int]:
    """Return the last tokens of a prompt, enough to see whether it ends in an open reasoning."""
    return unpack_tokens(packed[-TAIL_BYTES:])


def _num_chars(request: CompletionRequest) -> int:
    num_chars = len(request.text or "")
    for message in request.messages or ():
        num_chars += len(message.content or "")
        if message.reasoning or message.tool_calls:
            num_chars += len(message.reasoning) + sum(len(call.arguments) for call in message.tool_calls)
    chat = request.chat
    return num_chars + len(chat.tools) + len(chat.documents) + len(chat.variables)
