"""Drafts by prompt lookup: what followed the same tokens earlier in the request, or in its tenant's last answers.

Agents repeat themselves: they copy files, quote tools, fill the same JSON. What is remembered of answers belongs to one
tenant *and* one namespace: no other tenant, and no other `cache_salt` of the same one, is ever proposed any of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from kvasir.worker.speculation.proposer import Draft, Text
from kvasir.worker.speculation.suffix_index import BREAK, MAX_MATCH, SuffixIndex

ANSWER_TOKENS = 8_192  # remembered of one answer, its last ones
HALF_TOKENS = 16_384  # remembered of a tenant's answers: one to two times as many
MAX_TENANT_BYTES = 2 << 20  # of all its namespaces
MAX_BYTES = 64 << 20  # of all tenants
READ_TOKENS = 2_048  # of a long prompt, per step

_Scope = tuple[str, bytes]
"""A tenant and one of its namespaces."""


class Lookup:
    """A `Proposer`."""

    name = "lookup"

    def __init__(self, max_bytes: int = MAX_BYTES, max_tenant_bytes: int = MAX_TENANT_BYTES) -> None:
        self._max_bytes, self._max_tenant_bytes = max_bytes, max_tenant_bytes
        self._answers: OrderedDict[_Scope, _Answers] = OrderedDict()  # the last used one last

    @property
    def size_bytes(self) -> int:
        """What is remembered of finished answers."""
        return sum(answers.size_bytes for answers in self._answers.values())

    def size_bytes_of(self, tenant: str) -> int:
        return sum(answers.size_bytes for scope, answers in self._answers.items() if scope[0] == tenant)

    def open(self, text: Text) -> _Reader:
        scope = (text.tenant, text.namespace)
        if scope in self._answers:
            self._answers.move_to_end(scope)
        return _Reader(text, self._answers, scope)

    def close(self, text: Text) -> None:
        """Remember the answer of `text`, unless its request wishes to leave nothing."""
        if text.leaves_nothing or len(text.output_ids) < 2:
            return
        scope = (text.tenant, text.namespace)
        answers = self._answers.setdefault(scope, _Answers())
        answers.add(text.output_ids[-ANSWER_TOKENS:])
        self._answers.move_to_end(scope)
        while self.size_bytes_of(text.tenant) > self._max_tenant_bytes:
            self._answers.pop(next(other for other in self._answers if other[0] == text.tenant))
        while self.size_bytes > self._max_bytes:
            self._answers.popitem(last=False)

    def forget(self, tenant: str) -> None:
        for scope in [scope for scope in self._answers if scope[0] == tenant]:
            del self._answers[scope]


class _Answers:
    """The last answers of one scope, in two halves: when the newer one is full, the older one goes."""

    def __init__(self) -> None:
        self.halves = [SuffixIndex(HALF_TOKENS)]

    @property
    def size_bytes(self) -> int:
        return sum(half.size_bytes for half in self.halves)

    def add(self, token_ids: Sequence[int]) -> None:
        if len(self.halves[0]) + len(token_ids) > HALF_TOKENS:
            self.halves = [SuffixIndex(HALF_TOKENS), self.halves[0]]
        self.halves[0].extend([*token_ids, BREAK])


class _Reader:
    """Follows one request."""

    def __init__(self, text: Text, answers: OrderedDict[_Scope, _Answers], scope: _Scope) -> None:
        self._text = text
        self._answers, self._scope = answers, scope
        self._own = SuffixIndex(len(text.prompt_ids) + len(text.output_ids) + 1_024)

    def propose(self, limit: int) -> Draft:
        """Return what followed the longest match, at most `limit` tokens; nothing while the prompt is still read."""
        text, own = self._text, self._own
        num_left = len(text.prompt_ids) + len(text.output_ids) - len(own)
        own.extend(text.tokens(len(own), len(own) + min(num_left, READ_TOKENS)))
        if num_left > READ_TOKENS:
            return Draft()
        suffix = own.tokens[-MAX_MATCH:]
        position, length = own.find(suffix)
        source = own
        answers = self._answers.get(self._scope)
        for half in answers.halves if answers is not None else ():
            found = half.find(suffix)
            if found[1] > length:
                source, (position, length) = half, found
        if not length:
            return Draft()
        found_ids = source.tokens[position : position + limit].tolist()
        if source is own:  # a text that repeats itself goes on with what was just copied
            while len(found_ids) < limit:
                found_ids += found_ids[: limit - len(found_ids)]
            return Draft(found_ids, length)
        return Draft([*takewhile(BREAK.__ne__, found_ids)], length)
