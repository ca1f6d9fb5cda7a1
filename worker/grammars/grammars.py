"""The worker's grammars: compiled in a thread, remembered per tenant, and asked for masks.

llguidance does not hold Python's lock while it compiles, so the engine's steps go on. The gateway has tried each
grammar before in a process that may die; the threads here have more stack than that process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from llguidance import LLMatcher, LLTokenizer

from kvasir.protocol.errors import BadRequest
from kvasir.protocol.grammars import make_matcher
from kvasir.protocol.sampling import Constraint, Grammar
from kvasir.worker.grammars.answer_matcher import AnswerMatcher

MAX_COMPILED = 64
MAX_COMPILED_OF_TENANT = 16
STACK_BYTES = 64 << 20  # address space, not memory

_Key = tuple[str, Grammar]


class Grammars:
    """Makes matchers. For the engine's thread."""

    def __init__(self, tokenizer: LLTokenizer, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_token_ids = tokenizer, tuple(eos_token_ids)
        self._compiled: OrderedDict[_Key, LLMatcher] = OrderedDict()  # the last used one last
        self._lock = threading.Lock()
        self._compiling = _Thread("grammars")

    def open(self, tenant: str, constraint: Constraint, output_ids: Sequence[int]) -> AnswerMatcher:
        """Return the matcher of an answer that begins with `output_ids`; it may be ready only later.

        A grammar that cannot be compiled makes it ready with an error.
        """
        assert constraint.grammar is not None
        matcher = AnswerMatcher(constraint.reasoning, self._eos_token_ids, self._tokenizer.vocab_size)
        key = (tenant, constraint.grammar)
        known = None if output_ids else self._find(key)
        if known is None:
            self._compiling.submit(lambda: self._begin(matcher, key, [*output_ids]))
        else:
            matcher.begin(known, ())
        return matcher

    def _begin(self, matcher: AnswerMatcher, key: _Key, output_ids: list[int]) -> None:
        """In the thread: let `matcher` begin, or fail."""
        try:
            found = self._find(key)
            if found is None:
                found = make_matcher(self._tokenizer, key[1])
                self._remember(key, found)
                found = found.deep_copy()
            matcher.begin(found, output_ids)
        except BadRequest as error:
            matcher.fail(error.message)
        except BaseException as bug:  # a panic is none of Exception; it ends this request alone
            matcher.fail(f"the grammar cannot be compiled: {type(bug).__name__}: {bug}"[:500])

    def _find(self, key: _Key) -> LLMatcher | None:
        """Return a copy of a compiled grammar."""
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
            return None if found is None else found.deep_copy()

    def _remember(self, key: _Key, matcher: LLMatcher) -> None:
        with self._lock:
            own = [other for other in self._compiled if other[0] == key[0]]
            if len(own) >= MAX_COMPILED_OF_TENANT:
                del self._compiled[own[0]]
            elif len(self._compiled) >= MAX_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[key] = matcher


class _Thread:
    """Runs one job after another. It ends with the process, whatever it is doing."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def submit(self, job: Callable[[], object]) -> None:
        """Run `job`, which must not raise, after those before it."""
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            self._jobs.get()()
