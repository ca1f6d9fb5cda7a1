"""Why a prompt was not found cached: it is compared with the request that it follows. No I/O, no text.

A request follows the newest one of its tenant that has a beginning of its conversation in common with it, known by
digests of the messages (`PromptParts`), or, where there are none, by the hash of that prompt's last block. Nothing is
looked up across tenants, so that nothing of one shows in another's answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from xxhash import xxh3_128_digest

from kvasir.gateway.core.api import Change, Changed, PromptParts, Submit
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.gateway.routing.router import Decision
from kvasir.protocol.prefix import HASH_BYTES

Cause = Literal["never_seen", Changed, "routed_elsewhere", "evicted", "worker_left"]
"""The first that holds, in this order.

never_seen: no remembered request of this tenant begins like it. model_changed: that one went to another model, or to
other weights. namespace_changed: it was hashed for other readers (another sharing scope or cache salt, or a prefix
published since). system_, tools_, messages_changed: what the prompt is made of is not what it was. tokens_changed: it
is, but its tokens are not (the chat template, truncation). routed_elsewhere: another worker had more of it, but would
have cost more. evicted: the worker has dropped it since. worker_left: so has the worker that had it.
"""

MIN_BLOCKS = 8
MAX_KEYS = 64  # of the last messages of one prompt that find it


class Miss(msgspec.Struct, frozen=True):
    """Why `num_tokens` of a prompt had to be computed again, or, never seen, for the first time.

    `previous`: the id of the request that this one follows, in hexadecimal. `worker_id`: who had more, has dropped it,
    or is gone; `cost_s` there, if it had more, against that of the chosen one; `evicted_s_ago`, if that is known.
    """

    cause: Cause
    num_tokens: int
    previous: str = ""
    worker_id: str = ""
    cost_s: float | None = None
    chosen_cost_s: float | None = None
    evicted_s_ago: float | None = None


class Prompt(msgspec.Struct, frozen=True, eq=False):
    """What is remembered of a prompt. `num_blocks` full ones, the last with the hash `end`."""

    req_id: bytes
    model: str
    root: bytes
    namespace: bytes
    num_public_tokens: int
    num_blocks: int
    end: bytes
    parts: PromptParts | None
    worker_id: str
    keys: tuple[bytes, ...]


class Prompts:
    """The last `max_prompts` prompts that workers have begun to compute."""

    def __init__(self, max_prompts: int = 4_096) -> None:
        self._max_prompts = max_prompts
        self._prompts: OrderedDict[bytes, Prompt] = OrderedDict()  # by request, the oldest first
        self._by_key: dict[bytes, Prompt] = {}  # the newest with that key

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, submit: Submit, worker_id: str) -> None:
        """Remember a prompt of a full block at least that `worker_id` is computing or has computed."""
        num_blocks = len(submit.prefix_hashes) // HASH_BYTES
        end = submit.prefix_hashes[-HASH_BYTES:]
        keys = (_key(submit.tenant_id, end), *_message_keys(submit)[-MAX_KEYS:])
        if submit.req_id in self._prompts:
            self._forget(submit.req_id)
        prompt = self._prompts[submit.req_id] = Prompt(
            submit.req_id,
            submit.model,
            submit.root,
            submit.namespace,
            submit.num_public_tokens,
            num_blocks,
            end,
            submit.parts,
            worker_id,
            keys,
        )
        for key in keys:
            self._by_key[key] = prompt
        if len(self._prompts) > self._max_prompts:
            self._forget(next(iter(self._prompts)))

    def of(self, tenant_id: str, req_id: bytes) -> Prompt | None:
        """Return the prompt of a request, None if it is not remembered or another tenant's."""
        prompt = self._prompts.get(req_id)
        return prompt if prompt is not None and _key(tenant_id, prompt.end) in prompt.keys else None

    def previous(self, submit: Submit) -> tuple[Prompt, bool] | None:
        """Return the prompt that `submit` follows, and whether it goes on where that one's messages end."""
        message_keys = _message_keys(submit)
        for num_messages in range(len(message_keys), 0, -1):
            prompt = self._by_key.get(message_keys[num_messages - 1])
            if prompt is not None:
                assert prompt.parts is not None
                return prompt, num_messages == len(prompt.parts.messages)
        hashes = submit.prefix_hashes
        for start in range(len(hashes) - HASH_BYTES, -1, -HASH_BYTES):
            prompt = self._by_key.get(_key(submit.tenant_id, hashes[start : start + HASH_BYTES]))
            if prompt is not None:
                return prompt, True
        return None

    def _forget(self, req_id: bytes) -> None:
        prompt = self._prompts.pop(req_id, None)
        for key in prompt.keys if prompt is not None else ():
            if self._by_key.get(key) is prompt:
                del self._by_key[key]


