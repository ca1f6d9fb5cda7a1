"""The parts of an answer's text as it comes: what belongs together, and what may yet become a mark."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.protocol.client_messages import AnswerPart, ReasoningPart, TextPart, ToolCallPart

MAX_SPACE = (
    4096  # characters of white space that are held back while they may be no content: to look at more would cost
)


def joined(parts: Sequence[AnswerPart]) -> list[AnswerPart]:
    """Return `parts` with neighbours that belong together in one. The beginning of a call stays by itself."""
    found: list[AnswerPart] = []
    for part in parts:
        last = found[-1] if found else None
        match last, part:
            case (TextPart(before), TextPart(text)):
                found[-1] = TextPart(before + text)
            case (ReasoningPart(before), ReasoningPart(text)):
                found[-1] = ReasoningPart(before + text)
            case (ToolCallPart(index, "", "", before), ToolCallPart(same, "", "", text)) if index == same:
                found[-1] = ToolCallPart(index, arguments=before + text)
            case _:
                found.append(part)
    return found


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `mark`, shorter than it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
