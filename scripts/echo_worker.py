"""A worker without a model: answers every request at once with tokens of its prompt. For benchmarks and tests.

It speaks the worker protocol like a real one, prefix events included, but computes nothing: what is measured with it
is the gateway. All requests that have arrived by the time it looks are answered in one StepReport.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.codec import encode
from kvasir.protocol.messages import (
    COMMANDS,
    Abort,
    Bye,
    Drain,
    Generate,
    Hello,
    Identify,
    Limits,
    Load,
    Output,
    Refused,
    Report,
    Resync,
    Snapshot,
    StepReport,
    Welcome,
)
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.profile import LinkProfile, apply_profile
from kvasir.protocol.tokens import TOKEN_BYTES

HELLO_RETRY_S = 1.0


class EchoWorker:
    """The loop around a DEALER. The cache is a bounded set of hashes, the oldest of which go first."""

    def __init__(self, socket: zmq.Socket[bytes], hello: Hello) -> None:
        self._socket = socket
        self._hello = hello
        self._is_joined = False
        self._heartbeat_s = 1.0
        self._due = 0.0  # the next Hello or heartbeat
        self._step = 0
        self._event_seq = 0
        self._resident: dict[bytes, None] = {}
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve until drained or refused; return the exit code."""
        while self._exit_code is None:
            wait_s = self._due - time.monotonic()
            if wait_s > 0 and not self._socket.poll(int(wait_s * 1000) + 1):
                continue
            generates = self._take_commands()
            if generates:
                self._answer(generates)
            elif time.monotonic() >= self._due:
                self._send(StepReport(self._count(), self._event_seq, Load()) if self._is_joined else self._hello)
                self._due = time.monotonic() + (self._heartbeat_s if self._is_joined else HELLO_RETRY_S)
        return self._exit_code

    def _take_commands(self) -> list[Generate]:
        generates = []
        receive, decode = self._socket.recv, COMMANDS.decode
        try:
            while True:
                command = decode(receive(zmq.NOBLOCK))
                match command:
                    case Generate():
                        generates.append(command)
                    case Abort():
                        pass  # it has been answered
                    case Welcome():
                        self._is_joined, self._heartbeat_s = True, command.heartbeat_s
                        self._send(Snapshot(self._event_seq, b"".join(self._resident)))
                    case Refused():
                        print(f"refused: {command.reason}", file=sys.stderr)
                        self._exit_code = 2
                    case Identify():
                        self._is_joined, self._due = False, 0.0
                    case Resync():
                        self._send(Snapshot(self._event_seq, b"".join(self._resident)))
                    case Drain():
                        self._send(Bye("drained"))
                        self._exit_code = 0
        except zmq.Again:
            return generates

    def _answer(self, generates: list[Generate]) -> None:
        stored: dict[bytes, None] = {}
        outputs = [self._output(generate, stored) for generate in generates]
        removed = []
        while len(self._resident) > self._hello.num_blocks:
            oldest = next(iter(self._resident))
            del self._resident[oldest]
            if stored.pop(oldest, removed) is removed:
                removed.append(oldest)
        self._event_seq += bool(stored or removed)
        report = StepReport(
            self._count(), self._event_seq, Load(), outputs, stored=b"".join(stored), removed=b"".join(removed)
        )
        self._send(report)
        self._due = time.monotonic() + self._heartbeat_s

    def _output(self, generate: Generate, stored: dict[bytes, None]) -> Output:
        packed = generate.token_ids
        size = generate.max_tokens * TOKEN_BYTES
        tokens = (packed * (size // len(packed) + 1))[:size]
        num_cached = 0
        resident = self._resident
        for digest in split_hashes(generate.prefix_hashes):
            if digest in resident:
                num_cached += self._hello.block_size
            else:
                resident[digest] = stored[digest] = None
        seq = len(packed) // TOKEN_BYTES - generate.num_prompt_tokens
        return Output(generate.req_id, generate.attempt, seq, tokens, "length", num_cached)

    def _count(self) -> int:
        self._step += 1
        return self._step

    def _send(self, report: Report) -> None:
        try:
            self._socket.send(encode(report), zmq.NOBLOCK)
        except zmq.Again:  # no gateway there
            self._is_joined = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run until the gateway lets it go; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", required=True, help="the gateway's worker socket, ipc://PATH")
    parser.add_argument("--worker-id", default=f"echo-{os.getpid()}")
    parser.add_argument("--model", default="echo", help="the name under which it serves")
    parser.add_argument("--block-size", type=int, default=16, help="must be the gateway's")
    parser.add_argument("--num-blocks", type=int, default=100_000, help="how many hashes its cache remembers")
    parser.add_argument("--max-requests", type=int, default=1024, help="requests taken at a time")
    parser.add_argument("--max-context", type=int, default=32_768)
    parser.add_argument("--fingerprint", default="echo")
    args = parser.parse_args(argv)
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id=args.worker_id,
        incarnation=secrets.token_bytes(16),
        model=args.model,
        fingerprint=args.fingerprint,
        dtype="none",
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        limits=Limits(args.max_requests, args.max_context, 8_192),
        pid=os.getpid(),
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    apply_profile(socket, LinkProfile())
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.connect(args.endpoint)
    try:
        return EchoWorker(socket, hello).run()
    except KeyboardInterrupt:
        return 130
    finally:
        socket.close(linger=500)
        context.term()


if __name__ == "__main__":
    sys.exit(main())
