"""`kvasir demo`: cold against warm, shared against private, on a running gateway.

Six requests of two tenants. Every run brings its own random line into both texts, so that it starts cold however often
it is run. A tiny request goes first, so that the first row measures the cache and not a process that has just started.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.text import Text

from kvasir._answers import Completion
from kvasir.cli.admin_client import ask
from kvasir.cli.chat import choose_model
from kvasir.cli.demo_keys import borrowed_key
from kvasir.cli.output import ID_CHARS, Rows, example, harmless, json_option, make_console, plain, print_json
from kvasir.client import Client
from kvasir.paths import admin_socket, client_endpoint
from kvasir.protocol.admin_messages import Done, PrefixPublish, PrefixRemove, PrefixReply, StatusQuery, StatusReply
from kvasir.protocol.errors import BadRequest, RequestFailed

PREFIX_NAME = "kvasir-demo"
MAX_TOKENS = 48
MAX_LINES = 6  # of what it wrote in full
TIMEOUT_S = 120.0


@click.command()
@click.option("--model", help="Which model. Default: the first that is served.")
@json_option
@example("kvasir demo")
def demo(model: str | None, as_json: bool) -> None:
    """Show what shared prefixes save.

    Cold against warm, shared against private: six requests of two tenants.
    """
    rows = run_demo(make_console(), model=model, quiet=as_json)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the demonstration as it went. `expects`: "cold" (0 cached tokens) or "warm" (more)."""

    tenant: str
    what: str
    expects: str
    worker: str
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float
    request_id: str
    text: str

    @property
    def is_as_expected(self) -> bool:
        return (self.cached_tokens > 0) == (self.expects == "warm")


def run_demo(console: Console, *, model: str | None = None, quiet: bool = False) -> list[Row]:
    """Run the demonstration against this user's gateway; print a table and what it shows. Return the rows.

    Makes the tenants `demo` and `demo-b`, unless they are there already, and publishes the prefix `kvasir-demo`. What
    it made is gone at the end, also after a failure.

    Raises:
        RequestFailed: a request was warm that should have been cold, or the other way round.
        KvasirError: no gateway, no model, a request failed.
    """
    run = secrets.token_hex(4)
    system = f"This is demonstration {run}. {SYSTEM_PROMPT}"
    private = f"# The ledger of run {run}: nobody else's business.\n{PRIVATE_CODE}"
    with (
        borrowed_key("demo", admin_socket()) as key,
        borrowed_key("demo-b", admin_socket()) as key_b,
        Client(client_endpoint(), key, timeout_s=TIMEOUT_S) as demo,
        Client(client_endpoint(), key_b, timeout_s=TIMEOUT_S) as demo_b,
        contextlib.ExitStack() as cleaning,
    ):
        name, _ = choose_model(demo, model)
        speak = _warm_up(demo, name)
        workers = [worker for worker in ask(StatusQuery(), StatusReply).workers if worker.model == name]
        is_shared = not any("public_zone" in worker.lacks for worker in workers)
        ask(PrefixPublish(name=PREFIX_NAME, text=system, replace=True), PrefixReply)
        cleaning.callback(ask, PrefixRemove(name=PREFIX_NAME), Done)
        plan: tuple[tuple[str, str, str, Callable[[], Completion]], ...] = (
            ("demo", "published, first time", "cold", lambda: speak(demo, system, QUESTIONS[0])),
            ("demo", "published, again", "warm", lambda: speak(demo, system, QUESTIONS[1])),
            (
                "demo-b",
                "published, first contact",
                "warm" if is_shared else "cold",
                lambda: speak(demo_b, system, QUESTIONS[2]),
            ),
            ("demo", "private, first time", "cold", lambda: _complete(demo, name, private)),
            ("demo-b", "the same text, its own", "cold", lambda: _complete(demo_b, name, private)),
            ("demo", "private, again", "warm", lambda: _complete(demo, name, private)),
        )
        rows: list[Row] = []
        with contextlib.nullcontext() if quiet else console.status("six requests, one after the other"):
            for tenant, what, expects, request in plan:
                done = request()
                tokens = (done.usage.prompt_tokens, done.usage.cached_tokens)
                ttft_ms = 1000 * done.ttft_s
                rows.append(Row(tenant, what, expects, done.worker, *tokens, ttft_ms, done.request_id, done.text))
    if not quiet:
        console.print(f"\n[bold]Demonstration {run}[/bold]: cold against warm, shared against private\n")
        console.print(_table(rows))
    wrong = [row for row in rows if not row.is_as_expected]
    if wrong:
        row = wrong[0]
        hint = (
            "was the cache too small, or a worker restarted? see `kvasir status`"
            if row.expects == "warm"
            else "this must not happen; please report it"
        )
        raise RequestFailed(
            f"{row.tenant}: {row.what} should have been {row.expects}, had {row.cached_tokens} cached tokens; {hint}"
        )
    if not quiet:
        for row in (row for row in (rows[0], rows[3]) if row.text.strip()):
            console.print(f"\nWhat it wrote to {row.tenant} ({row.what}):")
            console.print(Text(excerpt(row.text)), style="dim")
        console.print(f"\n{plain(reading(rows))}")
        if not is_shared:
            console.print(f"{plain(workers[0].engine)} shares no prefixes between tenants: docs/fleets.md says why.")
        console.print(f"Why each went where it went: kvasir explain {plain(rows[-1].request_id[:ID_CHARS])}")
    return rows


