"""`kvasir tenant`: all through the admin socket, effective at once."""

from __future__ import annotations

from typing import Literal, get_args

import click
from msgspec import structs
from rich.console import Group

from kvasir.cli.admin_client import ask
from kvasir.cli.keys import key_table
from kvasir.cli.output import (
    Rows,
    age,
    confirm,
    count,
    example,
    facts,
    json_option,
    make_console,
    percent,
    plain,
    print_done,
    show,
    yes_option,
)
from kvasir.cli.terms import parse_alias, terms_lines, terms_options
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import CacheHint
from kvasir.protocol.terms import TermsChange


@click.group()
@example("kvasir tenant create acme")
def tenant() -> None:
    """Make, show, change and delete tenants."""


@tenant.command("create")
@click.argument("name")
@click.option("--group", metavar="G", help="Share cached prefixes with the other tenants of group G.")
@click.option("--allow-model", "models", metavar="M", multiple=True, help="Allow only this model; repeatable.")
@json_option
@example("kvasir tenant create acme\nkvasir tenant create acme-batch --group acme --allow-model qwen")
def tenant_create(name: str, group: str | None, models: tuple[str, ...], as_json: bool) -> None:
    """Make a tenant called NAME and print its id. By default it shares its cache with nobody."""
    command = am.TenantCreate(name=name, group=group, allowed_models=list(models) or None)
    reply = ask(command, am.TenantReply)
    show(reply, as_json, reply.tenant.id)
    if not as_json:
        make_console(stderr=True).print(f"[dim]next: kvasir key create {plain(name)}[/dim]")


@tenant.command("list")
@json_option
@example("kvasir tenant list")
def tenant_list(as_json: bool) -> None:
    """List all tenants, their settings and what they have used since the gateway started."""
    reply = ask(am.TenantList(), am.TenantsReply)
    nothing = "no tenants yet; make one with: kvasir tenant create NAME"
    show(reply, as_json, tenant_table(reply.tenants) if reply.tenants else nothing)


def tenant_table(tenants: list[records.TenantInfo], *, is_live: bool = False) -> Rows:
    """Return tenants and their usage as a table, with their settings or (`is_live`) with what they have under way."""
    special = ("running", "waiting") if is_live else ("sharing", "models", "keys", "floor", "cap", "hint")
    usage_columns = ("requests", "prompt", "hit rate", "output")
    numbers = ("running", "waiting", "keys", "floor", "cap", *usage_columns)
    minor = ("requests",) if is_live else ("keys", "models", "hint", "requests", "output")
    table = Rows("tenant", "status", *special, *usage_columns, numbers=numbers, minor=minor)
    for info in tenants:
        usage = info.usage
        models = "all" if info.allowed_models is None else plain(", ".join(info.allowed_models))
        settings = (str(info.num_keys), info.kv_floor or "–", info.kv_cap or "–", info.cache_hint or "–")
        under_way = (str(usage.num_running), str(usage.num_waiting))
        table.add_row(
            plain(info.name),
            info.status if info.status == "active" else f"[red]{info.status}[/red]",
            *(under_way if is_live else (plain(info.sharing), models, *settings)),
            count(usage.num_requests),
            count(usage.prompt_tokens),
            percent(usage.cached_tokens, usage.prompt_tokens),
            count(usage.output_tokens),
        )
    return table


@tenant.command("show")
@click.argument("name")
@json_option
@example("kvasir tenant show acme")
def tenant_show(name: str, as_json: bool) -> None:
    """Show one tenant, its keys and what it has used since the gateway started."""
    reply = ask(am.TenantShow(name=name), am.TenantReply)
    info, usage = reply.tenant, reply.tenant.usage
    lines = (
        ("tenant", info.name),
        ("id", info.id),
        ("status", info.status),
        ("sharing", info.sharing),
        ("models", "all" if info.allowed_models is None else ", ".join(info.allowed_models)),
        ("KV floor, cap", f"{info.kv_floor or 'none'}, {info.kv_cap or 'none'}"),
        ("cache hint", info.cache_hint or "none"),
        *terms_lines(info.terms),
        ("created", f"{age(info.created_at)} ago"),
        ("requests", f"{usage.num_requests} ({usage.num_running} running, {usage.num_waiting} waiting)"),
        ("prompt tokens", f"{usage.prompt_tokens}, {percent(usage.cached_tokens, usage.prompt_tokens)} cached"),
        ("output tokens", str(usage.output_tokens)),
    )
    show(reply, as_json, Group(facts(lines), "", key_table(reply.keys)))


