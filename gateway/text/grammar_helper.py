"""The process that tries grammars: what a caller sends is compiled here first, where it can do no harm.

A fork server. It has loaded the tokenizers. For each grammar it forks a child with bounds on memory, processor time and
stack. The child compiles the grammar and computes the first mask. If it is too slow or crashes, only this grammar is
refused.

Reads `Trial`s from standard input and writes `Verdict`s to standard output, each a line of JSON. Ends when its input
does.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import msgspec
from llguidance import LLTokenizer

from kvasir.protocol.errors import BadRequest, ModelError
from kvasir.protocol.grammars import load_tokenizer, make_matcher, plain
from kvasir.protocol.sampling import Grammar

LIMIT_S = 0.8
MEMORY_BYTES = 256 << 20  # beyond what the helper has itself
STACK_BYTES = 2 << 20  # less than any thread of a worker has
MAX_TEXT_BYTES = 2000  # a pipe takes it at once
TOO_MUCH = "the grammar takes too long to prepare or too much memory; make it smaller or less nested"


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """Try `grammar` for the model in `folder`."""

    number: int
    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    grammar: Grammar


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What is wrong with the grammar of trial `number`; empty: nothing."""

    number: int
    error: str = ""


class Lines:
    """Whole lines out of a stream of bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """Take what was read; return the lines that it completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


def line(message: Trial | Verdict) -> bytes:
    """Return `message` as a line."""
    return msgspec.json.encode(message) + b"\n"


@dataclass(frozen=True, slots=True)
class _Child:
    number: int
    pid: int
    deadline: float


class _Server:
    """Children by the reading ends of their pipes."""

    def __init__(self) -> None:
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._lines = Lines()
        self._trials = msgspec.json.Decoder(Trial)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._wait_s()):
                if key.fd != 0:
                    self._finish(key.fd)
                elif not self._read():
                    return
            now = time.monotonic()
            for fd in [fd for fd, child in self._children.items() if now >= child.deadline]:
                self._finish(fd)

    def _wait_s(self) -> float | None:
        if not self._children:
            return None
        return max(0.0, min(child.deadline for child in self._children.values()) - time.monotonic())

    def _read(self) -> bool:
        """Start what is asked for; False: the gateway is gone."""
        data = os.read(0, 1 << 16)
        for trial in self._lines.push(data):
            self._start(self._trials.decode(trial))
        if not data:
            for child in self._children.values():
                os.kill(child.pid, signal.SIGKILL)
        return bool(data)

    def _start(self, trial: Trial) -> None:
        try:
            tokenizer = _tokenizer(trial.folder, trial.vocab_size, trial.eos_token_ids)
        except ModelError as error:
            _write(Verdict(trial.number, error.message))
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _try(tokenizer, trial.grammar, writing)
        os.close(writing)
        self._children[reading] = _Child(trial.number, pid, time.monotonic() + LIMIT_S)
        self._selector.register(reading, selectors.EVENT_READ)

    def _finish(self, fd: int) -> None:
        """Tell what came of a child that has written, died, or had its time."""
        child = self._children.pop(fd)
        self._selector.unregister(fd)
        os.set_blocking(fd, False)
        try:
            told = os.read(fd, MAX_TEXT_BYTES + 1)
        except BlockingIOError:
            told = b""
        os.close(fd)
        os.kill(child.pid, signal.SIGKILL)  # not waited for before: the number is its own still
        os.waitpid(child.pid, 0)
        _write(Verdict(child.number, told[1:].decode("utf-8", "replace") if told else TOO_MUCH))


def _try(tokenizer: LLTokenizer, grammar: Grammar, fd: int) -> NoReturn:
    """In the child: compile `grammar`, write a zero byte and what is wrong with it, and exit."""
    try:
        _bound()
        error = _error(tokenizer, grammar)
        os.write(fd, b"\0" + error.encode("utf-8", "replace")[:MAX_TEXT_BYTES])
    finally:
        os._exit(0)


def _bound() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, 1),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _error(tokenizer: LLTokenizer, grammar: Grammar) -> str:
    try:
        matcher = make_matcher(tokenizer, grammar)
    except BadRequest as error:
        return error.message
    matcher.compute_bitmask()
    return plain(matcher.get_error()) if matcher.is_error() else ""


@cache
def _tokenizer(folder: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    return load_tokenizer(Path(folder), vocab_size, eos_token_ids)


def _write(verdict: Verdict) -> None:
    data = memoryview(line(verdict))
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they come to the whole group; the gateway says when it is over
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crashing child would say so over and over
    try:
        _Server().run()
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
