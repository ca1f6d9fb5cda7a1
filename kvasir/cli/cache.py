"""`kvasir cache`: who holds the workers' KV memory, and what it came to."""

from __future__ import annotations

import click
from rich.console import Group, RenderableType
from rich.text import Text

from kvasir.cli.admin_client import ask
from kvasir.cli.output import Rows, bar, count, example, json_option, percent, plain, show
from kvasir.cli.prefixes import pinned_on
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records

MAX_PREFIXES = 10
PREVIEW_CHARS = 32
_NUMBERS = ("blocks", "floor", "cap", "hit rate", "saved", "byte·s", "lost", "took", "own")
_LEGEND = """\
hit rate: share of the prompt tokens that were found cached; saved: how many those were; byte·s: bytes held × seconds;
evicted blocks: lost to others, took from others, own for itself"""


@click.group()
@example("kvasir cache show")
def cache() -> None:
    """Show and clear what is cached."""


@cache.command("show")
@json_option
@example("kvasir cache show\nkvasir cache show --json | jq '.workers[].tenants'")
def cache_show(as_json: bool) -> None:
    """Show who holds every worker's KV blocks, what that saved, and the prefixes that saved most.

    Private prompts that begin alike count as one prefix; nothing of their text is kept.
    """
    reply = ask(am.CacheQuery(), am.CacheReply)
    legend = Text(" ".join(_LEGEND.splitlines()), "dim")
    pools = Group(*[_worker(worker) for worker in reply.workers], legend, Text(), _prefixes(reply))
    show(reply, as_json, pools if reply.workers else "no workers yet; see `kvasir status`")


@cache.command("clear")
@click.option("--tenant", required=True, metavar="T", help="Whose blocks to drop.")
@json_option
@example("kvasir cache clear --tenant acme")
def cache_clear(tenant: str, as_json: bool) -> None:
    """Drop what is cached of a tenant on all workers. Blocks of requests that are running stay till they end."""
    reply = ask(am.CacheClear(tenant=tenant), am.Done)
    show(reply, as_json, f"the workers drop what is cached of tenant {tenant}")


def _worker(worker: records.CacheWorker) -> RenderableType:
    if worker.engine != "kvasir":
        return Text.from_markup(
            f"[bold]{plain(worker.id)}[/bold]  {plain(worker.model)}  {count(worker.num_cached_blocks)} of "
            f"{count(worker.num_blocks)} blocks cached ({worker.block_size} tokens each); {plain(worker.engine)} tells "
            "nobody whose they are, and has no floors, caps and pins\n"
        )
    held = sum(tenant.num_blocks for tenant in worker.tenants)
    title = Text.from_markup(
        f"[bold]{plain(worker.id)}[/bold]  {plain(worker.model)}  {count(held)} of {count(worker.num_blocks)} blocks "
        f"held ({worker.block_size} tokens each), {count(worker.num_pinned)} pinned"
    )
    table = Rows("tenant", "", *_NUMBERS, numbers=_NUMBERS, minor=("", "own", "took", "lost", "byte·s"))
    for tenant in worker.tenants:
        table.add_row(
            plain("(published)" if tenant.tenant == "public" else tenant.tenant),
            bar(tenant.num_blocks, worker.num_blocks),
            count(tenant.num_blocks),
            count(tenant.floor) if tenant.floor else "–",
            "–" if tenant.cap is None else count(tenant.cap),
            *_savings(tenant),
            count(tenant.byte_s),
            count(tenant.suffered),
            count(tenant.caused),
            count(tenant.evicted_own),
        )
    return Group(title, table if worker.tenants else Text("nothing is cached yet", "dim"), Text())


def _savings(tenant: records.CacheTenant) -> tuple[str, str]:
    if tenant.tenant == "public":  # what published blocks save is saved by the tenants
        return "–", "–"
    return percent(tenant.saved_tokens, tenant.looked_up_tokens), count(tenant.saved_tokens)


def _prefixes(reply: am.CacheReply) -> RenderableType:
    """Return the prefixes that saved most. Of private ones only the tenant is known."""
    rows = [
        (
            prefix.saved_tokens,
            (plain(prefix.name), count(prefix.hits), count(prefix.saved_tokens), pinned_on(prefix)),
            plain(" ".join(prefix.preview.split())[:PREVIEW_CHARS]),
        )
        for prefix in reply.prefixes
    ]
    rows += [
        (
            prefix.saved_tokens,
            (f"(private, {plain(prefix.tenant)})", count(prefix.hits), count(prefix.saved_tokens), "–"),
            "[dim]not shown[/dim]",
        )
        for prefix in reply.private_prefixes
    ]
    if not rows:
        return Text("no prefix is published, and nothing was found cached yet", "dim")
    table = Rows("top prefixes", "hits", "saved", "pinned on", "begins", numbers=("hits", "saved"), minor=("begins",))
    for _, cells, begins in sorted(rows, key=lambda row: -row[0])[:MAX_PREFIXES]:
        table.add_row(*cells, begins)
    return table
