"""`kvasir chat`: a conversation in the terminal. `Chat` knows no terminal: messages come in, text goes out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from kvasir._answers import Completion
from kvasir.cli.demo_keys import find_key
from kvasir.cli.output import ID_CHARS, example, harmless, make_console, plain
from kvasir.client import Client
from kvasir.paths import home_dir
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, ConnectionLost, KvasirError, PromptTooLong

HELP = """\
/reset         forget the conversation
/system TEXT   start over with this system prompt; without TEXT: show it
/model NAME    go on with another model; without NAME: show those there are
/help          this
/quit          leave, as Ctrl-D does
Enter sends, Alt-Enter begins a new line, pasted lines stay one message.
Arrow up brings back what was sent. Ctrl-C stops an answer or clears the line."""


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
    """Chat with a model in the terminal.

    What comes through a pipe is one message: its answer goes to stdout, the line of figures to stderr.
    """
    if system_file is not None:
        try:
            system = system_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"cannot read {system_file} as text: {error}; name a readable UTF-8 file") from None
    key = find_key(api_key)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    message = "" if interactive else sys.stdin.read().strip()
    if not interactive and not message:
        raise BadRequest("there is no message on stdin; pipe some text in, or chat in a terminal")
    console = make_console()
    notes = make_console(stderr=not interactive)
    with Client(endpoint, key) as client:
        name, max_context = choose_model(client, model)
        talk = Chat(client, console, notes, name, system, temperature, max_tokens)
        if not interactive:
            talk.say(message)
            return
        notes.print(f"{plain(name)}, {max_context} tokens of context. /help shows the commands.", style="dim")
        talk.run(line_reader())


@dataclass(slots=True)
class Chat:
    """One conversation. `turns`: what the next request sends, but the system prompt. `notes` takes all but answers."""

    client: Client
    console: Console
    notes: Console
    model: str
    system: str = ""
    temperature: float = 0.7
    max_tokens: int = 512
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self, read: Callable[[], str]) -> None:
        """Answer message after message until `read` raises EOFError, or KeyboardInterrupt twice, or the user quits.

        Raises:
            AuthenticationFailed: the key does not work any more.
        """
        was_interrupted = False
        while True:
            try:
                message = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if was_interrupted:
                    return
                self._note("Ctrl-C again leaves")
                was_interrupted = True
                continue
            was_interrupted = False
            if message == "/quit":
                return
            try:
                if message.startswith("/"):
                    self._command(message)
                elif message:
                    self.say(message)
            except AuthenticationFailed:
                raise
            except KvasirError as error:
                hint = " Say it again when the gateway is back." if isinstance(error, ConnectionLost) else ""
                self.notes.print(Text(harmless(error.message + hint)), style="red")

    def say(self, message: str) -> None:
        """Send `message` and print the answer. A conversation that has grown too long loses its older half.

        Raises:
            KvasirError: the request failed, and the message is no part of the conversation.
        """
        self.turns.append({"role": "user", "content": message})
        while True:
            try:
                answer = self._answer()
            except PromptTooLong:
                if len(self.turns) == 1:
                    self.turns.clear()
                    raise
                num_dropped = max(2, len(self.turns) // 4 * 2)
                del self.turns[:num_dropped]
                self._note(f"too long for the model: the first {num_dropped} messages are forgotten")
            except KvasirError:
                self.turns.pop()
                raise
            else:
                self.turns.append({"role": "assistant", "content": answer})
                return

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.turns.clear()
            self._note("forgotten")
        elif name == "/system" and rest:
            self.system = rest
            self.turns.clear()
            self._note("new system prompt, conversation forgotten")
        elif name == "/system":
            self._note(self.system or "there is no system prompt")
        elif name == "/model" and rest:
            self.model, max_context = choose_model(self.client, rest)
            self._note(f"{self.model}, {max_context} tokens of context")
        elif name == "/model":
            self._note(f"{self.model}, of {', '.join(card.name for card in self.client.models())}")
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"{name} is no command; /help shows those there are")

    def _answer(self) -> str:
        """Print the answer as it comes and return it; Ctrl-C ends it where it is."""
        first_at = 0.0
        parts: list[str] = []
        messages = [{"role": "system", "content": self.system}] if self.system else []
        stream = self.client.chat(
            messages + self.turns,
            stream=True,
            model=self.model,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )
        try:
            with stream:
                for chunk in stream:
                    first_at = first_at or time.monotonic()
                    parts.append(chunk.text)
                    # What a model writes must not reach the terminal as control sequences.
                    self.console.file.write(harmless(chunk.text))
                    self.console.file.flush()
            self.console.print()
            self._note(summary(stream.result, time.monotonic() - first_at))
        except KeyboardInterrupt:
            self.console.print()
            self._note("stopped")
        return "".join(parts)

    def _note(self, text: str) -> None:
        self.notes.print(Text(harmless(text)), style="dim")


def choose_model(client: Client, wanted: str | None) -> tuple[str, int]:
    """Return (name, context in tokens) of the model to talk to: the one wanted, or the first with a worker.

    Raises:
        BadRequest: there is no such model, or none at all; names those there are.
    """
    cards = client.models()
    names = ", ".join(card.name for card in cards) or "none"
    if wanted is None:
        cards = sorted(cards, key=lambda card: card.num_workers == 0)
    else:
        cards = [card for card in cards if card.name == wanted]
    if not cards:
        raise BadRequest(f"no model {wanted or ''} is served for this key; there are: {names}".replace("  ", " "))
    return cards[0].name, cards[0].max_context


def summary(done: Completion, streaming_s: float) -> str:
    """Return one line: worker, cached and prompt tokens, TTFT, tokens/s, id. `streaming_s`: first to last token."""
    usage = done.usage
    parts = [
        done.worker or "?",
        f"{usage.cached_tokens}/{usage.prompt_tokens} prompt tokens cached",
        f"TTFT {done.ttft_s * 1000:.0f} ms",
        f"{usage.completion_tokens} tokens",
    ]
    if streaming_s > 0 and usage.completion_tokens > 1:
        parts.append(f"{(usage.completion_tokens - 1) / streaming_s:.0f}/s")
    if done.finish_reason == "length":
        parts.append("cut at --max-tokens or the window")
    return " · ".join([*parts, f"request {done.request_id[:ID_CHARS]}"])


def line_reader() -> Callable[[], str]:
    """Return what reads one message, of several lines if need be, with a history that outlives the chat."""
    from prompt_toolkit import PromptSession  # here: nobody else waits for it to load
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = home_dir() / "chat_history"
    history: History = FileHistory(str(path))
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, history=history)
    return lambda: session.prompt("\n> ", prompt_continuation="  ")
