"""Incremental detokenisation: the tokens of an answer to text that stays, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvasir.gateway.text.answer_parts import overlap


class Detokenizer:
    """Token ids of one answer, a few at a time, to text that will not change any more.

    Holds back incomplete characters, and whatever could be the beginning of a stop string. `stopped` is set once a
    stop string was found; the text then ends before it and later tokens are ignored. The pushes together give exactly
    `ModelText.decode` of all ids, cut at the first stop string (after it with `keep_stop`). Text of the first
    `min_tokens` tokens is no stop string. `end_token_ids`: for its user, who does not push them.
    """

    __slots__ = (
        *("_held", "_keep_stop", "_num_free", "_rest", "_stop", "_token_bytes"),
        *("end_token_ids", "stop_string", "stopped"),
    )

    def __init__(
        self,
        token_bytes: list[bytes],
        stop: tuple[str, ...],
        end_token_ids: tuple[int, ...],
        *,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._token_bytes = token_bytes
        self.end_token_ids = end_token_ids
        self._rest = b""  # the beginning of a character
        self._stop = stop
        self._keep_stop = keep_stop
        self._num_free = min_tokens if stop else 0  # tokens still to come that end nothing
        self._held = ""
        self.stopped = False
        self.stop_string: str | None = None  # that was found

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete."""
        if self.stopped:
            return ""
        if self._num_free:
            return self._push_free(token_ids)
        token_bytes = self._token_bytes
        data = self._rest + b"".join([token_bytes[token_id] for token_id in token_ids if token_id < len(token_bytes)])
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        return self._until_stop(text) if self._stop else text

    def _push_free(self, token_ids: Sequence[int]) -> str:
        """Push tokens; a stop string in the first `_num_free` of them ends nothing."""
        stop, num_free = self._stop, self._num_free
        self._stop, self._num_free = (), 0
        text = self.push(token_ids[:num_free])
        self._stop, self._num_free = stop, max(0, num_free - len(token_ids))
        return text + (self.push(token_ids[num_free:]) if len(token_ids) > num_free else "")

    def finish(self) -> str:
        """Return what was held back: the answer ends here."""
        if self.stopped:
            return ""
        rest, self._rest = self._rest.decode("utf-8", "replace"), b""
        text = self._until_stop(rest) if self._stop else rest
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _until_stop(self, text: str) -> str:
        """Return the part of held + `text` that is sure to stay; keep the rest."""
        text = self._held + text
        # (end, begin): the stop string that is complete first ends the answer, in whatever pieces it came.
        found = [(index + len(stop), index) for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            end, begin = min(found)
            self.stop_string = text[begin:end]
            return text[: end if self._keep_stop else begin]
        num_held = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
