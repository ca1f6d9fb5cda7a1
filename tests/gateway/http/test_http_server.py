"""The HTTP parser fed in any pieces, and the server's connections: half-closed, pipelined, lingering, out of room."""

from __future__ import annotations

import contextlib
import gc
import itertools
import socket
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.http.connection import READ_BYTES, Exchange, Handler
from kvasir.gateway.http.limits import HttpLimits
from kvasir.gateway.http.parser import REQUEST_BYTES, HttpRequest, MessageLimits, RequestParser
from kvasir.gateway.http.response import HttpResponse
from kvasir.gateway.http.server import HttpServer, open_listeners
from kvasir.protocol.errors import ConfigurationError, KvasirError

pytestmark = pytest.mark.timeout(60)
LIMITS = MessageLimits(max_header_bytes=1000, max_headers=20, max_body_bytes=100)


# ---- the parser --------------------------------------------------------------------------------------------------


def feed(data: bytes, cuts: list[int] | None = None) -> RequestParser:
    parser = RequestParser(LIMITS)
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or ())})
    for start, end in itertools.pairwise(borders):
        if parser.refusal is None:
            parser.feed(data[start:end])
    return parser


def outcome(parser: RequestParser) -> tuple[list[HttpRequest], int | None]:
    return list(parser.requests), None if parser.refusal is None else parser.refusal.status


bodies = st.binary(max_size=60)
names = st.sampled_from(["accept", "Authorization", "X-Thing", "content-type"])
values = st.text("abc ;,=é\t", max_size=12).map(str.strip)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, HttpRequest]:
    """A request as it may be written, and what it says."""
    method, path = (
        draw(st.sampled_from(["GET", "POST", "HEAD"])),
        draw(st.sampled_from(["/", "/v1/models/a%2Fb", "/x"])),
    )
    version = draw(st.sampled_from(["1.1", "1.0"]))
    headers = {"host": "x"}
    lines = [f"{method} {path}{draw(st.sampled_from(['', '?a=b/c']))} HTTP/{version}", "Host: x"]
    for name, value in draw(st.lists(st.tuples(names, values), max_size=4)):
        lines.append(f"{name}:{draw(st.sampled_from(['', ' ', '  ']))}{value}")
        key = name.lower()
        headers[key] = f"{headers[key]},{value}" if key in headers else value
    body = draw(bodies) if method == "POST" else b""
    keep_alive = version == "1.1"
    if version == "1.0" and draw(st.booleans()):
        lines.append("Connection: keep-alive")
        headers["connection"], keep_alive = "keep-alive", True
    if method == "POST" and version == "1.1" and draw(st.booleans()):
        lines.append("Transfer-Encoding: chunked")
        headers["transfer-encoding"] = "chunked"
        sizes = draw(st.lists(st.integers(1, 40), max_size=4))
        content, rest = b"", body
        for size in [*sizes, len(body)]:
            piece, rest = rest[:size], rest[size:]
            if piece:
                content += b"%X%b\r\n%b\r\n" % (len(piece), draw(st.sampled_from([b"", b";a=b"])), piece)
        content += b"0\r\n" + draw(st.sampled_from([b"", b"Authorization: Bearer smuggled\r\n"])) + b"\r\n"
    else:
        if method == "POST":
            lines.append(f"Content-Length: {len(body)}")
            headers["content-length"] = str(len(body))
        content = body
    raw = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content
    return raw, HttpRequest(method, path, headers, body, keep_alive, version == "1.0")


@settings(max_examples=300)
@given(st.lists(messages(), min_size=1, max_size=3), st.lists(st.integers(0, 1000), max_size=20))
def test_requests_are_the_same_however_their_bytes_arrive(
    sent: list[tuple[bytes, HttpRequest]], cuts: list[int]
) -> None:
    for _, request in sent[:-1]:
        if not request.keep_alive:
            return  # nothing may follow it
    parser = feed(b"".join(raw for raw, _ in sent), cuts)
    assert outcome(parser) == ([request for _, request in sent], None)
    assert parser.phase == "idle"


