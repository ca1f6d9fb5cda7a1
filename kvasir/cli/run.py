"""`kvasir up`, `kvasir gateway` and `kvasir worker`: what starts processes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import click

from kvasir.cli import processes
from kvasir.cli import up as upper
from kvasir.cli.admin_client import ask
from kvasir.cli.output import example, json_option, make_console, print_json
from kvasir.paths import run_dir, state_dir, worker_endpoint
from kvasir.protocol.admin_messages import Done, DrainGateway, StatusQuery, StatusReply
from kvasir.protocol.errors import BadRequest, KvasirError

HELP_TIMEOUT_S = 30


class PassThrough(click.Command):
    """A command whose options belong to the process it starts; its help shows theirs, too."""

    def __init__(self, *args: object, **options: object) -> None:
        options["context_settings"] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add what `python -m <module> --help` says, where it is installed."""
        command = processes.module_command(str(self.name), ["--help"])
        try:
            done = subprocess.run(
                command, env=processes.module_environment(), capture_output=True, text=True, timeout=HELP_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired):
            return
        if done.returncode == 0:
            formatter.write("\n" + done.stdout[done.stdout.find("options:") :])


@click.command("gateway", cls=PassThrough)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@example(
    "kvasir gateway --state-dir /var/lib/kvasir --run-dir /run/kvasir --model qwen=/models/Qwen3-8B --workers 2\n"
    "kvasir gateway --http 0.0.0.0:8000 --workers 0        # workers dial in by themselves"
)
def gateway(args: tuple[str, ...]) -> None:
    """Run the gateway in the foreground, as a service does. All options are those of `python -m kvasir.gateway`."""
    defaults: list[str] = []
    if not _has(args, "--state-dir"):
        defaults += ["--state-dir", str(state_dir())]
        if not _has(args, "--run-dir"):
            defaults += ["--run-dir", str(run_dir())]
    processes.run_in_place("gateway", [*defaults, *args])


@click.command("worker", cls=PassThrough)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@example("kvasir worker --gateway ipc:///run/kvasir/workers/workers.sock --model /models/Qwen3-8B --name qwen")
def worker(args: tuple[str, ...]) -> None:
    """Run one worker in the foreground; it dials the gateway. All options are those of `python -m kvasir.worker`."""
    defaults = [] if _has(args, "--gateway") else ["--gateway", worker_endpoint()]
    processes.run_in_place("worker", [*defaults, *args])


@click.command()
@click.option("--model", "models", metavar="NAME=PATH", multiple=True, help="Serve this folder; repeatable.")
@click.option("--workers", type=click.IntRange(1, 256), help="Workers per model. Default: one per GPU, else two.")
@click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8000", show_default=True, help="HTTP edge, or `off`.")
@click.option("--zmq", metavar="ENDPOINT", multiple=True, help="A further SDK endpoint such as tcp://0.0.0.0:5555.")
@click.option("--worker-args", metavar="ARGS", default="", help='For every worker, such as "--kv-memory 2G".')
@click.option("--block-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Tokens per KV block.")
@click.option("--wait", "wait_s", type=click.FloatRange(min=1), default=600.0, help="Seconds until all must be ready.")
@click.option("--demo", "with_demo", is_flag=True, help="Run the demonstration when ready, then keep serving.")
@example("kvasir up --demo\nkvasir up --model qwen=/models/Qwen3-8B --workers 2 --http 0.0.0.0:8000")
def up(
    models: tuple[str, ...],
    workers: int | None,
    http: str,
    zmq: tuple[str, ...],
    worker_args: str,
    block_size: int,
    wait_s: float,
    with_demo: bool,
) -> None:
    """Start everything on this machine: a gateway and its workers, by default on the bundled model. Ctrl-C stops.

    The first start makes a demonstration tenant and prints its API key. State is kept in $KVASIR_HOME, or
    ~/.local/state/kvasir.
    """
    host, _, port = http.rpartition(":")
    if http != "off" and (not host or not port.isdigit()):
        raise BadRequest(f"--http {http!r} is no HOST:PORT; try 127.0.0.1:8000, or `off`")
    plan = upper.UpPlan(
        models=upper.plan_models(models),
        num_workers=workers or upper.count_gpus() or 2,
        http=http,
        zmq=zmq,
        worker_args=worker_args,
        block_size=block_size,
        wait_s=wait_s,
    )
    upper.serve(plan, make_console(), then=_demonstrate if with_demo else None)


@click.command()
@json_option
@example("kvasir down")
def down(as_json: bool) -> None:
    """Stop the running gateway as Ctrl-C does: it takes nothing new, finishes what runs, then leaves."""
    pid = ask(StatusQuery(), StatusReply).pid
    reply = ask(DrainGateway(), Done)
    if as_json:
        print_json(reply)
    else:
        click.echo(f"the gateway (process {pid}) finishes what runs and stops")


def _demonstrate(key: str) -> None:
    from kvasir.cli.demo import run_demo

    try:
        run_demo(make_console())
    except KvasirError as error:  # it serves all the same
        click.echo(f"kvasir: the demonstration failed: {error.message}", err=True)


def _has(args: Sequence[str], option: str) -> bool:
    return any(arg == option or arg.startswith(option + "=") for arg in args)
