"""The gateway as a process of its own, in want of descriptors."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from kvasir.gateway.config import GatewayConfig
from kvasir.protocol.client_messages import GATEWAY_MESSAGES, ModelList, ModelsRequest
from kvasir.protocol.codec import encode
from tests.box import free_port

pytestmark = pytest.mark.timeout(60)
LIMIT = 120


def test_idle_strangers_leave_descriptors_for_everybody_else(tmp_path: Path) -> None:
    """libzmq ends the whole process when its ipc listener finds no descriptor left."""
    port = free_port()
    config = GatewayConfig(tmp_path, tmp_path / "run", ())
    command = [sys.executable, "-m", "kvasir.gateway", "--state-dir", str(tmp_path)]
    with ExitStack() as stack:
        process = subprocess.Popen(
            [*command, "--http", f"127.0.0.1:{port}"],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT // 2, LIMIT)),
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        said = ""
        while "gateway_ready" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        for _ in range(2 * LIMIT):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        context = stack.enter_context(zmq.Context())
        for number in range(10):
            dealer = stack.enter_context(context.socket(zmq.DEALER))
            dealer.linger = 0
            dealer.connect(config.client_endpoints[0])
            dealer.send(encode(ModelsRequest(number, "nobody's key")))
            assert dealer.poll(10_000)
            answer = GATEWAY_MESSAGES.decode(dealer.recv())
            assert isinstance(answer, ModelList) and answer.error is not None
        assert f"few_descriptors limit={LIMIT} max_http_connections={LIMIT // 2}" in said
        assert process.poll() is None
