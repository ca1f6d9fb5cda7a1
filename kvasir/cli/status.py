"""`kvasir status` and `kvasir models`: how a running gateway is doing."""

from __future__ import annotations

import time

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
    show,
)
from kvasir.cli.tenants import tenant_table
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records

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
    if as_json or not watch:
        reply = ask(am.StatusQuery(), am.StatusReply)
        show(reply, as_json, render_status(reply))
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
    show({"models": reply.models}, as_json, _model_table(reply.models))


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
