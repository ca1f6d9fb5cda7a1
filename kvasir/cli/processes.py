"""`kvasir gateway` and `kvasir worker`: both are started as processes, the command line never imports their insides."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click

import kvasir
from kvasir.cli.output import example
from kvasir.paths import run_dir, state_dir, worker_endpoint
from kvasir.protocol.errors import ConfigurationError

HELP_TIMEOUT_S = 30
_KINDS: dict[str, list[list[str]]] = {"gateway": [[]], "worker": [[], ["--engine", "vllm"]]}
ROOT = Path(kvasir.__path__[0]).resolve().parent


class PassThrough(click.Command):
    """A command whose options belong to the process it starts; its help shows theirs, too."""

    def __init__(self, *args: object, **options: object) -> None:
        options["context_settings"] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add what `python -m <module> --help` says, where it is installed."""
        for kind in _KINDS[str(self.name)]:
            command = module_command(str(self.name), [*kind, "--help"])
            try:
                done = subprocess.run(
                    command, env=module_environment(), capture_output=True, text=True, timeout=HELP_TIMEOUT_S
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                title = f"\nwith {' '.join(kind)}, " if kind else "\n"
                formatter.write(title + done.stdout[done.stdout.find("options:") :])


@click.command("gateway", cls=PassThrough)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@example(
    "kvasir gateway --state-dir /var/lib/kvasir --run-dir /run/kvasir --model qwen=/models/Qwen3-8B --workers 2\n"
    "kvasir gateway --http 0.0.0.0:8000 --workers 0        # workers dial in by themselves"
)
def gateway(args: tuple[str, ...]) -> None:
    """Run the gateway in the foreground.

    As a service does. All options are those of `python -m kvasir.gateway`."""
    defaults: list[str] = []
    if not _has(args, "--state-dir"):
        defaults += ["--state-dir", str(state_dir())]
        if not _has(args, "--run-dir"):
            defaults += ["--run-dir", str(run_dir())]
    run_in_place("gateway", [*defaults, *args])


@click.command("worker", cls=PassThrough)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@example(
    "kvasir worker --gateway ipc:///run/kvasir/workers/workers.sock --model /models/Qwen3-8B --name qwen\n"
    "kvasir worker --engine vllm --upstream http://10.0.0.5:8000 --name qwen        # fronts a vLLM server"
)
def worker(args: tuple[str, ...]) -> None:
    """Run one worker in the foreground.

    It dials the gateway. All options are those of `python -m kvasir.worker`."""
    defaults = [] if _has(args, "--gateway") else ["--gateway", worker_endpoint()]
    run_in_place("worker", [*defaults, *args])


def module_command(module: str, args: Sequence[str]) -> list[str]:
    """Return the command that runs `python -m kvasir.MODULE args` with this interpreter.

    -P: the current folder may hold a module of the same name, and must not win.
    """
    return [sys.executable, "-P", "-m", f"kvasir.{module}", *args]


def module_environment() -> dict[str, str]:
    """Return this process's environment; from a source tree that is not installed, with the tree on the path."""
    environment = dict(os.environ)
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), sysconfig.get_path("purelib"))}
    if ROOT not in installed:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return environment


def run_in_place(module: str, args: Sequence[str]) -> int:
    """Run a module in the foreground, in place of this process: signals and the exit code are its own.

    Raises:
        ConfigurationError: it is not installed.
    """
    _check_installed("upstream" if _has(args, "--engine") else module)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, module_command(module, args), module_environment())


def start(module: str, args: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a module in a session of its own, so that Ctrl-C reaches only us; both its outputs go to `log`
    (the log before it stays as `.log.1`).

    Raises:
        ConfigurationError: it is not installed, or the log cannot be written.
    """
    _check_installed(module)
    try:
        log.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))  # why the last one ended may be asked after the next has started
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "wb") as sink:
            return subprocess.Popen(
                module_command(module, args),
                env=module_environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {log}: {error.strerror}; set KVASIR_HOME to a folder you may write"
        ) from None


def last_lines(log: Path, number: int) -> list[str]:
    """Return the last non-empty lines of a log, oldest first; none if it cannot be read."""
    try:
        with log.open("rb") as source:
            source.seek(max(0, source.seek(0, os.SEEK_END) - 16_384))
            lines = source.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-number:]


def _check_installed(module: str) -> None:
    needs = {
        "gateway": ("trio", "httptools", "tokenizers", "jinja2"),
        "worker": ("torch", "numpy", "safetensors"),
        "upstream": ("trio", "httptools"),
    }
    missing = [name for name in needs[module] if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the {module} needs {', '.join(missing)}, not installed here; run: pip install 'kvasir-gateway[{module}]'"
        )


def _has(args: Sequence[str], option: str) -> bool:
    return any(arg == option or arg.startswith(option + "=") for arg in args)
