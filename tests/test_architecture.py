"""The direction of imports: protocol <- cache <- worker, protocol <- gateway, protocol <- kvasir."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"protocol", "cache", "worker", "gateway", "kvasir"}
MAY_IMPORT = {
    "protocol": set(),
    "cache": {"protocol"},
    "worker": {"protocol", "cache"},
    "gateway": {"protocol"},
    "kvasir": {"protocol"},
}
TORCH_FREE_BUT = {"worker": None, "cache": {"kv_store.py"}}  # None: the whole room may use torch
FORBIDDEN_EVERYWHERE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


FILES = sorted(path for room in OURS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_the_way_the_map_says(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    used = imports(path)
    assert used & OURS <= MAY_IMPORT[room] | {room}
    assert not used & FORBIDDEN_EVERYWHERE
    free_but = TORCH_FREE_BUT.get(room, set())
    if free_but is not None and path.name not in free_but:
        assert not used & {"torch", "transformers", "safetensors"}


def test_nothing_calls_eval_exec_or_pickled_sockets() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                called_on_name = isinstance(node.func, ast.Attribute)
                assert name not in {"recv_pyobj", "send_pyobj"}, path
                assert called_on_name or name not in {"eval", "exec"}, path


def test_the_sdk_pulls_in_nothing_but_its_three_libraries() -> None:
    heavy = {"torch", "trio", "tokenizers", "click", "rich", "jinja2", "httptools", "numpy"}
    code = f"import sys, kvasir; print(sorted(set(sys.modules) & {heavy!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.strip() == "[]"
