"""Published prefixes as each model sees them: their token ids, their hashes, and which of them a prompt begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile

import trio

from kvasir.gateway.core.api import CoreApi
from kvasir.gateway.tenants.directory import PublishedPrefix, Tenant, TenantDirectory
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.client_messages import ChatMessage
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import Pin
from kvasir.protocol.prefix import HASH_BYTES, derive_namespace, derive_root, hash_prompt
from kvasir.protocol.tokens import TOKEN_BYTES, pack_tokens

_Form = tuple[bytes, PublishedPrefix]  # one way in which a prefix begins prompts: packed token ids, whole blocks


class Published:
    """The directory's published prefixes, tokenised once per model. A change of the directory holds at once.

    `texts`: by model name; None for a model without a tokenizer, which has no published prefixes. `secret`: the
    deployment's.
    """

    def __init__(
        self,
        core: CoreApi,
        directory: TenantDirectory,
        texts: Mapping[str, ModelText | None],
        secret: bytes,
        block_size: int,
    ) -> None:
        self._core = core
        self._directory = directory
        self._texts = texts
        self._block_size = block_size
        self._block_bytes = block_size * TOKEN_BYTES
        self._secret = secret
        self._namespace = derive_namespace(secret, "public")
        self._prefixes: tuple[PublishedPrefix, ...] | None = None  # what `_by_first_block` was made of
        self._by_first_block: dict[str, dict[bytes, list[_Form]]] = {}  # by model; longest first
        self._packed: dict[tuple[str, str], list[bytes]] = {}  # model, published text -> what tokenising it has given
        self._threads = trio.CapacityLimiter(1)

    def num_public_tokens(self, model: str, tenant: Tenant, packed: bytes) -> int:
        """Return the length of the longest published prefix of `packed` that `tenant` may use, in whole blocks."""
        self.warm()
        for form, prefix in self._by_first_block.get(model, {}).get(packed[: self._block_bytes], ()):
            if (prefix.tenant_ids is None or tenant.id in prefix.tenant_ids) and packed.startswith(form):
                return len(form) // TOKEN_BYTES
        return 0

    def public_tokens(self, prefix: PublishedPrefix) -> dict[str, int]:
        """Return, per served model, how many tokens of `prefix` are shared: the longest of its forms."""
        return {
            model: max((len(form) // TOKEN_BYTES for form in self._forms(model, prefix)), default=0)
            for model, info in self._core.models().items()
            if "public_zone" not in info.lacks
        }

    def pins(self, model: str, worker_id: str, prefixes: Iterable[PublishedPrefix] | None = None) -> list[Pin]:
        """Return what a worker of `model` is to pin of `prefixes` (None: those that are published), one per form."""
        prefixes = self._directory.prefixes if prefixes is None else prefixes
        wanted = [prefix for prefix in prefixes if prefix.is_pinned_on(worker_id)]
        return [pin for prefix in wanted for pin in self._pins_of(model, prefix)]

    def prefix_of_hash(self, model: str) -> dict[bytes, PublishedPrefix]:
        """Return the published prefixes of `model` by the hash of the last block of each of their forms."""
        prefixes = self._directory.prefixes
        return {pin.prefix_hashes[-HASH_BYTES:]: prefix for prefix in prefixes for pin in self._pins_of(model, prefix)}

    def warm(self) -> None:
        """Tokenise the published prefixes for all models now rather than at the first request."""
        prefixes = self._directory.prefixes
        if self._prefixes is prefixes:
            return
        texts = {prefix.text for prefix in prefixes}
        self._packed = {key: forms for key, forms in self._packed.items() if key[1] in texts}
        self._by_first_block = {model: self._find_buckets(model, prefixes) for model in self._texts}
        self._prefixes = prefixes

    async def tokenise(self, published: str) -> None:
        """Tokenise a text that is about to be published, in a thread: neither publishing it nor the next request waits
        for that in the loop. Cancelled, it returns at once."""
        for model, text in self._texts.items():
            if text is not None and (model, published) not in self._packed:
                self._packed[model, published] = await trio.to_thread.run_sync(
                    self._pack, text, published, limiter=self._threads, abandon_on_cancel=True
                )

    def _find_buckets(self, model: str, prefixes: Iterable[PublishedPrefix]) -> dict[bytes, list[_Form]]:
        forms = [(form, prefix) for prefix in prefixes for form in self._forms(model, prefix)]
        buckets: dict[bytes, list[_Form]] = {}
        for form, prefix in sorted(forms, key=lambda pair: -len(pair[0])):
            buckets.setdefault(form[: self._block_bytes], []).append((form, prefix))
        return buckets

    def _pins_of(self, model: str, prefix: PublishedPrefix) -> list[Pin]:
        info = self._core.models().get(model)
        if info is None or not info.fingerprint or "public_zone" in info.lacks:
            return []
        root, space = derive_root(self._secret, info.fingerprint, info.dtype), self._namespace
        return [
            Pin(
                f"{prefix.name}/{number}",
                form,
                root,
                hash_prompt(root, space, space, form, len(form) // TOKEN_BYTES, self._block_size),
            )
            for number, form in enumerate(self._forms(model, prefix))
        ]

    def _forms(self, model: str, prefix: PublishedPrefix) -> list[bytes]:
        """Return the forms of `prefix` in whole blocks, tokenised once: a large one takes a second."""
        found = self._packed.get((model, prefix.text))
        if found is None:
            text = self._texts.get(model)
            found = self._packed[model, prefix.text] = [] if text is None else self._pack(text, prefix.text)
        return found

    def _pack(self, text: ModelText, published: str) -> list[bytes]:
        size = self._block_bytes
        packed = [pack_tokens(ids) for ids in published_forms(text, published)]
        return [form[: len(form) // size * size] for form in packed if len(form) >= size]


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
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))]
