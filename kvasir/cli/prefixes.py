"""`kvasir prefix`: published texts, through the admin socket, effective at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvasir.cli.admin_client import ask
from kvasir.cli.output import Rows, age, example, json_option, plain, print_done, show
from kvasir.protocol import admin_messages as am
from kvasir.protocol import admin_records as records
from kvasir.protocol.errors import BadRequest


@click.group()
@example("kvasir prefix publish support --file system-prompt.txt")
def prefix() -> None:
    """Publish texts that tenants share."""


@prefix.command("publish")
@click.argument("name")
@click.option("--file", "path", type=click.Path(path_type=Path), required=True, help="The text, UTF-8; - is stdin.")
@click.option("--tenant", "tenants", metavar="T", multiple=True, help="Only for this tenant; repeatable. Default: all.")
@click.option("--replace", is_flag=True, help="Replace what is published under NAME.")
@json_option
@example(
    "kvasir prefix publish support --file system-prompt.txt\nkvasir prefix publish support --file s.txt --tenant acme"
)
def prefix_publish(name: str, path: Path, tenants: tuple[str, ...], replace: bool, as_json: bool) -> None:
    """Publish the text in a file as NAME: system prompts and prompts that begin with it share their cached blocks."""
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode()
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}; name a readable text file") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    command = am.PrefixPublish(name=name, text=text, tenants=list(tenants) or None, replace=replace)
    reply = ask(command, am.PrefixReply)
    what = "is published" if reply.changed else "was published already"
    show(reply, as_json, f"prefix {name} {what}: {_tokens(reply.prefix)}")


@prefix.command("list")
@json_option
@example("kvasir prefix list")
def prefix_list(as_json: bool) -> None:
    """List the published prefixes and how many tokens of each are shared, per model."""
    reply = ask(am.PrefixList(), am.PrefixesReply)
    table = Rows("prefix", "tenants", "chars", "shared tokens", "pinned on", "published", numbers=("chars",))
    for info in reply.prefixes:
        names = "all" if info.tenants is None else ", ".join(info.tenants)
        tokens, when = _tokens(info), f"{age(info.created_at)} ago"
        table.add_row(plain(info.name), plain(names), str(info.num_chars), plain(tokens), pinned_on(info), when)
    nothing = "nothing is published; publish a text with: kvasir prefix publish NAME --file FILE"
    show(reply, as_json, table if reply.prefixes else nothing)


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
    print_done(reply, as_json, f"prefix {name} is pinned on {', '.join(sorted(set(workers))) or 'all workers'}")


@prefix.command("unpin")
@click.argument("name")
@json_option
@example("kvasir prefix unpin support")
def prefix_unpin(name: str, as_json: bool) -> None:
    """Let a pinned text's blocks go, on all workers, when room is needed."""
    print_done(ask(am.PrefixPin(name=name, pinned=False), am.Done), as_json, f"prefix {name} is not pinned any more")


@prefix.command("remove")
@click.argument("name")
@json_option
@example("kvasir prefix remove support")
def prefix_remove(name: str, as_json: bool) -> None:
    """Stop sharing a published text."""
    print_done(ask(am.PrefixRemove(name=name), am.Done), as_json, f"prefix {name} is removed")


def pinned_on(info: records.PrefixInfo | records.CachePrefix) -> str:
    """Return where a published prefix is pinned."""
    if not info.pinned:
        return "–"
    return "all workers" if info.pinned_on is None else plain(", ".join(info.pinned_on))


def _tokens(info: records.PrefixInfo) -> str:
    shared = [
        f"{tokens} tokens with {model}" if tokens else f"none with {model}, shorter than a block"
        for model, tokens in sorted(info.public_tokens.items())
    ]
    return ", ".join(shared) or "no model is served yet"
