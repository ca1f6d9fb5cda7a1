"""`kvasir chat` and `kvasir demo`: what speaks to a model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvasir.cli.chat import Chat, choose_model
from kvasir.cli.demo_keys import find_key
from kvasir.cli.output import example, json_option, make_console, plain, print_json
from kvasir.client import Client
from kvasir.protocol.errors import BadRequest


@click.command()
@click.option("--model", help="Which model. Default: the first that is served.")
@click.option("--system", default="", metavar="TEXT", help="A system prompt.")
@click.option(
    "--system-file", type=click.Path(path_type=Path), help="A system prompt from a file, such as a published one."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.7, show_default=True, help="0: always the likeliest."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer, in tokens."
)
@click.option("--endpoint", metavar="ENDPOINT", help="Where the gateway is. Default: this user's, or $KVASIR_ENDPOINT.")
@click.option("--api-key", metavar="KEY", help="Default: $KVASIR_API_KEY, else the demonstration tenant's.")
@example('kvasir chat\nkvasir chat --model qwen --system "Answer in one sentence."\necho "Hello!" | kvasir chat')
def chat(
    model: str | None,
    system: str,
    system_file: Path | None,
    temperature: float,
    max_tokens: int,
    endpoint: str | None,
    api_key: str | None,
) -> None:
    """Chat with a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands."""
    if system_file is not None:
        try:
            system = system_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"cannot read {system_file} as text: {error}; name a readable UTF-8 file") from None
    console = make_console()
    interactive = sys.stdin.isatty()
    with Client(endpoint, find_key(api_key)) as client:
        name, max_context = choose_model(client, model)
        talk = Chat(client, console, name, system, temperature, max_tokens, interactive)
        if interactive:
            import readline  # noqa: F401  # line editing and history for input()

            console.print(f"[dim]{plain(name)}, {max_context} tokens of context. /help shows the commands.[/dim]")
        talk.run(lambda: input("\n> ") if interactive else input())
    if interactive:
        click.echo()


@click.command()
@click.option("--model", help="Which model. Default: the first that is served.")
@json_option
@example("kvasir demo")
def demo(model: str | None, as_json: bool) -> None:
    """Show cold against warm, and shared against private, with six requests of two tenants."""
    from kvasir.cli import demo as demonstration

    rows = demonstration.run_demo(make_console(), model=model, quiet=as_json)
    if as_json:
        print_json(demonstration.as_json(rows))
