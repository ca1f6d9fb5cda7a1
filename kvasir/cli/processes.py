"""Starting the gateway and workers as processes: the command line never imports their insides."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import kvasir
from kvasir.protocol.errors import ConfigurationError

ROOT = Path(kvasir.__path__[0]).resolve().parent


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
    _check_installed(module)
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
    needs = {"gateway": ("trio", "httptools", "tokenizers", "jinja2"), "worker": ("torch", "numpy", "safetensors")}
    missing = [name for name in needs[module] if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the {module} needs {', '.join(missing)}, not installed here; run: pip install 'kvasir-gateway[{module}]'"
        )
