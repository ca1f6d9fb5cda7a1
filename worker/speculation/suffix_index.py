"""Where in a text its last tokens stood before: what followed them there is likely to follow again.

A hash chain as LZ77 has it (deflate, RFC 1951): every position is linked to the one before it with the same hash of its
last two tokens. 16 bytes and less than a microsecond per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

MAX_MATCH = 32  # tokens compared: longer matches are as good as this one
MAX_LOOKS = 8  # of the positions with the same two tokens, the last ones
BREAK = 0xFFFFFFFF  # no token: nothing matches across it


class SuffixIndex:
    """A text that grows, and where any two tokens stand in it. Made for `num_expected` tokens: with many more its
    chains get long, and matches are missed."""

    __slots__ = ("_heads", "_links", "_mask", "tokens")

    def __init__(self, num_expected: int) -> None:
        size = 1 << max(8, (num_expected - 1).bit_length())
        self._mask = size - 1
        self._heads = array("i", [-1]) * size  # by hash: the last position
        self._links = array("i")  # by position: the one before with the same hash
        self.tokens = array("I")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size_bytes(self) -> int:
        return 4 * len(self._heads) + 8 * len(self.tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append `token_ids`."""
        tokens, links, heads, mask = self.tokens, self._links, self._heads, self._mask
        before = tokens[-1] if tokens else BREAK
        for position, token in enumerate(token_ids, len(tokens)):
            slot = (before * 0x9E3779B1 ^ token) & mask
            links.append(heads[slot])
            heads[slot] = position
            before = token
        tokens.extend(token_ids)

    def find(self, suffix: Sequence[int]) -> tuple[int, int]:
        """Return (position, length): the position behind the longest match of the end of `suffix` that something
        follows, the last such, and how many tokens match, `MAX_MATCH` at most. (0, 0): not even two tokens match.

        `suffix` may be the end of this very text, which is no match of itself, since nothing follows it.
        """
        if len(suffix) < 2:
            return 0, 0
        tokens, links = self.tokens, self._links
        last, before = suffix[-1], suffix[-2]
        position = self._heads[(before * 0x9E3779B1 ^ last) & self._mask]
        end = len(tokens) - 1
        best = longest = 0
        for _ in range(MAX_LOOKS):
            if position < 1:
                break
            if position < end and tokens[position] == last and tokens[position - 1] == before:
                length, limit = 2, min(len(suffix), position + 1, MAX_MATCH)
                while length < limit and tokens[position - length] == suffix[-1 - length]:
                    length += 1
                if length > longest and tokens[position + 1] != BREAK:
                    best, longest = position + 1, length
                    if length == MAX_MATCH:
                        break
            position = links[position]
        return best, longest
