"""`kvasir tenant`, `kvasir key` and `kvasir prefix`: all through the admin socket, effective at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import click

from kvasir.cli.admin_client import ask
from kvasir.cli.output import Rows, age, count, example, facts, json_option, make_console, percent, plain, print_json
from kvasir.protocol import admin_messages as am
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import CacheHint


@click.group()
@example("kvasir tenant create acme")
def tenant() -> None:
    """Make, list, show, disable and enable tenants."""


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
    if as_json:
        print_json(reply)
        return
    click.echo(reply.tenant.id)
    make_console(stderr=True).print(f"[dim]next: kvasir key create {plain(name)}[/dim]")


@tenant.command("list")
@json_option
@example("kvasir tenant list")
def tenant_list(as_json: bool) -> None:
    """List all tenants, their settings and what they have used since the gateway started."""
    reply = ask(am.TenantList(), am.TenantsReply)
    if as_json:
        print_json(reply)
    elif not reply.tenants:
        click.echo("no tenants yet; make one with: kvasir tenant create NAME")
    else:
        make_console().print(tenant_table(reply.tenants))


def tenant_table(tenants: list[am.TenantInfo], *, is_live: bool = False) -> Rows:
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
    if as_json:
        print_json(reply)
        return
    info, usage = reply.tenant, reply.tenant.usage
    lines = (
        ("tenant", info.name),
        ("id", info.id),
        ("status", info.status),
        ("sharing", info.sharing),
        ("models", "all" if info.allowed_models is None else ", ".join(info.allowed_models)),
        ("KV floor, cap", f"{info.kv_floor or 'none'}, {info.kv_cap or 'none'}"),
        ("cache hint", info.cache_hint or "none"),
        ("created", f"{age(info.created_at)} ago"),
        ("requests", f"{usage.num_requests} ({usage.num_running} running, {usage.num_waiting} waiting)"),
        ("prompt tokens", f"{usage.prompt_tokens}, {percent(usage.cached_tokens, usage.prompt_tokens)} cached"),
        ("output tokens", str(usage.output_tokens)),
    )
    make_console().print(facts(lines))
    click.echo()
    _print_keys(reply.keys)


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
@json_option
@example(
    "kvasir tenant set acme --kv-floor 20% --kv-cap 50%\nkvasir tenant set acme --kv-cap none --cache-hint one_shot"
)
def tenant_set(
    name: str, kv_floor: str | None, kv_cap: str | None, cache_hint: CacheHint | Literal["none"] | None, as_json: bool
) -> None:
    """Change a tenant's share of every worker's KV memory and its default hint, at once.

    Floors that do not fit together are refused.
    """
    if kv_floor is None and kv_cap is None and cache_hint is None:
        raise BadRequest("say what to change: --kv-floor SIZE, --kv-cap SIZE, --cache-hint HINT")
    reply = ask(am.TenantSet(name=name, kv_floor=kv_floor, kv_cap=kv_cap, cache_hint=cache_hint), am.Done)
    _print_done(reply, as_json, f"tenant {name} is set")


@tenant.command("disable")
@click.argument("name")
@json_option
@example("kvasir tenant disable acme")
def tenant_disable(name: str, as_json: bool) -> None:
    """Disable a tenant: its keys stop working with the next request."""
    _print_done(ask(am.TenantSetStatus(name=name, active=False), am.Done), as_json, f"tenant {name} is disabled")


@tenant.command("enable")
@click.argument("name")
@json_option
@example("kvasir tenant enable acme")
def tenant_enable(name: str, as_json: bool) -> None:
    """Enable a disabled tenant again, with the keys it had."""
    _print_done(ask(am.TenantSetStatus(name=name, active=True), am.Done), as_json, f"tenant {name} is active")


@click.group()
@example("kvasir key create acme")
def key() -> None:
    """Make, list and revoke API keys."""


@key.command("create")
@click.argument("tenant")
@click.option("--label", metavar="TEXT", default="", help="A note to know the key by, such as who has it.")
@json_option
@example('kvasir key create acme --label "nightly job"')
def key_create(tenant: str, label: str, as_json: bool) -> None:
    """Make an API key for TENANT and print it: the only time that it is shown."""
    reply = ask(am.KeyCreate(tenant=tenant, label=label), am.KeyCreated)
    if as_json:
        print_json(reply)
        return
    click.echo(reply.key)
    make_console(stderr=True).print("[yellow]Keep it now: only a hash is stored, it is never shown again.[/yellow]")


@key.command("list")
@click.argument("tenant", required=False)
@json_option
@example("kvasir key list\nkvasir key list acme")
def key_list(tenant: str | None, as_json: bool) -> None:
    """List the keys of TENANT, or of all tenants."""
    reply = ask(am.KeyList(tenant=tenant), am.KeysReply)
    if as_json:
        print_json(reply)
    else:
        _print_keys(reply.keys)


@key.command("revoke")
@click.argument("key_id", metavar="KEYID")
@json_option
@example("kvasir key revoke 3f9a1c20b7de")
def key_revoke(key_id: str, as_json: bool) -> None:
    """Revoke a key for good: it stops working with the next request."""
    # Given a whole key, only its id is sent on: the secret has no business in another process.
    wanted = key_id.split("_")[1] if key_id.startswith("kv_") else key_id
    _print_done(ask(am.KeyRevoke(key_id=wanted or key_id), am.Done), as_json, f"key {wanted} is revoked")


@click.group()
@example("kvasir prefix publish support --file system-prompt.txt")
def prefix() -> None:
    """Publish texts whose cached blocks several tenants share."""


@prefix.command("publish")
@click.argument("name")
@click.option("--file", "path", type=click.Path(path_type=Path), required=True, help="The text, UTF-8.")
@click.option("--tenant", "tenants", metavar="T", multiple=True, help="Only for this tenant; repeatable. Default: all.")
@click.option("--replace", is_flag=True, help="Replace what is published under NAME.")
@json_option
@example(
    "kvasir prefix publish support --file system-prompt.txt\nkvasir prefix publish support --file s.txt --tenant acme"
)
def prefix_publish(name: str, path: Path, tenants: tuple[str, ...], replace: bool, as_json: bool) -> None:
    """Publish the text in a file as NAME: system prompts and prompts that begin with it share their cached blocks."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}; name a readable text file") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    command = am.PrefixPublish(name=name, text=text, tenants=list(tenants) or None, replace=replace)
    reply = ask(command, am.PrefixReply)
    if as_json:
        print_json(reply)
    else:
        what = "is published" if reply.changed else "was published already"
        click.echo(f"prefix {name} {what}: {_tokens(reply.prefix)}")


