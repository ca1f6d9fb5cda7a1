"""Grammars that callers send are tried before anything else is done with them, in a process of its own.

The process (`gateway.text.grammar_helper`) is started for the first grammar and again after it ended. Verdicts are
remembered per tenant: whether a grammar is known says nothing to others.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from kvasir.gateway.edges.turns import Turns
from kvasir.gateway.log import log
from kvasir.gateway.text.grammar_helper import Lines, Trial, Verdict, line
from kvasir.protocol.errors import BadRequest, Overloaded, Unavailable
from kvasir.protocol.sampling import Grammar

MAX_TRIALS = 4  # at a time
MAX_WAITING = 64
MAX_WAITING_OF_TENANT = 16
MAX_VERDICTS = 4096
START_S = 30.0  # to start and to load the tokenizer of a model
VERDICT_S = 5.0  # the helper itself ends a trial after less than a second
_verdicts = msgspec.json.Decoder(Verdict)


@dataclass(frozen=True, slots=True)
class GrammarModel:
    """What a grammar is compiled for: the tokenizer in `folder`, and the ids that end an answer."""

    folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(slots=True)
class _Pending:
    data: bytes
    done: trio.Event = field(default_factory=trio.Event)
    error: str | None = None


class GrammarCheck:
    """`verdict_nowait` and `verdict` say whether a grammar can be used; `run` has to run beside them."""

    def __init__(self, models: Mapping[str, GrammarModel]) -> None:
        """`models` by name; others take no grammars."""
        self._models = models
        self._verdicts: dict[bytes, str] = {}
        self._pending: dict[int, _Pending] = {}
        self._num_tried = self._num_waiting = 0
        self._wanted = trio.Event()
        self._process: trio.Process | None = None
        self._warm: set[str] = set()  # models for which this process has answered
        self._slots = trio.CapacityLimiter(MAX_TRIALS)
        self._turns = Turns(1)  # one trial at a time for each tenant

    def verdict_nowait(self, tenant_id: str, model: str, grammar: Grammar) -> bool:
        """Return whether `grammar` is known to be good; false: it is not known, ask `verdict`.

        Raises:
            BadRequest: it is known to be bad, or the model takes none.
        """
        if model not in self._models:
            raise BadRequest(f"model {model!r} has no tokenizer here, which grammars need", param="grammar")
        key = _key(tenant_id, model, grammar)
        error = self._verdicts.pop(key, None)
        if error is None:
            return False
        self._verdicts[key] = error  # the last used one last
        if error:
            raise BadRequest(error, param="grammar")
        return True

    async def verdict(self, tenant_id: str, model: str, grammar: Grammar) -> None:
        """Return when `grammar` is known to be good. Cancelled, the trial still runs to its end.

        Raises:
            BadRequest: it is bad; says why.
            Overloaded: too many are waiting. Unavailable: the helper failed.
        """
        if self.verdict_nowait(tenant_id, model, grammar):
            return
        if self._num_waiting >= MAX_WAITING or self._turns.num_waiting(tenant_id) >= MAX_WAITING_OF_TENANT:
            raise Overloaded(f"{self._num_waiting} grammars are waiting to be checked; try again", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            async with self._turns.of(tenant_id):
                if not self.verdict_nowait(tenant_id, model, grammar):
                    async with self._slots:
                        await self._try(tenant_id, model, grammar)
        finally:
            self._num_waiting -= 1
        self.verdict_nowait(tenant_id, model, grammar)

    async def _try(self, tenant_id: str, model: str, grammar: Grammar) -> None:
        target = self._models[model]
        self._num_tried += 1
        number = self._num_tried
        trial = Trial(number, str(target.folder), target.vocab_size, target.eos_token_ids, grammar)
        pending = self._pending[number] = _Pending(line(trial))
        self._wanted.set()
        try:
            with trio.move_on_after(VERDICT_S if model in self._warm else START_S):
                await pending.done.wait()
        finally:
            del self._pending[number]
        if pending.error is None:
            if self._process is not None:
                self._process.kill()  # it hangs, or has died: `run` starts another
            raise Unavailable("the grammar could not be checked just now; try again", retry_after_s=1.0)
        self._warm.add(model)
        if len(self._verdicts) >= MAX_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[_key(tenant_id, model, grammar)] = pending.error

    async def run(self) -> None:
        """Keep a helper while there is something to try. Runs until cancelled."""
        while True:
            await self._wanted.wait()
            try:
                await self._run_helper()
            except OSError as error:  # no descriptors, processes or memory left: perhaps there are some later
                log("grammar_helper_failed", error=str(error))
            self._process = None
            self._warm.clear()
            for pending in self._pending.values():
                pending.done.set()
            await trio.sleep(0.1)

    async def _run_helper(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))  # it finds our modules as this process does
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "kvasir.gateway.text.grammar_helper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, process.stdin)
                await self._receive(process.stdout)
                log("grammar_helper_ended")
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                await process.stdin.aclose()
                await process.stdout.aclose()

    async def _send(self, stdin: trio.abc.SendStream) -> None:
        sent = 0
        try:
            while True:
                self._wanted = trio.Event()
                for number, pending in [*self._pending.items()]:
                    if number > sent:
                        sent = number
                        await stdin.send_all(pending.data)
                await self._wanted.wait()
        except trio.BrokenResourceError:  # it has ended, which `_receive` sees
            return

    async def _receive(self, stdout: trio.abc.ReceiveStream) -> None:
        lines = Lines()
        while data := await stdout.receive_some(1 << 16):
            for answer in lines.push(bytes(data)):
                verdict = _verdicts.decode(answer)
                pending = self._pending.get(verdict.number)
                if pending is not None:
                    pending.error = verdict.error
                    pending.done.set()


def _key(tenant_id: str, model: str, grammar: Grammar) -> bytes:
    data = msgspec.msgpack.encode((tenant_id, model, grammar))
    return hashlib.blake2b(data, digest_size=16).digest()
