"""The ZeroMQ edge between real sockets and a scripted core."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
import zmq

import kvasir
from kvasir import AsyncClient, Client, errors
from kvasir.gateway.core.api import Cancel, Delta, Finished, ModelInfo, Submit
from kvasir.gateway.edges.outbox import OutboxLimits
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.published import Published
from kvasir.gateway.edges.zmq_edge import EdgeLimits, ZmqEdge
from kvasir.gateway.tenants.directory import Tenant, TenantDirectory, issue_key
from kvasir.gateway.text.model_text import QUICK_CHARS, ModelText, load_text
from kvasir.protocol.client_messages import (
    GATEWAY_MESSAGES,
    CancelRequest,
    CompletionDone,
    CompletionRequest,
    GatewayMessage,
    Received,
    Usage,
)
from kvasir.protocol.codec import encode
from kvasir.protocol.link import open_router
from kvasir.protocol.messages import TokenLogprobs
from kvasir.protocol.profile import LinkProfile
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from tests.chat_templates import FAMILIES
from tests.edge_helpers import GoodGrammars, make_text

pytestmark = pytest.mark.timeout(60)
SECRET = b"s" * 32
ALPHA, ALPHA_KEY = Tenant("a" * 16, "alpha"), issue_key(SECRET, "a" * 16, "", 0.0)
TEXT = load_text(Path(kvasir.__file__).parent / "demo_model")
BETA, BETA_KEY = Tenant("b" * 16, "beta", allowed_models=frozenset({"other"})), issue_key(SECRET, "b" * 16, "", 0.0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds: across a real socket there is no event to wait for."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


class FakeCore:
    """Takes requests; the test decides what becomes of them. As with the real one, a cancelled one finishes at once."""

    def __init__(self) -> None:
        self.on_submit: Callable[[Submit], None] = lambda submit: None
        self.cancels: list[Cancel] = []
        self.open: dict[bytes, Submit] = {}
        self.sent_tokens: dict[bytes, int] = {}
        self.closed_ids: set[bytes] = set()
        self._submitted, self._submits = trio.open_memory_channel[Submit](10_000)

    def submit(self, submit: Submit) -> None:
        self.open[submit.req_id] = submit
        self._submitted.send_nowait(submit)
        self.on_submit(submit)

    def cancel(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        submit = self.open.get(cancel.req_id)
        if submit is not None:
            self.finish(submit, cancel.reason, cancel.num_output_tokens or 0)

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        self.sent_tokens[req_id] = num_output_tokens

    def closed(self, req_id: bytes) -> None:
        self.closed_ids.add(req_id)

    def models(self) -> dict[str, ModelInfo]:
        return {name: ModelInfo(name, "f", "float32", 16, 2048, 2) for name in ("demo", "other")}

    async def next_submit(self) -> Submit:
        return await self._submits.receive()

    async def cancelled(self, submit: Submit) -> Cancel:
        """Wait until `submit` has been cancelled."""
        await until(lambda: any(cancel.req_id == submit.req_id for cancel in self.cancels))
        return next(cancel for cancel in self.cancels if cancel.req_id == submit.req_id)

    def deliver(self, submit: Submit, token_ids: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        submit.sink.put(Delta(submit.req_id, pack_tokens(token_ids), logprobs or []))

    def finish(self, submit: Submit, reason: str = "length", num_output_tokens: int = 0, error=None) -> None:
        if self.open.pop(submit.req_id, None) is not None:
            prompt = submit.num_prompt_tokens
            submit.sink.put(
                Finished(submit.req_id, reason, prompt, num_output_tokens, prompt // 2, "worker-1", 1, 0.5, error)
            )

    def echo(self, submit: Submit) -> None:
        """Answer with the prompt itself, two tokens at a time."""
        tokens = unpack_tokens(submit.token_ids)[: submit.max_tokens]
        for i in range(0, len(tokens), 2):
            self.deliver(submit, tokens[i : i + 2])
        self.finish(submit, "length", len(tokens))


def make_submit_text(submit: Submit) -> list[int]:
    return unpack_tokens(submit.token_ids)


class House:
    """An edge over a scripted core on `endpoint`, and what tests need to look into."""

    def __init__(self, folder: Path, limits: EdgeLimits | None, high_water: int) -> None:
        self.endpoint = f"ipc://{folder}/client.sock"
        self.core = FakeCore()
        self._clients: list[RawClient] = []
        self.directory = TenantDirectory(SECRET, [ALPHA, BETA, ALPHA_KEY[0], BETA_KEY[0]])
        self.text = TEXT
        texts = {"demo": TEXT, "other": None}
        published = Published(self.core, self.directory, texts, SECRET, 16)
        preparer = Preparer(self.core, published, texts, SECRET, 16, grammars=GoodGrammars())
        self.context: zmq.Context = zmq.Context()
        self.link = open_router(self.context, [self.endpoint], LinkProfile(high_water=high_water))
        self.lines: list[dict[str, object]] = []

        def access(event: str, **fields: object) -> None:
            self.lines.append(fields)

        self.edge = ZmqEdge(self.link, self.core, preparer, self.directory, limits, access=access)

    def dealer(self, **options: int) -> RawClient:
        client = RawClient(self.context, self.endpoint, **options)
        self._clients.append(client)
        return client

    async def settled(self) -> None:
        """Wait until no call is open and nothing waits to be sent."""
        await until(lambda: not self.edge.num_open and not self.edge.outbox.num_peers())


class RawClient:
    """A DEALER that says what it is told, at its own pace; for a Trio task."""

    def __init__(self, context: zmq.Context, endpoint: str, **options: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        for name, value in {"LINGER": 0, **options}.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)
        self.next_id = 0
        self.received: list[GatewayMessage] = []

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def request(self, prompt: str | list[int], key: str = ALPHA_KEY[1], **fields) -> int:
        """Send a request for tokens (of a list) or text (of a string); return its id."""
        self.next_id += 1
        as_text = isinstance(prompt, str)
        prompt_field = {"text": prompt} if as_text else {"token_ids": pack_tokens(prompt)}
        fields = {"model": "demo", "want_text": as_text, "want_tokens": not as_text, **prompt_field, **fields}
        self.send(encode(CompletionRequest(self.next_id, key, **fields)))
        return self.next_id

    def cancel(self, call_id: int) -> None:
        self.send(encode(CancelRequest(call_id)))

    async def receive(self):
        if not self.received:
            await until(lambda: self.socket.poll(0) != 0)
            self.received += map(GATEWAY_MESSAGES.decode, self.socket.recv_multipart())
        return self.received.pop(0)

    async def answer(self, call_id: int) -> tuple[str, list[int], CompletionDone]:
        """Return everything that comes for `call_id`; nothing else may come meanwhile."""
        text, token_ids = "", []
        while True:
            message = await self.receive()
            assert message.id == call_id
            if isinstance(message, CompletionDone):
                return text, token_ids, message
            text += message.text
            token_ids += unpack_tokens(message.token_ids)

    async def assert_silent(self, for_s: float = 0.05) -> None:
        await trio.sleep(for_s)
        assert not self.received
        assert not self.socket.poll(0)


@pytest.fixture
def run(tmp_path: Path):
    """Run `main(house)` beside an edge, under a time limit."""

    def runner(main, limits: EdgeLimits | None = None, high_water: int = 1000) -> None:
        async def bounded() -> None:
            with trio.fail_after(30):
                house = House(tmp_path, limits, high_water)
                try:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(house.edge.run)
                        await main(house)
                        house.link.close()
                finally:
                    house.link.close()
                    house.context.destroy(linger=0)

        trio.run(bounded)

    return runner


def test_tokens_in_and_tokens_out(run) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        prompt = list(range(300, 340))
        text, token_ids, done = await client.answer(client.request(prompt, max_tokens=40))
        assert (text, token_ids) == ("", prompt)
        assert (done.finish_reason, done.usage, done.worker, done.ttft_s) == (
            "length",
            Usage(40, 40, 20),
            "worker-1",
            0.5,
        )
        submit = await house.core.next_submit()
        assert (submit.tenant_id, submit.model, submit.max_tokens) == (ALPHA.id, "demo", 40)
        assert len(submit.prefix_hashes) == 2 * 16
        await house.settled()
        (line,) = house.lines
        assert (line["edge"], line["status"], line["tenant"], line["tokens"]) == ("zmq", "length", ALPHA.id, 40)
        assert line["request"] == submit.req_id.hex()

    run(main)


def test_an_answer_counts_as_delivered_as_far_as_its_client_says_that_it_has_arrived(run) -> None:
    async def main(house: House) -> None:
        client, other = house.dealer(), house.dealer()
        call_id = client.request([5, 6])
        submit = await house.core.next_submit()
        house.core.deliver(submit, [1, 2, 3])
        assert (await client.receive()).num_tokens == 3
        assert house.core.sent_tokens == {}, "it may have been lost on its way"
        client.send(encode(Received({call_id: 2, 77: 5})))
        await until(lambda: house.core.sent_tokens == {submit.req_id: 2})
        client.send(encode(Received({call_id: 1_000})))
        await until(lambda: house.core.sent_tokens == {submit.req_id: 3})
        house.core.finish(submit, "stop", 3)
        assert isinstance(await client.receive(), CompletionDone)
        other.send(encode(Received(ended=[call_id])))  # not its own
        await house.settled()
        assert not house.core.closed_ids
        client.send(encode(Received(ended=[call_id, call_id])))
        await until(lambda: house.core.closed_ids == {submit.req_id})

    run(main)


def test_who_never_says_what_has_arrived_pays_for_what_it_was_sent(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        client.request([5, 6])
        client.request([5, 6])
        ended, left = await house.core.next_submit(), await house.core.next_submit()
        for submit in (ended, left):
            house.core.deliver(submit, [1, 2, 3])
            await client.receive()
        house.core.finish(ended, "stop", 3)
        await client.receive()
        await until(lambda: house.core.closed_ids == {ended.req_id})
        client.socket.close()
        await trio.sleep(0.1)
        house.core.deliver(left, [4])  # found to be gone
        assert (await house.core.cancelled(left)).num_output_tokens in (3, 4)

    run(main, EdgeLimits(receipt_s=0.05))


def test_a_gateway_that_stops_in_good_order_closes_what_it_has_sent(run) -> None:
    cores = []

    async def main(house: House) -> None:
        cores.append(house.core)
        client = house.dealer()
        client.request([5, 6])
        submit = await house.core.next_submit()
        house.core.finish(submit, "stop")
        await client.receive()

    run(main)
    assert len(cores[0].closed_ids) == 1


def test_events_of_one_batch_become_one_chunk_in_order(run) -> None:
    """What the core puts without giving up control is one message per request, however many deltas it were."""

    async def main(house: House) -> None:
        client = house.dealer()
        ids = [client.request([5, 6]), client.request([7, 8])]
        submits = [await house.core.next_submit() for _ in ids]
        for token in range(300, 310):
            for submit in submits:
                house.core.deliver(submit, [token], [TokenLogprobs(-1.0)])
        chunks = [await client.receive() for _ in ids]
        assert {chunk.id for chunk in chunks} == set(ids)
        for chunk in chunks:
            assert unpack_tokens(chunk.token_ids) == list(range(300, 310))
            assert len(chunk.logprobs) == 10
        house.core.deliver(submits[0], [1])
        house.core.finish(submits[0], "stop", 11)
        assert unpack_tokens((await client.receive()).token_ids) == [1]
        assert (await client.receive()).finish_reason == "stop"
        await client.assert_silent()

    run(main)


def test_text_comes_out_whole_however_it_is_cut_into_tokens(run) -> None:
    text = "def grüße(naïve):\n    return 'שלום 🎉🎉' + naïve\n"

    async def main(house: House) -> None:
        client = house.dealer()
        call = client.request("x", want_tokens=True)
        submit = await house.core.next_submit()
        expected = house.text.encode(text)
        for token_id in expected:
            house.core.deliver(submit, [token_id])
            await trio.lowlevel.checkpoint()
        house.core.finish(submit, "stop", len(expected))
        got, token_ids, _ = await client.answer(call)
        assert (got, token_ids) == (text, expected)

    run(main)


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_a_stop_string_ends_the_answer_before_it_and_the_request_in_the_core(run, batch: int) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        call = client.request("x", stop=["END", "never"], want_tokens=True)
        submit = await house.core.next_submit()
        before, after = house.text.encode("some text and the EN"), house.text.encode("D and more that nobody wants")
        tokens = before + after
        needed = next(n for n in range(len(tokens)) if "END" in house.text.decode(tokens[:n]))
        needed = min(len(tokens), -(-needed // batch) * batch)  # a delta counts as a whole
        for i in range(0, len(tokens), batch):
            if submit.req_id in house.core.open:
                house.core.deliver(submit, tokens[i : i + batch])
                await trio.sleep(0.001)
        text, token_ids, done = await client.answer(call)
        assert text == "some text and the "
        assert token_ids == tokens[:needed]
        assert (done.finish_reason, done.usage.completion_tokens, done.error) == ("stop", needed, None)
        assert house.core.cancels == [Cancel(submit.req_id, "stop", needed)]
        await client.assert_silent()
        await house.settled()

    run(main)


def test_a_half_stop_string_comes_out_at_the_end_after_all(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        call = client.request("x", stop=["ENDING"])
        submit = await house.core.next_submit()
        house.core.deliver(submit, house.text.encode("the END"))
        house.core.finish(submit, "length", 3)
        text, _, done = await client.answer(call)
        assert (text, done.finish_reason, done.usage.completion_tokens) == ("the END", "length", 3)
        assert house.core.cancels == []

    run(main)


def test_a_cancelled_request_is_cancelled_in_the_core_and_still_ends_once(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        call = client.request([5, 6])
        submit = await house.core.next_submit()
        client.cancel(call)
        client.cancel(call)
        client.cancel(987)
        _, _, done = await client.answer(call)
        assert (done.finish_reason, done.error) == ("abort", None)
        assert set(house.core.cancels) == {Cancel(submit.req_id, "abort")}
        await client.assert_silent()

    run(main)


def test_leaving_a_stream_of_the_sdk_cancels_it_in_the_core(run) -> None:
    async def main(house: House) -> None:
        async with AsyncClient(house.endpoint, ALPHA_KEY[1], timeout_s=10) as client:
            async with client.generate([5, 6], model="demo", stream=True) as stream:
                submit = await house.core.next_submit()
                house.core.deliver(submit, [300])
                assert (await anext(stream)).token_ids == [300]
            assert (await house.core.cancelled(submit)).reason == "abort"
            house.core.on_submit = house.core.echo
            assert (await client.generate([7, 8], model="demo")).token_ids == [7, 8]

    run(main)


def test_the_blocking_client_in_a_thread_gets_text_chat_and_models(run) -> None:
    def work(endpoint: str) -> None:
        with Client(endpoint, ALPHA_KEY[1], timeout_s=10) as client:
            assert client.generate("import os\n", model="demo").text == "import os\n"
            assert "hello" in client.chat([{"role": "user", "content": "hello"}], model="demo").text
            assert [card.name for card in client.models()] == ["demo", "other"]
            with pytest.raises(errors.UnknownModel, match="nothing"):
                client.generate("x", model="nothing")
            with pytest.raises(errors.BadRequest, match="max_tokens") as caught:
                client.generate("x", model="demo", max_tokens=0)
            assert caught.value.param == "max_tokens"
            with pytest.raises(errors.InvalidMessage, match="temperature") as caught:
                client.generate("x", model="demo", temperature=-1)
            assert caught.value.param == "temperature"
            assert len(client.generate("x", model="demo").request_id) == 32
        with Client(endpoint, BETA_KEY[1], timeout_s=10) as client:
            assert [card.name for card in client.models()] == ["other"]
            with pytest.raises(errors.PermissionDenied):
                client.generate("x", model="demo")
        with Client(endpoint, "kv_0_nobody", timeout_s=10) as client:
            with pytest.raises(errors.AuthenticationFailed):
                client.generate("x")
            with pytest.raises(errors.AuthenticationFailed):
                client.models()

    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        await trio.to_thread.run_sync(work, house.endpoint)
        assert house.edge.num_refused >= 5
        await house.settled()

    run(main)


def test_a_key_revoked_between_two_requests_of_one_connection_counts_at_once(run) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        assert (await client.answer(client.request([5])))[2].error is None
        house.directory.apply(replace(ALPHA_KEY[0], revoked_at=1.0))
        assert (await client.answer(client.request([5])))[2].error.code == "invalid_api_key"

    run(main)


def test_clients_with_equal_ids_never_see_each_others_streams(run) -> None:
    async def main(house: House) -> None:
        rng = random.Random(4)
        clients = [house.dealer() for _ in range(4)]
        expected: dict[tuple[int, int], list[int]] = {}
        submits: dict[bytes, Submit] = {}
        for round_ in range(25):
            for index, client in enumerate(clients):
                marker = 300 + index * 100 + round_
                assert client.request([marker]) == round_ + 1
                expected[index, round_ + 1] = []
        for _ in range(100):
            submit = await house.core.next_submit()
            submits[submit.req_id] = submit
        got: dict[tuple[int, int], list[int]] = {key: [] for key in expected}
        for _ in range(500):
            submit = rng.choice(list(submits.values()))
            marker = make_submit_text(submit)[0]
            token = rng.randrange(1000, 4000)
            house.core.deliver(submit, [token])
            expected[(marker - 300) // 100, (marker - 300) % 100 + 1].append(token)
            if rng.random() < 0.2:
                await trio.lowlevel.checkpoint()
        for submit in submits.values():
            house.core.finish(submit)
        for index, client in enumerate(clients):
            ended: set[int] = set()
            while len(ended) < 25:
                message = await client.receive()
                assert message.id not in ended
                if isinstance(message, CompletionDone):
                    ended.add(message.id)
                else:
                    got[index, message.id] += unpack_tokens(message.token_ids)
            await client.assert_silent(0.01)
        assert got == expected

    run(main)


ANSWERED = {
    "unknown type": msgspec.msgpack.encode({"type": "evil", "id": 9}),
    "no type": msgspec.msgpack.encode({"id": 9}),
    "unknown field": msgspec.msgpack.encode({"type": "request", "id": 9, "api_key": "k", "tenant": "root"}),
    "wrong type": msgspec.msgpack.encode({"type": "request", "id": 9, "api_key": 5}),
    "missing field": msgspec.msgpack.encode({"type": "models", "id": 9}),
    "too many stops": msgspec.msgpack.encode({"type": "request", "id": 9, "api_key": "k", "stop": ["x"] * 17}),
    "too long": msgspec.msgpack.encode({"type": "request", "id": 9, "api_key": "k", "text": "x" * (9 << 20)}),
    "bad UTF-8": msgspec.msgpack.encode({"type": "models", "id": 9, "api_key": "kkk"}).replace(b"kkk", b"\xff\xfe\xfd"),
}
DROPPED = {
    "not MessagePack": b"\xc1",
    "empty": b"",
    "no map": msgspec.msgpack.encode(7),
    "id too large": msgspec.msgpack.encode({"type": "request", "id": 1 << 63, "api_key": "k"}),
    "truncated": encode(CompletionRequest(9, ALPHA_KEY[1], text="x"))[:-3],
    "too deep": b"\x82\xa4type\xa7request\xa2id" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("frame", ANSWERED.values(), ids=ANSWERED)
def test_a_malformed_message_with_an_id_is_answered_and_the_next_one_served(run, frame: bytes) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        client.send(frame)
        message = await client.receive()
        assert (message.id, message.finish_reason, message.error.code) == (9, "error", "invalid_message")
        assert (await client.answer(client.request([5, 6])))[1] == [5, 6]
        assert house.edge.num_malformed == 1

    run(main)


@pytest.mark.parametrize("frame", DROPPED.values(), ids=DROPPED)
def test_bytes_without_an_id_are_counted_and_the_next_message_served(run, frame: bytes) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        client.send(frame)
        assert (await client.answer(client.request([5, 6])))[1] == [5, 6]
        assert house.edge.num_malformed == 1

    run(main)


def test_messages_of_several_frames_are_refused(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        client.send(b"", encode(CompletionRequest(3, ALPHA_KEY[1], text="x")))
        _, _, done = await client.answer(3)
        assert done.error.code == "invalid_message"

    run(main)


def test_random_bytes_never_stop_the_edge(run) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        rng = random.Random(5)
        good = encode(
            CompletionRequest(1, ALPHA_KEY[1], text="import os", model="demo", stop=["x"], stop_token_ids=[3])
        )
        noise = house.dealer()
        for _ in range(2_000):
            frame = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            noise.send(bytes(frame[: rng.choice([len(frame), rng.randrange(len(frame))])]))
        client = house.dealer()
        assert (await client.answer(client.request([5, 6])))[1] == [5, 6]
        await until(lambda: house.edge.num_malformed + house.edge.num_requests >= 2_001)

    run(main)


def test_a_link_closed_with_answers_still_to_be_sent_ends_the_edge_in_good_order(run) -> None:
    async def main(house: House) -> None:
        submitted: list[Submit] = []
        house.core.on_submit = submitted.append
        house.dealer().request([5, 6])
        await until(lambda: submitted)
        house.core.deliver(submitted[0], [7])  # and the link is closed before anybody has run

    for _ in range(10):
        run(main)


def test_a_running_id_cannot_be_used_twice(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        call = client.request([5])
        submit = await house.core.next_submit()
        client.next_id = 0
        client.request([6])
        refused = await client.receive()
        assert (refused.error.code, refused.error.param) == ("invalid_request", "id")
        house.core.deliver(submit, [5])
        house.core.finish(submit)
        assert (await client.answer(call))[1] == [5]

    run(main)


def test_a_client_may_only_have_so_many_requests_at_once(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        for _ in range(4):
            client.request([5])
        refused = await client.receive()
        assert (refused.id, refused.error.code) == (4, "overloaded")
        house.core.finish(await house.core.next_submit())
        assert (await client.receive()).id == 1
        client.request([5])
        for _ in range(3):
            await house.core.next_submit()
        await client.assert_silent()

    run(main, EdgeLimits(max_calls_per_client=3))


def test_a_draining_edge_refuses_what_is_new_and_goes_on_with_what_runs(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        running = client.request([5])
        submit = await house.core.next_submit()
        house.edge.drain()
        assert (await client.answer(client.request([6])))[2].error.code == "unavailable"
        house.core.deliver(submit, [300])
        house.core.finish(submit, "length", 1)
        house.edge.flush()
        assert (await client.answer(running))[1] == [300]

    run(main)


def test_refusals_of_the_core_reach_the_client(run) -> None:
    async def main(house: House) -> None:
        error = errors.Overloaded("the queue is full", retry_after_s=2.0).info()
        house.core.on_submit = lambda submit: house.core.finish(submit, "error", error=error)
        client = house.dealer()
        _, _, done = await client.answer(client.request([5]))
        assert (done.finish_reason, done.error) == ("error", error)

    run(main)


def test_a_bug_in_one_request_is_that_requests_error_alone(run, capsys: pytest.CaptureFixture[str]) -> None:
    async def main(house: House) -> None:
        def fail(submit: Submit) -> None:
            raise ZeroDivisionError("oh")

        house.core.on_submit = fail
        client = house.dealer()
        assert (await client.answer(client.request([5])))[2].error.code == "internal_error"
        house.core.on_submit = house.core.echo
        assert (await client.answer(client.request([5])))[1] == [5]

    run(main)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_client_that_is_gone_gets_all_its_requests_cancelled(run) -> None:
    async def main(house: House) -> None:
        client = house.dealer()
        calls = [client.request([5]) for _ in range(5)]
        submits = [await house.core.next_submit() for _ in calls]
        client.socket.close()
        while submits[0].req_id in house.core.open:
            house.core.deliver(submits[0], [300])
            await trio.sleep(0.005)
        assert {cancel.req_id for cancel in house.core.cancels} == {submit.req_id for submit in submits}
        await house.settled()
        assert house.edge.outbox.num_gone == 1

    run(main)


def test_a_client_that_does_not_read_is_cut_off_and_the_others_do_not_notice(run) -> None:
    """Bounded memory, each of its calls ends in one error, and once it has read that it may go on."""

    async def main(house: House) -> None:
        house_core = house.core
        slow, quick = house.dealer(RCVHWM=5), house.dealer()
        calls = [slow.request([5]), slow.request([6])]
        submits = [await house_core.next_submit() for _ in calls]

        def waiting() -> int:
            return house.edge.outbox.num_waiting()

        sent, waited = 0, 0
        while not house.edge.outbox.num_cut:
            if waiting() > waited:  # stuck, or is libzmq's thread only behind?
                await trio.sleep(0.05)
            waited = waiting()
            house_core.deliver(submits[0], list(range(300, 2348)))
            sent += 1
            await trio.lowlevel.checkpoint()
            assert waiting() <= 51
            assert sent < 5_000
        assert {cancel.req_id for cancel in house_core.cancels} == {submit.req_id for submit in submits}
        slow.request([7])
        house_core.on_submit = house_core.echo
        assert (await quick.answer(quick.request([8])))[1] == [8]
        ended: dict[int, CompletionDone] = {}
        while len(ended) < 2:
            message = await slow.receive()
            if isinstance(message, CompletionDone):
                assert message.id not in ended
                ended[message.id] = message
        assert {done.error.code for done in ended.values()} == {"overloaded"}
        assert set(ended) == set(calls)
        await house.settled()
        assert house.edge.num_dropped == 1
        assert (await slow.answer(slow.request([9])))[1] == [9]

    limits = EdgeLimits(outbox=OutboxLimits(max_messages=50, max_bytes=1 << 20, retry_s=0.005))
    run(main, limits, high_water=5)


def test_a_client_that_stays_stuck_is_cut_off_after_a_while(run) -> None:
    async def main(house: House) -> None:
        slow = house.dealer(RCVHWM=5)
        call = slow.request([5])
        submit = await house.core.next_submit()
        while not house.core.cancels:
            house.core.deliver(submit, list(range(300, 2348)))
            await trio.sleep(0.002)
        assert [(cancel.req_id, cancel.reason) for cancel in house.core.cancels] == [(submit.req_id, "abort")]
        while not isinstance(message := await slow.receive(), CompletionDone):
            pass
        assert (message.id, message.error.code) == (call, "overloaded")
        await house.settled()

    run(main, EdgeLimits(outbox=OutboxLimits(1 << 20, 1 << 30, stuck_s=0.2, retry_s=0.005)), high_water=5)


def test_a_slow_client_that_catches_up_loses_nothing(run) -> None:
    async def main(house: House) -> None:
        slow = house.dealer(RCVHWM=5)
        call = slow.request([5])
        submit = await house.core.next_submit()
        expected: list[int] = []
        while house.edge.outbox.num_waiting() < 20:
            tokens = list(range(300 + len(expected) % 7, 1300))
            house.core.deliver(submit, tokens)
            expected += tokens
            await trio.lowlevel.checkpoint()
        house.core.finish(submit, "length", len(expected))
        _, token_ids, done = await slow.answer(call)
        assert token_ids == expected
        assert done.finish_reason == "length"
        await house.settled()

    run(main, EdgeLimits(outbox=OutboxLimits(retry_s=0.005)), high_water=5)


def test_a_long_text_is_tokenised_beside_the_others_and_can_be_cancelled_meanwhile(run) -> None:
    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        long = client.request("import os, sys\n" * 1_000)
        message = await client.receive()
        assert (message.id, message.error.code) == (long, "context_length_exceeded")
        cancelled = client.request("x" * 300_000)
        quick = client.request([5])
        client.cancel(cancelled)
        answers = {}
        while len(answers) < 2:
            message = await client.receive()
            if isinstance(message, CompletionDone):
                answers[message.id] = message
        assert answers[quick].finish_reason == "length"
        assert (answers[cancelled].finish_reason, answers[cancelled].error) == ("abort", None)
        await client.assert_silent()

    run(main)


def test_only_so_many_long_texts_are_tokenised_at_once_cancelled_ones_among_them(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    pack_text = ModelText.pack

    def pack_at_the_gate(text: ModelText, prompt: str, *rest: Any) -> bytes:
        assert len(prompt) <= QUICK_CHARS or gate.wait(20)
        return pack_text(text, prompt, *rest)

    monkeypatch.setattr(ModelText, "pack", pack_at_the_gate)
    long = "import os\n" * 1_000

    async def main(house: House) -> None:
        house.core.on_submit = house.core.echo
        client = house.dealer()
        try:
            first, cancelled, refused = (client.request(long) for _ in range(3))
            message = await client.receive()
            assert (message.id, message.error.code, message.error.retry_after_s) == (refused, "overloaded", 1.0)
            client.cancel(cancelled)
            assert (await client.receive()).finish_reason == "abort"
            still_refused = client.request(long)  # the cancelled one's thread goes on, so that its place is not free
            message = await client.receive()
            assert (message.id, message.error.code) == (still_refused, "overloaded")
            assert (await client.answer(client.request([5], max_tokens=1)))[1] == [5]  # others do not wait for them
        finally:
            gate.set()
        assert (await client.receive()).id == first
        codes: set[str] = set()
        while codes != {"context_length_exceeded"}:  # both places are free again, as soon as both threads have ended
            for _ in range(2):
                client.request(long)
            codes = {(await client.receive()).error.code for _ in range(2)}

    run(main, EdgeLimits(max_preparing=2))


def test_one_tenants_long_texts_leave_room_for_another_tenants(run, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(ModelText, "pack", lambda text, prompt, *rest: gate.wait(20) and b"")
    long = "import os\n" * 1_000

    async def main(house: House) -> None:
        house.directory.apply(Tenant("b" * 16, "beta"))
        client = house.dealer()
        try:
            for _ in range(3):
                client.request(long)
            refused = client.request(long)
            message = await client.receive()
            assert (message.id, message.error.code) == (refused, "overloaded")
            client.request(long, key=BETA_KEY[1])
            await until(lambda: house.edge._preparing.total() == 4)
            client.request(long, key=BETA_KEY[1])
            assert (await client.receive()).error.code == "overloaded"
        finally:
            gate.set()
        await house.settled()
        assert not house.edge._preparing

    run(main, EdgeLimits(max_preparing=4))


def test_a_restarted_gateway_serves_the_same_client_again(tmp_path: Path) -> None:
    """The SDK's client outlives two gateways; what the first one had in hand fails, nothing hangs."""
    outcome: list[object] = []
    begun, restarted = threading.Event(), threading.Event()

    def work(endpoint: str) -> None:
        with Client(endpoint, ALPHA_KEY[1], timeout_s=15) as client:
            stream = client.generate([5, 6], model="demo", stream=True)
            next(stream)
            begun.set()
            try:
                next(stream)
            except errors.ConnectionLost as error:
                outcome.append(error)
            restarted.wait(15)
            outcome.append(client.generate([7, 8], model="demo").token_ids)

    async def serve(on_start) -> None:
        house = House(tmp_path, None, 1000)
        async with trio.open_nursery() as nursery:
            await nursery.start(house.edge.run)
            with trio.fail_after(20):
                await on_start(house)
            house.link.close()
        house.context.destroy(linger=0)

    async def first(house: House) -> None:
        thread.start()
        house.core.deliver(await house.core.next_submit(), [300])
        await trio.to_thread.run_sync(begun.wait, 15)

    async def second(house: House) -> None:
        house.core.on_submit = house.core.echo
        restarted.set()
        await trio.to_thread.run_sync(thread.join, 15)

    thread = threading.Thread(target=work, args=(f"ipc://{tmp_path}/client.sock",))
    trio.run(serve, first)
    trio.run(serve, second)
    assert isinstance(outcome[0], errors.ConnectionLost)
    assert outcome[1] == [7, 8]


