"""A gateway that only speaks the client protocol, in a thread: what the SDK's tests talk to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq

from kvasir.protocol.client_messages import (
    CLIENT_MESSAGES,
    CancelRequest,
    ClientMessage,
    CompletionChunk,
    CompletionDone,
    CompletionRequest,
    ModelCard,
    ModelList,
    ModelsRequest,
    Received,
    Usage,
)
from kvasir.protocol.codec import Message, encode
from kvasir.protocol.errors import AuthenticationFailed
from kvasir.protocol.profile import LinkProfile, apply_profile
from kvasir.protocol.tokens import num_tokens, pack_tokens, unpack_tokens

API_KEY = "kv_test_key"
Script = Callable[[CompletionRequest], Iterable[Message]]


def echo(request: CompletionRequest) -> Iterable[Message]:
    """Answer with the prompt itself, one word or token per chunk, `max_tokens` of them at most."""
    if request.api_key != API_KEY:
        yield CompletionDone(request.id, "error", error=AuthenticationFailed("this key is unknown").info())
        return
    if request.messages is not None:
        pieces: list[Any] = [f"{message.role}:{message.content};" for message in request.messages]
    elif request.text is not None:
        pieces = request.text.split(" ")
    else:
        pieces = unpack_tokens(request.token_ids or b"")
    pieces = pieces[: request.max_tokens]
    for i, piece in enumerate(pieces):
        if isinstance(piece, str):
            yield CompletionChunk(request.id, text=piece, token_ids=pack_tokens([i]))
        else:
            yield CompletionChunk(request.id, text=f"<{piece}>", token_ids=pack_tokens([piece]))
    prompt = num_tokens(request.token_ids or b"")
    yield CompletionDone(
        request.id, "length", Usage(prompt, len(pieces), prompt // 2), "worker-1", 0.25, request_id="c0ffee"
    )


def endless(request: CompletionRequest) -> Iterable[Message]:
    """One chunk, then nothing for ever."""
    yield CompletionChunk(request.id, text="first ", token_ids=pack_tokens([1]))


def silent(request: CompletionRequest) -> Iterable[Message]:
    """Nothing at all."""
    return ()


class FakeGateway:
    """Answers every request with what `script` yields for it. `received` gets every message, in order."""

    def __init__(self, folder: Path, script: Script = echo) -> None:
        self.endpoint = f"ipc://{folder}/client.sock"
        self.script = script
        self.received: queue.SimpleQueue[ClientMessage] = queue.SimpleQueue()
        self._peers: dict[int, bytes] = {}
        self._outbox: queue.SimpleQueue[tuple[int, Message | bytes]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.start()

    def start(self) -> None:
        self._stopping.clear()
        context: zmq.Context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        apply_profile(socket, LinkProfile())
        socket.bind(self.endpoint)
        self._thread = threading.Thread(target=self._run, args=(context, socket), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Go away at once, without a word to anybody."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None

    def send(self, call_id: int, message: Message | bytes) -> None:
        """Send a message to whoever made call `call_id`."""
        self._outbox.put((call_id, message))

    def wait_for(self, kind: type[ClientMessage]) -> Any:
        """Return the next message of `kind`, dropping others."""
        while True:
            message = self.received.get(timeout=10)
            if isinstance(message, kind):
                return message

    def assert_nothing_more(self, kind: type[ClientMessage], within_s: float = 0.1) -> None:
        """No message of `kind` has come or comes soon."""
        give_up = time.monotonic() + within_s
        while (left := give_up - time.monotonic()) > 0:
            try:
                assert not isinstance(self.received.get(timeout=left), kind)
            except queue.Empty:
                return

    def __enter__(self) -> FakeGateway:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _run(self, context: zmq.Context, socket: zmq.Socket) -> None:
        while not self._stopping.is_set():
            if socket.poll(5):
                peer, frame = socket.recv_multipart()
                message = CLIENT_MESSAGES.decode(frame)
                self.received.put(message)
                if isinstance(message, Received):
                    continue
                self._peers[message.id] = peer
                if isinstance(message, CompletionRequest):
                    for answer in self.script(message):
                        socket.send_multipart([peer, encode(answer)])
                elif isinstance(message, ModelsRequest):
                    card = ModelCard("demo", 2048, 2)
                    socket.send_multipart([peer, encode(ModelList(message.id, [card]))])
                else:
                    assert isinstance(message, CancelRequest)
            while not self._outbox.empty():
                call_id, out = self._outbox.get()
                socket.send_multipart([self._peers[call_id], out if isinstance(out, bytes) else encode(out)])
        socket.close(linger=0)
        context.term()
