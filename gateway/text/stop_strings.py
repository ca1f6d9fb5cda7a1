"""Finds which of some strings comes first in a text that comes in pieces (Knuth, Morris, Pratt 1977): a character costs
about the same whatever the strings are and whatever came before it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """`num_open`: how many characters at the end of what was pushed may yet become a string."""

    __slots__ = ("_firsts", "_matched", "_strings", "num_open")

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings`: none of them empty."""
        self._strings = [(string, _fallbacks(string)) for string in strings]
        self._firsts = {string[0] for string in strings}
        self._matched = [0] * len(strings)  # characters of each with which the text ends
        self.num_open = 0

    def push(self, text: str) -> tuple[int, int] | None:
        """Return (end, length) of the string that is complete first, the longest of several: `text[:end]` ends with it
        or with its rest. None: there is none in what was pushed so far."""
        if not self.num_open and self._firsts.isdisjoint(text):
            return None
        matched = self._matched
        for end, char in enumerate(text, 1):
            longest = 0
            for index, (string, fallbacks) in enumerate(self._strings):
                num = matched[index]
                while num and string[num] != char:
                    num = fallbacks[num]
                if string[num] == char:
                    num += 1
                    if num == len(string):
                        longest = max(longest, num)
                        num = fallbacks[num]
                matched[index] = num
            if longest:
                return end, longest
        self.num_open = max(matched)
        return None


@lru_cache(maxsize=4096)
def _fallbacks(string: str) -> tuple[int, ...]:
    """Return, for each number of matched characters, how many are matched by the longest shorter beginning."""
    found = [0, 0]
    num = 0
    for char in string[1:]:
        while num and string[num] != char:
            num = found[num]
        num += string[num] == char
        found.append(num)
    return tuple(found)
