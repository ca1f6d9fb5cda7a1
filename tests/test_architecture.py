"""The direction of imports, as docs/architecture.md draws it, and that no two files import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("protocol", "cache", "worker", "gateway", "kvasir")

# Room -> what its files may import beside the room itself. The longest name that fits a file counts, and a name covers
# the rooms inside it. The files at the top of gateway/ and worker/ put the rest together: they may import all of it.
MAY_IMPORT = {
    "protocol": set(),
    "cache": {"protocol"},
    "worker": {"protocol", "cache"},
    "worker/engine": {"protocol", "cache", "worker/speculation"},
    "worker/model": {"protocol", "cache", "worker/engine/step"},
    "worker/events": {"protocol", "cache", "worker/log"},
    "worker/upstream": {"protocol", "worker/arguments", "worker/log", "worker/dial"},
    "worker/grammars": {"protocol"},
    "worker/speculation": {"protocol", "cache", "worker/engine/step"},
    "gateway": {"protocol", "kvasir"},  # kvasir: only the package itself, to find where it lies
    "gateway/http": {"protocol", "gateway/log"},
    "gateway/text": {"protocol"},
    "gateway/sql": {"protocol"},
    "gateway/tenants": {"protocol", "gateway/sql"},
    "gateway/ledger": {"protocol", "gateway/log", "gateway/sql", "gateway/core/ledger", "gateway/core/admission"},
    "gateway/routing": {"protocol"},
    "gateway/core": {"protocol", "gateway/routing"},
    "gateway/edges": {"protocol", "gateway/log", "gateway/http", "gateway/text", "gateway/tenants", "gateway/core/api"},
    "gateway/workers": {"protocol", "gateway/log", "gateway/config", "gateway/core/notices", "kvasir"},
    "gateway/admin": {"protocol", "gateway"},
    "kvasir": {"protocol"},
    "kvasir/cli": {"protocol", "kvasir"},
}
TORCH_FREE = (
    "protocol",
    "cache",
    "gateway",
    "kvasir",
    "worker/engine",
    "worker/events",
    "worker/upstream",
    "worker/grammars",
    "worker/speculation",
)
TORCH_FREE_BUT = {"cache/kv_store"}
FORBIDDEN_EVERYWHERE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}

FILES = {
    str(path.relative_to(ROOT).with_suffix("")): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if not path.is_symlink()
}


def name_of(module: str) -> str:
    """Return the file of one of our modules, from the root and without its suffix ("gateway/core/api")."""
    path = module.removeprefix("kvasir.").replace(".", "/") if module != "kvasir" else "kvasir/__init__"
    for name in (path, f"kvasir/{path}", f"{path}/__init__", f"kvasir/{path}/__init__"):
        if name in FILES:
            return name
    raise AssertionError(f"{module} is no file of ours")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the top-level names of others' modules that a file imports, and the names of our own files."""
    others, ours = set(), set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [module for module in inside if is_module(module)] or [node.module]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "kvasir":
                ours.add(name_of(module))
            else:
                others.add(module.split(".")[0])
    return others, ours


def is_module(module: str) -> bool:
    if not module.startswith("kvasir."):
        return False
    path = module.removeprefix("kvasir.").replace(".", "/")
    return any(name in FILES for name in (path, f"kvasir/{path}", f"{path}/__init__", f"kvasir/{path}/__init__"))


def room_of(name: str) -> str:
    return max((room for room in MAY_IMPORT if name.startswith(room + "/")), key=len)


@pytest.mark.parametrize("name", FILES)
def test_imports_only_go_the_way_the_map_says(name: str) -> None:
    others, ours = imports(FILES[name])
    room = room_of(name)
    allowed = MAY_IMPORT[room] | {room}
    for used in ours:
        assert used in allowed or any(used.startswith(other + "/") for other in allowed), f"{name} imports {used}"
        assert not (used.startswith("kvasir/cli/") and room != "kvasir/cli" and name != "kvasir/__main__")
    assert not others & FORBIDDEN_EVERYWHERE
    assert not others & set(ROOMS) - {"kvasir"}, "our own rooms are imported as kvasir.ROOM"
    if name.startswith(TORCH_FREE) and name not in TORCH_FREE_BUT:
        assert not others & {"torch", "transformers", "safetensors"}


def test_no_two_files_import_each_other_not_even_by_way_of_others() -> None:
    graph = {name: imports(path)[1] - {name} for name, path in FILES.items() if not name.endswith("__init__")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle of imports: {' <- '.join(circle.args[1])}")


def test_nothing_calls_eval_exec_or_pickled_sockets() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                called_on_name = isinstance(node.func, ast.Attribute)
                assert name not in {"recv_pyobj", "send_pyobj"}, path
                assert called_on_name or name not in {"eval", "exec"}, path


def test_the_sdk_pulls_in_nothing_but_its_three_libraries() -> None:
    heavy = {"torch", "trio", "tokenizers", "click", "rich", "jinja2", "httptools", "numpy"}
    code = f"import sys, kvasir; kvasir.Client, kvasir.AsyncClient; print(sorted(set(sys.modules) & {heavy!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.strip() == "[]"
