"""What is installed: every folder of code, as part of the one package."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "cache", "worker", "gateway")


def test_every_folder_of_code_is_a_package_of_the_wheel() -> None:
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    folders = {path.parent.relative_to(ROOT) for room in (*ROOMS, "kvasir") for path in (ROOT / room).rglob("*.py")}
    packages = {".".join(path.parts if path.parts[0] == "kvasir" else ("kvasir", *path.parts)) for path in folders}
    assert packages <= set(setuptools.find_namespace_packages(str(ROOT), **settings))
    assert all((ROOT / room / "py.typed").exists() for room in (*ROOMS, "kvasir"))
