"""`kvasir status`, `kvasir models` and `kvasir explain`: looking into a running gateway."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvasir.cli.admin_client import ask
from kvasir.cli.output import (
    Rows,
    bar,
    count,
    duration,
    example,
    facts,
    json_option,
    make_console,
    percent,
    plain,
    print_json,
)
from kvasir.cli.tenants import tenant_table
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import BadRequest

_TERMS = {  # of the router's decisions: (column, what it is)
    "cost_s": (
        "cost",
        "What sending it there costs; the least wins: wait + (3 + passed) × miss, and a part of heat where no worker "
        "has half of the prompt cached.",
    ),
    "wait_s": ("wait", "Seconds that the worker is busy with other requests before it has read this prompt."),
    "miss_s": ("miss", "Seconds to compute the prompt tokens that are not cached there."),
    "num_cached_tokens": ("cached", "Prompt tokens cached there, or about to be by requests sent before."),
    "num_overtaken": ("passed", "Requests waiting there that this one, being shorter, would overtake."),
    "heat_s": ("heat", "Seconds of prefill that the worker was given lately; they fade within half a minute."),
    "num_running": ("running", "Requests running there; the fewest decide between costs within a millisecond."),
}
_CAUSES = {  # of `misses.Cause`
    "never_seen": "no request of this tenant that is remembered begins like it",
    "model_changed": "the request before went to another model or other weights",
    "namespace_changed": "the request before was hashed for other readers: sharing, salt or published prefix changed",
    "system_changed": "the system message is another than in the request before",
    "tools_changed": "the tools are others than in the request before",
    "messages_changed": "the messages are not those of the request before and what follows them",
    "tokens_changed": "the messages are the same, but not their tokens: the chat template, or truncation",
    "routed_elsewhere": "it went elsewhere;",
    "evicted": "evicted;",
    "worker_left": "which had them, has left",
}
_LACKS = {  # of `messages.Lack`: what follows "has no"
    "public_zone": "prefixes shared between tenants",
    "owners": "floors and caps",
    "pins": "pins",
    "retention": "retention",
    "resumed_penalties": "hand-over of requests with presence or frequency penalties",
    "bad_words": "bad_words",
    "max_reasoning_tokens": "max_reasoning_tokens",
    "logprobs": "logprobs",
    "resumed_draws": "equal draws after a hand-over of sampled requests",
    "order": "short prompts before long ones",
    "grammars": "structured output",
    "no_store": "no_store",
}
_STATE_COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "red"}


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing it until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds, with --watch."
)
@json_option
@example("kvasir status\nkvasir status --watch\nkvasir status --json | jq '.workers[].state'")
def status(watch: bool, interval: float, as_json: bool) -> None:
    """Show workers, models and tenants."""
    if as_json:
        print_json(ask(am.StatusQuery(), am.StatusReply))
    elif not watch:
        make_console().print(render_status(ask(am.StatusQuery(), am.StatusReply)))
    else:
        console = make_console()
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                live.update(render_status(ask(am.StatusQuery(), am.StatusReply)), refresh=True)
                time.sleep(interval)


@click.command()
@json_option
@example("kvasir models")
def models(as_json: bool) -> None:
    """List the served models."""
    reply = ask(am.StatusQuery(), am.StatusReply)
    if as_json:
        print_json({"models": reply.models})
    else:
        make_console().print(_model_table(reply.models))


@click.command()
@click.argument("request")
@json_option
@example("kvasir explain chatcmpl-5f0c6d1e9a7b4c3d")
def explain(request: str, as_json: bool) -> None:
    """Show why a REQUEST went where it went.

    With what every worker would have cost, in seconds. Only recent requests are remembered.

    REQUEST is the id of an HTTP answer or its x-request-id, `request_id` in the SDK, or what chat and demo print: the
    beginning of an id is enough.
    """
    if not request:
        raise BadRequest("say which request: the id of an answer, or the beginning of one")
    reply = ask(am.ExplainQuery(request=request), am.ExplainReply)
    if as_json:
        print_json(reply)
        return
    console = make_console()
    for number, receipt in enumerate(reply.receipts, start=1):
        decision = receipt["decision"]
        worker, num_tokens = plain(decision["worker_id"]), decision["num_tokens"]
        console.print(f"attempt {number}: {num_tokens} tokens to [bold]{worker}[/bold], the cheapest of:")
        console.print(_terms_table(decision))
        for line in _story(receipt):
            console.print(plain(line))
    console.print(facts(_TERMS.values(), "dim"))


def render_status(reply: am.StatusReply) -> RenderableType:
    """Return the whole status as something to print."""
    state = "[yellow]draining[/yellow]" if reply.draining else "up"
    head = Text.from_markup(f"Kvasir {plain(reply.version)}  {state} for {duration(reply.uptime_s)}")
    parts: list[RenderableType] = [
        head,
        facts(reply.endpoints.items()),
        "",
        _worker_table(reply.workers),
        *_engine_notes(reply.workers),
        *_draft_notes(reply.workers),
        "",
        _model_table(reply.models),
    ]
    if reply.tenants:
        parts += ["", tenant_table(reply.tenants, is_live=True)]
    if reply.ledger_error:
        parts.insert(1, Text(f"new requests are refused: {plain(reply.ledger_error)}", "red"))
    if reply.bounds:
        at_most = ", ".join(f"{bound} {name}" for name, bound in reply.bounds.items())
        parts += ["", Text(f"at most {at_most}", "dim")]
    return Group(*parts)


def _worker_table(workers: list[records.WorkerInfo]) -> RenderableType:
    if not workers:
        return "no workers have joined yet"
    numbers = ("running", "waiting", "cached", "hit rate", "prefill/s", "decode/s", "restarts")
    columns = ("worker", "model", "state", "device", "running", "waiting", "blocks in use", *numbers[2:])
    table = Rows(*columns, numbers=numbers, minor=("device", "model", "cached", "prefill/s", "decode/s"))
    for info in workers:
        colour = _STATE_COLOURS.get(info.state, "white")
        used = info.num_blocks - info.num_free_blocks
        table.add_row(
            plain(info.id),
            plain(info.model),
            f"[{colour}]{plain(info.state)}[/{colour}]",
            plain(f"{info.device} {info.attention}".strip() if info.engine == "kvasir" else info.engine),
            f"{info.num_running}/{info.max_requests}",
            str(info.num_waiting),
            f"{bar(used, info.num_blocks, 4)} {count(used)}/{count(info.num_blocks)}",
            count(info.num_cached_blocks),
            percent(info.cached_tokens, info.prompt_tokens),
            count(info.prefill_rate),
            count(info.decode_rate),
            str(info.num_restarts),
        )
    return table


def _engine_notes(workers: list[records.WorkerInfo]) -> list[RenderableType]:
    """Say of each engine that is not our own what it cannot do."""
    found = {(info.engine, tuple(info.lacks)): info.id for info in reversed(workers) if info.engine != "kvasir"}
    return [
        Text(f"{engine} ({worker}) has no {', no '.join(_LACKS.get(lack, lack) for lack in lacks)}", "dim")
        for (engine, lacks), worker in found.items()
        if lacks
    ]


def _draft_notes(workers: list[records.WorkerInfo]) -> list[RenderableType]:
    """Say of each proposer what its drafts have been worth."""
    notes: list[RenderableType] = []
    drafts = [its for info in workers for its in info.drafts if its.num_runs]
    for proposer in sorted({its.proposer for its in drafts}):
        own = [its for its in drafts if its.proposer == proposer]
        num_drafted, num_accepted = (sum(getattr(its, name) for its in own) for name in ("num_drafted", "num_accepted"))
        per_run = 1 + num_accepted / sum(its.num_runs for its in own)
        text = f"drafts ({proposer}): {count(num_drafted)} tokens, {percent(num_accepted, num_drafted)} of them held, "
        notes.append(Text(f"{text}{per_run:.1f} tokens a step where there were any", "dim"))
    return notes


def _model_table(models: list[records.ModelStatus]) -> Rows:
    numbers = ("context", "workers", "waiting")
    table = Rows("model", "dtype", *numbers, "fingerprint", numbers=numbers, minor=("fingerprint", "dtype"))
    for info in models:
        counts = (str(info.max_context), str(info.num_workers), str(info.num_waiting))
        table.add_row(plain(info.name), plain(info.dtype), *counts, plain(info.fingerprint[:16]))
    return table


def _story(receipt: dict[str, Any]) -> list[str]:
    """Return in words how long an attempt waited, how clear the choice was, and what was cached and why no more."""
    decision, found, miss = receipt["decision"], receipt["num_cached_tokens"], receipt["miss"]
    waited = f"it waited {receipt['waited_s']:.3f} s in the queue"
    if receipt["held_s"]:
        waited += f", {receipt['held_s']:.3f} s of that for the best worker to have room"
    if receipt["lead"] > 0:
        waited += f"; its tenant was {count(round(receipt['lead']))} tokens ahead of its fair share"
    lines = [waited]
    others = [terms["cost_s"] for terms in decision["terms"] if terms["worker_id"] != decision["worker_id"]]
    if others:
        lines.append(f"the next best would have cost {min(others) - decision['chosen']['cost_s']:.4f} s more")
    guesses = [terms["worker_id"] for terms in decision["terms"] if terms.get("is_guess")]
    if guesses:
        lines.append(f"a guess: what {', '.join(guesses)} had cached was not known then, and taken for nothing")
    if found is not None:
        lines.append(f"{found} tokens were cached, {decision['chosen']['num_cached_tokens']} had been predicted")
    if miss is not None:
        lines.append(f"{miss['num_tokens']} more were not: {_reason(miss)}")
    if decision.get("note"):
        lines.append(f"this attempt {decision['note']}")
    return lines


def _reason(miss: dict[str, Any]) -> str:
    text = _CAUSES.get(miss["cause"], str(miss["cause"]))
    if miss["cause"] == "routed_elsewhere":
        text += f" {miss['worker_id']} had them, but would have cost {miss['cost_s']:.4f} s"
        text += f" against {miss['chosen_cost_s']:.4f} s"
    elif miss["cause"] == "evicted":
        ago = miss["evicted_s_ago"]
        text += f" {miss['worker_id']} dropped them" + ("" if ago is None else f" {ago:.1f} s before")
    elif miss["cause"] == "worker_left":
        text = f"{miss['worker_id']}, {text}"
    return text + (f" (it follows request {miss['previous'][:16]})" if miss["previous"] else "")


def _terms_table(decision: dict[str, Any]) -> Rows:
    terms = decision["terms"]
    names = [name for name in (terms[0] if terms else {}) if name not in ("worker_id", "is_guess")]
    columns = [_TERMS[name][0] if name in _TERMS else name for name in names]
    table = Rows("worker", *columns, numbers=columns)
    for row in terms:
        chosen = "bold" if row["worker_id"] == decision["worker_id"] else ""
        values = [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        table.add_row(plain(row["worker_id"]), *values, style=chosen)
    return table
