"""The access log: every line comes, in order, with fewer writes than lines; the rest when it is cancelled.

Nothing that a client sends can end a line or pose as a field of its own.
"""

from __future__ import annotations

import sys

import pytest
import trio
from trio.testing import MockClock

from kvasir.gateway.log import MAX_STRANGERS, AccessLog, log


def test_lines_of_the_access_log_are_written_together_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)

    async def main() -> None:
        access = AccessLog()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access.run)
            for number in range(3):
                access("request", number=number)
            assert writes == []
            await trio.sleep(0.15)
            assert len(writes) == 1
            access("request", number=3)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(writes) == 2
    lines = "".join(writes).splitlines()
    assert [line.split()[-1] for line in lines] == [f"number={number}" for number in range(4)]


def test_who_has_no_key_cannot_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)

    async def main() -> None:
        access = AccessLog()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access.run)
            for _ in range(3):
                for number in range(1000):
                    access("request", status=401)
                    access("request", status=200, tenant=f"t{number}")
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    lines = "".join(writes).splitlines()
    assert len([line for line in lines if "tenant=" in line]) == 3000
    assert len([line for line in lines if "status=401" in line]) <= 4 * MAX_STRANGERS
    left_out = [int(line.split("num=")[1]) for line in lines if "requests_without_a_line" in line]
    assert sum(left_out) + len([line for line in lines if "status=401" in line]) == 3000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        (3, "3"),
        (0.5, "0.5"),
        ("", "''"),
        ("a b", "'a b'"),
        ("a status=200", "'a status=200'"),
        ("a\nb", r"'a\nb'"),
        ("a\x1b[2J", r"'a\x1b[2J'"),
        ("/?a=b", "/?a=b"),
        ("a= b=c", "'a= b=c'"),
    ],
)
def test_a_value_that_could_be_misread_is_quoted(value: object, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)
    for fields in ({"path": value, "nothing": None, "ms": 1}, {"ms": 1, "path": value}):
        log("request", **fields)
    first, last = (line.split(" ", 2)[2] for line in writes)
    assert first == f"request path={shown} ms=1\n"
    assert last == f"request ms=1 path={shown}\n"