def is_worth_a_reason(submit: Submit) -> bool:
    """Return whether a prompt is so long that to know why it was not cached is worth what that costs."""
    return len(submit.prefix_hashes) >= MIN_BLOCKS * HASH_BYTES


def explain(
    submit: Submit,
    prompts: Prompts,
    num_cached: int,
    block_size: int,
    decision: Decision,
    index_of: Callable[[str], PrefixIndex | None],
    now: float,
) -> Miss | None:
    """Return why only `num_cached` tokens of a prompt were cached; None if no more can have been.

    `index_of(worker_id)`: what a worker has cached, None if it has left.
    """
    num_uncached = submit.num_prompt_tokens - num_cached
    if num_uncached < block_size:
        return None
    found = prompts.previous(submit)
    if found is None:
        return Miss("never_seen", num_uncached)
    previous, goes_on = found
    num_before = min(previous.num_blocks, (submit.num_prompt_tokens - 1) // block_size) * block_size
    num_missed = num_before - num_cached
    if num_missed <= 0:
        return None
    previous_id = previous.req_id.hex()
    cause = _change(submit, previous, goes_on)
    if cause is not None:
        return Miss(cause, num_missed, previous_id)
    better = max(decision.terms, key=lambda terms: terms.num_cached_tokens)
    if better.worker_id != decision.worker_id and better.num_cached_tokens >= num_cached + block_size:
        num_missed = min(num_missed, better.num_cached_tokens - num_cached)
        cost_s = better.cost_s, decision.chosen.cost_s
        return Miss("routed_elsewhere", num_missed, previous_id, better.worker_id, *cost_s)
    first_missed = submit.prefix_hashes[num_cached // block_size * HASH_BYTES :][:HASH_BYTES]
    for worker_id in dict.fromkeys((previous.worker_id, decision.worker_id)):
        index = index_of(worker_id)
        evicted_at = None if index is None else index.evicted_at(first_missed)
        if evicted_at is not None:
            return Miss("evicted", num_missed, previous_id, worker_id, evicted_s_ago=now - evicted_at)
    has_left = index_of(previous.worker_id) is None
    return Miss("worker_left" if has_left else "evicted", num_missed, previous_id, previous.worker_id)


def change(submit: Submit, previous: Prompt | None, block_size: int) -> tuple[Change, int] | None:
    """Return what `CoreApi.change` does."""
    if previous is None:
        return "previous_not_found", 0
    goes_on = True
    if submit.parts is not None and previous.parts is not None:
        theirs = previous.parts.messages
        goes_on = submit.parts.messages[: len(theirs)] == theirs
    cause = _change(submit, previous, goes_on)
    return None if cause is None else (cause, previous.num_blocks * block_size)


def _change(submit: Submit, previous: Prompt, goes_on: bool) -> Changed | None:
    """Return what is not as it was in the previous prompt, None if this one begins with all of it."""
    if (submit.model, submit.root) != (previous.model, previous.root):
        return "model_changed"
    if submit.namespace != previous.namespace:
        return "namespace_changed"
    ours, theirs = submit.parts, previous.parts
    if ours is not None and theirs is not None:
        if ours.system != theirs.system:
            return "system_changed"
        if ours.tools != theirs.tools:
            return "tools_changed"
        if not goes_on:
            return "messages_changed"
    end = submit.prefix_hashes[(previous.num_blocks - 1) * HASH_BYTES : previous.num_blocks * HASH_BYTES]
    if end == previous.end:
        return None
    return "tokens_changed" if submit.num_public_tokens == previous.num_public_tokens else "namespace_changed"


def _message_keys(submit: Submit) -> list[bytes]:
    """Return what finds a conversation by each of its beginnings, the shortest first."""
    messages: Sequence[bytes] = submit.parts.messages if submit.parts is not None else ()
    keys = []
    key = submit.tenant_id.encode()
    for digest in messages:
        key = xxh3_128_digest(key + digest)
        keys.append(key)
    return keys


def _key(tenant_id: str, end: bytes) -> bytes:
    return end + tenant_id.encode()
