"""What tests of several rooms share: databases, so that one test runs on both kinds."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.postgres import Postgres, find_programs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs behind it: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("kvasir", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvasir")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that runs, for all tests of a process."""
    programs = find_programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    server = Postgres(programs)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """What --database says: nothing, then the URL of an empty PostgreSQL database."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("postgres").new_url())
