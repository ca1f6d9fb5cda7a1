"""The text the demonstration model is trained on: CPython's own standard library, as source and as chats.

Everything is read from the running interpreter, in sorted order, so two machines with the same Python version read
the same bytes (`Corpus.digest` says which). The only text that is not the library's is the handful of dialogues and
system prompts in demo_dialogues.py. This module knows nothing of tokens or models.
"""

import ast
import hashlib
import inspect
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_dialogues as written

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Left out: third-party and vendored code, tests, data tables, and packages that distributions ship separately or that
# later versions dropped. What stays is on every machine with CPython.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "lib-dynload", "__pycache__", "__phello__"),
    *("idlelib", "lib2to3", "tkinter", "turtledemo", "distutils", "ensurepip", "msilib", "encodings", "pydoc_data"),
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "this.py", "__hello__", "turtle.py", "stringprep.py")

# Never trained on: whole files of several kinds, so that perplexity is measured on code the model has not seen.
HELD_OUT = (
    "asyncio/locks.py",
    "colorsys.py",
    "fractions.py",
    "graphlib.py",
    "http/cookies.py",
    "queue.py",
    "shlex.py",
    "wsgiref/headers.py",
    "zipapp.py",
)

Message = tuple[str, str]  # (role, content)


@dataclass(frozen=True, slots=True)
class Corpus:
    """`plain` and `chats` are whole documents, each without its closing <|endoftext|>; `held_out` maps file to text."""

    plain: list[str]
    chats: list[str]
    held_out: dict[str, str]

    @property
    def digest(self) -> str:
        """Hex SHA-256 (first 16 digits) over every document: equal digests mean equal training text."""
        documents = [*self.plain, *self.chats, *self.held_out.values()]
        return hashlib.sha256("\0".join(documents).encode("utf-8", "replace")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Function:
    """One documented function of the library; `doc` is its whole docstring, `source` is dedented."""

    module: str
    qualname: str
    signature: str
    doc: str
    source: str


def read_corpus(seed: int) -> Corpus:
    """Read the standard library of the running interpreter; `seed` draws the wordings of the chats."""
    library = Path(sysconfig.get_path("stdlib"))
    held_out: dict[str, str] = {}
    plain: list[str] = []
    functions: list[Function] = []
    module_docs: dict[str, str] = {}
    for name, text in stdlib_files(library):
        if name in HELD_OUT:
            held_out[name] = document_of(name, text)
            continue
        plain.append(document_of(name, text))
        tree = ast.parse(text)
        module = module_name(name)
        module_docs[module] = ast.get_docstring(tree) or ""
        functions += functions_in(tree, text, module)
    held_out_modules = {module_name(name) for name in HELD_OUT}
    builtin_docs = [doc for doc in builtin_docstrings() if doc[0].partition(".")[0] not in held_out_modules]
    topics = language_topics()
    plain += [f"{title}\n\n{doc}\n" for title, doc in [*topics, *builtin_docs]]
    chats = list(make_chats(functions, builtin_docs, module_docs, random.Random(seed)))
    return Corpus(plain, chats, held_out)


def stdlib_files(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (path relative to `library`, text) of every file kept, sorted by path."""
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.as_posix().startswith(SKIPPED_PREFIXES):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield relative.as_posix(), text


def document_of(name: str, text: str) -> str:
    """A source file as the model reads it: its path first, so that a prompt can ask for a file by name."""
    return f"# {name}\n{text}"


def module_name(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def functions_in(tree: ast.Module, text: str, module: str) -> Iterator[Function]:
    """Yield the documented functions and methods of a module that are short enough to be an answer."""
    lines = text.splitlines()

    def walk(body: list[ast.stmt], owner: str) -> Iterator[Function]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                length = (node.end_lineno or node.lineno) - first + 1
                private = node.name.startswith("_") and not node.name.endswith("__")
                if doc and not private and 4 <= length <= 36:
                    source = inspect.cleandoc("\n" + "\n".join(lines[first - 1 : node.end_lineno]))
                    signature = f"{node.name}({ast.unparse(node.args)})"
                    yield Function(module, owner + node.name, signature, doc, source)

    return walk(tree.body, "")


def builtin_docstrings() -> list[tuple[str, str]]:
    """(name, docstring) of what is written in C: the builtins and the extension modules in the interpreter."""
    names = ("builtins", "math", "itertools", "_collections", "_functools", "time", "sys", "posix", "_operator", "_io")
    public = {"builtins": "", "posix": "os.", "_collections": "collections.", "_functools": "functools."}
    found = []
    for name in names:
        module = sys.modules.get(name) or __import__(name)
        prefix = public.get(name, name.removeprefix("_") + ".")
        for attribute, value in sorted(vars(module).items()):
            if attribute.startswith("_") or not callable(value):
                continue
            members = [(attribute, value)]
            if inspect.isclass(value) and not issubclass(value, BaseException):
                public_members = [item for item in sorted(vars(value).items()) if not item[0].startswith("_")]
                members += [(f"{attribute}.{key}", member) for key, member in public_members]
            for label, member in members:
                doc = inspect.getdoc(member)
                if doc and len(doc) < 3000:
                    found.append((prefix + label, doc))
    return found


def language_topics() -> list[tuple[str, str]]:
    """(title, text) of the language reference that `help()` carries (pydoc_data.topics)."""
    from pydoc_data.topics import topics

    return [(f'help("{title}")', text) for title, text in sorted(topics.items())]


# Chats --------------------------------------------------------------------------------------------------------------


def render_chat(messages: list[Message]) -> str:
    """The same text as `CHAT_TEMPLATE` gives for `messages` (a test holds them together)."""
    return "".join(f"<|{role}|>{content.strip()}{END}" for role, content in messages)


def make_chats(
    functions: list[Function], docs: list[tuple[str, str]], module_docs: dict[str, str], rng: random.Random
) -> Iterator[str]:
    """Yield every chat once, in a fixed order for a given `rng`: about a third with a system prompt, some long."""
    turns: list[tuple[str, list[Message]]] = []  # (module, user turn + assistant turn)
    for function in functions:
        turns.append((function.module, ask_for_source(function, rng)))
        if rng.random() < 0.35:
            name = f"{function.module}.{function.qualname}"
            turns.append((function.module, ask_for_meaning(name, function.doc, rng)))
    turns += [(name.rpartition(".")[0], ask_for_meaning(name, doc, rng)) for name, doc in docs if len(doc) < 1200]
    turns += [
        (module, ask_for_meaning(module, doc, rng, kind="the module "))
        for module, doc in module_docs.items()
        if 20 < len(doc) < 1500 and not module.rpartition(".")[2].startswith("_")
    ]
    turns += [
        ("", [("user", question), ("assistant", answer)])
        for questions, answers in written.DIALOGUES
        for question in questions
        for answer in answers
        for _ in range(written.REPEATS)
    ]
    rng.shuffle(turns)
    while turns:
        module, messages = turns.pop()
        while turns and rng.random() < 0.25 and len(messages) < 6:
            messages = messages + turns.pop()[1]
        yield render_chat(system_turn(module_docs.get(module, ""), rng) + messages)


def ask_for_source(function: Function, rng: random.Random) -> list[Message]:
    first_line = function.doc.partition("\n\n")[0].replace("\n", " ")
    question = rng.choice(written.SOURCE_QUESTIONS).format(
        name=function.qualname,
        module=function.module,
        signature=function.signature,
        summary=first_line,
        task=(first_line[:1].lower() + first_line[1:]).rstrip("."),
    )
    return [("user", question), ("assistant", f"```python\n{function.source}\n```")]


def ask_for_meaning(name: str, doc: str, rng: random.Random, kind: str = "") -> list[Message]:
    paragraphs = doc.split("\n\n")
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) > 600:
            break
        answer += "\n\n" + paragraph
    question = rng.choice(written.MEANING_QUESTIONS).format(name=f"{kind}`{name}`")
    return [("user", question), ("assistant", answer)]


def system_turn(module_doc: str, rng: random.Random) -> list[Message]:
    """No system turn (65 %), one of the short ones (25 %), a long one (5 %), or a module's documentation (5 %)."""
    draw = rng.random()
    if draw < 0.65:
        return []
    if draw < 0.90:
        return [("system", rng.choice(written.SHORT_SYSTEM_PROMPTS))]
    if draw < 0.95 or not module_doc:
        return [("system", rng.choice(written.LONG_SYSTEM_PROMPTS))]
    return [("system", f"{rng.choice(written.SHORT_SYSTEM_PROMPTS)}\n\nReference:\n\n{module_doc[:2000]}")]