def test_an_answer_with_reasoning_and_calls_comes_in_parts_through_the_sdk(run) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    text = make_text(FAMILIES["qwen3"], ["<think>", "</think>"])
    answer = '<think>Hm.</think>Let me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

    async def main(house: House) -> None:
        def reply(submit: Submit) -> None:
            for token_id in text._tokenizer.encode(answer, add_special_tokens=False).ids:
                house.core.deliver(submit, [token_id])
            house.core.finish(submit, "stop", 9)

        house.edge._preparer._texts = {"demo": text}
        house.core.on_submit = reply
        async with AsyncClient(house.endpoint, ALPHA_KEY[1], timeout_s=10) as client:
            messages = [{"role": "user", "content": "Add."}]
            whole = await client.chat(messages, model="demo", tools=[tool])
            assert (whole.text, whole.reasoning, whole.finish_reason) == ("Let me.", "Hm.", "tool_calls")
            [call] = whole.tool_calls
            assert (call.name, call.arguments) == ("add", '{"a": 1}') and call.id.startswith("call_")
            await client.chat([*messages, whole.message], model="demo", tools=[tool], tool_choice="add")
            with pytest.raises(errors.BadRequest, match="tools are: add"):
                await client.chat(messages, model="demo", tools=[tool], tool_choice="gone")
        await house.settled()

    run(main)
