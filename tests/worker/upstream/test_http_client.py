"""The client of upstream servers against sockets that say anything, in any pieces."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.upstream import http_client
from kvasir.worker.upstream.http_client import HttpClient, UpstreamUnreachable, parse_url

pytestmark = pytest.mark.timeout(30)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def with_server(answer: bytes, ask: Callable[[HttpClient], Awaitable[None]], *, pieces: int = 0) -> bytes:
    """Run `ask` against a server that says `answer` (`pieces` bytes at a time, 0: at once) and hangs up; return what it
    was sent."""
    received = bytearray()

    async def handle(stream: trio.SocketStream) -> None:
        received.extend(await stream.receive_some())
        try:
            for start in range(0, len(answer), pieces or len(answer) or 1):
                await stream.send_all(answer[start : start + (pieces or len(answer))])
                await trio.lowlevel.checkpoint()
        except trio.BrokenResourceError:
            pass
        await stream.aclose()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, handle, [listener])
            port = listener.socket.getsockname()[1]
            await ask(HttpClient(parse_url(f"http://127.0.0.1:{port}/base/"), {"X-Key": "k"}))
            nursery.cancel_scope.cancel()

    trio.run(main)
    return bytes(received)


def test_a_request_names_host_path_and_length_and_asks_for_no_second_one() -> None:
    async def ask(client: HttpClient) -> None:
        assert await client.ask("POST", "/x", b"{}") == (404, b"gone")

    sent = with_server(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\ngone", ask)

    head, _, body = sent.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /base/x HTTP/1.1" and body == b"{}"
    assert {b"Connection: close", b"X-Key: k", b"Content-Length: 2"} <= set(lines)
    assert lines[1].startswith(b"Host: 127.0.0.1:")


@pytest.mark.parametrize("pieces", [0, 1, 2, 7, 64])
def test_events_are_the_same_however_their_bytes_are_cut(pieces: int) -> None:
    events = [b'data: {"a":1}\n\n', b": a comment\n\n", b"event: x\ndata: one\ndata: two\n\n", b"data: [DONE]\n\n"]
    whole = b"".join(events)
    answer = CHUNKED + b"".join(chunk(whole[i : i + 11]) for i in range(0, len(whole), 11)) + b"0\r\n\r\n"
    found: list[bytes] = []

    async def ask(client: HttpClient) -> None:
        async with client.open("GET", "/") as stream:
            assert stream.status == 200
            while (event := await stream.event()) is not None:
                found.append(event)

    with_server(answer, ask, pieces=pieces)

    assert found == [b'{"a":1}', b"one\ntwo", b"[DONE]"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"no http at all\r\n\r\n",
        CHUNKED + chunk(b"data: 1\n\n"),
        HEAD + b"content-length: 10\r\n\r\nshort",
        CHUNKED + b"zz\r\n",
    ],
)
def test_an_answer_that_is_not_whole_is_unreachable(answer: bytes) -> None:
    async def ask(client: HttpClient) -> None:
        with pytest.raises(UpstreamUnreachable):
            await client.ask("GET", "/")

    with_server(answer, ask)


def test_a_refused_connection_is_unreachable_and_says_where() -> None:
    async def main() -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        with pytest.raises(UpstreamUnreachable, match=f"127.0.0.1:{port} cannot be reached: .*Connection refused"):
            await HttpClient(parse_url(f"http://127.0.0.1:{port}")).ask("GET", "/")

    trio.run(main)


def test_answers_and_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_ANSWER_BYTES", 1000)
    monkeypatch.setattr(http_client, "MAX_EVENT_BYTES", 1000)
    answer = CHUNKED + b"".join(chunk(b"x" * 300) for _ in range(10)) + b"0\r\n\r\n"

    async def ask(client: HttpClient) -> None:
        with pytest.raises(UpstreamUnreachable, match="more than 1000 bytes"):
            await client.ask("GET", "/")
        async with client.open("GET", "/") as stream:
            with pytest.raises(UpstreamUnreachable, match="an event of more than 1000 bytes"):
                await stream.event()

    with_server(answer, ask)


def test_a_silent_server_is_too_slow_and_a_cancelled_read_closes_the_connection() -> None:
    closed = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            pass
        closed.set()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, handle, [listener])
            client = HttpClient(parse_url(f"http://127.0.0.1:{listener.socket.getsockname()[1]}"))
            with pytest.raises(trio.TooSlowError):
                await client.ask("GET", "/", timeout_s=0.05)
            with trio.fail_after(5):
                await closed.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("text", ["", "host:80", "ftp://h", "http://", "http://u:p@h", "http://h:99999", "http://h/?x"])
def test_what_is_no_url_of_a_server_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--upstream"):
        parse_url(text)


def test_a_url_may_leave_out_the_port_and_have_a_path() -> None:
    plain, secure = parse_url("http://h/v/"), parse_url("https://[::1]:8443")
    assert (plain.host, plain.port, plain.is_tls, plain.base) == ("h", 80, False, "/v")
    assert (secure.host, secure.port, secure.is_tls, secure.base) == ("::1", 8443, True, "")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the server's certificate")
def test_over_tls_a_certificate_that_is_not_known_is_named_and_roots_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = "-subj /CN=h -addext subjectAltName=IP:127.0.0.1"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes {subject} -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    made: list[ssl.SSLContext] = []
    make = ssl.create_default_context

    def make_and_count() -> ssl.SSLContext:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", make_and_count)

    async def handle(stream: trio.SocketStream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await secure.receive_some()
            await secure.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(secure)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, handle, [listener])
            address = parse_url(f"https://127.0.0.1:{listener.socket.getsockname()[1]}")
            with pytest.raises(UpstreamUnreachable, match="self-signed certificate"):
                await HttpClient(address).ask("GET", "/")
            made.clear()
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            client = HttpClient(address)
            for _ in range(3):
                assert await client.ask("GET", "/") == (200, b"ok")
            assert len(made) == 1
            nursery.cancel_scope.cancel()

    trio.run(main)
