"""The command line: every command has help with an example, errors are one line and exit code 2, JSON is stable."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import zmq
from click.testing import CliRunner
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.cells import cell_len
from rich.console import Console

from kvasir.cli import demo_keys, processes, up, up_plan
from kvasir.cli.chat import Chat, choose_model, line_reader
from kvasir.cli.main import cli, run
from kvasir.cli.output import Rows, age, bar, count, duration, harmless, percent, plain
from kvasir.paths import admin_socket
from kvasir.protocol.admin_messages import AdminFailed, Done
from kvasir.protocol.client_messages import ModelCard, Usage
from kvasir.protocol.codec import encode
from kvasir.protocol.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigurationError,
    InvalidMessage,
    Overloaded,
    PromptTooLong,
)
from tests.box import open_box
from tests.gateway.admin.test_admin import Office, open_office

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[3]


def command_paths(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            found += command_paths(inner, (*path, name))
    return found


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        monkeypatch.setenv("KVASIR_HOME", name)
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.delenv("KVASIR_API_KEY", raising=False)
        monkeypatch.delenv("KVASIR_ENDPOINT", raising=False)
        (Path(name) / "state").mkdir()
        yield Path(name)


@pytest.fixture
def office(home: Path) -> Iterator[Office]:
    with open_office(home) as office:
        yield office


def kvasir(capsys: Any, *args: str, code: int = 0) -> tuple[str, str]:
    """Run a command in this process; return (stdout, stderr)."""
    assert run(list(args)) == code, capsys.readouterr()
    seen = capsys.readouterr()
    return seen.out, seen.err


def kvasir_json(capsys: Any, *args: str) -> Any:
    return json.loads(kvasir(capsys, *args, "--json")[0])


def assert_one_line(err: str, *words: str) -> None:
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("path", command_paths(), ids=" ".join)
def test_every_command_explains_itself_with_an_example_that_parses(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0
    assert "Example:" in done.output
    assert f"kvasir {' '.join(path)}".strip() in done.output.partition("Example:")[2]
    # The printed example names only options that exist.
    example = done.output.partition("Example:")[2].partition("Options:")[0]
    if path and path[-1] not in ("gateway", "worker"):
        command: Any = cli
        for name in path:
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for line in example.splitlines():
            if line.strip().startswith(f"kvasir {' '.join(path)}"):
                used = {word for word in line.partition("|")[0].partition("#")[0].split() if word.startswith("--")}
                inner = {o for c in getattr(command, "commands", {}).values() for p in c.params for o in p.opts}
                assert used <= known | inner, line


def test_tenants_keys_and_prefixes_from_the_command_line(office: Office, home: Path, capsys: Any) -> None:
    tenant_id = kvasir(capsys, "tenant", "create", "acme", "--group", "g", "--allow-model", "demo")[0].strip()
    created = kvasir_json(capsys, "key", "create", "acme", "--label", "laptop")
    assert office.directory.authenticate(created["key"]).tenant.id == tenant_id
    assert set(created) == {"id", "key", "tenant", "label"}
    out, err = kvasir(capsys, "key", "create", "acme")
    assert out.startswith("kv_") and len(out.splitlines()) == 1 and "never shown again" in err
    [listed, _] = kvasir_json(capsys, "key", "list", "acme")["keys"]
    assert listed["id"] == created["id"] and "key" not in listed and listed["revoked_at"] is None
    kvasir(capsys, "key", "revoke", created["key"])
    with pytest.raises(AuthenticationFailed):
        office.directory.authenticate(created["key"])
    shown = kvasir_json(capsys, "tenant", "show", "acme")
    assert shown["tenant"]["sharing"] == "group:g" and shown["tenant"]["usage"]["prompt_tokens"] == 0
    kvasir(capsys, "tenant", "set", "acme", "--kv-floor", "20%", "--cache-hint", "one_shot")
    assert kvasir_json(capsys, "tenant", "show", "acme")["tenant"]["cache_hint"] == "one_shot"
    kvasir(capsys, "tenant", "set", "acme", "--weight", "4", "--priority", "high")
    kvasir(capsys, "tenant", "set", "acme", "--alias", "gpt-4o=large,demo", "--alias", "gone=demo")
    kvasir(capsys, "tenant", "set", "acme", "--alias", "gone=none")
    assert office.directory.tenant("acme").terms.aliases == {"gpt-4o": ["large", "demo"]}
    assert "gpt-4o is large or demo" in kvasir(capsys, "tenant", "show", "acme")[0]
    assert "is no alias" in kvasir(capsys, "tenant", "set", "acme", "--alias", "gpt-4o", code=2)[1]
    assert "weight 4, high priority" in kvasir(capsys, "tenant", "show", "acme")[0]
    for shown in (kvasir(capsys, "tenant", "show", "acme")[0], kvasir(capsys, "tenant", "list")[0]):
        assert "one_shot" in shown and "20%" in shown
    assert kvasir_json(capsys, "tenant", "disable", "acme") == {"changed": True}
    assert "already" in kvasir(capsys, "tenant", "disable", "acme")[0]
    assert kvasir_json(capsys, "tenant", "list")["tenants"][0]["status"] == "disabled"
    kvasir(capsys, "tenant", "enable", "acme")
    (home / "text").write_text("published " * 20)
    published = kvasir_json(capsys, "prefix", "publish", "sys", "--file", str(home / "text"), "--tenant", "acme")
    assert published["changed"] and published["prefix"]["tenants"] == ["acme"]
    assert kvasir_json(capsys, "prefix", "list")["prefixes"][0]["public_tokens"] == {"demo": 192}
    office.house.names = ["demo-0", "demo-1"]
    assert "demo-0, demo-1" in kvasir(capsys, "prefix", "pin", "sys", "--worker", "demo-1", "--worker", "demo-0")[0]
    assert kvasir_json(capsys, "prefix", "list")["prefixes"][0]["pinned_on"] == ["demo-0", "demo-1"]
    assert "demo-0, demo-1" in kvasir(capsys, "prefix", "list")[0]
    assert "demo-0, demo-1" in kvasir(capsys, "cache", "show")[0]
    kvasir(capsys, "prefix", "pin", "sys")
    assert "all workers" in kvasir(capsys, "cache", "show")[0]
    first, second, third = kvasir(capsys, "cache", "show")[0].splitlines()[-3:]
    assert first.startswith("(private, acme)") and "12.3k" in first and "published" not in first
    assert second.startswith("sys") and "4.1k" in second and "published published" in second
    assert third.startswith("(private, acme)") and "100" in third
    kvasir(capsys, "prefix", "unpin", "sys")
    kvasir(capsys, "prefix", "remove", "sys")
    assert kvasir_json(capsys, "prefix", "list") == {"prefixes": []}


def test_tables_name_what_is_there_and_never_a_secret(office: Office, home: Path, capsys: Any) -> None:
    kvasir(capsys, "tenant", "create", "acme")
    key = kvasir(capsys, "key", "create", "acme", "--label", "[red]odd[/red] \x1b[31m")[0].strip()
    (home / "text").write_text("published " * 20)
    kvasir(capsys, "prefix", "publish", "sys", "--file", str(home / "text"))
    for command in (["tenant", "list"], ["tenant", "show", "acme"], ["key", "list"], ["prefix", "list"], ["status"]):
        out, _ = kvasir(capsys, *command)
        assert ("sys" if command[0] == "prefix" else "acme") in out
        assert key.rpartition("_")[2] not in out and "\x1b" not in out
    assert "[red]odd[/red]" in kvasir(capsys, "key", "list")[0]
    out, _ = kvasir(capsys, "status")
    assert "demo-0" in out and "ready" in out and "60/100" in out and "http://127.0.0.1:8000/v1" in out
    out, _ = kvasir(capsys, "explain", "known")
    assert (
        "7 tokens to demo-1" in out and "0.2500" in out and "wait" in out and "Seconds that the worker is busy" in out
    )
    for words in (
        "it waited 0.500 s in the queue, 0.250 s of that for the best worker to have room",
        "12 tokens ahead of its fair share",
        "the next best would have cost 0.2500 s more",
        "a guess: what demo-0 had cached was not known then",
        "0 tokens were cached, 0 had been predicted",
        "4 more were not: it went elsewhere; demo-0 had them, but would have cost 0.5000 s against 0.2500 s",
        "(it follows request c0ffeec0ffeec0ff)",
        "this attempt is one of two",
    ):
        assert words in " ".join(out.split()), words
    assert "demo" in kvasir(capsys, "models")[0]
    assert kvasir_json(capsys, "models")["models"][0]["max_context"] == 2048


LONG = "a-tenant-with-a-name-of-sixty-characters-in-all-which-is-fine"
TABLES = ["tenant list", f"tenant show {LONG}", "key list", "prefix list", "status", "models", "cache show"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_header_and_no_cell_is_cut_off_at_any_width(
    office: Office, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (home / "text").write_text("published " * 20)
    kvasir(capsys, "tenant", "create", LONG, "--group", "acme")
    kvasir(capsys, "tenant", "set", LONG, "--kv-floor", "20%", "--kv-cap", "12345", "--cache-hint", "one_shot")
    kvasir(capsys, "key", "create", LONG, "--label", "the nightly job")
    kvasir(capsys, "prefix", "publish", "a-prefix", "--file", str(home / "text"), "--tenant", LONG)
    for command in (*TABLES, "explain known"):
        out, _ = kvasir(capsys, *command.split())
        assert "…" not in out, command
        assert max(map(cell_len, out.splitlines())) <= columns, command
        assert command not in TABLES[:4] or LONG in "".join(out.split()), "folded at most"


def test_a_table_leaves_out_minor_columns_and_then_becomes_records() -> None:
    table = Rows("name", "size", "note", numbers=("size",), minor=("note",))
    table.add_row("a", "1", "[red]of no great weight[/red]")

    def shown(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width)
        console.print(table)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]

    assert shown(40) == ["name  size  note", "a        1  of no great weight"]
    assert " ".join(shown(29)).startswith("name  size a        1 in a wider terminal") and "note" in shown(29)[-1]
    assert shown(9) == ["a", "  size 1", "  note of", "no great", "weight"]


def test_json_of_status_keeps_its_fields(office: Office, capsys: Any) -> None:
    status = kvasir_json(capsys, "status")
    assert set(status) == {
        "workers",
        "models",
        "tenants",
        "pid",
        "version",
        "uptime_s",
        "draining",
        "endpoints",
        "bounds",
        "ledger_error",
    }
    assert {"id", "model", "state", "pid", "num_running", "num_waiting", "num_free_blocks"} <= set(status["workers"][0])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tenant", "create", "Bad Name"], ["lower-case"]),
        (["tenant", "show", "nobody"], ["nobody", "kvasir tenant list"]),
        (["tenant", "show", ""], ["kvasir: name: expected a text of length >= 1"]),
        (["tenant", "show", "\udcff"], ["not UTF-8"]),
        (["tenant", "list", "\x1b[31mred"], ["�[31mred"]),
        (["key", "create", "nobody"], ["nobody"]),
        (["key", "revoke", "nokey"], ["nokey"]),
        (["prefix", "publish", "p", "--file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["prefix", "publish", "p", "--file", "/"], ["/", "directory"]),
        (["prefix", "publish", "p", "--file", sys.executable], ["not UTF-8"]),
        (["tenant", "set", "nobody", "--cache-hint", "open"], ["nobody", "kvasir tenant list"]),
        (["tenant", "set", "nobody", "--cache-hint", "often"], ["--cache-hint", "one_shot", "none"]),
        (["tenant", "set", "nobody"], ["say what to change", "--token-budget"]),
        (["prefix", "remove", "p"], ["kvasir prefix list"]),
        (["prefix", "pin", "p"], ["'p'", "kvasir prefix list"]),
        (["prefix", "unpin", "p"], ["'p'", "kvasir prefix list"]),
        (["explain", "unknown"], ["unknown"]),
        (["explain", ""], ["which request"]),
        (["tenant", "creat", "x"], ["create", "--help"]),
        (["tenant", "create"], ["NAME", "--help"]),
        (["status", "--no-such-option"], ["--no-such-option"]),
        (["up", "--model", "x=/no/such/folder"], ["/no/such/folder"]),
        (["up", "--http", "nonsense"], ["HOST:PORT"]),
        (["up"], ["already", "kvasir down"]),
    ],
    ids=" ".join,
)
def test_an_error_is_one_line_and_exit_code_2(office: Office, capsys: Any, args: list[str], words: list[str]) -> None:
    _, err = kvasir(capsys, *args, code=2)
    assert_one_line(err, *words)


def test_output_that_cannot_be_written_is_one_line_that_says_so(office: Office, home: Path) -> None:
    for args in ("tenant list", "tenant list --json", "--help"):
        with open("/dev/full", "w") as full:
            call = subprocess.run(
                [sys.executable, "-m", "kvasir", *args.split()],
                cwd=ROOT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=30,
                check=False,
            )
        assert call.returncode == 2
        assert_one_line(call.stderr, "No space left on device")
    closed = ["sh", "-c", '"$1" -m kvasir tenant list >&-', "sh", sys.executable]
    call = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (call.returncode, call.stderr) == (0, "")


def test_ctrl_c_while_modules_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(30)\n")
    call = subprocess.Popen(
        [sys.executable, "-m", "kvasir", "status"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert call.stdout is not None and call.stdout.readline() == "loading\n"
    call.send_signal(signal.SIGINT)
    assert call.communicate(timeout=30)[1] == ""
    assert call.returncode == -signal.SIGINT


def test_a_text_too_long_for_a_frame_is_refused_before_it_is_sent(office: Office, home: Path, capsys: Any) -> None:
    (home / "long").write_text("x" * (9 << 20))
    assert_one_line(kvasir(capsys, "prefix", "publish", "p", "--file", str(home / "long"), code=2)[1], "shorter")


@pytest.mark.parametrize(
    "args", [["status"], ["tenant", "list"], ["key", "create", "x"], ["demo"], ["models", "--json"]]
)
def test_without_a_gateway_it_says_how_to_start_one(home: Path, capsys: Any, args: list[str]) -> None:
    assert_one_line(kvasir(capsys, *args, code=2)[1], "no gateway is running", "kvasir up", str(home))


@pytest.mark.parametrize("name", ["KVASIR_ADMIN_SOCKET", "KVASIR_ENDPOINT"])
def test_up_refuses_a_start_beside_a_gateway_that_the_environment_names(
    home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "/run/kvasir/another.sock")
    monkeypatch.setattr(processes, "start", None)  # what must not be reached
    assert_one_line(kvasir(capsys, "up", "--http", "off", code=2)[1], name, "/run/kvasir/another.sock", "unset")


def test_down_asks_the_gateway_to_drain(office: Office, capsys: Any) -> None:
    assert str(os.getpid()) in kvasir(capsys, "down")[0]
    assert office.house.drained


@pytest.mark.parametrize(
    "answer",
    [
        b"\x82\xa4type\xa6status\xaaof_old\x01",  # {"type": "status", "of_old": 1}
        b"\xa5hello",
        encode(AdminFailed(InvalidMessage("not a valid message: Invalid value 'status' - at `$.type`").info())),
    ],
)
def test_a_gateway_of_another_version_can_be_stopped_and_that_is_said(home: Path, capsys: Any, answer: bytes) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    admin_socket().parent.mkdir(parents=True)
    router.bind(f"ipc://{admin_socket()}")

    def serve() -> None:
        for reply in (answer, encode(Done())):
            router.send_multipart([router.recv_multipart()[0], reply])

    thread = threading.Thread(target=serve)
    thread.start()
    pid = str(os.getpid())
    assert_one_line(kvasir(capsys, "status", code=2)[1], "another version", f"kill {pid}", "kvasir down")
    assert pid in kvasir(capsys, "down")[0]
    thread.join(10)
    router.close()
    context.term()


def test_chat_without_a_key_says_where_to_get_one(home: Path, capsys: Any) -> None:
    assert_one_line(kvasir(capsys, "chat", code=2)[1], "no API key", "kvasir up")


def test_chat_with_nothing_in_the_pipe_says_so(home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert_one_line(kvasir(capsys, "chat", "--api-key", "kv_x_y", code=2)[1], "no message")


def test_as_processes_exit_codes_and_streams_are_kept(home: Path) -> None:
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvasir", *args], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )

    refused = call("status")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert_one_line(refused.stderr, "no gateway")
    assert call("--version").returncode == call("--help").returncode == call().returncode == 0


# ---- chat --------------------------------------------------------------------------------------------------------


class FakeStream:
    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces
        self.closed = False
        usage = Usage(20, len(pieces), 16)
        result = SimpleNamespace(usage=usage, worker="demo-1", ttft_s=0.012, finish_reason="stop")
        result.request_id = "c0ffee0123"
        self.result = result

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield SimpleNamespace(text=piece)


class FakeClient:
    """Answers with what it is given, remembers what it was asked."""

    def __init__(self, *answers: list[Any]) -> None:
        self._answers = list(answers)
        self.asked: list[Any] = []
        self.streams: list[FakeStream] = []

    def chat(self, messages: list[Any], **options: Any) -> FakeStream:
        self.asked.append([dict(message) for message in messages])
        self.streams.append(FakeStream(self._answers.pop(0)))
        return self.streams[-1]

    def models(self) -> list[ModelCard]:
        return [ModelCard("asleep", 100, 0), ModelCard("demo", 2048, 2)]


def talk(client: FakeClient, *lines: Any) -> tuple[Chat, str]:
    waiting = list(lines)

    def read_line() -> str:
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out = io.StringIO()
    console = Console(file=out, width=120)
    chat = Chat(client, console, console, "demo")  # type: ignore[arg-type]
    chat.run(read_line)
    return chat, out.getvalue()


def test_a_conversation_grows_by_both_sides_and_says_what_was_cached() -> None:
    client = FakeClient(["Hel", "lo"], ["Bye"])
    _, out = talk(client, "hi", "", "and now?")
    assert client.asked[1] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "and now?"},
    ]
    assert "Hello" in out and "demo-1 · 16/20 prompt tokens cached · TTFT 12 ms" in out
    assert "request c0ffee01\n" in out


def test_commands_of_the_chat() -> None:
    client = FakeClient(["a"], ["b"], ["c"])
    _, out = talk(client, "/system be brief", "one", "/reset", "two", "/system", "/nonsense", "/help", "/quit", "three")
    assert client.asked == [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}],
    ]
    assert "be brief" in out and "/nonsense is no command" in out and "/system TEXT   start over" in out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    client = FakeClient(["par", "tial", KeyboardInterrupt()], ["more"])
    _, out = talk(client, "hi", "go on")
    assert client.streams[0].closed and "stopped" in out
    assert client.asked[1][1] == {"role": "assistant", "content": "partial"}


def test_ctrl_c_at_the_prompt_leaves_when_it_comes_twice_in_a_row() -> None:
    client = FakeClient(["a"])
    _, out = talk(client, KeyboardInterrupt(), "one", KeyboardInterrupt(), KeyboardInterrupt(), "two")
    assert out.count("Ctrl-C again leaves") == 2 and len(client.asked) == 1


def test_another_model_goes_on_with_the_conversation() -> None:
    chat, out = talk(FakeClient(["a"]), "/model", "/model nothing", "one", "/model asleep")
    assert "demo, of asleep, demo" in out and "no model nothing is served" in out and "asleep, 100 tokens" in out
    assert chat.model == "asleep" and len(chat.turns) == 2


def test_a_refused_turn_is_taken_back_and_the_conversation_goes_on() -> None:
    client = FakeClient(["a"], [Overloaded("too busy")], ["b"])
    chat, out = talk(client, "one", "two", "three")
    assert "too busy" in out
    assert [turn["content"] for turn in chat.turns] == ["one", "a", "three", "b"]
    with pytest.raises(AuthenticationFailed):
        talk(FakeClient([AuthenticationFailed("revoked")]), "one")


def test_a_chat_longer_than_the_window_forgets_its_older_half_and_says_so() -> None:
    too_long = [PromptTooLong("too long")]
    client = FakeClient(["1"], ["2"], ["3"], ["4"], too_long, too_long, ["5"], too_long, too_long, too_long)
    chat, out = talk(client, "a", "b", "c", "d", "e", "a message that is too long alone")
    assert [turn["content"] for turn in client.asked[6]] == ["d", "4", "e"]
    assert "the first 4 messages are forgotten" in out and "the first 2 messages are forgotten" in out
    assert "too long\n" in out and chat.turns == []


def test_several_lines_are_one_message_and_ctrl_c_clears_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_HOME", str(home / "not-yet-there"))
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        read = line_reader()
        typed.send_text("\x1b[200~pasted\nlines\x1b[201~ and\x1b\rmore\r")
        assert read() == "pasted\nlines and\nmore"
        typed.send_text("half a thought\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        typed.send_text("\x04")
        with pytest.raises(EOFError):
            read()
        read = line_reader()  # the next chat
        typed.send_text("\x1b[A\r")
        assert read() == "pasted\nlines and\nmore"
    assert (home / "not-yet-there" / "chat_history").stat().st_mode & 0o777 == 0o600


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    assert harmless("a\x1b[31mb\n\tc\x07") == "a�[31mb\n\tc�"
    _, out = talk(FakeClient(["\x1b]0;title\x07[bold]not markup[/bold]"]), "hi")
    assert "\x1b]0" not in out and "[bold]not markup[/bold]" in out


def test_the_first_model_that_is_awake_is_taken_and_a_wrong_one_named() -> None:
    client: Any = FakeClient()
    assert choose_model(client, None) == ("demo", 2048)
    assert choose_model(client, "asleep") == ("asleep", 100)
    with pytest.raises(BadRequest, match="asleep, demo"):
        choose_model(client, "nothing")


# ---- demo --------------------------------------------------------------------------------------------------------


class SmallModel:
    """Stands in for gateway and workers: caches whole texts per tenant, published ones for all."""

    def __init__(self, office: Office, *, leaks: bool = False) -> None:
        self.office = office
        self.leaks = leaks
        self.cached: set[tuple[str, str]] = set()
        self.num_requests = 0

    def client(self, endpoint: str, key: str, **_: Any) -> Any:
        tenant = self.office.directory.authenticate(key).tenant.name

        def generate(text: str, **options: Any) -> SimpleNamespace:
            return self._answer("" if self.leaks else tenant, text, len(text))

        def chat(messages: list[dict[str, str]], **options: Any) -> SimpleNamespace:
            system = messages[0]["content"]
            is_public = any(prefix.text == system for prefix in self.office.directory.prefixes)
            return self._answer("" if is_public else tenant, system, len(system))

        return nullcontext(SimpleNamespace(generate=generate, chat=chat, models=FakeClient().models))

    def _answer(self, scope: str, text: str, size: int) -> SimpleNamespace:
        self.num_requests += 1
        hit = (scope, text) in self.cached
        self.cached.add((scope, text))
        usage = Usage(size, 2, size if hit else 0)
        return SimpleNamespace(
            usage=usage, worker="demo-0", ttft_s=0.002 if hit else 0.05, text="return \x1b 1", request_id="c0ffee0123"
        )


def test_the_demonstration_shows_the_same_at_every_run(
    office: Office, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.cli.demo.Client", SmallModel(office).client)
    for _ in range(2):
        rows = kvasir_json(capsys, "demo")["rows"]
        assert [row["cached_tokens"] > 0 for row in rows] == [False, True, True, False, False, True]
        assert [row["tenant"] for row in rows] == ["demo", "demo", "demo-b", "demo", "demo-b", "demo"]
    out, _ = kvasir(capsys, "demo")
    assert "kvasir explain c0ffee01" in out and "c0ffee01\n" in out
    assert "published, first contact" in out and "and 0 of demo's private text" in out and "\x1b" not in out
    assert kvasir_json(capsys, "prefix", "list")["prefixes"] == [] == kvasir_json(capsys, "tenant", "list")["tenants"]
    assert not demo_keys.key_path("demo").exists()
    demo_keys.obtain_key("demo")  # as `kvasir up` does, for `kvasir chat`
    kvasir(capsys, "demo")
    assert [tenant["name"] for tenant in kvasir_json(capsys, "tenant", "list")["tenants"]] == ["demo"]
    assert office.directory.authenticate(demo_keys.find_key(None)).tenant.name == "demo"


def test_the_demonstration_fails_loudly_when_private_text_is_shared(
    office: Office, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.cli.demo.Client", SmallModel(office, leaks=True).client)
    _, err = kvasir(capsys, "demo", code=2)
    assert_one_line(err.splitlines()[-1], "demo-b", "should have been cold", "report")
    assert "Traceback" not in err
    assert kvasir_json(capsys, "prefix", "list")["prefixes"] == [] == kvasir_json(capsys, "tenant", "list")["tenants"]


# ---- up ----------------------------------------------------------------------------------------------------------


def test_models_are_named_by_hand_or_by_their_folder(tmp_path: Path) -> None:
    (tmp_path / "Qwen3").mkdir()
    assert up_plan.plan_models([]) == (f"demo={up_plan.DEMO_MODEL}",)
    assert up_plan.plan_models([str(tmp_path / "Qwen3"), f"q={tmp_path / 'Qwen3'}"]) == (
        f"Qwen3={tmp_path / 'Qwen3'}",
        f"q={tmp_path / 'Qwen3'}",
    )
    with pytest.raises(ConfigurationError, match="no folder"):
        up_plan.plan_models(["x=/nowhere"])


def test_the_demonstration_key_is_kept_and_made_anew_when_it_was_revoked(
    office: Office, home: Path, capsys: Any
) -> None:
    with pytest.raises(AuthenticationFailed):
        demo_keys.find_key(None)
    first = demo_keys.obtain_key("demo")
    assert demo_keys.obtain_key("demo") == first == demo_keys.find_key(None)
    assert demo_keys.key_path("demo").stat().st_mode & 0o777 == 0o600
    kvasir(capsys, "key", "revoke", first.split("_")[1])
    second = demo_keys.obtain_key("demo")
    assert second != first and office.directory.authenticate(second).tenant.name == "demo"
    demo_keys.key_path("demo").write_text("nonsense")
    assert office.directory.authenticate(demo_keys.obtain_key("demo")).tenant.name == "demo"
    assert demo_keys.find_key("kv_given_one") == "kv_given_one"


FAKE_GATEWAY = """
import signal, sys, threading
from pathlib import Path
from tests.gateway.admin.test_admin import Office
home = Path(sys.argv[1])
office = Office(home)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stop.wait(50)
office.close()
print("left in good order")
"""
STARTER = """
import sys
from kvasir.cli import processes
processes.module_command = lambda module, args: [sys.executable, "-c", {code!r}, {home!r}, *args]
from kvasir.cli.main import main
sys.argv[1:] = {args!r}
main()
"""


def start_up(home: Path, code: str, *args: str) -> subprocess.Popen[str]:
    """Run `kvasir up` with a stand-in for the gateway."""
    script = STARTER.format(code=code, home=str(home), args=["up", "--workers", "1", "--http", "off", *args])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "KVASIR_HOME": str(home), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_waits_prints_a_key_serves_and_stops_in_good_order(home: Path, number: signal.Signals) -> None:
    process = start_up(home, FAKE_GATEWAY)
    lines: list[str] = []
    while not any("In another terminal" in line for line in lines):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        lines.append(line)
    key = demo_keys.stored_key("demo")
    assert key is not None and any(key in line for line in lines)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "stopped" in out and "left in good order" in (home / "gateway.log").read_text()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; print('kvasir gateway: port 8000 is taken', file=sys.stderr); sys.exit(2)", "port 8000 is taken"),
        ("import sys; sys.exit(1)", "said nothing"),
        ("import os; print('last line', flush=True); os.kill(os.getpid(), 9)", "killed by signal 9 (log"),
    ],
)
def test_up_says_in_one_line_why_the_gateway_did_not_start(home: Path, code: str, words: str) -> None:
    process = start_up(home, code)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert_one_line(err, words, "gateway.log")


def test_the_welcome_prints_a_request_that_can_be_pasted(home: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    up.print_welcome(up_plan.UpPlan(("demo=/x",), 2), "kv_key", home / "gateway.log", console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, out.splitlines())) <= 80
    assert json.loads(out.partition("-d '")[2].partition("'")[0])["model"] == "demo"
    assert f"$(cat {demo_keys.key_path('demo')})" in out


@pytest.mark.parametrize(("http", "warned"), [("127.0.0.1:8000", False), ("[::1]:8000", False), ("0.0.0.0:8000", True)])
def test_up_warns_of_http_in_the_clear_beyond_this_machine(home: Path, http: str, *, warned: bool) -> None:
    console = Console(file=io.StringIO(), width=80)
    up.print_welcome(up_plan.UpPlan(("demo=/x",), 2, http=http), "kv_key", home / "gateway.log", console)
    assert ("not encrypted" in console.file.getvalue()) == warned  # type: ignore[attr-defined]


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Path("/dev/nvidia0"), Path("/dev/nvidia1"), Path("/dev/nvidia2"), Path("/dev/nvidiactl")]
    glob: Callable[..., Any] = lambda self, pattern: iter(devices)  # noqa: E731
    monkeypatch.setattr(Path, "glob", glob)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert up_plan.count_gpus() == 3
    for value, number in (("", 0), ("-1", 0), ("1", 1), ("0,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert up_plan.count_gpus() == number


def test_numbers_are_shown_short() -> None:
    assert [count(n) for n in (0, 950, 12_345, 4_500_000)] == ["0", "950", "12.3k", "4.5M"]
    assert [duration(s) for s in (-1, 59, 61, 7200, 90_000)] == ["0 s", "59 s", "1 min", "2 h", "1 d"]
    assert age(100.0, 160.0) == "1 min"
    assert percent(1, 0) == "–" and percent(1, 4) == "25 %"
    assert bar(1, 2, 4) == "██░░" and bar(9, 2, 4) == "████" and bar(1, 0, 4) == "░░░░"
    assert plain("[red]x\x1b") == "\\[red]x�"


# ---- the real thing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_demo_chat_status_and_down_against_a_real_gateway() -> None:
    with open_box() as box:
        for _ in range(2):
            rows = box.json("demo")["rows"]
            assert [row["cached_tokens"] > 0 for row in rows] == [False, True, True, False, False, True]
            assert all(row["worker"].startswith("demo-") and row["ttft_ms"] > 0 for row in rows)
        assert box.json("tenant", "list")["tenants"] == [] == box.json("prefix", "list")["prefixes"]
        box.kvasir("tenant", "create", "acme")
        key = box.json("key", "create", "acme")["key"]
        said = box.kvasir("chat", "--api-key", key, "--max-tokens", "8", input="Hello!\nIn two lines!\n")
        assert said.stderr.count("prompt tokens cached") == 1 and "cached" not in said.stdout
        assert box.kvasir("explain", said.stderr.split()[-1]).stdout.count("attempt") == 1
        assert {worker["id"] for worker in box.workers()} == {"demo-0", "demo-1"}
        [tenant] = box.json("tenant", "list")["tenants"]
        assert tenant["name"] == "acme" and tenant["usage"]["num_requests"] == 1
        assert "demo-0" in box.kvasir("status").stdout
        box.kvasir("down")
        assert box.process.wait(30) == 0
