"""`kvasir usage`, `kvasir price`, `kvasir audit` and `kvasir backup`: what was used, what it costs, who did what."""

from __future__ import annotations

import csv
import sys
import time
from datetime import date
from pathlib import Path
from typing import Literal, get_args

import click
from rich.console import Group, RenderableType
from rich.text import Text

from kvasir.cli.admin_client import ask
from kvasir.cli.keys import key_id_of
from kvasir.cli.output import Rows, count, example, json_option, percent, plain, print_done, show
from kvasir.cli.terms import money, parse_price, price_text
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.days import date_of_day, day_of_date
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.terms import MONEY_UNITS, Price

By = Literal["tenant", "key", "model", "day"]
BACKUP_TIMEOUT_S = 600.0


def parse_date(text: str) -> int:
    """Return a date as the number of days since 1 January 1970.

    Raises:
        click.BadParameter: it is none.
    """
    try:
        return day_of_date(date.fromisoformat(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no date; give one such as 2026-01-31") from None


@click.command()
@click.option("--tenant", metavar="T", help="Only of this tenant; deleted ones too.")
@click.option("--key", metavar="KEYID", help="Only of this key.")
@click.option("--by", type=click.Choice(get_args(By)), default="tenant", help="What to tell apart.")
@click.option("--since", metavar="YYYY-MM-DD", type=parse_date, help="From this day on (UTC). Default: 30 days ago.")
@click.option("--until", metavar="YYYY-MM-DD", type=parse_date, help="Until the end of this day. Default: today.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, for a spreadsheet.")
@json_option
@example("kvasir usage\nkvasir usage --tenant acme --by model --since 2026-01-01 --until 2026-01-31 --csv")
def usage(
    tenant: str | None,
    key: str | None,
    by: By,
    since: int | None,
    until: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show what tenants have used, from the ledger.

    Requests, refusals, tokens and money, as far as they are settled. A prompt counts with its first token; output
    tokens are those that clients were sent. Money goes by the price that was in force when a request came.
    """
    if as_csv and as_json:
        raise BadRequest("--csv and --json do not go together; choose one")
    key = None if key is None else key_id_of(key)
    reply = ask(am.UsageQuery(by=by, tenant=tenant, key=key, first_day=since, last_day=until), am.UsageReply)
    if as_csv:
        _print_csv(reply.rows, by)
    else:
        show(reply, as_json, _usage(reply, by))


def _print_csv(rows: list[records.UsageRow], by: str) -> None:
    names = ["tenant", *([by] if by != "tenant" else []), *records.UsageRow.__struct_fields__[4:-1]]
    writer = csv.writer(sys.stdout)
    writer.writerow([*names, "money"])
    for row in rows:
        writer.writerow(
            [*(getattr(row, name) for name in names), f"{row.cost / MONEY_UNITS:.10f}".rstrip("0").rstrip(".")]
        )


def _usage(reply: am.UsageReply, by: str) -> RenderableType:
    span = f"{date_of_day(reply.first_day)} to {date_of_day(reply.last_day)}"
    if not reply.rows:
        return f"nothing was used from {span}"
    numbers = ("requests", "refused", "prompt", "cached", "output", "money")
    first = ("tenant",) if by == "tenant" else ("tenant", by)
    table = Rows(*first, *numbers, numbers=numbers, minor=("refused",))
    for row in reply.rows:
        table.add_row(*(plain(getattr(row, name)) for name in first), *_cells(row))
    if len(reply.rows) > 1:
        total = records.UsageRow("all")
        for row in reply.rows:
            for name in records.UsageRow.__struct_fields__[4:]:
                setattr(total, name, getattr(total, name) + getattr(row, name))
        table.add_row("all", *[""] * (len(first) - 1), *_cells(total), style="bold")
    return Group(Text(f"{span}, UTC", "dim"), table)


def _cells(row: records.UsageRow) -> tuple[str, ...]:
    return (
        str(row.num_requests),
        str(row.num_refused),
        count(row.prompt_tokens),
        percent(row.cached_tokens, row.prompt_tokens),
        count(row.output_tokens),
        money(row.cost),
    )


@click.group()
@example("kvasir price set qwen --prompt 0.25 --cached 0.025 --output 1.00")
def price() -> None:
    """Set what models cost."""


@price.command("set")
@click.argument("model")
@click.option(
    "--prompt", metavar="PRICE", type=parse_price, required=True, help="Of a million prompt tokens that were computed."
)
@click.option(
    "--cached", metavar="PRICE", type=parse_price, help="Of a million that were found in a cache. Default: as --prompt."
)
@click.option("--output", metavar="PRICE", type=parse_price, required=True, help="Of a million output tokens.")
@json_option
@example("kvasir price set qwen --prompt 0.25 --cached 0.025 --output 1.00")
def price_set(model: str, prompt: int, cached: int | None, output: int, as_json: bool) -> None:
    """Set what a million tokens of MODEL cost from now on, in the currency that you count in."""
    values = Price(prompt, prompt if cached is None else cached, output)
    print_done(ask(am.PriceSet(model=model, price=values), am.Done), as_json, f"model {model} has its price")


@price.command("remove")
@click.argument("model")
@json_option
@example("kvasir price remove qwen")
def price_remove(model: str, as_json: bool) -> None:
    """Let MODEL cost nothing from now on."""
    print_done(ask(am.PriceSet(model=model, price=None), am.Done), as_json, f"model {model} costs nothing now")


@price.command("list")
@json_option
@example("kvasir price list")
def price_list(as_json: bool) -> None:
    """List what a million tokens of each model cost."""
    reply = ask(am.PriceList(), am.PricesReply)
    numbers = ("prompt", "cached", "output")
    table = Rows("model", *numbers, numbers=numbers)
    for info in reply.prices:
        table.add_row(plain(info.model), *(price_text(getattr(info.price, name)) for name in numbers))
    nothing = "no model has a price; set one with: kvasir price set MODEL --prompt P --output P"
    show(reply, as_json, table if reply.prices else nothing)


@click.group()
@example("kvasir audit log")
def audit() -> None:
    """Show and check what operators changed."""


@audit.command("log")
@click.option("--last", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many.")
@json_option
@example("kvasir audit log --last 5\nkvasir audit log --last 1000 --json | jq '.rows[].command'")
def audit_log(last: int, as_json: bool) -> None:
    """Show the last changes, oldest first: who did what to whom. With --json also how it was before and after."""
    reply = ask(am.AuditQuery(last=last), am.AuditReply)
    table = Rows("no.", "time", "command", "subject", "by", numbers=("no.",), minor=("by",))
    for row in reply.rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.time))
        table.add_row(str(row.seq), when, plain(row.command), plain(row.subject), plain(row.actor))
    show(reply, as_json, table if reply.rows else "nothing was changed yet")


@audit.command("verify")
@json_option
@example("kvasir audit verify")
def audit_verify(as_json: bool) -> None:
    """Check that no row of the trail was changed, put in or taken out. Each row's digest covers the one before it.

    Rows cut off its end are noticed by their number only: keep it elsewhere.
    """
    reply = ask(am.AuditVerify(), am.AuditVerified)
    show(reply, as_json, f"the audit trail is whole: {reply.num_rows} rows")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@example("kvasir backup /var/backups/kvasir-monday")
def backup(folder: Path, as_json: bool) -> None:
    """Copy what the gateway keeps into FOLDER.

    Tenants, keys, ledger, audit trail and the deployment's secret, while it runs. FOLDER is made; it is a state
    directory that a gateway can be started on. Keep it as safe as the one in use: with its secret and a key's hash,
    keys can be tested.
    """
    command = am.Backup(folder=str(folder.resolve()))
    print_done(ask(command, am.Done, timeout_s=BACKUP_TIMEOUT_S), as_json, f"everything is in {folder}")
