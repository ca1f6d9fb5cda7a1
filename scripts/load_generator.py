"""The other ends of `bench_gateway.py`, each a process of its own: two load generators and a trivial HTTP backend.

load_generator.py zmq ENDPOINT KEY PROMPTS IN_FLIGHT MAX_TOKENS SECONDS     prints one JSON object
load_generator.py http PORT PATH KEY BODIES IN_FLIGHT SECONDS               prints one JSON object
load_generator.py backend PORT OUTPUT_TOKENS                                serves until it is killed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvasir.protocol.client_messages import GATEWAY_MESSAGES, CompletionDone, CompletionRequest
from kvasir.protocol.codec import encode
from kvasir.protocol.sampling import SamplingOptions
from kvasir.protocol.tokens import pack_tokens

MODEL_NAME = "demo"


def generate_zmq(
    endpoint: str, key: str, prompts_path: str, in_flight: str, max_tokens: str, seconds: str
) -> dict[str, Any]:
    """Four connections, each with a quarter of the requests in flight; a new one for each that is done."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    greedy = SamplingOptions(temperature=0.0)
    prompts = json.loads(Path(prompts_path).read_text())
    as_text = isinstance(prompts[0], str)
    packed = [b"" if as_text else pack_tokens(prompt[:-8]) for prompt in prompts]
    sockets = [context.socket(zmq.DEALER) for _ in range(4)]
    poller = zmq.Poller()
    began: dict[int, float] = {}
    latencies: list[float] = []
    errors = sent = 0
    first = random.randrange(10_000_000, 90_000_000)

    def send(dealer: zmq.Socket[bytes]) -> None:
        nonlocal sent
        sent += 1
        number = f"{first + sent:08d}"
        index = sent % len(prompts)
        if as_text:
            prompt = {"text": prompts[index].replace("@@@@@@@@", number)}
        else:
            prompt = {"token_ids": packed[index] + pack_tokens(300 + int(digit) for digit in number)}
        request = CompletionRequest(
            sent,
            key,
            MODEL_NAME,
            **prompt,
            max_tokens=int(max_tokens),
            sampling=greedy,
            want_text=as_text,
            want_tokens=not as_text,
        )
        began[sent] = time.perf_counter()
        dealer.send(encode(request))

    for dealer in sockets:
        dealer.connect(endpoint)
        poller.register(dealer, zmq.POLLIN)
        for _ in range(max(1, int(in_flight) // len(sockets))):
            send(dealer)
    begun = time.perf_counter()
    end = begun + float(seconds)
    while (now := time.perf_counter()) < end:
        for dealer, _ in poller.poll(1000):
            with contextlib.suppress(zmq.Again):
                while True:
                    for message in map(GATEWAY_MESSAGES.decode, dealer.recv_multipart(zmq.NOBLOCK)):
                        if isinstance(message, CompletionDone):
                            latencies.append(time.perf_counter() - began.pop(message.id))
                            errors += message.error is not None or message.usage.completion_tokens != int(max_tokens)
                            send(dealer)
    return sample(latencies, errors, now - begun)


def generate_http(port: str, path: str, key: str, bodies_path: str, in_flight: str, seconds: str) -> dict[str, Any]:
    """Keep-alive connections over raw sockets and epoll; reads Content-Length and nothing else of an answer."""
    requests = [
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()
        for body in Path(bodies_path).read_text().splitlines()
    ]
    first = random.randrange(10_000_000, 90_000_000)
    epoll = select.epoll()
    connections: dict[int, tuple[socket.socket, bytearray]] = {}
    began: dict[int, float] = {}
    latencies: list[float] = []
    errors = sent = 0

    def send(connection: socket.socket) -> None:
        nonlocal sent
        sent += 1
        began[connection.fileno()] = time.perf_counter()
        connection.sendall(requests[sent % len(requests)].replace(b"@@@@@@@@", b"%08d" % (first + sent)))

    for _ in range(int(in_flight)):
        connection = socket.create_connection(("127.0.0.1", int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[connection.fileno()] = (connection, bytearray())
        epoll.register(connection, select.EPOLLIN)
        send(connection)
    begun = time.perf_counter()
    end = begun + float(seconds)
    while (now := time.perf_counter()) < end:
        for descriptor, _ in epoll.poll(1.0):
            connection, buffer = connections[descriptor]
            data = connection.recv(65536)
            if not data:
                raise RuntimeError("the server closed a connection")
            buffer += data
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                continue
            headers = bytes(buffer[:head]).lower()
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(buffer) >= head + 4 + length:
                latencies.append(time.perf_counter() - began[descriptor])
                errors += not headers.startswith(b"http/1.1 200")
                buffer.clear()
                send(connection)
    return sample(latencies, errors, now - begun)


def sample(latencies: list[float], errors: int, seconds: float) -> dict[str, Any]:
    latencies.sort()
    count = len(latencies)
    if not count:
        raise RuntimeError("no request was answered")
    p50, p99 = latencies[count // 2] * 1e3, latencies[count * 99 // 100] * 1e3
    return {"requests": count, "errors": errors, "seconds": seconds, "p50_ms": p50, "p99_ms": p99}


class Backend(asyncio.Protocol):
    """Answers every request at once: what a model server would say, without the model."""

    answers: dict[bytes, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (head := self.buffer.find(b"\r\n\r\n")) >= 0:
            headers = self.buffer[:head].lower()
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in headers else 0
            if len(self.buffer) < head + 4 + length:
                return
            method, _, rest = self.buffer.partition(b" ")
            if method not in (b"GET", b"POST"):  # the router first tries gRPC
                self.transport.close()
                return
            self.buffer = self.buffer[head + 4 + length :]
            self.transport.write(self.answers.get(rest.split(b" ", 1)[0], self.answers[b"/health"]))


async def serve_backend(port: str, output_tokens: str) -> None:
    def answer(value: Any) -> bytes:
        body = json.dumps(value).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    usage = {"prompt_tokens": 128, "completion_tokens": int(output_tokens), "total_tokens": 128 + int(output_tokens)}
    text = " word" * int(output_tokens)
    common = {"id": "cmpl-1", "created": 1, "model": MODEL_NAME, "usage": usage}
    chat = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    Backend.answers = {
        b"/health": answer({}),
        b"/v1/models": answer({"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]}),
        b"/get_model_info": answer({"model_path": MODEL_NAME, "is_generation": True}),
        b"/get_server_info": answer({"model_id": MODEL_NAME, "dp_size": 1}),
        b"/v1/completions": answer(
            {"object": "text_completion", **common, "choices": [{"index": 0, "text": text, "finish_reason": "length"}]}
        ),
        b"/v1/chat/completions": answer({"object": "chat.completion", **common, "choices": [chat]}),
    }
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", int(port), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "backend":
        asyncio.run(serve_backend(*rest))
    else:
        print(json.dumps({"zmq": generate_zmq, "http": generate_http}[what](*rest)))
