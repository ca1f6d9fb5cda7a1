"""From what a client asks to a checked `Submit`: the one way in, for both edges.

Both edges speak `CompletionRequest`. Intake finds the model, turns the prompt into token ids, checks every number, and
hashes the prompt in its zones: the longest published prefix that the tenant may use in the public namespace, the rest
in the namespace of the tenant's sharing scope. Namespaces come from here and from nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

import trio

from kvasir.gateway.core.api import CoreApi, ModelInfo, Sink, Submit
from kvasir.gateway.tenants.directory import PublishedPrefix, Tenant, TenantDirectory
from kvasir.gateway.text.detokenizer import Detokenizer
from kvasir.gateway.text.model_text import QUICK_CHARS, ModelText
from kvasir.gateway.text.word_cache import Words
from kvasir.protocol.client_messages import ChatMessage, CompletionRequest
from kvasir.protocol.errors import BadRequest, PermissionDenied, PromptTooLong, Unavailable, UnknownModel
from kvasir.protocol.messages import MAX_TOKEN_ID, Pin, Sampling, SamplingOptions
from kvasir.protocol.prefix import HASH_BYTES, derive_namespace, derive_root, hash_prompt
from kvasir.protocol.tokens import TOKEN_BYTES, pack_tokens

MAX_THREADS = 4
_SAMPLING = Sampling.__struct_fields__
MAX_MEMORIES = 256  # of words, one per model and sharing scope; some megabytes each when full


@dataclass(frozen=True, slots=True)
class _Published:
    """A published prefix as one model sees it: packed token ids, whole blocks."""

    name: str
    tokens: bytes
    tenant_ids: frozenset[str] | None


class Intake:
    """Makes `Submit`s. Owns the tokenizers and what is known of published prefixes per model.

    `texts`: by model name; None for a model without a tokenizer, which takes token ids only. `secret`: the
    deployment's, from which all namespaces and chain roots are derived.
    """

    def __init__(
        self,
        core: CoreApi,
        directory: TenantDirectory,
        texts: Mapping[str, ModelText | None],
        secret: bytes,
        block_size: int,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._core = core
        self._directory = directory
        self._texts = texts
        self._secret = secret
        self._block_size = block_size
        self._clock = clock
        self._public_namespace = derive_namespace(secret, "public")
        self._namespaces: dict[tuple[str, str], bytes] = {}
        self._roots: dict[tuple[str, str], bytes] = {}
        self._memories: dict[tuple[str, tuple[str, str]], Words] = {}
        self._prefixes: tuple[PublishedPrefix, ...] | None = None  # what `_published` was made of
        self._published: dict[str, dict[bytes, list[_Published]]] = {}  # model -> first block -> longest first
        self._forms: dict[tuple[str, str], list[bytes]] = {}  # model, published text -> what tokenising it has given
        self._threads = trio.CapacityLimiter(MAX_THREADS)

    def is_quick(self, request: CompletionRequest) -> bool:
        """Return whether `prepare_nowait` takes well under a millisecond of tokenising."""
        size = len(request.text or "")
        if request.messages is not None:
            size += sum(len(message.content) for message in request.messages)
        return size <= QUICK_CHARS

    def prepare_nowait(self, request: CompletionRequest, tenant: Tenant, sink: Sink) -> Submit:
        """Return `request` of `tenant` as a checked `Submit` with a fresh id, whose events will go to `sink`.

        Raises:
            UnknownModel, PermissionDenied, BadRequest, PromptTooLong: the request is wrong; `param` names the field.
            Unavailable: the model is configured, but none of its workers has ever come up yet.
        """
        info = self._find_model(request.model, tenant)
        _check_form(request)
        packed = request.token_ids if request.token_ids is not None else self._encode(info, request, tenant)
        return self._submit(request, tenant, sink, info, packed)

    async def prepare(self, request: CompletionRequest, tenant: Tenant, sink: Sink) -> Submit:
        """As `prepare_nowait`, tokenising a long text in a thread. A checkpoint only then. Cancelled, it returns at
        once; the thread ends by itself, unheard."""
        if self.is_quick(request):
            return self.prepare_nowait(request, tenant, sink)
        info = self._find_model(request.model, tenant)
        _check_form(request)
        packed = request.token_ids
        if packed is None:
            packed = await trio.to_thread.run_sync(
                self._encode, info, request, tenant, limiter=self._threads, abandon_on_cancel=True
            )
        return self._submit(request, tenant, sink, info, packed)

    def detokenizer(self, request: CompletionRequest, submit: Submit) -> Detokenizer | None:
        """Return what turns the answer into text, None if only token ids are wanted."""
        text = self._texts.get(submit.model)
        if text is None or not request.want_text:
            return None
        ends = (*submit.stop_token_ids, *(() if submit.ignore_eos else text.eos_token_ids))
        return text.detokenizer(request.stop, ends)

    def text(self, model: str) -> ModelText | None:
        """Return the tokenizer of a model, if it has one."""
        return self._texts.get(model)

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        """Return, per served model, how many tokens of `prefix` are shared: the longest of its forms."""
        found: dict[str, int] = {}
        for name in self._core.models():
            forms = [form for bucket in self._published_for(name).values() for form in bucket]
            sizes = [len(form.tokens) // TOKEN_BYTES for form in forms if form.name == prefix.name]
            found[name] = max(sizes, default=0)
        return found

    def pins(self, model: str, worker_id: str, prefixes: Iterable[PublishedPrefix] | None = None) -> list[Pin]:
        """Return what a worker of `model` is to pin of `prefixes` (None: those that are published), one per form."""
        info = self._core.models().get(model)
        if info is None or not info.fingerprint:
            return []
        prefixes = self._directory.prefixes if prefixes is None else prefixes
        return [
            Pin(f"{prefix.name}/{number}", form, self._root(info), self._public_hashes(info, form))
            for prefix in prefixes
            if prefix.is_pinned_on(worker_id)
            for number, form in enumerate(self._packed_forms(model, prefix))
        ]

    def prefix_of_hash(self, model: str) -> dict[bytes, PublishedPrefix]:
        """Return the published prefixes of `model` by the hash of the last block of each of their forms."""
        info = self._core.models().get(model)
        if info is None or not info.fingerprint:
            return {}
        return {
            self._public_hashes(info, form)[-HASH_BYTES:]: prefix
            for prefix in self._directory.prefixes
            for form in self._packed_forms(model, prefix)
        }

    def _public_hashes(self, info: ModelInfo, packed: bytes) -> bytes:
        space = self._public_namespace
        return hash_prompt(self._root(info), space, space, packed, len(packed) // TOKEN_BYTES, self._block_size)

    def warm(self) -> None:
        """Tokenise all published prefixes for all models now rather than at the first request. May run in a thread,
        as long as nothing else uses this intake."""
        for model in self._texts:
            self._published_for(model)

    async def tokenise(self, published: str) -> None:
        """Tokenise a text that is about to be published, in a thread: neither publishing it nor the next request waits
        for that in the loop. Cancelled, it returns at once."""
        for model, text in self._texts.items():
            if text is not None and (model, published) not in self._forms:
                self._forms[model, published] = await trio.to_thread.run_sync(
                    self._whole_forms, text, published, limiter=self._threads, abandon_on_cancel=True
                )

    def _find_model(self, name: str, tenant: Tenant) -> ModelInfo:
        models = self._core.models()
        if not name:
            mine = [model for model in models if tenant.may_use(model)]
            if len(mine) != 1:
                raise BadRequest(
                    f"name one of the models you may use: {', '.join(sorted(mine)) or 'none'}", param="model"
                )
            [name] = mine
        info = models.get(name)
        if info is None:
            served = ", ".join(sorted(model for model in models if tenant.may_use(model))) or "none yet"
            raise UnknownModel(f"model {name[:80]!r} is not served here; served: {served}", param="model")
        if not tenant.may_use(name):
            raise PermissionDenied(f"tenant {tenant.name} may not use model {name!r}; ask the operator", param="model")
        if not info.fingerprint:
            raise Unavailable(f"model {name!r} is still being loaded; try again in a moment", retry_after_s=2.0)
        return info

    def _encode(self, info: ModelInfo, request: CompletionRequest, tenant: Tenant) -> bytes:
        text = self._texts.get(info.name)
        if text is None:
            raise BadRequest(f"model {info.name!r} has no tokenizer here; send token ids", param="prompt")
        num_chars = len(request.text or "") + sum(len(message.content) for message in request.messages or ())
        if num_chars > text.max_chars(info.max_context):
            raise PromptTooLong(
                f"a prompt of {num_chars} characters cannot fit the {info.max_context} tokens of model {info.name!r}; "
                "shorten it",
                param="prompt",
            )
        memory = self._memory(info.name, tenant)
        try:
            if request.messages is not None:
                return pack_tokens(text.encode_chat(request.messages, memory))
            return pack_tokens(text.encode(request.text or "", memory))
        except (UnicodeEncodeError, TypeError):  # the tokenizer calls a lone surrogate no string
            raise BadRequest("the prompt is no valid Unicode text (a lone surrogate); send valid UTF-8") from None

    def _memory(self, model: str, tenant: Tenant) -> Words:
        """Return the words that the tenant's sharing scope has used with a model; nobody else's, see `word_cache`."""
        key = (model, tenant.scope)
        memory = self._memories.pop(key, None)
        if memory is None:
            memory = Words()
            if len(self._memories) >= MAX_MEMORIES:
                del self._memories[next(iter(self._memories))]
        self._memories[key] = memory  # the last used one last
        return memory

    def _submit(self, request: CompletionRequest, tenant: Tenant, sink: Sink, info: ModelInfo, packed: bytes) -> Submit:
        num_tokens = self._check_prompt(request, info, packed)
        max_tokens = _check_max_tokens(request, info, num_tokens)
        self._check_sampling(request, info)
        text = self._texts.get(info.name)
        now = self._clock()
        root, namespace = self._root(info), self._namespace(tenant)
        num_public = self._num_public_tokens(info.name, tenant, packed)
        hashes = hash_prompt(root, self._public_namespace, namespace, packed, num_public, self._block_size)
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
            sampling=self._sampling(request.sampling, info.name),
            sink=sink,
            arrived=now,
            deadline=None if request.deadline_s is None else now + request.deadline_s,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            cache_hint=request.cache_hint or tenant.cache_hint,
            retention=tuple(request.retention),
            vocab_size=MAX_TOKEN_ID + 1 if text is None else text.vocab_size,
        )

    def _check_prompt(self, request: CompletionRequest, info: ModelInfo, packed: bytes) -> int:
        """Return the prompt's length in tokens."""
        if not packed:
            raise BadRequest("the prompt is empty; send at least one token", param="prompt")
        if len(packed) % TOKEN_BYTES:
            raise BadRequest("token_ids is no whole number of 32-bit ids; pack them as little-endian u32")
        num_tokens = len(packed) // TOKEN_BYTES
        if num_tokens >= info.max_context:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, model {info.name!r} takes {info.max_context} with at least one "
                "left for the answer; shorten it",
                param="prompt",
            )
        if request.token_ids is not None:
            self._check_ids(info.name, memoryview(packed).cast("I"), "prompt")
        return num_tokens

    def _check_ids(self, model: str, ids: memoryview | list[int], param: str) -> None:
        text = self._texts.get(model)
        vocab_size = MAX_TOKEN_ID + 1 if text is None else text.vocab_size
        wrong = max(ids, default=0) if max(ids, default=0) >= vocab_size else min(ids, default=0)
        if not 0 <= wrong < vocab_size:
            raise BadRequest(f"token id {wrong} is not in the vocabulary of {vocab_size} tokens", param=param)

    def _check_sampling(self, request: CompletionRequest, info: ModelInfo) -> None:
        self._check_ids(info.name, list(request.sampling.logit_bias), "logit_bias")
        self._check_ids(info.name, request.stop_token_ids, "stop_token_ids")
        if request.stop and (not request.want_text or self._texts.get(info.name) is None):
            raise BadRequest("stop strings need text; ask for text or use stop_token_ids", param="stop")
        if request.deadline_s is not None and not 0 < request.deadline_s < inf:
            raise BadRequest("deadline_s must be a positive number of seconds", param="deadline_s")

    def _sampling(self, options: SamplingOptions, model: str) -> Sampling:
        """Return how to draw: what `options` leave out is the model's default, else that of `Sampling`."""
        text = self._texts.get(model)
        fields = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
        return Sampling(**fields if text is None else {**text.sampling, **fields})

    def _root(self, info: ModelInfo) -> bytes:
        key = (info.fingerprint, info.dtype)
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = derive_root(self._secret, info.fingerprint, info.dtype)
        return root

    def _namespace(self, tenant: Tenant) -> bytes:
        scope = tenant.scope
        namespace = self._namespaces.get(scope)
        if namespace is None:
            namespace = self._namespaces[scope] = derive_namespace(self._secret, *scope)
        return namespace

    # ---- published prefixes --------------------------------------------------------------------------------------

    def _num_public_tokens(self, model: str, tenant: Tenant, packed: bytes) -> int:
        """Return the length of the longest published prefix of `packed` that `tenant` may use, in whole blocks."""
        published = self._published_for(model)
        if not published:
            return 0
        for form in published.get(packed[: self._block_size * TOKEN_BYTES], ()):
            if (form.tenant_ids is None or tenant.id in form.tenant_ids) and packed.startswith(form.tokens):
                return len(form.tokens) // TOKEN_BYTES
        return 0

    def _published_for(self, model: str) -> dict[bytes, list[_Published]]:
        if self._prefixes is not self._directory.prefixes:
            self._prefixes = self._directory.prefixes
            self._published.clear()
            texts = {prefix.text for prefix in self._prefixes}
            self._forms = {key: forms for key, forms in self._forms.items() if key[1] in texts}
        published = self._published.get(model)
        if published is None:
            published = self._published[model] = self._tokenise_published(model)
        return published

    def _tokenise_published(self, model: str) -> dict[bytes, list[_Published]]:
        buckets: dict[bytes, list[_Published]] = {}
        block_bytes = self._block_size * TOKEN_BYTES
        for prefix in self._directory.prefixes:
            for packed in self._packed_forms(model, prefix):
                form = _Published(prefix.name, packed, prefix.tenant_ids)
                buckets.setdefault(packed[:block_bytes], []).append(form)
        for forms in buckets.values():
            forms.sort(key=lambda form: -len(form.tokens))
        return buckets

    def _packed_forms(self, model: str, prefix: PublishedPrefix) -> list[bytes]:
        """Return the forms of `prefix` in whole blocks, tokenised once: a large one takes a second."""
        found = self._forms.get((model, prefix.text))
        if found is None:
            text = self._texts.get(model)
            found = [] if text is None else self._whole_forms(text, prefix.text)
            self._forms[model, prefix.text] = found
        return found

    def _whole_forms(self, text: ModelText, published: str) -> list[bytes]:
        block_bytes = self._block_size * TOKEN_BYTES
        packed = [pack_tokens(ids) for ids in published_forms(text, published)]
        return [form[: len(form) // block_bytes * block_bytes] for form in packed if len(form) >= block_bytes]


def published_forms(text: ModelText, published: str) -> list[list[int]]:
    """Return the token ids that `published` begins a prompt with: as plain text, and as the system message of a chat.

    What follows can merge into the last tokens, so a form is what two quite different continuations have in common.
    """
    forms = [_common(text.encode(published + "\nA"), text.encode(published + " 9"))]
    if text.has_chat_template:
        system = ChatMessage("system", published)
        try:
            chats = [text.encode_chat([system, ChatMessage("user", user)]) for user in ("A", "9 z")]
        except BadRequest:  # a template without system messages
            return forms
        forms.append(_common(*chats))
    return forms


def _common(left: list[int], right: list[int]) -> list[int]:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return left[:length]


def _check_form(request: CompletionRequest) -> None:
    given = [request.text is not None, request.messages is not None, request.token_ids is not None]
    if sum(given) != 1:
        raise BadRequest("give exactly one of text, messages and token_ids", param="prompt")


def _check_max_tokens(request: CompletionRequest, info: ModelInfo, num_tokens: int) -> int:
    left = info.max_context - num_tokens
    if request.max_tokens is None:
        return left
    if request.max_tokens < 1:
        raise BadRequest(f"max_tokens must be at least 1, not {request.max_tokens}", param="max_tokens")
    if request.max_tokens > left:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens and max_tokens is {request.max_tokens}, together more than the "
            f"{info.max_context} of model {info.name!r}; ask for at most {left}",
            param="max_tokens",
        )
    return request.max_tokens
