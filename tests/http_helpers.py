"""The HTTP edge over real sockets, for tests with raw bytes and with the public clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
import trio

from kvasir.gateway.core.api import Submit
from kvasir.gateway.edges.grammar_check import GrammarCheck
from kvasir.gateway.edges.http_api import HttpApi
from kvasir.gateway.http.limits import HttpLimits
from kvasir.gateway.http.server import HttpServer, open_listeners
from kvasir.gateway.text.model_text import ModelText
from tests.edge_helpers import ANSWER, KEYS, TEXT, FakeCore, make_directory, make_preparer

KEY = KEYS["alpha"]


@dataclass
class Edge:
    port: int
    core: FakeCore
    server: HttpServer

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def raw(self, data: bytes, *, pieces: int = 1) -> bytes:
        """Send bytes and return all that comes back until the server closes."""
        async with await self.connect() as stream:
            size = -(-len(data) // pieces) or 1
            for start in range(0, len(data), size):
                await stream.send_all(data[start : start + size])
                await trio.lowlevel.checkpoint()
            return b"".join([chunk async for chunk in stream])

    async def post(self, path: str, body: Any, key: str = KEY) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.raw(post_bytes(path, content, key=key, close=True))
        head, _, rest = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        return int(lines[0].split()[1]), headers, dechunk(rest) if "transfer-encoding" in headers else rest


def post_bytes(path: str, content: bytes, *, key: str = KEY, close: bool = False) -> bytes:
    closing = "connection: close\r\n" if close else ""
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{closing}"
        f"content-length: {len(content)}\r\n\r\n"
    ).encode() + content


def dechunk(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        out += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return out


@asynccontextmanager
async def open_edge(
    limits: HttpLimits | None = None,
    script: Callable[[Submit], Sequence[int]] | None = None,
    text: ModelText = TEXT,
    grammars: GrammarCheck | None = None,
) -> AsyncIterator[Edge]:
    """Serve the routes over a scripted core; `text` is the model's."""
    core = FakeCore(script or (lambda submit: text.encode(ANSWER)))
    directory = make_directory()
    preparer = make_preparer(core, directory, text, grammars)
    server = HttpServer(HttpApi(core, preparer, directory, lambda: b"# HELP x\n"), limits)
    listeners = await open_listeners("127.0.0.1", 0)
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            core.nursery = nursery
            await nursery.start(server.run, listeners)
            yield Edge(listeners[0].socket.getsockname()[1], core, server)
            nursery.cancel_scope.cancel()


def with_openai(work: Callable[[openai.OpenAI, FakeCore], None], key: str = KEY, **edge: Any) -> None:
    async def main() -> None:
        async with open_edge(**edge) as opened:

            def blocking() -> None:
                url = f"http://127.0.0.1:{opened.port}/v1"
                with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20) as api:
                    work(api, opened.core)

            await trio.to_thread.run_sync(blocking)

    trio.run(main)