def reading(rows: list[Row]) -> str:
    """Return what the rows show, in one sentence."""
    first, again, shared, private, theirs, warm = rows
    return (
        f"Warm requests skip what is cached: first token after {again.ttft_ms:.0f} ms instead of {first.ttft_ms:.0f} "
        f"(private text: {warm.ttft_ms:.0f} instead of {private.ttft_ms:.0f}); demo-b found {shared.cached_tokens} "
        f"tokens of the published prompt at its very first contact, and {theirs.cached_tokens} of demo's private text."
    )


def excerpt(text: str) -> str:
    """Return the first lines of `text` that have something in them, indented."""
    lines = [line for line in harmless(text).splitlines() if line.strip()]
    more = ["…"] if len(lines) > MAX_LINES else []
    return "\n".join("  " + line for line in [*lines[:MAX_LINES], *more])


def _warm_up(client: Client, model: str) -> Callable[[Client, str, str], Completion]:
    """Send a tiny request per form and return how to ask: as a chat, or as plain text for a model without template."""
    _complete(client, model, "import os", max_tokens=2)
    try:
        _chat(client, model, "Be brief.", "Hello!", max_tokens=2)
    except BadRequest:
        return lambda who, system, question: _complete(who, model, f"{system}\n\n{question}\n")
    return lambda who, system, question: _chat(who, model, system, question)


def _chat(client: Client, model: str, system: str, question: str, max_tokens: int = MAX_TOKENS) -> Completion:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return client.chat(messages, model=model, max_tokens=max_tokens, temperature=0)


def _complete(client: Client, model: str, text: str, max_tokens: int = MAX_TOKENS) -> Completion:
    return client.generate(text, model=model, max_tokens=max_tokens, temperature=0)


def _table(rows: list[Row]) -> Rows:
    numbers = ("prompt", "cached", "TTFT")
    table = Rows("tenant", "what", "worker", *numbers, "request", numbers=numbers)
    for row in rows:
        colour = ("green" if row.expects == "warm" else "cyan") if row.is_as_expected else "red"
        table.add_row(
            row.tenant,
            plain(row.what),
            plain(row.worker),
            str(row.prompt_tokens),
            f"[{colour}]{row.cached_tokens}[/{colour}]",
            f"{row.ttft_ms:.0f} ms",
            plain(row.request_id[:ID_CHARS]),
        )
    return table


# ---- what it says: a system prompt worth publishing, and code that belongs to one tenant alone -----------------------

SYSTEM_PROMPT = """You are Kvasir, a helpful assistant that runs on machines its owners can touch. In the old stories \
Kvasir was the
wisest of beings, made from everybody's contribution, and there was no question that he could not answer. You are much
smaller than that: five million parameters, and everything you know you learned from Python's standard library. Be
cheerful about it.

Rules of this service. First, be useful: if a person asks for a function, write the function; if a person asks what
something means, tell them what its docstring says. Second, be honest: you are a demonstration, you have seen nothing
but source code, and you may be wrong. Third, be short: an answer that fits on the screen is better than one that does
not.
Fourth, write code that runs: import what you use, return what you promise, and raise a ValueError when an argument
makes no sense. Fifth, keep to the subject: programming in Python.

Format. Put code between three backquotes and name the language. Put the names of modules, classes and functions between
single backquotes. Write lists with a dash. Do not use headings or tables. Do not end with a question.

How to answer:
- Begin with the answer. Explanations come after it, and only when they help.
- When you are asked for code, reply with one complete function in a code block. Give it a docstring that says what it
  returns and which errors it raises. Prefer the standard library to anything that has to be installed.
- When you are asked what something does, quote its documentation and stop there.
- Use names that say what they hold. Do not abbreviate. One word for one thing.
- Handle the empty case. Handle the case where the file is not there. Say so in the docstring.
- If a question cannot be answered, say what is missing and what the person could try next.

Style of the code. Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.
Complex is better than complicated. Flat is better than nested. Sparse is better than dense. Readability counts. Special
cases are not special enough to break the rules, although practicality beats purity. Errors should never pass silently,
unless explicitly silenced. In the face of ambiguity, refuse the temptation to guess."""

QUESTIONS = (
    "Write a function that reads the lines of a file.",
    "What does `os.path.join` do?",
    "Write a function that counts the words in a text.",
)

PRIVATE_CODE = '''"""Records of our customers."""

import csv
import json
from collections import defaultdict
from pathlib import Path


class Customer:
    """One customer, as the accounting department knows them."""

    def __init__(self, number, name, country):
        self.number = number
        self.name = name
        self.country = country
        self.invoices = []

    def __repr__(self):
        return f"Customer({self.number!r}, {self.name!r})"

    def add_invoice(self, amount, date):
        """Add an invoice to this customer."""
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.invoices.append((date, amount))

    def total(self):
        """Return the sum of all invoices."""
        return sum(amount for date, amount in self.invoices)


def read_customers(path):
    """Read customers from a CSV file and return them as a dictionary."""
    customers = {}
    with open(path, newline="") as file:
        for row in csv.reader(file):
            customer = Customer(row[0], row[1], row[2])
            customers[customer.number] = customer
    return customers


def totals_by_country(customers):
    """Return a dictionary of totals for each country."""
    totals = defaultdict(int)
    for customer in customers.values():
        totals[customer.country] += customer.total()
    return totals


def write_totals(path, totals):
    """Write the totals to a JSON file."""
'''
