"""The blocking client against a scripted gateway over real sockets."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_overloads

import pytest

import kvasir
from kvasir import AsyncClient, Client, Completion, errors, paths
from kvasir._pump import _State
from kvasir.protocol.client_messages import (
    CancelRequest,
    CompletionChunk,
    CompletionDone,
    CompletionRequest,
    ModelCard,
    Received,
    Usage,
)
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import ErrorInfo
from kvasir.protocol.tokens import pack_tokens
from tests.fake_gateway import API_KEY, FakeGateway, echo, endless, silent

pytestmark = pytest.mark.timeout(30)
ROOT = Path(kvasir.__file__).parent.parent


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[FakeGateway]:
    with FakeGateway(tmp_path) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.endpoint, API_KEY, timeout_s=10) as client:
        yield client


def test_text_in_gives_a_whole_completion(client: Client) -> None:
    completion = client.generate("a b c", max_tokens=2)
    assert completion == Completion("ab", [0, 1], "length", Usage(0, 2, 0), "worker-1", 0.25, "c0ffee")


@pytest.mark.parametrize("method", [Client.generate, Client.chat, AsyncClient.generate, AsyncClient.chat])
def test_stream_may_be_a_bool_variable_for_a_type_checker(method: Any) -> None:
    assert [overload.__annotations__["stream"] for overload in get_overloads(method)] == [
        *("Literal[False]", "Literal[True]", "bool")
    ]


def test_a_gateway_that_never_pauses_does_not_keep_the_client_from_sending(gateway: FakeGateway) -> None:
    state, chunk = _State(gateway.endpoint, 5.0), encode(CompletionChunk(1, "x"))
    real, state.socket = state.socket, SimpleNamespace(recv_multipart=lambda flags: [chunk])  # type: ignore[assignment]
    try:
        state._receive()  # comes back, so that cancellations and receipts have their turn
    finally:
        state.socket = real
        state._close_sockets()


def test_token_ids_in_give_token_ids_and_usage_with_cached_tokens(client: Client) -> None:
    completion = client.generate([7, 8, 9, 4_000_000_000])
    assert completion.token_ids == [7, 8, 9, 4_000_000_000]
    assert completion.usage == Usage(4, 4, 2)


def test_a_stream_yields_the_chunks_in_order_and_then_has_a_result(client: Client) -> None:
    stream = client.generate([5, 6, 7], stream=True)
    with pytest.raises(RuntimeError, match="not been read"):
        _ = stream.result
    chunks = list(stream)
    assert [chunk.token_ids for chunk in chunks] == [[5], [6], [7]]
    assert "".join(chunk.text for chunk in chunks) == stream.result.text == "<5><6><7>"
    assert list(stream) == []


def test_the_gateway_is_told_what_has_arrived(gateway: FakeGateway, client: Client) -> None:
    gateway.script = lambda request: [CompletionChunk(request.id, "a", num_tokens=1)]
    with client.generate("x", stream=True) as stream:
        call_id = gateway.wait_for(CompletionRequest).id
        assert gateway.wait_for(Received) == Received({call_id: 1})
        gateway.send(call_id, CompletionChunk(call_id, "b", num_tokens=3))
        assert gateway.wait_for(Received) == Received({call_id: 3})
        gateway.send(call_id, CompletionDone(call_id, "stop"))
        assert [chunk.text for chunk in stream] == ["a", "b"]
    assert gateway.wait_for(Received) == Received({}, [call_id])


def test_a_client_that_is_closed_at_once_still_says_what_has_arrived(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint, API_KEY, timeout_s=10) as client:
        client.generate("a b c")
    assert len(gateway.wait_for(Received).ended) == 1


def test_chat_sends_the_messages_as_they_are(client: Client) -> None:
    completion = client.chat([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    assert completion.text == "system:be kind;user:hi;"


def test_every_option_reaches_the_gateway(client: Client, gateway: FakeGateway) -> None:
    client.generate(
        "x", model="m", max_tokens=3, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=0.3, repetition_penalty=1.1, logit_bias={3: -1.5}, seed=9, logprobs=2, stop="END",
        stop_token_ids=[1, 2], ignore_eos=True, want_text=True, want_tokens=False, deadline_s=5.0, timeout_s=9,
    )  # fmt: skip
    request = gateway.wait_for(CompletionRequest)
    sampling = request.sampling
    assert (request.model, request.max_tokens, request.stop, request.deadline_s) == ("m", 3, ["END"], 5.0)
    assert (request.stop_token_ids, request.ignore_eos, request.want_tokens) == ([1, 2], True, False)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 4, 0.9, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.2, 0.3, 1.1)
    assert (sampling.logit_bias, sampling.seed, sampling.logprobs) == ({3: -1.5}, 9, 2)


def test_requests_without_a_seed_draw_different_ones(client: Client, gateway: FakeGateway) -> None:
    client.generate("x")
    client.generate("x")
    assert gateway.wait_for(CompletionRequest).sampling.seed != gateway.wait_for(CompletionRequest).sampling.seed


def test_models_are_listed(client: Client) -> None:
    assert client.models() == [ModelCard("demo", 2048, 2)]


@pytest.mark.parametrize("code", ["invalid_api_key", "model_not_found", "overloaded", "context_length_exceeded"])
def test_the_gateways_errors_come_out_as_their_own_class(client: Client, gateway: FakeGateway, code: str) -> None:
    info = ErrorInfo(code, "no, because", "model", 1.5)
    gateway.script = lambda request: [CompletionDone(request.id, "error", error=info)]
    with pytest.raises(errors.KvasirError, match="no, because") as caught:
        client.generate("x")
    assert caught.value.info() == info
    assert type(caught.value).code == code


def test_an_error_in_mid_stream_comes_after_the_chunks_before_it(client: Client, gateway: FakeGateway) -> None:
    gateway.script = lambda request: [
        CompletionChunk(request.id, text="half"),
        CompletionDone(request.id, "error", error=ErrorInfo("request_failed", "two workers died of it")),
    ]
    stream = client.generate("x", stream=True)
    assert next(stream).text == "half"
    with pytest.raises(errors.RequestFailed, match="two workers"):
        next(stream)
    assert list(stream) == []
    gateway.assert_nothing_more(CancelRequest)


def test_a_wrong_key_is_refused_and_a_missing_one_noticed_before_anything_is_sent(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(gateway.endpoint, "kv_wrong") as client, pytest.raises(errors.AuthenticationFailed, match="unknown"):
        client.generate("x")
    monkeypatch.delenv("KVASIR_API_KEY", raising=False)
    with pytest.raises(errors.AuthenticationFailed, match="KVASIR_API_KEY"):
        Client(gateway.endpoint)


def test_endpoint_and_key_come_from_the_environment(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_API_KEY", API_KEY)
    monkeypatch.setenv("KVASIR_ENDPOINT", gateway.endpoint)
    with Client(timeout_s=10) as client:
        assert client.generate("x").text == "x"
    monkeypatch.delenv("KVASIR_ENDPOINT")
    monkeypatch.setenv("KVASIR_HOME", "/somewhere")
    assert paths.client_endpoint() == "ipc:///somewhere/run/clients/client.sock"


def leave_by_close(stream) -> None:
    next(stream)
    stream.close()


def leave_by_with(stream) -> None:
    with stream:
        next(stream)


def leave_by_break_and_garbage(stream) -> None:
    for _ in stream:
        break


def leave_by_exception(stream) -> None:
    with pytest.raises(ZeroDivisionError), stream:
        next(stream)
        _ = 1 / 0


def leave_by_timeout(stream) -> None:
    stream._timeout_s = 0.05
    next(stream)
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.05 s"):
        next(stream)


@pytest.mark.parametrize(
    "leave", [leave_by_close, leave_by_with, leave_by_break_and_garbage, leave_by_exception, leave_by_timeout]
)
def test_whoever_leaves_a_stream_cancels_its_request_and_no_other(client: Client, gateway: FakeGateway, leave) -> None:
    gateway.script = endless
    other = client.generate("y", stream=True)
    leave(client.generate("x", stream=True))
    gc.collect()
    assert gateway.wait_for(CompletionRequest).text == "y"
    left = gateway.wait_for(CompletionRequest)
    assert gateway.wait_for(CancelRequest).id == left.id
    gateway.assert_nothing_more(CancelRequest)
    assert next(other).text == "first "
    gateway.script = echo
    assert client.generate("z").text == "z"


def test_a_finished_stream_cancels_nothing(client: Client, gateway: FakeGateway) -> None:
    with client.generate("a b", stream=True) as stream:
        list(stream)
    del stream
    gc.collect()
    gateway.assert_nothing_more(CancelRequest)


def test_silence_ends_a_call_after_its_timeout(client: Client, gateway: FakeGateway) -> None:
    gateway.script = silent
    begun = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="cancelled"):
        client.generate("x", timeout_s=0.2)
    assert time.monotonic() - begun < 5
    gateway.wait_for(CancelRequest)


def test_interleaved_streams_keep_their_chunks_apart(client: Client) -> None:
    streams = [client.generate([i * 10 + j for j in range(5)], stream=True) for i in range(20)]
    for j in range(5):
        for i, stream in enumerate(streams):
            assert next(stream).token_ids == [i * 10 + j]
    for stream in streams:
        assert list(stream) == []
        assert stream.result.finish_reason == "length"


def test_threads_share_a_client(client: Client) -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for i in range(20):
                prompt = [index, i, 3]
                assert client.generate(prompt).token_ids == prompt
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures


def test_a_gateway_that_is_not_there_is_an_error_in_time(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/nobody.sock", API_KEY, connect_timeout_s=0.2) as client:
        begun = time.monotonic()
        with pytest.raises(errors.ConnectionLost, match="kvasir up"):
            client.generate("x")
        assert 0.15 < time.monotonic() - begun < 5


def test_a_gateway_that_goes_away_fails_what_it_had_and_the_next_one_serves(
    client: Client, gateway: FakeGateway
) -> None:
    gateway.script = endless
    streams = [client.generate("x", stream=True) for _ in range(3)]
    for stream in streams:
        next(stream)
    gateway.stop()
    for stream in streams:
        with pytest.raises(errors.ConnectionLost, match="went away"):
            next(stream)
    late = client.generate("c d", stream=True)  # asked while nobody is there: waits for the next gateway
    gateway.script = echo
    gateway.start()
    assert [chunk.text for chunk in late] == ["c", "d"]
    gateway.assert_nothing_more(CancelRequest)


def test_what_a_gateway_said_before_it_went_away_is_not_lost(client: Client, gateway: FakeGateway) -> None:
    stream = client.generate([1, 2, 3], stream=True)
    client.models()  # answered after the stream's end, so that everything is here
    gateway.stop()
    assert [chunk.token_ids for chunk in stream] == [[1], [2], [3]]
    assert stream.result.finish_reason == "length"


@pytest.mark.skipif(sys.platform != "linux", reason="SIGSTOP and heartbeats")
def test_a_gateway_that_stops_answering_heartbeats_is_noticed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from tests.fake_gateway import FakeGateway, endless; FakeGateway(Path(sys.argv[1]), endless); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(ROOT)])
    try:
        with Client(f"ipc://{tmp_path}/client.sock", API_KEY, timeout_s=20, connect_timeout_s=20) as client:
            stream = client.generate("x", stream=True)
            next(stream)
            os.kill(process.pid, 19)
            with pytest.raises(errors.ConnectionLost):
                next(stream)
    finally:
        process.kill()
        process.wait(5)


def test_bytes_that_are_no_message_fail_the_calls_instead_of_hanging_them(client: Client, gateway: FakeGateway) -> None:
    gateway.script = endless
    stream = client.generate("x", stream=True)
    next(stream)
    gateway.send(gateway.wait_for(CompletionRequest).id, b"\xc1 rubbish")
    with pytest.raises(errors.InvalidMessage, match="version"):
        next(stream)
    gateway.wait_for(CancelRequest)
    gateway.script = echo
    assert client.generate("z").text == "z"


def test_messages_for_calls_that_nobody_has_are_ignored(client: Client, gateway: FakeGateway) -> None:
    client.generate("x")
    call_id = gateway.wait_for(CompletionRequest).id
    gateway.send(call_id, CompletionChunk(call_id, text="late"))
    gateway.send(call_id, CompletionDone(call_id, "stop"))
    gateway.send(call_id, CompletionChunk(987_654, token_ids=pack_tokens([1])))
    assert client.generate("y").text == "y"


def test_closing_cancels_what_is_in_flight_and_wakes_its_reader(gateway: FakeGateway) -> None:
    gateway.script = endless
    client = Client(gateway.endpoint, API_KEY, timeout_s=20)
    stream = client.generate("x", stream=True)
    next(stream)
    closer = threading.Timer(0.05, client.close)
    closer.start()
    with pytest.raises(errors.ConnectionLost, match="closed"):
        next(stream)
    closer.join()
    gateway.wait_for(CancelRequest)
    with pytest.raises(errors.ConnectionLost, match="closed"):
        client.generate("x")
    client.close()


def test_a_dropped_client_takes_its_thread_with_it(gateway: FakeGateway) -> None:
    before = threading.active_count()
    client = Client(gateway.endpoint, API_KEY)
    client.generate("x")
    assert threading.active_count() == before + 1
    del client
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("prompt", "options", "error", "match"),
    [
        ([-1], {}, errors.BadRequest, "token ids"),
        ([1 << 32], {}, errors.BadRequest, "token ids"),
        (["a"], {}, errors.BadRequest, "token ids"),
        (b"text", {}, errors.BadRequest, "bytes"),
        ("x", {"tools": []}, errors.BadRequest, "tools is for chats"),
        ("x" * (9 << 20), {}, errors.TooLarge, "bytes"),
        ("x", {"max_tokens": 1 << 70}, errors.BadRequest, "cannot be sent"),
        ("\ud800", {}, errors.BadRequest, "cannot be sent"),
        ("x", {"temprature": 1}, TypeError, "temprature"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(client: Client, prompt, options, error, match) -> None:
    with pytest.raises(error, match=match):
        client.generate(prompt, **options)


@pytest.mark.parametrize("message", [{"role": "user"}, "hi", {"role": "user", "content": "x", "nam": "y"}])
def test_malformed_chat_messages_are_refused_at_once(client: Client, message) -> None:
    with pytest.raises(errors.BadRequest, match="message"):
        client.chat([message])


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "ipc://" + "x" * 200])
def test_a_malformed_endpoint_is_refused_when_the_client_is_made(endpoint: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="cannot connect"):
        Client(endpoint, API_KEY)


def import_in(folder: Path, code: str = "import kvasir") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["protocol", "gateway", "worker", "cache"])
def test_a_users_own_modules_may_have_our_rooms_names(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('must not be executed')\n")
    done = import_in(tmp_path, "from kvasir import AsyncClient, Client; import kvasir.protocol.messages; print('fine')")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "fine", "")


def test_a_client_left_open_does_not_keep_the_process(gateway: FakeGateway) -> None:
    code = (
        f"from kvasir import Client; client = Client({gateway.endpoint!r}, {API_KEY!r});"
        "stream = client.generate('a b c', stream=True); print(next(stream).text)"
    )
    done = import_in(ROOT, code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "a", "")
