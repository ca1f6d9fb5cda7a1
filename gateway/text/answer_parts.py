"""What the text of an answer consists of: content, reasoning, and calls of tools, each as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks aloud before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number `index` of the answer begins; its arguments follow."""

    index: int
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call number `index`: JSON, as the model writes it."""

    index: int
    text: str


Part = Content | Reasoning | CallBegin | CallArguments


def joined(parts: Sequence[Part]) -> list[Part]:
    """Return `parts` with neighbours that belong together in one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        match last, part:
            case (Content(before), Content(text)):
                found[-1] = Content(before + text)
            case (Reasoning(before), Reasoning(text)):
                found[-1] = Reasoning(before + text)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                found[-1] = CallArguments(index, before + text)
            case _:
                found.append(part)
    return found


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `mark`, shorter than it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
