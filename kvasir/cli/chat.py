"""`kvasir chat`: a conversation in the terminal. The loop knows no terminal: lines come in, text goes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from kvasir._session import Completion
from kvasir.cli.output import harmless
from kvasir.client import Client
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, ConnectionLost, KvasirError, PromptTooLong

HELP = """/reset         forget the conversation
/system TEXT   set the system prompt and forget the conversation; without TEXT: show it
/help          this
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(slots=True)
class Chat:
    """One conversation. `turns` is what the next request sends, the system prompt apart."""

    client: Client
    console: Console
    model: str
    system: str = ""
    temperature: float = 0.7
    max_tokens: int = 512
    interactive: bool = True
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self, read_line: Callable[[], str]) -> None:
        """Answer line after line until `read_line` raises EOFError or the user quits.

        Raises:
            KeyboardInterrupt: Ctrl-C at the prompt.
            KvasirError: a request failed and nobody is there to go on (not `interactive`).
        """
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.turns.clear()
            self._note("forgotten")
        elif name == "/system" and rest.strip():
            self.system = rest.strip()
            self.turns.clear()
            self._note("new system prompt, conversation forgotten")
        elif name == "/system":
            self._note(self.system or "there is no system prompt")
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"{name} is no command; /help shows those there are")

    def _turn(self, line: str) -> None:
        self.turns.append({"role": "user", "content": line})
        try:
            answer = self._answer()
        except KvasirError as error:
            self.turns.pop()
            if not self.interactive or isinstance(error, AuthenticationFailed):
                raise
            hint = " /reset starts over." if isinstance(error, PromptTooLong) else ""
            hint = " Say it again when the gateway is back." if isinstance(error, ConnectionLost) else hint
            self.console.print(Text(harmless(error.message + hint)), style="red")
        else:
            self.turns.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        """Print the answer as it comes and return it; Ctrl-C ends it where it is."""
        first_at = 0.0
        pieces: list[str] = []
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
                    pieces.append(chunk.text)
                    # What a model writes must not reach the terminal as control sequences.
                    self.console.file.write(harmless(chunk.text))
                    self.console.file.flush()
            self.console.print()
            self._note(summary(stream.result, time.monotonic() - first_at))
        except KeyboardInterrupt:
            self.console.print()
            self._note("stopped")
        return "".join(pieces)

    def _note(self, text: str) -> None:
        self.console.print(Text(harmless(text)), style="dim")


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
    """Return one line: worker, cached and prompt tokens, TTFT, tokens/s. `streaming_s`: first to last token."""
    usage = done.usage
    parts = [
        done.worker or "?",
        f"{usage.cached_tokens}/{usage.prompt_tokens} prompt tokens cached",
        f"first token {done.ttft_s * 1000:.0f} ms",
        f"{usage.completion_tokens} tokens",
    ]
    if streaming_s > 0 and usage.completion_tokens > 1:
        parts.append(f"{(usage.completion_tokens - 1) / streaming_s:.0f} tokens/s")
    if done.finish_reason == "length":
        parts.append("cut at --max-tokens or the window")
    return " · ".join(parts)
