"""`kvasir explain`: why a request went where it went, and what was not cached there."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Group, RenderableType

from kvasir.cli.admin_client import ask
from kvasir.cli.output import Rows, count, example, facts, json_option, plain, show
from kvasir.protocol import admin_messages as am
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
    parts: list[RenderableType] = []
    for number, receipt in enumerate(reply.receipts, start=1):
        decision = receipt["decision"]
        worker, num_tokens = plain(decision["worker_id"]), decision["num_tokens"]
        head = f"attempt {number}: {num_tokens} tokens to [bold]{worker}[/bold], the cheapest of:"
        parts += [head, _terms_table(decision), *map(plain, _story(receipt))]
    show(reply, as_json, Group(*parts, facts(_TERMS.values(), "dim")))


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