@settings(max_examples=200)
@given(messages(), st.lists(st.integers(0, 1000), max_size=20), st.integers(0, 1000), st.binary(min_size=1, max_size=3))
def test_damaged_requests_never_raise_and_are_judged_alike_however_they_arrive(
    message: tuple[bytes, HttpRequest], cuts: list[int], where: int, damage: bytes
) -> None:
    raw = message[0]
    where %= len(raw)
    raw = raw[:where] + damage + raw[where + len(damage) :]
    assert outcome(feed(raw, cuts)) == outcome(feed(raw))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n", 400),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n", 400),
        ("CONNECT a:443 HTTP/1.1\r\nHost: a\r\n", 400),
        ("GET http:// HTTP/1.1\r\nHost: a\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\n" + "A: " + "b" * 990 + "\r\n", 431),
        ("GET / HTTP/1.1\r\nHost: a\r\n" + "A: b\r\n" * 20, 431),
    ],
)
def test_what_the_parser_alone_would_let_through_is_refused(head: str, status: int) -> None:
    for cuts in ([], list(range(0, 2000, 7))):
        assert outcome(feed(head.encode() + b"\r\n", cuts)) == ([], status)


def test_a_body_announced_too_large_is_refused_after_its_head() -> None:
    requests, status = outcome(feed(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n"))
    assert [(each.path, each.is_complete) for each in requests] == [("/x", False)] and status == 413


def test_a_header_or_chunk_line_without_end_is_refused_while_it_comes() -> None:
    for start, status in (
        (b"GET / HTTP/1.1\r\nA: ", 431),
        (b"GET /", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTrailer: ", 413),
    ):
        parser = RequestParser(LIMITS)
        parser.feed(start)
        num_fed = 0
        while parser.refusal is None:
            parser.feed(b"x" * 50)
            num_fed += 50
            assert num_fed <= 1500
        assert parser.refusal.status == status


def test_an_absolute_url_is_served_as_its_path() -> None:
    [request] = feed(b"GET http://example.org:80/v1/models?x HTTP/1.1\r\nHost: example.org\r\n\r\n").requests
    assert request.path == "/v1/models"


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2000), max_size=8))
def test_a_wish_for_another_protocol_is_ignored_and_nothing_is_lost_by_it(cuts: list[int]) -> None:
    """Java's HttpClient and `curl --http2` ask for h2c with every request, those with a body too."""
    requests = (
        b"POST /length HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"Content-Length: 5\r\n\r\nhello",
        b"GET /none HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n",
        b"POST /chunks HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"GET /last HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    parser = feed(b"".join(requests), cuts)
    assert parser.refusal is None and parser.phase == "idle"
    assert [(request.path, request.body, request.keep_alive) for request in parser.requests] == [
        ("/length", b"hello", True),
        ("/none", b"", True),
        ("/chunks", b"ab", True),
        ("/last", b"", True),
    ]


def test_hundreds_of_upgrades_at_once_are_as_good_as_one() -> None:
    parser = feed((b"GET / HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n") * 1500)
    assert parser.refusal is None and len(parser.requests) == 1500
    assert feed(b"CONNECT a:443 HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n").refusal is not None


def test_a_closed_parser_is_freed_at_once_with_all_it_held() -> None:
    """Not by the garbage collector, which seldom looks: it and the C parser refer to each other."""
    heads = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n", b"POST / HTTP/1.1\r\nTrouble\r\n\r\n"
    gc.disable()
    try:
        for head in heads:
            parser = feed(head + b"x" * 40)
            kept = weakref.ref(parser)
            parser.close()
            parser.close()
            assert parser.num_held_bytes == 0
            del parser
            assert kept() is None
    finally:
        gc.enable()


def test_what_is_held_is_counted_however_small_its_pieces() -> None:
    parser = feed(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2\r\nab\r\n" * 30)
    assert parser.num_held_bytes == 60
    tracemalloc.start()
    try:
        parser = RequestParser(MessageLimits())
        parser.feed(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        parser.feed(b"2\r\nab\r\n" * 100_000)
        assert parser.num_held_bytes == 200_000
        assert tracemalloc.get_traced_memory()[0] < 400_000
    finally:
        tracemalloc.stop()
    pipelined = feed(
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10 + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12"
    )
    assert pipelined.num_held_bytes == 10 * REQUEST_BYTES + 2


# ---- the server --------------------------------------------------------------------------------------------------


async def say_path(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
    try:
        await exchange.body()
    except KvasirError as error:
        return HttpResponse(error.http_status, error.message.encode())
    return HttpResponse(200, request.path.encode(), "text/plain")


@asynccontextmanager
async def open_server(handler: Handler, limits: HttpLimits | None = None) -> AsyncIterator[tuple[HttpServer, int]]:
    server = HttpServer(handler, limits)
    listeners = await open_listeners("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, listeners)
            yield server, port
            nursery.cancel_scope.cancel()


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds: across a real socket there is no event to wait for."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


async def talk(port: int, data: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(data)
        if half_close:
            await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


def test_keep_alive_and_dates_are_as_the_protocol_wants_them() -> None:
    async def main() -> None:
        async with open_server(say_path) as (server, port):
            once = await talk(port, b"GET /a HTTP/1.0\r\n\r\n")
            assert once.endswith(b"\r\n\r\n/a") and b"connection: close\r\n" in once and b"\r\ndate: " in once
            twice = await talk(port, b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n")
            assert twice.count(b"HTTP/1.1 200 OK") == 2 and b"connection: keep-alive\r\n" in twice
            assert server.statistics.by_status == {200: 3}

    run(main)


def test_a_client_that_has_said_all_is_answered_if_that_takes_no_waiting() -> None:
    """`nc -N` and the like close their sending side at once."""
    cancelled = trio.Event()

    async def wait(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        if request.path == "/now":
            return HttpResponse(200, b"now")
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async def main() -> None:
        async with open_server(wait) as (_, port):
            assert (await talk(port, b"GET /now HTTP/1.1\r\nHost: x\r\n\r\n", half_close=True)).endswith(b"now")
            assert await talk(port, b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n", half_close=True) == b""
            await cancelled.wait()

    run(main)


def test_hundreds_of_pipelined_requests_are_answered_in_order_while_others_are_served() -> None:
    async def main() -> None:
        async with open_server(say_path) as (_, port):
            many = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(500))
            last = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            answers: list[bytes] = []

            async def pipeline() -> None:
                answers.append(await talk(port, many + last))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipeline)
                assert (await talk(port, last)).endswith(b"/last")
            paths = [part.rpartition(b"\r\n\r\n")[2] for part in answers[0].split(b"HTTP/1.1 200 OK")[1:]]
            assert paths == [*(b"/%d" % number for number in range(500)), b"/last"]

    run(main)


def test_a_crowd_is_let_in_within_a_few_turns_of_the_loop() -> None:
    async def main() -> None:
        server = HttpServer(say_path)
        listeners = await open_listeners("127.0.0.1", 0)
        address = listeners[0].socket.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection(address))
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run, listeners)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
                assert server.statistics.num_accepted == 40
                nursery.cancel_scope.cancel()

    run(main)


def test_an_answer_larger_than_the_sockets_hold_arrives_whole() -> None:
    body = bytes(range(256)) * 80_000

    async def large(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        if request.path == "/whole":
            return HttpResponse(200, body)
        exchange.begin(200, "text/plain")
        for start in range(0, len(body), 1 << 20):
            await exchange.write(body[start : start + (1 << 20)])
        await exchange.end()
        return None

    async def main() -> None:
        async with open_server(large) as (_, port):
            whole = await talk(port, b"GET /whole HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert whole.partition(b"\r\n\r\n")[2] == body
            plain = await talk(port, b"GET /stream HTTP/1.0\r\n\r\n")
            assert plain.partition(b"\r\n\r\n")[2] == body
            chunked = (await talk(port, b"GET /s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).partition(
                b"\r\n\r\n"
            )[2]
            joined = b""
            while chunked:
                size, _, chunked = chunked.partition(b"\r\n")
                joined += chunked[: int(size, 16)]
                chunked = chunked[int(size, 16) + 2 :]
            assert joined == body

    run(main)


def test_a_refused_client_that_goes_on_sending_can_still_read_why() -> None:
    async def main() -> None:
        async with open_server(say_path, HttpLimits(max_body_bytes=1000)) as (server, port):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n"
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
                answer = bytearray()

                async def read() -> None:
                    async for chunk in stream:
                        answer.extend(chunk)

                nursery.start_soon(read)
                await stream.send_all(head + b"x" * 4_000_000)
            assert answer.startswith(b"HTTP/1.1 413 ") and b"4000000 bytes" in answer
            assert server.room.num_bytes == 0

    run(main)


def test_a_refused_client_that_never_stops_sending_is_cut() -> None:
    async def main() -> None:
        async with (
            open_server(say_path, HttpLimits(linger_s=0.3)) as (server, port),
            await trio.open_tcp_stream("127.0.0.1", port) as stream,
        ):
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"\0" * 10_000)
            assert server.statistics.num_cut == 1

    run(main)


def test_bodies_together_are_bounded_and_let_go() -> None:
    async def main() -> None:
        async with open_server(say_path, HttpLimits(max_total_body_bytes=300_000)) as (server, port):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n"
            async with await trio.open_tcp_stream("127.0.0.1", port) as first:
                await first.send_all(head + b"x" * 199_999)
                await until(lambda: server.room.num_bytes == 199_999)
                assert (await talk(port, head + b"x" * 200_000)).startswith(b"HTTP/1.1 503 ")
                await first.send_all(b"x")
                assert (await first.receive_some()).startswith(b"HTTP/1.1 200 ")
            await until(lambda: server.statistics.num_open == 0)
            assert server.room.num_bytes == 0

    run(main)


POST_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


def test_bodies_of_clients_that_leave_are_freed_at_once_and_counted_until_then() -> None:
    """Without a key: announce much, send it, close. Two of three bodies are never complete."""

    async def main() -> None:
        handled: list[weakref.ref[Witness]] = []

        async def note(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
            await exchange.body()
            request.headers = witness = Witness()
            handled.append(weakref.ref(witness))
            return HttpResponse(200, b"")

        async with open_server(note, HttpLimits(max_total_body_bytes=4_000_000)) as (server, port):
            statistics = server.statistics
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                for round_ in range(12):
                    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                        if round_ % 3 == 0:
                            await stream.send_all(POST_HEAD + b"x" * 1_000_000)
                            assert await stream.receive_some()
                            assert handled.pop()() is None  # let go although the connection lives on
                            assert server.room.num_bytes == 0
                        else:
                            await stream.send_all(POST_HEAD + b"x" * 900_000)
                            await until(lambda: server.room.num_bytes == 900_000)
                    await until(lambda: statistics.num_open == 0)
                    assert server.room.num_bytes == 0
                assert tracemalloc.get_traced_memory()[0] < 800_000
            finally:
                tracemalloc.stop()
                gc.enable()

    run(main)


class Witness(dict[str, str]):
    """A dict whose end can be seen."""


def test_held_bodies_are_counted_while_they_are_answered_and_with_those_behind_them() -> None:
    go_on = trio.Event()

    async def wait(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        await exchange.body()
        await go_on.wait()
        return HttpResponse(200, b"")

    async def main() -> None:
        async with open_server(wait, HttpLimits()) as (server, port):
            async with (
                await trio.open_tcp_stream("127.0.0.1", port) as first,
                await trio.open_tcp_stream("127.0.0.1", port) as second,
            ):
                await first.send_all(POST_HEAD + b"x" * 1_000_000)
                await until(lambda: server.room.num_bytes == 1_000_000 + REQUEST_BYTES)
                await first.send_all(POST_HEAD + b"y" * 30_000)  # not read before the first is answered
                await second.send_all(POST_HEAD + b"x" * 100)
                await until(lambda: server.room.num_bytes == 1_000_100 + REQUEST_BYTES)
                go_on.set()
                await until(lambda: server.room.num_bytes == 30_100)
            await until(lambda: server.statistics.num_open == 0)
            assert server.room.num_bytes == 0

    run(main)


def test_a_body_that_was_read_takes_no_room_for_the_rest_of_its_answer() -> None:
    async def main() -> None:
        go_on = trio.Event()

        async def read(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
            assert len(await exchange.body("a")) == 1_000_000
            exchange.drop_body()
            assert request.body == b""
            await go_on.wait()
            return HttpResponse(200, b"")

        async with (
            open_server(read) as (server, port),
            await trio.open_tcp_stream("127.0.0.1", port) as stream,
        ):
            for _ in range(2):
                await stream.send_all(POST_HEAD + b"x" * 1_000_000)
                await until(lambda: server.room.num_bytes == REQUEST_BYTES)
                go_on.set()
                assert await stream.receive_some()
                await until(lambda: server.room.num_bytes == 0)
                go_on = trio.Event()
            assert not server.room.by_owner

    run(main)


def test_no_owner_can_take_all_the_room_for_bodies() -> None:
    """Whoever holds the most is refused while there is room for others, and gets it again."""

    async def read(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        try:
            await exchange.body(request.path)
        except KvasirError as error:
            return HttpResponse(error.http_status, error.message.encode())
        return HttpResponse(200, b"")

    async def main() -> None:
        async with (
            open_server(read, HttpLimits(max_total_body_bytes=4_000_000)) as (server, port),
            contextlib.AsyncExitStack() as stack,
        ):
            greedy = POST_HEAD.replace(b"POST /", b"POST /greedy")
            held = [await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port)) for _ in range(3)]
            for number, stream in enumerate(held, 1):
                await stream.send_all(greedy + b"x" * 990_000)
                await until(lambda number=number: server.room.num_bytes == number * 990_000)  # type: ignore[misc]
            close = b"Connection: close\r\nHost"
            whole = POST_HEAD.replace(b"Host", close) + b"x" * 1_000_000
            refused = await talk(port, whole.replace(b"POST /", b"POST /greedy"))
            assert refused.startswith(b"HTTP/1.1 429 ") and b"too many of your large requests" in refused
            other = whole.replace(b"Length: 1000000", b"Length: 600000")[:-400_000]
            for _ in range(2):
                assert (await talk(port, other)).startswith(b"HTTP/1.1 200 ")
            await held[0].send_all(b"x" * 10_000)
            assert (await held[0].receive_some()).startswith(b"HTTP/1.1 200 ")
            assert (await talk(port, whole.replace(b"POST /", b"POST /greedy"))).startswith(b"HTTP/1.1 200 ")
            for stream in held:
                await stream.aclose()
            await until(lambda: server.statistics.num_open == 0)
            assert not server.room.by_owner and server.room.num_bytes == 0

    run(main)


def test_pipelined_requests_that_wait_are_counted_with_or_without_bodies() -> None:
    async def wait(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        await trio.sleep_forever()

    async def main() -> None:
        async with (
            open_server(wait) as (server, port),
            await trio.open_tcp_stream("127.0.0.1", port) as stream,
        ):
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 30)
            await until(lambda: server.statistics.num_requests == 1)
            assert server.room.num_bytes == 30 * REQUEST_BYTES

    run(main)


def test_a_refused_client_holds_nothing_while_it_lingers() -> None:
    async def main() -> None:
        async with open_server(say_path, HttpLimits(max_body_bytes=500_000)) as (server, port):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            chunk = b"%x\r\n%b\r\n" % (10_000, b"x" * 10_000)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(head + chunk * 49)
                await until(lambda: server.room.num_bytes == 490_000)
                await stream.send_all(chunk * 2)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 413 ")
                assert server.room.num_bytes == 0 and server.statistics.num_open == 1

    run(main)


def test_one_that_sends_without_a_pause_lets_others_go_first() -> None:
    """Requests that are there in full and take no waiting: the task that serves them must still give way."""

    async def main() -> None:
        async with open_server(say_path) as (server, port):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\nConnection: close\r\n\r\n"
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 0 < server.room.num_bytes < 50_000

            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head + b"x" * 50_000)  # all of it in the kernel's buffers
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(count)
                    await until(lambda: server.room.num_bytes == 50_000)
                    nursery.cancel_scope.cancel()
            assert turns >= 50_000 // READ_BYTES - 1  # tasks of one turn run in any order

    run(main)


async def refuse_all(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
    return HttpResponse(401, b"no")


@pytest.mark.parametrize("coding", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("more", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_that_its_handler_does_not_want_is_neither_asked_for_nor_held(coding: bytes, more: bytes) -> None:
    async def main() -> None:
        async with open_server(refuse_all, HttpLimits(linger_s=0.3)) as (server, port):
            head = b"POST / HTTP/1.1\r\nHost: x\r\n%b%b\r\n\r\n" % (more, coding)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(head)
                answer = b"".join([chunk async for chunk in stream])  # at once; then there is no more
                assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"\r\n\r\nno")
                assert b"\r\nconnection: close\r\n" in answer and answer.count(b"HTTP/1.1") == 1
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)  # passes for the body, is dropped
                assert server.room.num_bytes == 0
                await until(lambda: server.statistics.num_open == 0)  # also if the client stays
            assert server.statistics.by_status == {401: 1} and server.statistics.num_requests == 1

    run(main)


def test_a_connection_goes_on_after_a_refusal_whose_body_was_there_already() -> None:
    async def main() -> None:
        async with open_server(refuse_all) as (server, port):
            post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
            answer = await talk(port, (post + b"hello") * 2 + post + b"hel")
            assert answer.count(b"HTTP/1.1 401 ") == 3 and answer.count(b"connection: close") == 1
            assert server.statistics.num_requests == 3

    run(main)


def test_a_client_is_told_to_continue_once_its_body_is_wanted() -> None:
    async def main() -> None:
        async with open_server(say_path) as (_, port):
            head = b"POST /%b HTTP/1.%d\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n"
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                for path in (b"a", b"b"):
                    await stream.send_all(head % (path, 1))
                    assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
                    await stream.send_all(b"abc")
                    assert (await stream.receive_some()).endswith(b"/" + path)
            assert (await talk(port, head % (b"c", 0) + b"abc")).startswith(b"HTTP/1.1 200 ")  # knows no 100

    run(main)


def test_a_refused_client_is_the_first_to_give_way() -> None:
    async def main() -> None:
        async def choose(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
            return await (refuse_all if request.method == "POST" else say_path)(request, exchange)

        async with (
            open_server(choose, HttpLimits(max_connections=2)) as (_, port),
            await trio.open_tcp_stream("127.0.0.1", port) as idle,
            await trio.open_tcp_stream("127.0.0.1", port) as refused,
        ):
            get = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
            await idle.send_all(get)
            assert await idle.receive_some()
            await refused.send_all(POST_HEAD)
            assert (await refused.receive_some()).startswith(b"HTTP/1.1 401 ")
            assert (await talk(port, get.replace(b"Host", b"Connection: close\r\nHost"))).endswith(b"/a")
            await idle.send_all(get)
            assert (await idle.receive_some()).endswith(b"/a")

    run(main)


def test_a_newcomer_takes_the_place_of_the_longest_idle_and_of_nobody_busy() -> None:
    async def main() -> None:
        get = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
        async with (
            open_server(say_path, HttpLimits(max_connections=2)) as (server, port),
            await trio.open_tcp_stream("127.0.0.1", port) as idle,
            await trio.open_tcp_stream("127.0.0.1", port) as lively,
        ):
            for stream in (idle, lively):
                await stream.send_all(get)
                assert await stream.receive_some()
            async with await trio.open_tcp_stream("127.0.0.1", port) as newcomer:
                await newcomer.send_all(get[:10])
                assert await idle.receive_some() == b""
                await lively.send_all(get[:10])
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert (await talk(port, b"")).startswith(b"HTTP/1.1 503 ")
                assert server.statistics.num_turned_away == 1 and server.statistics.num_open == 2
                for stream in (lively, newcomer):
                    await stream.send_all(get[10:])
                    assert (await stream.receive_some()).endswith(b"/a")

    run(main)


def test_who_is_slow_at_sending_a_request_gives_way_where_there_is_no_room() -> None:
    async def main() -> None:
        get = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
        post = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        async with (
            open_server(say_path, HttpLimits(max_connections=3, crowd_s=0.2)) as (server, port),
            contextlib.AsyncExitStack() as stack,
        ):
            slow = [await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port)) for _ in range(3)]
            for stream, begun in zip(slow, (get[:9], post, get[:9]), strict=True):
                await stream.send_all(begun)
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert (await talk(port, b"")).startswith(b"HTTP/1.1 503 ")  # those may be quick yet
            await trio.sleep(0.3)
            for gone in slow[:2]:
                newcomer = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
                await newcomer.send_all(get[:9])
                assert await gone.receive_some() == b""
            for stream in (slow[2], newcomer):
                await stream.send_all(get[9:])
                assert (await stream.receive_some()).endswith(b"/a")
            assert (server.statistics.num_turned_away, server.statistics.num_open) == (1, 3)

    run(main)


def test_a_handler_that_fails_in_mid_stream_leaves_the_body_without_its_end() -> None:
    async def fail(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        exchange.begin(200, "text/plain")
        await exchange.write(b"so far")
        raise ValueError("a bug")

    async def main() -> None:
        async with open_server(fail) as (server, port):
            answer = await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.endswith(b"6\r\nso far\r\n")
            assert server.statistics.num_open == 0

    run(main)


def test_a_header_value_cannot_add_headers() -> None:
    async def say_worker(request: HttpRequest, exchange: Exchange) -> HttpResponse | None:
        return HttpResponse(200, b"", headers=[("x-worker", "a\r\nset-cookie: b\nc")])

    async def main() -> None:
        async with open_server(say_worker) as (_, port):
            answer = await talk(port, b"GET / HTTP/1.0\r\n\r\n")
            assert b"\r\nx-worker: a set-cookie: b c\r\n" in answer

    run(main)


def test_an_address_in_use_is_a_configuration_error_that_names_it() -> None:
    async def main() -> None:
        async with open_server(say_path) as (_, port):
            with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*in use"):
                await open_listeners("127.0.0.1", port)

    run(main)


def test_draining_ends_the_server_when_the_last_connection_is_closed() -> None:
    async def main() -> None:
        server = HttpServer(say_path)
        listeners = await open_listeners("127.0.0.1", 0)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run, listeners)
                async with (
                    await trio.open_tcp_stream("127.0.0.1", port) as half,
                    await trio.open_tcp_stream("127.0.0.1", port) as idle,
                ):
                    await half.send_all(b"GET /half HTTP/1.1\r\n")
                    await idle.send_all(b"GET /idle HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert await idle.receive_some()
                    server.drain()
                    assert await idle.receive_some() == b""
                    await half.send_all(b"Host: x\r\n\r\n")
                    answer = b"".join([chunk async for chunk in half])
                    assert answer.endswith(b"/half") and b"connection: close" in answer
            # The nursery ends only once `run` has returned.

    run(main)