@prefix.command("list")
@json_option
@example("kvasir prefix list")
def prefix_list(as_json: bool) -> None:
    """List the published prefixes and how many tokens of each are shared, per model."""
    reply = ask(am.PrefixList(), am.PrefixesReply)
    if as_json:
        print_json(reply)
    elif not reply.prefixes:
        click.echo("nothing is published; publish a text with: kvasir prefix publish NAME --file FILE")
    else:
        table = Rows("prefix", "tenants", "chars", "shared tokens", "pinned on", "published", numbers=("chars",))
        for info in reply.prefixes:
            names = "all" if info.tenants is None else ", ".join(info.tenants)
            tokens, when = _tokens(info), f"{age(info.created_at)} ago"
            table.add_row(plain(info.name), plain(names), str(info.num_chars), plain(tokens), pinned_on(info), when)
        make_console().print(table)


@prefix.command("pin")
@click.argument("name")
@click.option("--worker", "workers", metavar="W", multiple=True, help="Only on this worker; repeatable. Default: all.")
@click.option("--prewarm", is_flag=True, help="Compute it now where it is pinned and not cached yet.")
@json_option
@example("kvasir prefix pin support --prewarm\nkvasir prefix pin support --worker demo-0 --worker demo-1")
def prefix_pin(name: str, workers: tuple[str, ...], prewarm: bool, as_json: bool) -> None:
    """Keep a published text's blocks on all workers, or on those named, whatever else needs room.

    It takes its blocks twice: as plain text, and as the system message of a chat. Pinning again replaces the workers
    chosen before.
    """
    reply = ask(am.PrefixPin(name=name, prewarm=prewarm, workers=list(workers) or None), am.Done)
    _print_done(reply, as_json, f"prefix {name} is pinned on {', '.join(sorted(set(workers))) or 'all workers'}")


@prefix.command("unpin")
@click.argument("name")
@json_option
@example("kvasir prefix unpin support")
def prefix_unpin(name: str, as_json: bool) -> None:
    """Let a pinned text's blocks go, on all workers, when room is needed."""
    _print_done(ask(am.PrefixPin(name=name, pinned=False), am.Done), as_json, f"prefix {name} is not pinned any more")


@prefix.command("remove")
@click.argument("name")
@json_option
@example("kvasir prefix remove support")
def prefix_remove(name: str, as_json: bool) -> None:
    """Stop sharing a published text."""
    _print_done(ask(am.PrefixRemove(name=name), am.Done), as_json, f"prefix {name} is removed")


def pinned_on(info: am.PrefixInfo | am.CachePrefix) -> str:
    """Return where a published prefix is pinned."""
    if not info.pinned:
        return "–"
    return "all workers" if info.pinned_on is None else plain(", ".join(info.pinned_on))


def _print_keys(keys: list[am.KeyInfo]) -> None:
    if not keys:
        click.echo("no keys yet; make one with: kvasir key create TENANT")
        return
    table = Rows("key id", "tenant", "label", "state", "created")
    for info in keys:
        state = "active" if info.revoked_at is None else "[red]revoked[/red]"
        table.add_row(plain(info.id), plain(info.tenant), plain(info.label), state, f"{age(info.created_at)} ago")
    make_console().print(table)


def _print_done(reply: am.Done, as_json: bool, text: str) -> None:
    if as_json:
        print_json(reply)
    else:
        click.echo(text + ("" if reply.changed else " (it was already)"))


def _tokens(info: am.PrefixInfo) -> str:
    shared = [
        f"{tokens} tokens with {model}" if tokens else f"none with {model}, shorter than a block"
        for model, tokens in sorted(info.public_tokens.items())
    ]
    return ", ".join(shared) or "no model is served yet"