@tenant.command("set")
@click.argument("name")
@click.option("--kv-floor", metavar="SIZE", help="KV blocks that others cannot take: 512, 20%, or none.")
@click.option("--kv-cap", metavar="SIZE", help="KV blocks it may hold at most, on each worker: 2048, 50%, or none.")
@click.option(
    "--cache-hint",
    type=click.Choice([*get_args(CacheHint), "none"]),
    help="What to take a request for that brings no cache_hint of its own: nothing follows it, its conversation goes "
    "on, this was its last turn.",
)
@click.option(
    "--alias",
    "aliases",
    metavar="NAME=MODEL,...|NAME=none",
    type=parse_alias,
    multiple=True,
    help="What to take a model's name for: gpt-4o=qwen; with several, qwen,demo, the first that has a worker; or none.",
)
@click.option(
    "--weight", type=click.IntRange(1, 100), help="Its part of what is computed, beside others' (default: 1)."
)
@terms_options
@json_option
@example(
    "kvasir tenant set acme --kv-floor 20% --kv-cap 50%\nkvasir tenant set acme --kv-cap none --cache-hint one_shot\n"
    "kvasir tenant set acme --requests-per-min 600 --max-concurrent 32 --token-budget 5M/month\n"
    "kvasir tenant set acme --weight 4 --priority high\n"
    "kvasir tenant set acme --alias gpt-4o=qwen,demo --alias qwen=qwen,demo"
)
def tenant_set(
    name: str,
    kv_floor: str | None,
    kv_cap: str | None,
    cache_hint: CacheHint | Literal["none"] | None,
    aliases: tuple[tuple[str, list[str]], ...],
    weight: int | None,
    terms: TermsChange,
    as_json: bool,
) -> None:
    """Change a tenant's share of every worker's KV memory and of the queue, its default hint, limits and budgets.

    At once; floors that do not fit together are refused. Limits and budgets count all its keys together; "none" lifts
    one. A whole minute's worth may come at once; a day and a month are those of the calendar in UTC.
    """
    terms = structs.replace(terms, weight=weight, aliases=dict(aliases))
    command = am.TenantSet(name=name, kv_floor=kv_floor, kv_cap=kv_cap, cache_hint=cache_hint, terms=terms)
    if command == am.TenantSet(name=name):
        raise BadRequest("say what to change, such as --kv-cap 50% or --token-budget 5M/month; see --help")
    reply = ask(command, am.Done)
    print_done(reply, as_json, f"tenant {name} is set")


@tenant.command("disable")
@click.argument("name")
@json_option
@example("kvasir tenant disable acme")
def tenant_disable(name: str, as_json: bool) -> None:
    """Disable a tenant: its keys stop working with the next request, and what it runs ends at once."""
    print_done(ask(am.TenantSetStatus(name=name, active=False), am.Done), as_json, f"tenant {name} is disabled")


@tenant.command("enable")
@click.argument("name")
@json_option
@example("kvasir tenant enable acme")
def tenant_enable(name: str, as_json: bool) -> None:
    """Enable a disabled tenant again, with the keys it had."""
    print_done(ask(am.TenantSetStatus(name=name, active=True), am.Done), as_json, f"tenant {name} is active")


@tenant.command("rename")
@click.argument("name")
@click.argument("new_name")
@json_option
@example("kvasir tenant rename acme acme-research")
def tenant_rename(name: str, new_name: str, as_json: bool) -> None:
    """Give a tenant another name. Its keys, cache and usage stay."""
    reply = ask(am.TenantRename(name=name, new_name=new_name), am.Done)
    print_done(reply, as_json, f"tenant {name} is called {new_name} now")


@tenant.command("delete")
@click.argument("name")
@yes_option
@json_option
@example("kvasir tenant delete acme --yes")
def tenant_delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete a tenant and its keys for good. What it runs ends at once, what is cached of it goes; its usage stays."""
    confirm(yes, f"Delete tenant {name} and all its keys for good?")
    print_done(ask(am.TenantDelete(name=name), am.Done), as_json, f"tenant {name} is deleted")
