"""The gateway put together, without workers: what it leaves on the disk, what it refuses to start with."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kvasir import paths
from kvasir.gateway import app
from kvasir.gateway.__main__ import parse
from kvasir.gateway.app import serve
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.log import log

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


def modes_of_a_running_gateway(home: Path, http: tuple[str, int] | None = None) -> dict[str, int]:
    """Run a gateway until it says that it is ready; return the mode of each socket's folder."""
    modes: dict[str, int] = {}
    ready = trio.Event()

    def heed(event: str, **fields: object) -> None:
        log(event, **fields)
        if event == "gateway_ready":
            ready.set()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, GatewayConfig(home / "state", home / "run", (), http=http))
            await ready.wait()
            for socket in (home / "run").glob("*/*.sock"):
                modes[socket.parent.name] = socket.parent.stat().st_mode & 0o7777
            nursery.cancel_scope.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "log", heed)
        trio.run(main)
    return modes


def test_each_socket_has_a_folder_of_its_own_and_only_that_of_clients_is_open_to_the_group(home: Path) -> None:
    assert modes_of_a_running_gateway(home) == {"clients": 0o750, "workers": 0o700, "admin": 0o700}


def test_a_gateway_that_is_cut_off_leaves_no_thread_that_writes_to_its_ledger(home: Path) -> None:
    modes_of_a_running_gateway(home)
    assert "ledger" not in [thread.name for thread in threading.enumerate()]


def test_a_folder_that_was_made_for_another_group_stays_as_it_is(home: Path) -> None:
    (home / "run" / "workers").mkdir(parents=True)
    (home / "run" / "workers").chmod(0o2750)
    assert modes_of_a_running_gateway(home) == {"clients": 0o750, "workers": 0o2750, "admin": 0o700}


def test_the_gateway_listens_where_the_sdk_and_the_command_line_look(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVASIR_HOME", str(home))
    monkeypatch.delenv("KVASIR_ENDPOINT", raising=False)
    monkeypatch.delenv("KVASIR_ADMIN_SOCKET", raising=False)
    config = GatewayConfig(paths.state_dir(), paths.run_dir(), ())
    assert config.client_endpoints == (paths.client_endpoint(),)
    assert config.worker_endpoint == paths.worker_endpoint()
    assert config.admin_endpoint == f"ipc://{paths.admin_socket()}"


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://eth0:5555", "tcp://10.0.0.7:5555", "ws://x:1"]
)
def test_zeromq_in_the_clear_beyond_this_machine_is_refused_unless_asked_for_by_name(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--state-dir", "/x", "--zmq", endpoint])
    assert "--insecure" in capsys.readouterr().err
    assert parse(["--state-dir", "/x", "--zmq", endpoint, "--insecure"]).zmq_endpoints == (endpoint,)
    assert parse(["--state-dir", "/x", "--zmq", "tcp://127.0.0.1:5"]).zmq_endpoints == ("tcp://127.0.0.1:5",)


def test_http_beyond_this_machine_is_warned_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        modes_of_a_running_gateway(home, http=(host, 0))
        assert ("http_is_not_encrypted" in capsys.readouterr().err) == warned


def test_a_log_line_carries_the_date_and_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log("request", path="/a\nb\x1b[2J", status=200)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d request path='/a\\nb\\x1b\[2J' status=200\n", line)


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), (" \n", "is empty")])
def test_a_metrics_token_file_without_a_token_is_refused(
    home: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "token"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--state-dir", "/x", "--metrics-token-file", str(path)])
    assert words in capsys.readouterr().err
    path.write_text("token\n")
    assert parse(["--state-dir", "/x", "--metrics-token-file", str(path)]).metrics_token == "token"


def test_each_model_has_its_tool_parser_and_the_http_edge_its_origins(capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", "a=/a", "--model", "b=/b"]
    given = [
        "--tool-parser",
        "hermes",
        "--tool-parser",
        "b=mistral",
        "--cors-origin",
        "https://x",
        "--cors-origin",
        "*",
    ]
    config = parse(["--state-dir", "/x", *models, *given])
    assert [model.tool_parser for model in config.models] == ["hermes", "mistral"]
    assert config.cors_origins == ("https://x", "*")
    assert [model.tool_parser for model in parse(["--state-dir", "/x", *models]).models] == ["auto", "auto"]
    with pytest.raises(SystemExit):
        parse(["--state-dir", "/x", "--tool-parser", "pythonic"])
    assert "there are hermes, qwen3_coder, llama3, mistral" in capsys.readouterr().err
