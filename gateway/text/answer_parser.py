"""The parser of an answer: reasoning first, then content and calls of tools; and which kinds a model writes.

The kinds are found from the model's chat template, which shows the model how to write them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.gateway.text.answer_parts import MAX_SPACE, overlap
from kvasir.gateway.text.tool_calls import HermesParser, LlamaParser, MistralParser, ToolParser
from kvasir.gateway.text.tool_calls_xml import QwenCoderParser
from kvasir.protocol.client_messages import AnswerPart, ReasoningPart, TextPart

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen3_coder": QwenCoderParser,
    "llama3": LlamaParser,
    "mistral": MistralParser,
}
REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes reasoning and calls of tools; None: not at all, or in a way that is not known here."""

    reasoning: tuple[str, str] | None = None
    tools: type[ToolParser] | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that the parser must see."""
        return (*(self.reasoning or ()), *(self.tools.marks if self.tools else ()))


def find_format(template: str, tool_parser: str = "auto") -> AnswerFormat:
    """Return the format that a chat template shows. `tool_parser`: a name of `TOOL_PARSERS`, "none", or "auto"."""
    reasoning = next((marks for marks in REASONING_MARKS if marks[1] in template), None)
    name = _find_tools(template) if tool_parser == "auto" else tool_parser
    return AnswerFormat(reasoning, TOOL_PARSERS.get(name))


def _find_tools(template: str) -> str:
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "arguments" in template and "<arg_key>" not in template:
        return "hermes"
    if "<|start_header_id|>" in template and ("<|python_tag|>" in template or '"parameters": ' in template):
        return "llama3"
    return "none"


class ReasoningParser:
    """Splits text at the end of the reasoning. `is_open`: it has begun in the prompt; else it may begin the answer."""

    def __init__(self, start: str, end: str, *, is_open: bool) -> None:
        self.start, self.end = start, end
        self.is_inside = is_open
        self._is_over = False
        self._buffer = ""

    def push(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the content that `text` completes."""
        if self._is_over:
            return "", text
        self._buffer += text
        if not self.is_inside:
            stripped = self._buffer.lstrip()
            if len(self._buffer) - len(stripped) > MAX_SPACE:
                return "", self._end()
            if not stripped.startswith(self.start):
                return "", ("" if self.start.startswith(stripped) else self._end())
            self._buffer = stripped[len(self.start) :]
            self.is_inside = True
        reasoning, mark, after = self._buffer.partition(self.end)
        if mark:
            self._buffer = after
            return reasoning, self._end()
        num_held = overlap(self._buffer, self.end)
        self._buffer = self._buffer[len(self._buffer) - num_held :]
        return reasoning[: len(reasoning) - num_held], ""

    def finish(self) -> tuple[str, str]:
        """Return what was held back: the answer ends here."""
        is_inside = self.is_inside
        rest = self._end()
        return (rest, "") if is_inside else ("", rest)

    def _end(self) -> str:
        self._is_over, self.is_inside = True, False
        rest, self._buffer = self._buffer, ""
        return rest


class AnswerParser:
    """Turns the text of an answer, as it comes, into its parts: the same for every way to cut the text into pieces."""

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, keep_reasoning: bool = True
    ) -> None:
        """`keep_reasoning` false: it is told apart and left out."""
        self._reasoning, self._tools = reasoning, tools
        self._keep_reasoning = keep_reasoning

    @property
    def is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def is_over(self) -> bool:
        """Whether nothing that may follow is wanted."""
        return self._tools is not None and self._tools.is_over

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that `text` completes."""
        return self._add(*(("", text) if self._reasoning is None else self._reasoning.push(text)))

    def finish(self) -> list[AnswerPart]:
        """Return what was held back: the answer ends here."""
        parts = self._add(*(("", "") if self._reasoning is None else self._reasoning.finish()))
        return parts if self._tools is None else parts + self._tools.finish()

    def _add(self, reasoning: str, text: str) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        if reasoning and self._keep_reasoning:
            parts.append(ReasoningPart(reasoning))
        if self._tools is not None:
            parts += self._tools.push(text)
        elif text:
            parts.append(TextPart(text))
        return parts
