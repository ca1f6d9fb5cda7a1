"""Worker processes with the oracle model, over real sockets, with a small gateway of the test's own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.codec import Message, encode
from kvasir.protocol.messages import (
    REPORTS,
    Abort,
    Bye,
    Drain,
    Hello,
    Identify,
    Limits,
    Output,
    Refused,
    Report,
    Resync,
    Snapshot,
    StepReport,
    Welcome,
)
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.tokens import unpack_tokens
from kvasir.worker.dial import open_socket
from kvasir.worker.loop import Worker
from kvasir.worker.process import main
from tests.engine_helpers import PUBLIC_SPACE, Rig, expected_tokens, make_generate, make_prompt

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20.0
R = TypeVar("R", bound=Report)

pytestmark = pytest.mark.timeout(60)


@dataclass
class Gateway:
    """A ROUTER that does what it is told, and the worker process that dials it."""

    context: zmq.Context[zmq.Socket[bytes]]
    socket: zmq.Socket[bytes]
    endpoint: str
    process: subprocess.Popen[bytes]
    stderr: Path
    peer: bytes = b""
    reports: list[Report] = field(default_factory=list)

    def send(self, message: Message | bytes) -> None:
        self.socket.send_multipart([self.peer, message if isinstance(message, bytes) else encode(message)])

    def receive(self) -> Report:
        """Return the next report; every one is kept in `reports`."""
        assert self.socket.poll(int(1000 * TIMEOUT_S)), f"no report within {TIMEOUT_S} s:\n{self.log()}"
        self.peer, frame = self.socket.recv_multipart()
        self.reports.append(REPORTS.decode(frame))
        return self.reports[-1]

    def receive_until(self, is_enough: Callable[[Report], bool]) -> Report:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            report = self.receive()
            if is_enough(report):
                return report
        raise AssertionError(f"it did not come within {TIMEOUT_S} s:\n{self.log()}")

    def expect(self, kind: type[R]) -> R:
        report = self.receive_until(lambda report: isinstance(report, kind))
        assert isinstance(report, kind)
        return report

    def welcome(self, epoch: bytes = b"epoch 1", heartbeat_s: float = 0.05) -> Snapshot:
        self.expect(Hello)
        self.send(Welcome(epoch, PUBLIC_SPACE, heartbeat_s))
        return self.expect(Snapshot)

    def outputs(self, req_id: bytes) -> list[Output]:
        steps = [report for report in self.reports if isinstance(report, StepReport)]
        return [output for step in steps for output in step.outputs if output.req_id == req_id]

    def tokens(self, req_id: bytes) -> list[int]:
        return [token for output in self.outputs(req_id) for token in unpack_tokens(output.token_ids)]

    def finish(self, req_id: bytes) -> Output:
        """Receive until `req_id` has ended; return its last output."""
        self.receive_until(lambda _: any(output.finish_reason for output in self.outputs(req_id)))
        return self.outputs(req_id)[-1]

    def exit_code(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def log(self) -> str:
        return self.stderr.read_text()


def bind_router(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    socket.bind(endpoint)
    return socket


@contextlib.contextmanager
def open_gateway(*args: str, model: str = "oracle:", **popen: Any) -> Iterator[Gateway]:
    folder = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = f"ipc://{folder}/workers.sock"
    socket = bind_router(context, endpoint)
    stderr = folder / "stderr.log"
    with stderr.open("wb") as sink:
        command = [sys.executable, "-m", "kvasir.worker", "--model", model, "--name", "oracle", "--gateway", endpoint]
        process = subprocess.Popen(
            [*command, "--worker-id", "w1", "--block-size", "4", "--check", *args], cwd=ROOT, stderr=sink, **popen
        )
    gateway = Gateway(context, socket, endpoint, process, stderr)
    try:
        yield gateway
        assert "Traceback" not in stderr.read_text()
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        gateway.socket.close()
        context.term()
        shutil.rmtree(folder)


# ---- joining


def test_a_worker_says_who_it_is_and_reports_the_same_tokens_as_the_plain_model() -> None:
    with open_gateway("--max-requests", "7", "--max-step-tokens", "100", "--max-context", "500") as gateway:
        hello = gateway.expect(Hello)
        assert hello.protocol_version == PROTOCOL_VERSION
        assert (hello.worker_id, hello.model, hello.block_size, hello.device) == ("w1", "oracle", 4, "cpu")
        assert hello.limits == Limits(7, 500, 100)
        assert hello.pid == gateway.process.pid
        assert hello.bytes_per_block == 4 * 8, "one word per token"
        gateway.send(Welcome(b"epoch 1", PUBLIC_SPACE, 0.05))
        assert gateway.expect(Snapshot).hashes == b""
        for i in range(5):
            gateway.send(make_generate(make_prompt(30, salt=i), 20, req_id=b"%d" % i))
        for i in range(5):
            assert gateway.finish(b"%d" % i).finish_reason == "length"
            assert gateway.tokens(b"%d" % i) == expected_tokens(make_prompt(30, salt=i), 20)
        assert "ready worker=w1 model=oracle" in gateway.log()


def test_an_idle_worker_shows_that_its_engine_lives() -> None:
    with open_gateway() as gateway:
        gateway.welcome(heartbeat_s=0.02)
        steps = [gateway.expect(StepReport).step for _ in range(5)]
        assert steps == sorted(set(steps))


def test_a_worker_says_hello_again_until_it_is_answered() -> None:
    with open_gateway() as gateway:
        first = gateway.expect(Hello)
        assert gateway.expect(Hello) == first
        gateway.send(Welcome(b"epoch 1", PUBLIC_SPACE, 0.05))
        gateway.expect(Snapshot)


def test_a_refused_worker_prints_the_reason_and_exits_with_2() -> None:
    with open_gateway() as gateway:
        gateway.expect(Hello)
        gateway.send(Refused("worker 'w1' has blocks of 4 tokens, this gateway of 16"))
        assert gateway.exit_code() == 2
        assert "this gateway of 16" in gateway.log()


def test_an_unknown_worker_joins_again_and_drops_what_it_ran() -> None:
    with open_gateway(model="oracle:step_ms=5") as gateway:
        gateway.welcome()
        gateway.send(make_generate(make_prompt(9), 1000))
        gateway.receive_until(lambda _: len(gateway.tokens(b"r")) > 3)
        gateway.send(Identify())
        gateway.send(Identify())
        snapshot = gateway.welcome(b"epoch 2")
        assert set(split_hashes(make_generate(make_prompt(9), 1).prefix_hashes)) <= set(split_hashes(snapshot.hashes))
        num_hellos = sum(isinstance(report, Hello) for report in gateway.reports)
        assert (gateway.expect(StepReport).load.num_running, num_hellos) == (0, 2)
        # Its cache is still there.
        gateway.send(make_generate(make_prompt(9), 2, req_id=b"again"))
        gateway.finish(b"again")
        assert gateway.outputs(b"again")[0].num_cached_tokens == 8
        assert gateway.tokens(b"again") == expected_tokens(make_prompt(9), 2)


def test_a_new_epoch_drops_all_sequences_and_the_same_one_does_not() -> None:
    with open_gateway(model="oracle:step_ms=5") as gateway:
        gateway.welcome()
        gateway.send(make_generate(make_prompt(9), 1000))
        gateway.receive_until(lambda _: len(gateway.tokens(b"r")) > 3)
        gateway.send(Welcome(b"epoch 1", PUBLIC_SPACE, 0.05))
        gateway.expect(Snapshot)
        assert gateway.expect(StepReport).load.num_running == 1
        gateway.send(Welcome(b"epoch 2", PUBLIC_SPACE, 0.05))
        gateway.expect(Snapshot)
        assert gateway.expect(StepReport).load.num_running == 0


def test_a_worker_finds_a_gateway_that_comes_late() -> None:
    with open_gateway() as gateway:
        gateway.welcome()
        gateway.socket.close()
        gateway.socket = bind_router(gateway.context, gateway.endpoint)
        gateway.expect(StepReport)
        gateway.send(Identify())
        gateway.welcome(b"epoch 2")


# ---- commands


def test_abort_is_answered_and_frees_the_blocks() -> None:
    with open_gateway(model="oracle:step_ms=2") as gateway:
        gateway.welcome()
        gateway.send(make_generate(make_prompt(9), 10_000))
        gateway.receive_until(lambda _: bool(gateway.tokens(b"r")))
        gateway.send(Abort(b"r", 1))
        gateway.send(Abort(b"nobody", 1))
        assert gateway.finish(b"r").finish_reason == "abort"
        assert gateway.expect(StepReport).load.num_running == 0


def test_resync_is_answered_with_everything_that_is_resident() -> None:
    with open_gateway("--kv-memory", "512") as gateway:  # 16 blocks of 4 words of 8 bytes
        gateway.welcome()
        followed: set[bytes] = set()
        for i in range(4):
            gateway.send(make_generate(make_prompt(20, salt=i), 6, req_id=b"%d" % i))
            gateway.finish(b"%d" % i)
        for report in gateway.reports:
            if isinstance(report, StepReport):
                followed = (followed | set(split_hashes(report.stored))) - set(split_hashes(report.removed))
        gateway.send(Resync())
        snapshot = gateway.expect(Snapshot)
        assert set(split_hashes(snapshot.hashes)) == followed
        assert any(report.removed for report in gateway.reports if isinstance(report, StepReport))


def test_malformed_commands_are_logged_and_change_nothing() -> None:
    frames = [b"", b"garbage", b"\xc1", b"\x81\xa4type\xa6nosuch", encode(Drain(1.0)) + b"x", encode(Bye())]
    with open_gateway() as gateway:
        gateway.welcome()
        for frame in frames:
            gateway.send(frame)
        gateway.socket.send_multipart([gateway.peer, b"two", b"frames"])
        gateway.send(make_generate(make_prompt(9), 4))
        gateway.finish(b"r")
        assert gateway.tokens(b"r") == expected_tokens(make_prompt(9), 4)
        assert gateway.log().count("invalid_command") == len(frames) + 2


def test_a_request_that_cannot_be_read_is_answered_if_its_id_can() -> None:
    with open_gateway() as gateway:
        gateway.welcome()
        raw = msgspec.msgpack.decode(encode(make_generate(make_prompt(9), 4)))
        gateway.send(msgspec.msgpack.encode(raw | {"max_tokens": 0}))
        output = gateway.finish(b"r")
        assert (output.finish_reason, output.attempt) == ("error", 1)
        assert "$.max_tokens" in output.error


def test_every_request_ends_exactly_once_whatever_becomes_of_it() -> None:
    with open_gateway("--max-requests", "4", "--kv-memory", "640", model="oracle:step_ms=1") as gateway:
        gateway.welcome()
        commands = [make_generate(make_prompt(5 + i, salt=i), 5 * i + 1, req_id=b"%d" % i) for i in range(8)]
        commands[1].deadline_s = 0.0
        commands[3].num_public_tokens = 3
        for command in commands:
            gateway.send(command)
        gateway.send(Abort(b"5", 1))
        for command in commands:
            gateway.finish(command.req_id)
        for _ in range(3):
            gateway.expect(StepReport)
        ends = {c.req_id: [o.finish_reason for o in gateway.outputs(c.req_id) if o.finish_reason] for c in commands}
        assert ends == {
            b"0": ["length"],
            b"1": ["deadline"],
            b"2": ["length"],
            b"3": ["error"],
            b"4": ["length"],
            b"5": ["abort"],
            b"6": ["length"],
            b"7": ["length"],
        }
        for command in commands:
            prompt = unpack_tokens(command.token_ids)
            tokens = gateway.tokens(command.req_id)
            assert tokens == expected_tokens(prompt, len(tokens))


# ---- leaving


def test_a_drained_worker_finishes_what_it_has_refuses_the_rest_and_says_goodbye() -> None:
    with open_gateway(model="oracle:step_ms=2") as gateway:
        gateway.welcome()
        gateway.send(make_generate(make_prompt(9), 50))
        gateway.receive_until(lambda _: bool(gateway.tokens(b"r")))
        gateway.send(Drain(30.0))
        gateway.send(make_generate(make_prompt(9), 5, req_id=b"late"))
        gateway.expect(Bye)
        assert gateway.exit_code() == 0
        assert gateway.tokens(b"r") == expected_tokens(make_prompt(9), 50)
        assert [o.finish_reason for o in gateway.outputs(b"late")] == ["abort"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_hands_back_what_is_unfinished_at_the_deadline(number: signal.Signals) -> None:
    with open_gateway("--drain", "0.3", model="oracle:step_ms=2") as gateway:
        gateway.welcome(heartbeat_s=30.0)
        gateway.send(make_generate(make_prompt(9), 100_000))
        gateway.receive_until(lambda _: bool(gateway.tokens(b"r")))
        gateway.process.send_signal(number)
        gateway.expect(Bye)
        assert gateway.exit_code() == 0
        output = gateway.outputs(b"r")[-1]
        assert (output.finish_reason, output.error) == ("abort", "handed back: the worker leaves")
        assert gateway.tokens(b"r") == expected_tokens(make_prompt(9), len(gateway.tokens(b"r")))


def test_a_second_signal_does_not_wait_for_the_deadline() -> None:
    with open_gateway("--drain", "3000", model="oracle:step_ms=2") as gateway:
        gateway.welcome()
        gateway.send(make_generate(make_prompt(9), 100_000))
        gateway.receive_until(lambda _: bool(gateway.tokens(b"r")))
        gateway.process.send_signal(signal.SIGTERM)
        gateway.receive_until(lambda _: "draining" in gateway.log())
        gateway.process.send_signal(signal.SIGTERM)
        gateway.expect(Bye)
        assert gateway.exit_code() == 0


def test_an_idle_worker_wakes_for_a_signal_at_once() -> None:
    with open_gateway() as gateway:
        gateway.welcome(heartbeat_s=3000.0)
        gateway.expect(StepReport)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.exit_code() == 0


def test_a_worker_exits_when_its_supervisor_is_gone() -> None:
    with open_gateway("--exit-with-stdin", model="oracle:step_ms=2", stdin=subprocess.PIPE) as gateway:
        gateway.welcome(heartbeat_s=3000.0)
        gateway.send(make_generate(make_prompt(9), 100_000))
        gateway.receive_until(lambda _: bool(gateway.tokens(b"r")))
        gateway.process.stdin.close()
        assert gateway.exit_code() == 0


def test_a_worker_without_a_gateway_can_be_stopped() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvasir.worker", "--model", "oracle:", "--gateway", "ipc:///tmp/nobody-is-here"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    with process:
        assert b"ready" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


# ---- what does not allow a start


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--model", "oracle:"], "the following arguments are required: --gateway"),
        (["--model", "oracle:", "--gateway", "http://x"], "'http://x' cannot be dialled"),
        (["--model", "oracle:", "--gateway", "tcp://127.0.0.1:5560"], "of its own machine only; give ipc://PATH"),
        (["--model", "oracle:", "--gateway", "ipc://" + "x" * 200], "too long"),
        (["--model", "oracle:speed=1", "--gateway", "ipc:///tmp/x"], "no setting 'speed'"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--kv-memory", "lots"], "'lots' is no size"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--kv-memory", "500"], "at least 8 are needed"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--kv-memory", "9000T"], "are free for it; give less"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--block-size", "0"], "no whole number of at least 1"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--max-context", "999999"], "window of 131072 tokens"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--max-step-tokens", "3"], "less than the 32 requests"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--deterministic", "--dtype", "float16"], "float64"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--kv-memory", "9" * 400], "is no size"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--threads", "1000000"], "is more than 1024"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--block-size", "5000"], "<= 1024 - at `$.block_size`"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--name", "x" * 300], "at `$.model`"),
        (["--model", "x" * 5000, "--gateway", "ipc:///tmp/x", "--device", "cpu"], "cannot be read: File name too long"),
        (["--model", "oracle:", "--gateway", "ipc:///tmp/x", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert text in lines[0]


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--gateway", "ipc:///tmp/x", "--device", "cpu"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert " cannot_start error=" in lines[0]
    assert "holds no config.json" in lines[0]


def test_the_exit_code_of_a_refusal_reaches_the_shell() -> None:
    command = [sys.executable, "-m", "kvasir.worker", "--model", "oracle:"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_the_oracle_needs_no_torch() -> None:
    code = "import sys, worker.process, worker.startup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode == 0


# ---- a gateway that does not read


def test_reports_wait_in_a_bounded_backlog_and_an_overflow_starts_a_new_incarnation(tmp_path: Path) -> None:
    """Over a socket without a peer, so that nothing can ever be sent."""
    rig = Rig()
    hello = Hello(PROTOCOL_VERSION, "w1", b"first", "oracle", "f", "uint64", 4, 64, Limits(16, 256, 64))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = open_socket(context, f"ipc://{tmp_path}/nobody")
    worker = Worker(rig.engine, hello, socket, max_backlog=5, clock=rig.clock)
    try:
        worker._take(encode(Welcome(b"epoch 1", PUBLIC_SPACE, 1.0)))
        worker._take(encode(make_generate(make_prompt(9), 100)))
        for _ in range(4):
            worker._send(rig.engine.step())
        assert len(worker._backlog) == 5  # the snapshot and four steps
        assert rig.engine.num_unfinished == 1
        worker._send(rig.engine.step())
        assert (len(worker._backlog), rig.engine.num_unfinished, worker._is_joined) == (0, 0, False)
        assert worker._hello.incarnation != b"first"
        assert rig.engine.snapshot().hashes, "the cache was to be kept"
    finally:
        socket.close(linger=0)
        context.term()


def test_a_worker_without_finite_logits_three_times_in_a_row_hands_back_and_leaves_with_1(tmp_path: Path) -> None:
    rig, prompt = Rig(), make_prompt(9)
    rig.model.sick_token = prompt[0]
    hello = Hello(PROTOCOL_VERSION, "w1", b"first", "oracle", "f", "uint64", 4, 64, Limits(16, 256, 64))
    endpoint = f"ipc://{tmp_path}/gateway"
    with (
        zmq.Context() as context,
        bind_router(context, endpoint) as router,
        open_socket(context, endpoint) as socket,
    ):
        worker = Worker(rig.engine, hello, socket)
        worker._take(encode(Welcome(b"epoch 1", PUBLIC_SPACE, 0.01)))
        for i in range(3):
            worker._take(encode(make_generate([*prompt, i], 5, req_id=bytes([i]))))
        assert worker.run() == 1
        reports = []
        while router.poll(200):
            reports.append(REPORTS.decode(router.recv_multipart()[1]))
    outputs = [output for report in reports if isinstance(report, StepReport) for output in report.outputs]
    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert isinstance(reports[-1], Bye)
