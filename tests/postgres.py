"""A PostgreSQL server of the tests' own, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

WAIT_S = 30


class Postgres:
    """A server in a folder of its own, on a socket there. It refuses to run as root: `nobody` runs it then."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._home = Path(tempfile.mkdtemp(prefix="kvpg", dir="/tmp"))
        self._num_databases = 0
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._home, self._user)
        self._run(
            "initdb", "-D", f"{self._home}/data", "-A", "trust", "-U", "kvasir", "-E", "UTF8", "--locale=C", "--no-sync"
        )
        self.start()

    def start(self) -> None:
        """Start it; returns when it answers."""
        options = f"-k {self._home} -c listen_addresses='' -c fsync=off"  # here only processes die, not machines
        self._run("pg_ctl", "-D", f"{self._home}/data", "-l", f"{self._home}/log", "-w", "-o", options, "start")

    def stop(self) -> None:
        """Stop it as kill -9 would: connections break, nothing is tidied up."""
        self._run("pg_ctl", "-D", f"{self._home}/data", "-w", "-m", "immediate", "stop")

    def new_url(self) -> str:
        """Return the URL of a new, empty database."""
        self._num_databases += 1
        name = f"test{self._num_databases}"
        self._run("psql", "-h", str(self._home), "-U", "kvasir", "-d", "postgres", "-c", f"CREATE DATABASE {name}")
        return f"postgresql://kvasir:sesame@/{name}?host={self._home}"

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, program: str, *args: str) -> None:
        subprocess.run(
            [self._programs / program, *args],
            cwd="/",
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=WAIT_S,
            check=True,
        )


def find_programs() -> Path | None:
    """Return the folder of the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None
