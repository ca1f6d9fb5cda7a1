"""`kvasir up` and `kvasir down`: one machine with everything on it, from nothing to serving, and back on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from kvasir.cli import processes
from kvasir.cli.admin_client import ask, is_listening, listener
from kvasir.cli.demo import run_demo
from kvasir.cli.demo_keys import key_path, obtain_key
from kvasir.cli.output import example, harmless, json_option, make_console, plain, show
from kvasir.cli.up_plan import UpPlan, count_gpus, plan_models
from kvasir.paths import admin_socket, home_dir, local_admin_socket, local_client_endpoint
from kvasir.protocol.address import is_loopback
from kvasir.protocol.admin_messages import Done, DrainGateway, StatusQuery, StatusReply
from kvasir.protocol.errors import BadRequest, ConfigurationError, ConnectionLost, KvasirError, Unavailable

POLL_S = 0.2
HOPELESS_RESTARTS = 3  # a model none of whose workers has ever come up after so many tries will not


@click.command()
@click.option("--model", "models", metavar="NAME=PATH", multiple=True, help="Serve this folder; repeatable.")
@click.option("--upstream", "upstreams", metavar="NAME=URL", multiple=True, help="A vLLM server to front; repeatable.")
@click.option(
    "--workers", "num_workers", type=click.IntRange(1, 256), help="Workers per model. Default: one per GPU, else two."
)
@click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8000", show_default=True, help="HTTP edge, or `off`.")
@click.option("--zmq", metavar="ENDPOINT", multiple=True, help="A further SDK endpoint such as tcp://127.0.0.1:5555.")
@click.option("--insecure", is_flag=True, help="Allow ZeroMQ in the clear beyond loopback.")
@click.option("--worker-args", metavar="ARGS", default="", help='For every worker, such as "--kv-memory 2G".')
@click.option("--cors-origin", "cors_origins", metavar="ORIGIN", multiple=True, help="Whose pages may call; or `*`.")
@click.option("--tool-parser", "tool_parsers", metavar="[MODEL=]NAME", multiple=True, help="How a model calls tools.")
@click.option("--block-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Tokens per KV block.")
@click.option("--wait", "wait_s", type=click.FloatRange(min=1), default=600.0, help="Seconds until all must be ready.")
@click.option("--demo", "with_demo", is_flag=True, help="Run the demonstration when ready, then keep serving.")
@example(
    "kvasir up --demo\nkvasir up --model qwen=/models/Qwen3-8B --workers 2 --http 0.0.0.0:8000\n"
    "kvasir up --upstream qwen=http://127.0.0.1:8300      # a vLLM server that is running already"
)
def up(with_demo: bool, **plan: Any) -> None:
    """Start everything on this machine.

    That is a gateway and its workers, by default on the bundled model. Ctrl-C stops them.

    The first start makes a demonstration tenant and prints its API key. State is kept in $KVASIR_HOME, or
    ~/.local/state/kvasir.
    """
    host, _, port = plan["http"].rpartition(":")
    if plan["http"] != "off" and (not host or not port.isdigit()):
        raise BadRequest(f"--http {plan['http']!r} is no HOST:PORT; try 127.0.0.1:8000, or `off`")
    plan["models"] = plan_models(plan["models"], plan["upstreams"])
    plan["num_workers"] = plan["num_workers"] or count_gpus() or 2
    serve(UpPlan(**plan), make_console(), then=_demonstrate if with_demo else None)


@click.command()
@json_option
@example("kvasir down")
def down(as_json: bool) -> None:
    """Stop the running gateway, as Ctrl-C does.

    It takes nothing new, finishes what runs, then leaves.
    """
    pid = listener(admin_socket())  # not asked of the gateway: it may be of another version
    reply = ask(DrainGateway(), Done)
    show(reply, as_json, f"the gateway (process {pid or '?'}) finishes what runs and stops")


def serve(plan: UpPlan, console: Console, *, then: Callable[[], None] | None = None) -> None:
    """Start, wait until all workers are ready, call `then`, and serve until SIGINT, SIGTERM or SIGHUP.

    Returns after a stop that was asked for, when the gateway has drained and left.

    Raises:
        ConfigurationError: it does not start, or stops by itself; says why, from the gateway's log.
    """
    socket = local_admin_socket()
    _check_environment(socket, (local_client_endpoint(), *plan.zmq))
    if is_listening(socket):
        raise ConfigurationError(f"a gateway is running at {socket} already; use it, or stop it with `kvasir down`")
    log = home_dir() / "gateway.log"
    process = processes.start("gateway", plan.gateway_args(), log)
    try:
        with _stop_signals():
            _wait_until_ready(plan, process, log, console)
            key = obtain_key("demo", socket)
            print_welcome(plan, key, log, console)
            if then is not None:
                then()
                console.print("Serving. Ctrl-C stops.")
            process.wait()
        if process.returncode:
            raise ConfigurationError(_epitaph(process, log))
        console.print("the gateway was told to stop", style="dim")
    except _Stopped:
        console.print("\nstopping: running requests may finish, Ctrl-C again cuts them off", style="dim")
        _stop(process, plan.drain_s + 10)
        console.print("stopped", style="dim")
    finally:
        _kill(process)


def _demonstrate() -> None:
    try:
        run_demo(make_console())
    except KvasirError as error:  # it serves all the same
        click.echo(f"kvasir: the demonstration failed: {error.message}", err=True)


class _Stopped(BaseException):
    """Somebody asked us to stop. Not an Exception: nothing on the way may take it for a failure."""


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Stopped

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a job in the background of a plain shell
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(plan: UpPlan, process: subprocess.Popen[bytes], log: Path, console: Console) -> None:
    wanted = plan.workers_of()
    deadline = time.monotonic() + plan.wait_s
    begun = time.monotonic()
    with _progress(console) as show:
        show("starting the gateway")
        while True:
            if process.poll() is not None:
                raise ConfigurationError(_epitaph(process, log))
            status = _try_status()
            if status is not None:
                ready = {name: _num_ready(status, name) for name in wanted}
                if all(number >= wanted[name] for name, number in ready.items()):
                    break
                counts = [f"{name}: {number} of {wanted[name]} workers ready" for name, number in ready.items()]
                show(", ".join(counts), _last_line(log))
                for name, number in ready.items():
                    restarts = sum(worker.num_restarts for worker in status.workers if worker.model == name)
                    if not number and restarts >= HOPELESS_RESTARTS * wanted[name]:
                        raise ConfigurationError(f"no worker of model {name} comes up: {_last_words(log)}")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"not ready within {plan.wait_s:g} s: {_last_words(log)}")
            time.sleep(POLL_S)
    console.print(f"ready after {time.monotonic() - begun:.1f} s", style="dim")


def _try_status() -> StatusReply | None:
    try:
        return ask(StatusQuery(), StatusReply, path=local_admin_socket(), timeout_s=5)
    except (ConnectionLost, Unavailable):  # not yet
        return None


def _num_ready(status: StatusReply, model: str) -> int:
    return sum(worker.model == model and worker.state == "ready" for worker in status.workers)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[..., None]]:
    """Give `show(text, detail)`: a spinner on a terminal, else a line whenever `text` changes."""
    if console.is_terminal:
        width = console.width - 4
        with console.status("") as spinner:
            yield lambda text, detail="": spinner.update(Text(f"{text}  {detail}"[:width]))
    else:
        last = [""]

        def show(text: str, detail: str = "") -> None:
            if text != last[0]:
                console.print(Text(text))
                last[0] = text

        yield show


def print_welcome(plan: UpPlan, key: str, log: Path, console: Console) -> None:
    """Print where it can be reached, with what key, and something to try."""
    model = plan.models[0].partition("=")[0]
    console.print()
    if plan.http != "off":
        if not is_loopback(plan.http.rpartition(":")[0]):
            console.print("  [bold]warning[/bold]  HTTP beyond this machine is not encrypted: see docs/tls.md")
        console.print(f"  [bold]HTTP[/bold]     http://{plain(plan.http)}/v1")
    for endpoint in (local_client_endpoint(), *plan.zmq):
        console.print(f"  [bold]ZeroMQ[/bold]   {plain(endpoint)}", soft_wrap=True)
    models = ", ".join(f"{name} ({number} worker{'s' * (number != 1)})" for name, number in plan.workers_of().items())
    console.print(f"  [bold]models[/bold]   {plain(models)}")
    console.print(f"  [bold]API key[/bold]  {plain(key)}", soft_wrap=True)
    console.print(f"           [dim]tenant demo, kept in {plain(key_path('demo'))}[/dim]", soft_wrap=True)
    console.print(f"  [bold]log[/bold]      {plain(log)}", soft_wrap=True)
    console.print("\n  In another terminal:  kvasir chat    kvasir demo    kvasir status", style="dim")
    if plan.http != "off":
        curl = (
            f"  curl -s http://{plan.http}/v1/chat/completions \\\n"
            f'    -H "Authorization: Bearer $(cat {key_path("demo")})" \\\n'
            '    -H "Content-Type: application/json" \\\n'
            f'    -d \'{{"model": "{model}", "max_tokens": 48, "messages":\n'
            '         [{"role": "user", "content": "Hello!"}]}\'\n'
        )
        console.print(escape(curl), style="dim", soft_wrap=True)


def _epitaph(process: subprocess.Popen[bytes], log: Path) -> str:
    if process.returncode < 0:  # its last line is not about its end
        return f"the gateway was killed by signal {-process.returncode} (log: {log})"
    return f"the gateway stopped (exit code {process.returncode}): {_last_words(log)}"


def _last_words(log: Path) -> str:
    return f"{_last_line(log).removeprefix('kvasir gateway: ') or 'it said nothing'} (log: {log})"


def _last_line(log: Path) -> str:
    return harmless("".join(processes.last_lines(log, 1)))


def _stop(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ask the gateway to drain and leave; a second signal or `timeout_s` makes it immediate."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, _Stopped), _stop_signals():
        process.wait(timeout_s)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """See that nothing of ours is left, workers included: they are in the gateway's session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _check_environment(socket: Path, endpoints: Sequence[str]) -> None:
    """Raise ConfigurationError where the other commands would talk to another gateway than the one to be started."""
    for name, mine in (("KVASIR_ADMIN_SOCKET", (str(socket),)), ("KVASIR_ENDPOINT", endpoints)):
        if os.environ.get(name, mine[0]) not in mine:
            raise ConfigurationError(
                f"{name} names another gateway, {os.environ[name]}: the other commands would talk to that one; unset it"
            )
