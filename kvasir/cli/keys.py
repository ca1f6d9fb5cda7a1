"""`kvasir key`: API keys, through the admin socket, effective at once."""

from __future__ import annotations

import time
from typing import Literal

import click

from kvasir.cli.admin_client import ask
from kvasir.cli.output import Rows, age, duration, example, json_option, make_console, plain, print_done, show
from kvasir.cli.terms import parse_duration, terms_lines, terms_options
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.terms import TermsChange


@click.group()
@example("kvasir key create acme")
def key() -> None:
    """Make, list, change, rotate and revoke API keys."""


@key.command("create")
@click.argument("tenant")
@click.option("--label", metavar="TEXT", default="", help="A note to know the key by, such as who has it.")
@click.option(
    "--expires",
    "valid_s",
    metavar="TIME|none",
    type=parse_duration,
    help="It stops working after so long: 90d, 12h, 30min.",
)
@terms_options
@json_option
@example(
    'kvasir key create acme --label "nightly job"\n'
    "kvasir key create acme --label intern --expires 30d --token-budget 100k/day --max-concurrent 2"
)
def key_create(
    tenant: str, label: str, valid_s: float | Literal["none"] | None, terms: TermsChange, as_json: bool
) -> None:
    """Make an API key for TENANT and print it: the only time that it is shown.

    Its limits and budgets are its own, beside those of the tenant.
    """
    valid_s = None if valid_s == "none" else valid_s
    _print_key(ask(am.KeyCreate(tenant=tenant, label=label, valid_s=valid_s, terms=terms), am.KeyCreated), as_json)


@key.command("list")
@click.argument("tenant", required=False)
@json_option
@example("kvasir key list\nkvasir key list acme")
def key_list(tenant: str | None, as_json: bool) -> None:
    """List the keys of TENANT, or of all tenants."""
    reply = ask(am.KeyList(tenant=tenant), am.KeysReply)
    show(reply, as_json, key_table(reply.keys))


@key.command("set")
@click.argument("key_id", metavar="KEYID")
@click.option(
    "--expires",
    "valid_s",
    metavar="TIME|none",
    type=parse_duration,
    help="It stops working so long from now: 90d; none: never.",
)
@terms_options
@json_option
@example("kvasir key set 3f9a1c20b7de --requests-per-min 60 --expires 30d")
def key_set(key_id: str, valid_s: float | Literal["none"] | None, terms: TermsChange, as_json: bool) -> None:
    """Change a key's own limits and budgets, or when it expires, at once."""
    if valid_s is None and terms == TermsChange():
        raise BadRequest("say what to change, such as --requests-per-min 60 or --expires 30d; see --help")
    reply = ask(am.KeySet(key_id=key_id_of(key_id), valid_s=valid_s, terms=terms), am.Done)
    print_done(reply, as_json, f"key {key_id_of(key_id)} is set")


@key.command("rotate")
@click.argument("key_id", metavar="KEYID")
@click.option(
    "--overlap",
    "overlap_s",
    metavar="TIME|none",
    type=parse_duration,
    default="24h",
    show_default=True,
    help="How long the old one works.",
)
@json_option
@example("kvasir key rotate 3f9a1c20b7de --overlap 7d")
def key_rotate(key_id: str, overlap_s: float | Literal["none"], as_json: bool) -> None:
    """Give a key another secret and print it: the only time that it is shown. The old one works for a while.

    Its id, limits, budgets and usage stay.
    """
    command = am.KeyRotate(key_id=key_id_of(key_id), overlap_s=0.0 if overlap_s == "none" else overlap_s)
    _print_key(ask(command, am.KeyCreated), as_json)


@key.command("revoke")
@click.argument("key_id", metavar="KEYID")
@json_option
@example("kvasir key revoke 3f9a1c20b7de")
def key_revoke(key_id: str, as_json: bool) -> None:
    """Revoke a key for good: it stops working with the next request, and what it runs ends at once."""
    print_done(ask(am.KeyRevoke(key_id=key_id_of(key_id)), am.Done), as_json, f"key {key_id_of(key_id)} is revoked")


def key_table(keys: list[records.KeyInfo]) -> Rows | str:
    """Return keys as a table, or what to do when there are none."""
    if not keys:
        return "no keys yet; make one with: kvasir key create TENANT"
    table = Rows("key id", "tenant", "label", "state", "created", "limits", minor=("limits",))
    for info in keys:
        terms = ", ".join(text for _, text in terms_lines(info.terms)) or "–"
        table.add_row(
            plain(info.id), plain(info.tenant), plain(info.label), _state(info), f"{age(info.created_at)} ago", terms
        )
    return table


def _print_key(reply: am.KeyCreated, as_json: bool) -> None:
    show(reply, as_json, reply.key)
    if not as_json:
        make_console(stderr=True).print("[yellow]Keep it now: only a hash is stored, it is never shown again.[/yellow]")


def key_id_of(key: str) -> str:
    """Return a key's id. Given a whole key, only its id is sent on: the secret has no business in another process."""
    return (key.split("_")[1] if key.startswith("kv_") else key) or key


def _state(info: records.KeyInfo) -> str:
    if info.revoked_at is not None:
        return "[red]revoked[/red]"
    if info.expires_at is None:
        return "active"
    left_s = info.expires_at - time.time()
    return f"active, {duration(left_s)} left" if left_s > 0 else "[red]expired[/red]"
