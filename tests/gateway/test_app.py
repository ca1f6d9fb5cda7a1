"""The gateway put together, without workers: what it leaves on the disk, what it refuses to start with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kvasir import paths
from kvasir.gateway.app import serve
from kvasir.gateway.config import GatewayConfig

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


def modes_of_a_running_gateway(home: Path) -> dict[str, int]:
    """Run a gateway until its last socket is there; return the mode of each socket's folder."""
    modes: dict[str, int] = {}

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, GatewayConfig(home / "state", home / "run", (), http=None))
            while not (home / "run" / "admin" / "admin.sock").exists():  # noqa: ASYNC110 no event tells
                await trio.sleep(0.01)
            for socket in (home / "run").glob("*/*.sock"):
                modes[socket.parent.name] = socket.parent.stat().st_mode & 0o7777
            nursery.cancel_scope.cancel()

    trio.run(main)
    return modes


def test_each_socket_has_a_folder_of_its_own_and_only_that_of_clients_is_open_to_the_group(home: Path) -> None:
    assert modes_of_a_running_gateway(home) == {"clients": 0o750, "workers": 0o700, "admin": 0o700}


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
